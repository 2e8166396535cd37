"""Flickr8k from the photographs to the table: the shipped recipes, run as anyone would run them, scored on dev.

    make bench-flickr8k DATA=flickr8k WEIGHTS=vgg16.safetensors

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.bars import report

CONFIGS = Path(__file__).parent.parent / "configs"
CAPTIONERS = {
    "glance": {"BLEU-1": 0.63, "BLEU-2": 0.45, "BLEU-3": 0.31, "BLEU-4": 0.21, "CIDEr": 0.50},
    "attention": {"BLEU-1": 0.65, "BLEU-2": 0.47, "BLEU-3": 0.33, "BLEU-4": 0.22, "CIDEr": 0.55},
    "self-critical": {"CIDEr": 0.62},
}
STARTS = {"self-critical": "attention"}  # the captioner that its training goes on from
FEATURES = {
    "glance": "features-flickr8k",
    "attention": "features-flickr8k-pool4",
    "self-critical": "features-flickr8k-pool4",
}
RANKS = {
    "image_to_sentence": {"recall_at_1": 0.22, "recall_at_5": 0.49, "recall_at_10": 0.62, "median_rank": 6},
    "sentence_to_image": {"recall_at_1": 0.16, "recall_at_5": 0.40, "recall_at_10": 0.54, "median_rank": 9},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("weights", metavar="WEIGHTS")
    parser.add_argument("--output", type=Path, default=Path(".bench/flickr8k"))
    options = parser.parse_args()
    tokens = options.data / "Flickr8k.token.txt"
    if not tokens.exists():
        sys.exit(f"{tokens} does not exist; DATA is the folder of images/, Flickr8k.token.txt and the split files")
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    manifest = output / "manifest"
    _run("prepare", tokens, "--images", options.data / "images", "-o", manifest)
    for name in sorted(set(FEATURES.values())):
        config = CONFIGS / f"{name}.yaml"
        _run("extract-features", manifest, "-o", output / name, "--config", config, "--weights", options.weights)
    scores = {name: _score_captioner(name, output, manifest, options.weights) for name in CAPTIONERS}
    ranks = _score_ranker(output, output / FEATURES["glance"])
    met = [
        report(f"flickr8k-{name}-{metric}", scores[name][metric], bar)
        for name, bars in CAPTIONERS.items()
        for metric, bar in bars.items()
    ]
    for direction, bars in RANKS.items():
        for metric, bar in bars.items():
            name = f"flickr8k-{direction}-{metric}".replace("_", "-")
            met.append(report(name, ranks[direction][metric], bar, at_least=metric != "median_rank"))
    sys.exit(not all(met))


def _score_captioner(name: str, output: Path, manifest: Path, weights: str) -> Mapping[str, float]:
    """Trains the captioner, captions with it and scores dev."""
    features = output / FEATURES[name]
    captioner, captions, scores = (output / f"{kind}-{name}" for kind in ("captioner", "captions", "scores"))
    more: list[str | Path] = []
    if name in STARTS:
        more = ["--start-from", output / f"captioner-{STARTS[name]}"]
    elif name == "attention" and Path(weights).exists():
        more = ["--weights", weights]  # of its tail
    config = CONFIGS / f"captioner-flickr8k-{name}.yaml"
    _run("train-captioner", features, "-o", captioner, "--config", config, *more)
    decoding = CONFIGS / "captions-flickr8k.yaml"
    _run("generate-captions", features, "-c", captioner, "-o", captions, "--config", decoding)
    _run("evaluate", captions, "-m", manifest, "--split", "dev", "-c", captioner, "-f", features, "-o", scores)
    found: Mapping[str, float] = json.loads((scores / "scores.json").read_text())["scores"]
    return found


def _score_ranker(output: Path, features: Path) -> Mapping[str, Any]:
    """Trains the ranker and ranks dev, 1,000 images among each other."""
    ranker, scores = output / "ranker", output / "scores-ranker"
    _run("train-ranker", features, "-o", ranker, "--config", CONFIGS / "ranker-flickr8k.yaml")
    _run("evaluate", features, "-r", ranker, "--split", "dev", "--protocol", "flickr8k-1k", "-o", scores)
    found: Mapping[str, Any] = json.loads((scores / "scores.json").read_text())
    return found


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
