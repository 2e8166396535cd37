"""Checks that every valid, corrupt, unusual or malicious file becomes an image or a failure, in bounded memory.

A failure is an image that could not be read, with the reason.
"""

import argparse
import io
import json
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.bars import report, run_benchmark
from benchmarks.killed_commands import wait_for_processes
from benchmarks.synthetic_images import write_images
from captionlib.data.images.decoder_pool import DecoderConfig
from captionlib.data.images.decoding import Preprocessing
from captionlib.data.images.formats import FORMATS
from captionlib.data.images.loading import LoadingConfig, open_loader
from captionlib.errors import ImageError

VALID, MUTATED = 200, 500
LOADING = LoadingConfig(decode=DecoderConfig(processes=2))
PREPROCESSING = Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# The expected outcome of each kind of file; a mutated file may become either.
IMAGE = {"valid", "misnamed", "cmyk", "16-bit", "animated", "palette", "alpha", "rotated"}
FAILURE = {"truncated", "empty", "text", "enormous", "other-format"}


def write_files(folder: Path, mutated: int, seed: int) -> None:
    """Writes valid files to `valid/`, and files of all kinds to `mixed/`. Most are named `KIND-NUMBER.EXTENSION`."""
    valid = [path.rename(path.with_name(f"valid-{path.name}")) for path in write_images(folder / "valid", VALID)]
    mixed = folder / "mixed"
    mixed.mkdir()
    for path in valid:
        (mixed / path.name).write_bytes(path.read_bytes())
    image = Image.open(valid[0])
    formats = {each.name: encode(image, each.plugins[0]) for each in FORMATS if each.plugins[0] in Image.SAVE}
    contents = list(formats.values())
    print(f"# formats: {', '.join(formats)}")
    files = {f"truncated-{kind}{part}": c[: len(c) * part // 10] for kind, c in formats.items() for part in (1, 5, 9)}
    files |= {f"mutated-{number}": mutate(contents[number % len(contents)], seed + number) for number in range(mutated)}
    files |= {f"misnamed-{number}.txt": content for number, content in enumerate(contents)}
    files |= {
        "empty-1.jpg": b"",
        "text-1.jpg": b"Not found\n" * 100,
        "text-2.html": b"<!DOCTYPE html><title>404</title>",
        "other-format-1.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "other-format-2.pdf": b"%PDF-1.7\n",
        "enormous-bits.png": build_black_png(30_000, bits=1),
        "enormous-bytes.png": build_black_png(30_000, bits=8),
        "cmyk-1.jpg": encode(image.convert("CMYK"), "JPEG"),
        "16-bit-1.png": encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
        "animated-1.gif": encode(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "animated-2.webp": encode(image, "WEBP", save_all=True, append_images=[image.rotate(90)]),
        "palette-1.png": encode(image.quantize(16), "PNG", transparency=3),
        "alpha-1.png": encode(image.convert("RGBA"), "PNG"),
        "rotated-1.jpg": encode(image, "JPEG", exif=build_orientation(6)),
    }
    for name, content in files.items():
        (mixed / name).write_bytes(content)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def mutate(content: bytes, seed: int) -> bytes:
    """Flips up to eight bits of a file, or overwrites, removes, repeats or clears a part of it, or cuts its end off."""
    generator = np.random.default_rng(seed)
    start, end = sorted(generator.integers(0, len(content), 2))
    part = content[start:end]
    kind = generator.integers(10)
    if kind < 5:
        corrupt = bytearray(content)
        for position in generator.integers(0, len(content), generator.integers(1, 9)):
            corrupt[position] ^= 1 << int(generator.integers(8))
        return bytes(corrupt)
    replacement = (generator.bytes(len(part)), b"", 2 * part, bytes(len(part)), part)[kind - 5]
    return content[:start] + replacement + (b"" if kind == 9 else content[end:])


def build_black_png(side: int, bits: int) -> bytes:
    """Returns a black square as a PNG file, which is hundreds to thousands of times smaller than the decoded image."""
    compressor = zlib.compressobj(6)
    row = bytes(1 + (side * bits + 7) // 8)
    pixels = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def build_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def load_folder(folder: Path) -> None:
    """Loads all files of a folder; prints each outcome and the peak memory of this process and its children in kB."""
    outcomes = {}
    with open_loader(LOADING, PREPROCESSING) as load:
        for row, image in load({"uri": str(path)} for path in sorted(folder.iterdir())):
            outcomes[Path(row["uri"]).name] = image.reason if isinstance(image, ImageError) else "image"
        children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
        peak = sum(read_peak_memory(process) for process in ("self", *children))
    print(json.dumps({"outcomes": outcomes, "peak": peak}))


def load_in_subprocess(folder: Path) -> dict[str, Any]:
    """Loads a folder in a process of its own, which must print no errors and leave no process."""
    command = [sys.executable, "-m", "benchmarks.corrupt_images", "--load", str(folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    output, errors = process.communicate()
    left = wait_for_processes(process.pid)
    if process.returncode or errors or left:
        raise RuntimeError(f"exit code {process.returncode}, processes left: {left}, errors: {errors}")
    result: dict[str, Any] = json.loads(output)
    return result


def read_peak_memory(process: str) -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert match is not None
    return int(match[1])


def is_accounted(name: str, outcome: str | None) -> bool:
    """Returns whether a file has the expected outcome of its kind. A failure must have a reason."""
    kind = next(kind for kind in (*IMAGE, *FAILURE, "mutated") if name.startswith(kind))
    if kind == "mutated":
        return bool(outcome)
    return outcome == "image" if kind in IMAGE else bool(outcome) and outcome != "image"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mutated", type=int, default=MUTATED, help="number of mutated files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.load is not None:
        load_folder(options.load)
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_files(Path(scratch), options.mutated, options.seed)
        results = []
        for name in ("valid", "mixed"):
            results.append(load_in_subprocess(Path(scratch) / name))
            print(f"# {name}: {results[-1]['peak'] / 1024:.0f} MB, {dict(Counter(results[-1]['outcomes'].values()))}")
        names = sorted(path.name for path in (Path(scratch) / "mixed").iterdir())
    outcomes = results[1]["outcomes"]
    unexpected = [name for name in names if not is_accounted(name, outcomes.get(name))]
    print("".join(f"# {name} became {outcomes.get(name)}\n" for name in unexpected), end="")
    report("corrupt-images-accounted", 1 - len(unexpected) / len(names), 1.0)
    report("corrupt-images-peak-memory", results[1]["peak"] / results[0]["peak"], 1.5, at_least=False)


if __name__ == "__main__":
    run_benchmark(main)
