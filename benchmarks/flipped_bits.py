"""Flips single bits of datasets, an index and a checkpoint; each must be noticed, or have no effect on any row."""

import argparse
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.bars import report, run_benchmark
from benchmarks.tiny_project import IMAGES, create_project
from captionlib.data.shards.dataset import open_dataset
from captionlib.errors import CaptionlibError
from captionlib.models.checkpoints.checkpoint import load_captioner, load_ranker
from captionlib.search.index import open_index

BITS = 100


def read_dataset(folder: Path) -> Any:
    dataset = open_dataset(folder).require_complete()
    failures = [dataset.read_failures(shard) for shard in range(dataset.shards)]
    return [dataset.read(shard).to_pylist() for shard in range(dataset.shards)], [
        table and table.to_pylist() for table in failures
    ]


def read_index(folder: Path) -> Any:
    index = open_index(str(folder))
    rows = [(index.get_image(str(number)), index.get_details(str(number))) for number in range(IMAGES)]
    searches = index.search_text("red", IMAGES), index.search_similar("0", IMAGES)
    return rows, [table.to_pylist() for table in searches]


def read_checkpoint(folder: Path) -> Any:
    """Returns everything that determines the rows that a captioner or a ranker computes."""
    model = (load_captioner if folder.name == "captioner" else load_ranker)(folder)
    weights = {name: tensor.tolist() for name, tensor in model.model.state_dict().items()}
    return model.fingerprint, model.config, model.encoder, model.vocabulary.words, weights


READERS: dict[str, Callable[[Path], Any]] = {
    "manifest": read_dataset,
    "features": read_dataset,
    "captions": read_dataset,
    "embeddings": read_dataset,
    "index": read_index,
    "captioner": read_checkpoint,
    "ranker": read_checkpoint,
}


def flip_bits(folder: Path, count: int, seed: int) -> Iterator[str]:
    """Flips one bit at a time and yields its position. Each file has the same number of bits, whatever its size."""
    generator = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    if folder / "model.safetensors" in files:  # the other files of a checkpoint are not needed to use it
        files = [folder / "config.json", folder / "model.safetensors"]
    for number in range(count):
        path = files[number % len(files)]
        content = path.read_bytes()
        bit = generator.randrange(8 * len(content))
        path.write_bytes(content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :])
        yield f"bit {bit} of {path.relative_to(folder)}"
        path.write_bytes(content)


def examine(folder: Path, read: Callable[[Path], Any], count: int, seed: int) -> Counter[str]:
    """Returns how many flipped bits were noticed, had no effect, or had one."""
    expected = read(folder)
    outcomes = Counter[str]()
    for position in flip_bits(folder, count, seed):
        try:
            outcome = "without effect" if read(folder) == expected else "wrong"
        except CaptionlibError:
            outcome = "noticed"
        except Exception as error:  # the command line would report it as unexpected
            outcome = f"unexpected {type(error).__name__}"
        outcomes[outcome] += 1
        if outcome not in ("noticed", "without effect"):
            print(f"# {folder.name}, {position}: {outcome}", flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=BITS, help="number of bits of each folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["PATH"] = ""  # without Java, which takes seconds to start
    total = Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        project = create_project(Path(scratch) / "project")
        for name, read in READERS.items():
            outcomes = examine(project / name, read, options.bits, options.seed)
            print(f"# {name}: {dict(outcomes)}", flush=True)
            total += outcomes
    harmless = total["noticed"] + total["without effect"]
    report("flipped-bits", harmless / total.total(), 1.0)


if __name__ == "__main__":
    run_benchmark(main)
