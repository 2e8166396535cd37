"""Measures images/s of `extract-features` relative to a plain PyTorch loop over the same images, already decoded."""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from benchmarks.bars import measure_seconds, report, run_benchmark
from benchmarks.synthetic_images import decode_images, write_images, write_manifest
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.extraction import ExtractionConfig, load_shared_encoder
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig

IMAGES, BATCH, ROUNDS = 256, 32, 3
CONFIG = ExtractionConfig(EncoderConfig(weights="random:0", dtype="bfloat16"), batch_size=BATCH)


def build_plain_network() -> nn.Module:
    """Builds VGG-16 up to fc7."""
    network: nn.Module = create_feature_extractor(torchvision.models.vgg16(weights=None).eval(), ["classifier.4"])
    return network.bfloat16().to(memory_format=torch.channels_last)


@torch.inference_mode()
def run_plain_loop(network: nn.Module, images: npt.NDArray[np.uint8]) -> float:
    """Returns images/s of a loop that normalizes and encodes decoded images."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    began = time.perf_counter()
    for start in range(0, len(images), BATCH):
        pixels = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2)
        network(((pixels / 255 - mean) / std).bfloat16())
    return len(images) / (time.perf_counter() - began)


def run_pipeline(manifest: Path, output: Path) -> float:
    """Returns images/s from reading the manifest to writing `_SUCCESS`, without loading the model."""
    run = RunConfig(progress=False)
    return IMAGES / measure_seconds(lambda: extract_features(manifest, output, CONFIG, run=run))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = write_images(folder / "images", IMAGES)
        write_manifest(folder / "manifest", [str(path) for path in paths], IMAGES)
        images = decode_images(paths, load_shared_encoder(CONFIG.encoder, "auto", None).preprocessing)
        network = build_plain_network()
        run_plain_loop(network, images[: 2 * BATCH])
        ratios = []
        for number in range(ROUNDS):
            plain = run_plain_loop(network, images)
            ours = run_pipeline(folder / "manifest", folder / f"features{number}")
            ratios.append(ours / plain)
            print(f"# plain loop {plain:.2f} images/s, extract-features {ours:.2f} images/s")
        report("extract-throughput", statistics.median(ratios), 0.92)


if __name__ == "__main__":
    run_benchmark(main)
