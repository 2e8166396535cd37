"""Measures the CPU time of decoding images of 12 megapixels to an encoder's input, relative to two baselines.

The images are enlarged from those that scikit-image ships, with grain, so that the files are as large as a camera's.
"""

import io
import multiprocessing
import statistics
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image

from benchmarks.bars import measure_cpu, report, run_benchmark
from captionlib.data.images.decoding import Preprocessing, decode_image

WIDTH, HEIGHT, ROUNDS = 4000, 3000, 5
EXACT = Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FAST = replace(EXACT, decode_scale="fast")

Decode = Callable[[bytes], npt.NDArray[np.uint8]]


def make_images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    images = []
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        enlarged = Image.fromarray(getattr(skimage.data, name)()).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        grain = generator.normal(0, 5, (HEIGHT, WIDTH, 1)).astype(np.float32)
        images.append(Image.fromarray((np.asarray(enlarged) + grain).clip(0, 255).astype(np.uint8)))
    return images


def decode_plainly(content: bytes) -> npt.NDArray[np.uint8]:
    """Decodes, converts, resizes and crops the whole image with Pillow, as torchvision's transforms do."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        pixels = image.convert("RGB")
    scale = EXACT.resize_size / min(pixels.size)
    width, height = (int(length * scale) for length in pixels.size)
    pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (round((length - EXACT.crop_size) / 2) for length in (width, height))
    return np.asarray(pixels.crop((left, top, left + EXACT.crop_size, top + EXACT.crop_size)))


def decode_like_img2dataset(content: bytes) -> npt.NDArray[np.uint8]:
    """Decodes with OpenCV and resizes with INTER_AREA, as img2dataset does, and crops the center."""
    pixels: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    scale = EXACT.resize_size / min(pixels.shape[:2])
    height, width = (int(length * scale) for length in pixels.shape[:2])
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    left, top = (round((length - EXACT.crop_size) / 2) for length in (width, height))
    return np.ascontiguousarray(pixels[top : top + EXACT.crop_size, left : left + EXACT.crop_size, ::-1])


DECODERS: dict[str, Decode] = {
    "plain": decode_plainly,
    "img2dataset": decode_like_img2dataset,
    "exact": lambda content: decode_image(content, EXACT).pixels,
    "fast": lambda content: decode_image(content, FAST).pixels,
}


def run_decoder(name: str, contents: list[bytes]) -> float:
    cv2.setNumThreads(1)
    if name in {"exact", "fast"}:
        Image.core.set_blocks_max(4)  # type: ignore[attr-defined]  # as in decoder processes
    return 1000 * measure_cpu(lambda: deque(map(DECODERS[name], contents), maxlen=0)) / len(contents)


def measure(contents: list[bytes]) -> dict[str, float]:
    """Returns the median CPU milliseconds per image of each decoder, run alternately.

    Each decoder has its own process, because how long memory takes depends on what the process freed before.
    """
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for name in DECODERS}
        rounds = [
            {name: processes[name].submit(run_decoder, name, contents).result() for name in DECODERS}
            for _ in range(ROUNDS + 1)
        ]
    return {name: statistics.median(values[name] for values in rounds[1:]) for name in DECODERS}  # first: warm-up


def main() -> None:
    images = make_images()
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("jpeg", "JPEG", {"quality": 90}),
        ("progressive", "JPEG", {"quality": 90, "progressive": True}),
        ("webp", "WEBP", {"quality": 85, "method": 0}),
        ("png", "PNG", {"compress_level": 1}),
    ]
    for name, kind, options in kinds:
        contents = []
        for image in images:
            file = io.BytesIO()
            image.save(file, kind, **options)
            contents.append(file.getvalue())
        milliseconds = measure(contents)
        size = statistics.mean(map(len, contents)) / 1e6
        print(f"# {name}, {size:.1f} MB: " + ", ".join(f"{key} {value:.1f} ms" for key, value in milliseconds.items()))
        ratios = {
            "exact": (milliseconds["plain"] / milliseconds["exact"], 2.5),
            "fast": (milliseconds["plain"] / milliseconds["fast"], 4),
            "exact-img2dataset": (milliseconds["img2dataset"] / milliseconds["exact"], 1.5),
        }
        for key, (ratio, bar) in ratios.items():
            if name == "jpeg":
                report(f"decode-jpeg-{key}", ratio, bar)
            else:
                print(f"# {name} {key} {ratio:.2f}")


if __name__ == "__main__":
    run_benchmark(main)
