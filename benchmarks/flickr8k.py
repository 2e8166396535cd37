"""Flickr8k from the photographs to the table: the shipped recipes, run as anyone would run them, scored on dev.

    make bench-flickr8k DATA=flickr8k WEIGHTS=vgg16.safetensors
    make bench-flickr8k DATA=flickr8k WEIGHTS=vgg16.safetensors NAME="image_state ranking"

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

CONFIGS = Path(__file__).parent.parent / "configs"
WHOLE, BEFORE_TAIL = "features-flickr8k", "features-flickr8k-pool4"
DEV = f"{BEFORE_TAIL}-dev"  # what is captioned; dev is in the features of all as well, for those who train


class Stage(NamedTuple):
    """A training of a captioner.

    Attributes:
        recipe: of `configs/`, after `captioner-flickr8k-`.
        after: the stage that it goes on from; None is the first, which gets the weights that its encoder_top begins with.
        changes: of the recipe, as `--set` has them.
    """

    recipe: str
    after: str | None
    changes: tuple[str, ...] = ()


STAGES = {
    "image_state-words": Stage("words", None, ("captioner.attention_size=0",)),
    "image_state": Stage("image_state", "image_state-words"),
    "attention-words": Stage("words", None),
    "attention": Stage("attention", "attention-words"),
    "self-critical": Stage("self-critical", "attention"),
}
CAPTIONERS = {
    "image_state": {"BLEU-1": 0.63, "BLEU-2": 0.45, "BLEU-3": 0.31, "BLEU-4": 0.21, "CIDEr": 0.50},
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
    needed = {WHOLE: (manifest, WHOLE)} if "ranking" in names else {}
    if names != ["ranking"]:
        _run("prepare", tokens, "--images", options.data / "images", "-o", dev, "--split", "dev")
        needed |= {BEFORE_TAIL: (manifest, BEFORE_TAIL), DEV: (dev, BEFORE_TAIL)}
    for name, (images, recipe) in needed.items():
        config = CONFIGS / f"{recipe}.yaml"
        _run("extract-features", images, "-o", output / name, "--config", config, "--weights", options.weights)
    rows: list[Row] = []
    for name in names:
        rows += _score_ranker(output) if name == "ranking" else _score_captioner(name, output, options.weights)
    met = [report(f"flickr8k-{name}", value, bar, at_least) for name, value, bar, at_least in rows]
    sys.exit(not all(met))


def _train_captioner(name: str, output: Path, weights: str) -> Path:
    """Trains the captioner, after the one that it goes on from."""
    stage, captioner = STAGES[name], output / f"captioner-{name}"
    more: list[str | Path] = [word for change in stage.changes for word in ("--set", change)]
    if stage.after is not None:
        more += ["--init-from", _train_captioner(stage.after, output, weights)]
    elif Path(weights).exists():
        more += ["--weights", weights]
    config = CONFIGS / f"captioner-flickr8k-{stage.recipe}.yaml"
    _run("train-captioner", output / BEFORE_TAIL, "-o", captioner, "--config", config, *more)
    return captioner


def _score_captioner(name: str, output: Path, weights: str) -> list[Row]:
    """Trains the captioner, captions dev with it and scores that."""
    captioner = _train_captioner(name, output, weights)
    features, captions, scores = output / DEV, output / f"captions-{name}", output / f"scores-{name}"
    decoding = CONFIGS / "generate-captions/flickr8k.yaml"
    _run("build-datastore", output / BEFORE_TAIL, "-c", captioner, "--set", "splits=[train]")
    _run("generate-captions", features, "-c", captioner, "-o", captions, "--config", decoding)
    manifest = output / "manifest"  # of all: evaluate also tells how many captions stand in the training set
    _run("evaluate", captions, "-m", manifest, "--split", "dev", "-c", captioner, "-f", features, "-o", scores)
    found = json.loads((scores / "scores.json").read_text())["scores"]
    return [(f"{name}-{metric}", found[metric], bar, True) for metric, bar in CAPTIONERS[name].items()]


def _score_ranker(output: Path) -> list[Row]:
    """Trains the ranker and ranks dev, 1,000 images among each other."""
    features, ranker, scores = output / WHOLE, output / "ranker", output / "scores-ranking"
    _run("train-ranker", features, "-o", ranker, "--config", CONFIGS / "train-ranker/flickr8k.yaml")
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
