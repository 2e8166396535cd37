"""Measures encoding and captioning on a GPU: `make bench-gpu`.

It prints images/s and captions/s relative to bare loops, how fast images are decoded, and the peak memory of the GPU.
`python -m benchmarks.gpu cpu` runs the script with few images on a CPU, to check that it works. Its figures mean
nothing then.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.bars import report, run_benchmark
from benchmarks.decoding_speed import FEATURE_SIZE, build_captioner
from benchmarks.dense_beam_search import CONFIG, DenseSearch
from benchmarks.synthetic_images import decode_images, write_images, write_manifest
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.encoders.encoder import Encoder, EncoderConfig, load_encoder
from captionlib.models.inference.extraction import ExtractionConfig
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig

BATCH, ROUNDS, WORDS, IMAGE_SIZE = 128, 3, 9500, 500


def time_block(device: str, block: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds that a function takes, and the peak memory of the GPU in GB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    block()
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - began, torch.cuda.max_memory_allocated() / 1e9
    return time.perf_counter() - began, 0.0


def encode_plainly(encoder: Encoder, images: npt.NDArray[np.uint8]) -> None:
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            encoder.network(torch.from_numpy(images[start : start + BATCH]).to(encoder.device)).cpu()


def measure_encoding(device: str, count: int, folder: Path) -> None:
    """Measures `extract-features` with VGG-16 in bfloat16, the bare loop, and decoding alone."""
    config = ExtractionConfig(EncoderConfig(weights="random:0", dtype="bfloat16"), batch_size=BATCH)
    paths = write_images(folder / "images", count, IMAGE_SIZE)
    write_manifest(folder / "manifest", [str(path) for path in paths], -(-count // 4))
    encoder = load_encoder(config.encoder, device)
    images = decode_images(paths, encoder.preprocessing)
    encode_plainly(encoder, images[:BATCH])  # warms up
    best: dict[str, float] = {}
    for number in range(ROUNDS):
        target, run = folder / f"features{number}", RunConfig(progress=False)
        blocks: dict[str, Callable[[], object]] = {
            "bare loop": partial(encode_plainly, encoder, images),
            "decoding alone": partial(decode_images, paths, encoder.preprocessing),
            "extract-features": partial(extract_features, folder / "manifest", target, config, device=device, run=run),
        }
        for name, block in blocks.items():
            seconds, memory = time_block(device, block)
            best[name] = max(best.get(name, 0), count / seconds)
            print(f"# {name}: {count / seconds:.1f} images/s, {memory:.2f} GB of the GPU at most")
    bound = "decoding" if best["decoding alone"] < best["bare loop"] else "the GPU"
    print(f"# {bound} is the bound, with {len(images)} JPEG files of {IMAGE_SIZE} x {IMAGE_SIZE} pixels")
    slower = min(best["decoding alone"], best["bare loop"])
    report("gpu-extract-throughput", best["extract-features"] / slower, 0.9)


def measure_captioning(device: str, count: int) -> None:
    """Measures beam search with 9,500 words and a dense batched loop."""
    model = build_captioner(words=WORDS).to(device)
    features = torch.randn(count, FEATURE_SIZE, generator=torch.Generator().manual_seed(1)).to(device)
    decoders: dict[str, DenseSearch | Decoder] = {
        "dense loop": DenseSearch(model),
        "captionlib": Decoder(model, CONFIG),
    }
    best = dict.fromkeys(decoders, 0.0)
    for _ in range(ROUNDS + 1):
        for name, decoder in decoders.items():
            seconds, memory = time_block(device, partial(decoder.decode, features))
            best[name] = max(best[name], count / seconds)
            print(f"# {name}: {count / seconds:.0f} captions/s, {memory:.2f} GB of the GPU at most")
    report("gpu-captions-ratio", best["captionlib"] / best["dense loop"], 1)


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench-gpu: this machine has no GPU that PyTorch can use, so nothing was measured")
    on_gpu = device == "cuda"
    print(
        f"# {torch.cuda.get_device_name() if on_gpu else 'CPU: the figures mean nothing'}, PyTorch {torch.__version__}"
    )
    with TemporaryDirectory() as scratch:
        measure_encoding(device, 4096 if on_gpu else 8, Path(scratch))
    measure_captioning(device, 500 if on_gpu else 20)


if __name__ == "__main__":
    run_benchmark(main)
