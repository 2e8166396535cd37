"""Flickr8k from the photographs to the table: the shipped recipes, run as anyone would run them, scored on dev.

    make bench-flickr8k DATA=flickr8k WEIGHTS=vgg16.safetensors
    make bench-flickr8k DATA=flickr8k WEIGHTS=vgg16.safetensors NAME="pooled ranking"

DATA holds `images/`, `Flickr8k.token.txt` and the official split files; WEIGHTS is a file of VGG-16's weights, or a
name of torchvision's. Everything is kept in OUTPUT (`.bench/flickr8k`): what is done is skipped, and what was stopped
goes on. Each line of the table is `NAME VALUE BAR ok|short`; the exit status says whether all bars are met.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.bars import report

CONV5, POOL4 = "flickr8k-conv5", "flickr8k-pool4"  # recipes of extract-features, and the folders of their features
DEV = f"{POOL4}-dev"  # the images to caption; training reads dev from POOL4


class Stage(NamedTuple):
    """A stage in the training of a captioner.

    Attributes:
        recipe: the recipe of train-captioner.
        init_from: the stage to start from; None starts from the encoder's weights.
        overrides: values that replace those of the recipe.
    """

    recipe: str
    init_from: str | None
    overrides: tuple[str, ...] = ()


STAGES = {
    "pooled-words": Stage("flickr8k-bag-of-words", None, ("captioner.attention_size=0",)),
    "pooled": Stage("flickr8k-pooled", "pooled-words"),
    "attention-words": Stage("flickr8k-bag-of-words", None),
    "attention": Stage("flickr8k-attention", "attention-words"),
    "self-critical": Stage("flickr8k-self-critical", "attention"),
}
CAPTIONERS = {
    "pooled": {"BLEU-1": 0.63, "BLEU-2": 0.45, "BLEU-3": 0.31, "BLEU-4": 0.21, "CIDEr": 0.50},
    "attention": {"BLEU-1": 0.65, "BLEU-2": 0.47, "BLEU-3": 0.33, "BLEU-4": 0.22, "CIDEr": 0.55},
    "self-critical": {"CIDEr": 0.62},
}
PARTS = [*CAPTIONERS, "ranking"]
RANKS = {
    "image_to_text": {"recall_at_1": 0.22, "recall_at_5": 0.49, "recall_at_10": 0.62, "median_rank": 6},
    "text_to_image": {"recall_at_1": 0.16, "recall_at_5": 0.40, "recall_at_10": 0.54, "median_rank": 9},
}

Row = tuple[str, float, float, bool]  # of the table: what, its value, its bar, and whether it is to be at least the bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("weights", metavar="WEIGHTS")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--output", type=Path, default=Path(".bench/flickr8k"))
    options = parser.parse_args()
    names: list[str] = options.names or PARTS
    if unknown := [name for name in names if name not in PARTS]:
        sys.exit(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    tokens = options.data / "Flickr8k.token.txt"
    if not tokens.exists():
        sys.exit(f"{tokens} does not exist; DATA is the folder of images/, Flickr8k.token.txt and the split files")
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    manifest, dev = output / "manifest", output / "manifest-dev"
    _run("prepare", tokens, "--images", options.data / "images", "-o", manifest)
    needed = {CONV5: (manifest, CONV5)} if "ranking" in names else {}
    if names != ["ranking"]:
        _run("prepare", tokens, "--images", options.data / "images", "-o", dev, "--split", "dev")
        needed |= {POOL4: (manifest, POOL4), DEV: (dev, POOL4)}
    for name, (images, recipe) in needed.items():
        _run("extract-features", images, "-o", output / name, "--config", recipe, "--weights", options.weights)
    rows: list[Row] = []
    for name in names:
        rows += _score_ranker(output) if name == "ranking" else _score_captioner(name, output, options.weights)
    met = [report(f"flickr8k-{name}", value, bar, at_least) for name, value, bar, at_least in rows]
    sys.exit(not all(met))


def _train_captioner(name: str, output: Path, weights: str) -> Path:
    """Trains a captioner after the stage that it starts from."""
    stage, captioner = STAGES[name], output / f"captioner-{name}"
    arguments: list[str | Path] = [word for override in stage.overrides for word in ("--set", override)]
    if stage.init_from is not None:
        arguments += ["--init-from", _train_captioner(stage.init_from, output, weights)]
    elif Path(weights).exists():
        arguments += ["--weights", weights]
    _run("train-captioner", output / POOL4, "-o", captioner, "--config", stage.recipe, *arguments)
    return captioner


def _score_captioner(name: str, output: Path, weights: str) -> list[Row]:
    """Trains a captioner and scores its captions of dev."""
    captioner = _train_captioner(name, output, weights)
    features, captions, scores = output / DEV, output / f"captions-{name}", output / f"scores-{name}"
    _run("build-datastore", output / POOL4, "-c", captioner, "--set", "splits=[train]")
    _run("generate-captions", features, "-c", captioner, "-o", captions, "--config", "flickr8k")
    manifest = output / "manifest"  # with train: evaluate also counts the captions that occur in the training set
    _run("evaluate", captions, "-m", manifest, "--split", "dev", "-c", captioner, "-f", features, "-o", scores)
    found = json.loads((scores / "scores.json").read_text())["scores"]
    return [(f"{name}-{metric}", found[metric], bar, True) for metric, bar in CAPTIONERS[name].items()]


def _score_ranker(output: Path) -> list[Row]:
    """Trains a ranker and scores it on the 1,000 images of dev."""
    features, ranker, scores = output / CONV5, output / "ranker", output / "scores-ranking"
    _run("train-ranker", features, "-o", ranker, "--config", "flickr8k")
    _run("evaluate", features, "-r", ranker, "--split", "dev", "--protocol", "flickr8k-1k", "-o", scores)
    found = json.loads((scores / "scores.json").read_text())
    return [
        (f"{way}-{metric}".replace("_", "-"), found[way][metric], bar, metric != "median_rank")
        for way, bars in RANKS.items()
        for metric, bar in bars.items()
    ]


def _run(*words: str | Path) -> None:
    """Runs a command of captionlib, and ends where it fails."""
    command = ["captionlib", *map(str, words)]
    print(f"# {shlex.join(command)}", flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *command[1:]], check=False, stdout=sys.stderr)
    if done.returncode:
        sys.exit(done.returncode)
    print(f"#   {(time.monotonic() - began) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
