"""Measures images per CPU second of `extract-features`, relative to a DataLoader with two workers.

The files are photographs of 12 megapixels, and images of the size that web pages show. Both sides run the same small
network on one thread. The DataLoader applies torchvision's transforms.
"""

import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

from benchmarks.bars import measure_cpu, report, run_benchmark
from benchmarks.decode_jpeg import make_images
from benchmarks.synthetic_images import write_manifest
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.extraction import ExtractionConfig, load_shared_encoder
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig

BATCH, ROUNDS = 32, 3
CONFIG = ExtractionConfig(EncoderConfig("mobilenet_v3_small", "avgpool", "random:0"), batch_size=BATCH)
WEB_SIZE = (640, 480)


class PhotoDataset(Dataset[Tensor]):
    """Images for the network, with torchvision's transforms."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self._transform = MobileNet_V3_Small_Weights.DEFAULT.transforms()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self._paths[index]) as image:
            inputs: Tensor = self._transform(image.convert("RGB"))
        return inputs


@torch.inference_mode()
def run_loader(network: nn.Module, paths: list[str]) -> None:
    batches: Iterable[Tensor] = DataLoader(PhotoDataset(paths), BATCH, num_workers=2)
    for batch in batches:
        network(batch.to(memory_format=torch.channels_last)).half().numpy()


def measure(folder: Path, paths: list[str]) -> float:
    """Returns the median over rounds of the CPU time of the DataLoader ÷ that of `extract-features`."""
    folder.mkdir()
    write_manifest(folder / "manifest", paths, len(paths))
    model = mobilenet_v3_small(weights=None).eval()
    network = nn.Sequential(model.features, model.avgpool).to(memory_format=torch.channels_last)
    load_shared_encoder(CONFIG.encoder, "cpu", None)  # neither side counts loading the network
    ratios = []
    for number in range(ROUNDS):
        loader = measure_cpu(lambda: run_loader(network, paths))
        stage = measure_cpu(
            partial(
                extract_features,
                folder / "manifest",
                folder / f"features-{number}",
                CONFIG,
                device="cpu",
                run=RunConfig(progress=False),
            )
        )
        print(
            f"# {folder.name}: DataLoader {1000 * loader / len(paths):.1f} ms per image, "
            f"extract-features {1000 * stage / len(paths):.1f}",
            flush=True,
        )
        ratios.append(loader / stage)
    return statistics.median(ratios)


def main() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        images = make_images()
        for name, size, repeats, bar in (("photographs", images[0].size, 25, 1.5), ("web-images", WEB_SIZE, 250, 2.0)):
            paths = []
            for number, image in enumerate(images):
                path = Path(scratch) / f"{name}-{number}.jpg"
                image.resize(size, Image.Resampling.LANCZOS).save(path, quality=90)
                paths.append(str(path))
            report(f"photo-throughput-{name}", measure(Path(scratch) / name, paths * repeats), bar)


if __name__ == "__main__":
    run_benchmark(main)
