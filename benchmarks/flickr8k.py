"""Reproduces the results on Flickr8k, from the images to the scores on dev, with the shipped recipes.

    make bench-flickr8k DATA=flickr8k WEIGHTS=vgg16.safetensors
    make bench-flickr8k DATA=flickr8k WEIGHTS=vgg16.safetensors NAME="pooled ranking"
    make bench-flickr8k DATA=flickr8k WEIGHTS=vgg16.safetensors NAME=attention SEEDS=3

DATA contains `images/`, `Flickr8k.token.txt` and the official split files. WEIGHTS is a file with VGG-16's weights, or
one of torchvision's names. All output is kept in `--output` (default `.bench/flickr8k`). Finished steps are
skipped, and interrupted steps resume. Each result is printed as `NAME VALUE BAR ok|short`. With several seeds, the
value is the mean, and a line that starts with `#` gives the standard deviation and the value of each seed. The exit
status is zero if all bars are met.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.bars import report, run_benchmark

CONV5, POOL4 = "flickr8k-conv5", "flickr8k-pool4"
POOL4_DEV = f"{POOL4}-dev"  # only the images to caption; training uses the features of all splits


class Stage(NamedTuple):
    """A training run of a captioner.

    Attributes:
        recipe: name of a recipe (built-in configuration) of train-captioner.
        init_from: stage whose captioner initializes this one. If None, the weights are random, except for the encoder
            layers.
        overrides: values for `--set`.
    """

    recipe: str
    init_from: str | None
    overrides: tuple[str, ...] = ()


STAGES = {
    "pooled-bag-of-words": Stage("flickr8k-bag-of-words", None, ("captioner.attention_size=0",)),
    "pooled": Stage("flickr8k-pooled", "pooled-bag-of-words"),
    "attention-bag-of-words": Stage("flickr8k-bag-of-words", None),
    "attention": Stage("flickr8k-attention", "attention-bag-of-words"),
    "self-critical": Stage("flickr8k-self-critical", "attention"),
    "transformer-bag-of-words": Stage(
        "flickr8k-transformer",
        None,
        ("objective=bag_of_words", "label_smoothing=0", "best_by=perplexity", "training.epochs=10"),
    ),
    "transformer": Stage("flickr8k-transformer", "transformer-bag-of-words"),
}
CAPTIONERS = {
    "pooled": {"BLEU-1": 0.63, "BLEU-2": 0.45, "BLEU-3": 0.31, "BLEU-4": 0.21, "CIDEr": 0.50},
    "attention": {"BLEU-1": 0.65, "BLEU-2": 0.47, "BLEU-3": 0.33, "BLEU-4": 0.22, "CIDEr": 0.55},
    "self-critical": {"CIDEr": 0.62},
    "transformer": {"CIDEr": 0.55},
}
PARTS = [*CAPTIONERS, "ranking", "talk"]
RANKS = {
    "image_to_text": {"recall_at_1": 0.22, "recall_at_5": 0.49, "recall_at_10": 0.62, "median_rank": 6},
    "text_to_image": {"recall_at_1": 0.16, "recall_at_5": 0.40, "recall_at_10": 0.54, "median_rank": 9},
}
RNN_TO_LSTM = 1.33  # validation perplexity of talk-rnn ÷ that of talk-lstm

Row = tuple[str, float, float, bool]  # name, value, bar, and whether the bar is a minimum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("weights", metavar="WEIGHTS")
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help=f"parts to run: any of {', '.join(PARTS)}; all by default"
    )
    parser.add_argument("--output", type=Path, default=Path(".bench/flickr8k"))
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train each model with the seeds 0 to N - 1")
    options = parser.parse_args()
    names: list[str] = options.names or PARTS
    if unknown := [name for name in names if name not in PARTS]:
        sys.exit(f"unknown part {', '.join(unknown)}; available: {', '.join(PARTS)}")
    if not (options.data / "Flickr8k.token.txt").exists():
        sys.exit(f"{options.data}: expected a folder with images/, Flickr8k.token.txt and the split files")
    options.output.mkdir(parents=True, exist_ok=True)
    _extract_features(options.data, options.output, options.weights, names)
    for name in names:
        runs = [_score(name, options.output, options.weights, seed) for seed in range(options.seeds)]
        for rows in zip(*runs, strict=True):
            _report_seeds(rows)


def _score(name: str, output: Path, weights: str, seed: int) -> list[Row]:
    if name == "talk":
        return _compare_talk_captioners(output, seed)
    return _score_ranker(output, seed) if name == "ranking" else _score_captioner(name, output, weights, seed)


def _report_seeds(rows: Sequence[Row]) -> None:
    """Reports the mean of one result over the seeds, and the spread if there are several."""
    name, _, bar, at_least = rows[0]
    values = [value for _, value, _, _ in rows]
    if len(values) > 1:
        spread, each = statistics.stdev(values), ", ".join(f"{value:.3f}" for value in values)
        print(f"# flickr8k-{name}: standard deviation {spread:.3f} over {len(values)} seeds ({each})")
    report(f"flickr8k-{name}", statistics.mean(values), bar, at_least)


def _add_seed(name: str, seed: int) -> str:
    return f"{name}-seed-{seed}" if seed else name


def _extract_features(data: Path, output: Path, weights: str, names: Sequence[str]) -> None:
    manifest, dev = output / "manifest", output / "manifest-dev"
    source: list[str | Path] = [data / "Flickr8k.token.txt", "--images", data / "images"]
    _run("prepare", *source, "-o", manifest)
    extractions = [(CONV5, manifest, CONV5)] if {"ranking", "talk"} & set(names) else []
    if set(CAPTIONERS) & set(names):
        _run("prepare", *source, "-o", dev, "--split", "dev")
        extractions += [(POOL4, manifest, POOL4), (POOL4_DEV, dev, POOL4)]
    for name, images, recipe in extractions:
        _run("extract-features", images, "-o", output / name, "--config", recipe, "--weights", weights)


def _train_captioner(name: str, output: Path, weights: str, seed: int) -> Path:
    stage, captioner = STAGES[name], output / _add_seed(f"captioner-{name}", seed)
    overrides = (*stage.overrides, f"training.seed={seed}")
    options: list[str | Path] = [word for override in overrides for word in ("--set", override)]
    if stage.init_from is not None:
        options += ["--init-from", _train_captioner(stage.init_from, output, weights, seed)]
    elif Path(weights).exists():
        options += ["--weights", weights]
    _run("train-captioner", output / POOL4, "-o", captioner, "--config", stage.recipe, *options)
    return captioner


def _score_captioner(name: str, output: Path, weights: str, seed: int) -> list[Row]:
    captioner = _train_captioner(name, output, weights, seed)
    features = output / POOL4_DEV
    captions, scores = (output / _add_seed(f"{kind}-{name}", seed) for kind in ("captions", "scores"))
    _run("build-datastore", output / POOL4, "-c", captioner, "--set", "splits=[train]")
    _run("generate-captions", features, "-c", captioner, "-o", captions, "--config", "flickr8k")
    manifest = output / "manifest"  # all splits, because evaluate also counts captions that occur in the training split
    _run("evaluate", captions, "-m", manifest, "--split", "dev", "-c", captioner, "-f", features, "-o", scores)
    values = json.loads((scores / "scores.json").read_text())["scores"]
    return [(f"{name}-{metric}", values[metric], bar, True) for metric, bar in CAPTIONERS[name].items()]


def _compare_talk_captioners(output: Path, seed: int) -> list[Row]:
    """Trains the talk's RNN and LSTM on the same features and compares their perplexities on dev."""
    rows = []
    for layers in (1, 2):
        perplexities = []
        for recipe in ("talk-rnn", "talk-lstm"):
            captioner = output / _add_seed(f"captioner-{recipe}-{layers}", seed)
            overrides = ["--set", f"captioner.layers={layers}", "--set", f"training.seed={seed}"]
            _run("train-captioner", output / CONV5, "-o", captioner, "--config", recipe, *overrides)
            epochs = map(json.loads, (captioner / "metrics.jsonl").read_text().splitlines())
            perplexities.append(min(epoch["perplexity"] for epoch in epochs))
            print(f"# {captioner.name}: perplexity {perplexities[-1]:.2f}")
        rows.append((f"talk-rnn-to-lstm-{layers}-layer", perplexities[0] / perplexities[1], RNN_TO_LSTM, False))
    return rows


def _score_ranker(output: Path, seed: int) -> list[Row]:
    """Trains a ranker (dual encoder for image-text retrieval) and ranks the 1,000 images of dev."""
    features = output / CONV5
    ranker, scores = (output / _add_seed(name, seed) for name in ("ranker", "scores-ranking"))
    _run("train-ranker", features, "-o", ranker, "--config", "flickr8k", "--set", f"training.seed={seed}")
    _run("evaluate", features, "-r", ranker, "--split", "dev", "--protocol", "flickr8k-1k", "-o", scores)
    values = json.loads((scores / "scores.json").read_text())
    return [
        (f"{direction}-{metric}".replace("_", "-"), values[direction][metric], bar, metric != "median_rank")
        for direction, bars in RANKS.items()
        for metric, bar in bars.items()
    ]


def _run(*words: str | Path) -> None:
    command = ["captionlib", *map(str, words)]
    print(f"# {shlex.join(command)}", flush=True)
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-m", "captionlib", *command[1:]], check=False, stdout=sys.stderr)
    if result.returncode:
        sys.exit(result.returncode)
    print(f"#   {(time.monotonic() - began) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    run_benchmark(main)
