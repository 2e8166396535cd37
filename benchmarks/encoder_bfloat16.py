"""Compares VGG-16 up to fc7 in bfloat16 and float32: images/s, and cosine similarity of the features."""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.bars import report, run_benchmark
from benchmarks.synthetic_images import decode_images, write_images
from captionlib.models.encoders.encoder import Encoder, EncoderConfig, load_encoder

IMAGES, BATCH, ROUNDS = 64, 32, 3
FLOAT32 = EncoderConfig(weights="random:0", stored_dtype="float32")


def encode(encoder: Encoder, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], float]:
    began = time.perf_counter()
    features = np.concatenate([encoder.encode(images[start : start + BATCH]) for start in range(0, IMAGES, BATCH)])
    return features.astype(np.float32), IMAGES / (time.perf_counter() - began)


def main() -> None:
    """Runs both alternately. The bar for speed depends on the instruction sets of the processor."""
    capability = torch.backends.cpu.get_cpu_capability()
    amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_images(Path(scratch), IMAGES)
        encoders = [load_encoder(FLOAT32, "cpu"), load_encoder(replace(FLOAT32, dtype="bfloat16"), "cpu")]
        images = decode_images(paths, encoders[0].preprocessing)
    for encoder in encoders:
        encoder.encode(images[:BATCH])
    ratios = []
    for _ in range(ROUNDS):
        (exact, slow), (rounded, fast) = (encode(encoder, images) for encoder in encoders)
        ratios.append(fast / slow)
        print(f"# float32 {slow:.2f} images/s, bfloat16 {fast:.2f} images/s")
    cosine = (exact * rounded).sum(1) / (np.linalg.norm(exact, axis=1) * np.linalg.norm(rounded, axis=1))
    report("encoder-bfloat16-cosine", float(cosine.mean()), 0.999)
    if amx or avx512:
        report("encoder-bfloat16-speed", statistics.median(ratios), 3.5 if amx else 1.6)
    else:
        print(f"# encoder-bfloat16-speed not measured: {capability} has neither avx512_bf16 nor amx_bf16")


if __name__ == "__main__":
    run_benchmark(main)
