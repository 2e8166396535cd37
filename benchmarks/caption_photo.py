"""Measures the CPU time of `captionlib caption` of one image with VGG-16, relative to the least work that it needs.

That is to import PyTorch, and one forward pass of the encoder.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import torch
import torchvision
from torch import nn

from benchmarks.bars import measure_cpu, report, run_benchmark
from benchmarks.synthetic_images import write_images
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.checkpoints.checkpoint import save_captioner
from captionlib.models.checkpoints.encoder_file import ENCODER_ADDRESS
from captionlib.models.encoders.encoder import EncoderConfig, load_encoder

ROUNDS, WORDS = 7, 2500


def write_captioner(folder: Path) -> Path:
    """Writes a captioner with random weights, and beside it those of its encoder, VGG-16 up to fc7."""
    weights = folder / "vgg16.safetensors"
    safetensors.torch.save_file(torchvision.models.vgg16(weights=None).state_dict(), weights)
    encoder = load_encoder(EncoderConfig(weights=str(weights)), "cpu")
    words = tuple(f"word{number}" for number in range(WORDS))
    vocabulary = Vocabulary(words, (5,) * WORDS, unknown_count=0, sentence_count=WORDS)
    model = CaptionerNetwork(CaptionerConfig(), encoder.shape[0], len(vocabulary))
    provenance = {ENCODER_ADDRESS: str(weights)}
    save_captioner(folder / "captioner", model, vocabulary, encoder.description, provenance=provenance, training={})
    return folder / "captioner"


def measure_forward_pass() -> float:
    """Returns the median CPU seconds of the encoder's forward pass for one image."""
    model = torchvision.models.vgg16(weights=None)
    network = nn.Sequential(model.features, model.avgpool, nn.Flatten(), model.classifier[:5]).eval()
    image = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        seconds = [measure_cpu(lambda: network(image)) for _ in range(ROUNDS + 1)]
    return statistics.median(seconds[1:])  # the first round warms up


def measure_python(*arguments: str) -> float:
    """Returns the CPU seconds of a Python process on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return measure_cpu(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment))


def main() -> None:
    torch.set_num_threads(1)
    forward_pass = measure_forward_pass()
    ratios = []
    with TemporaryDirectory() as scratch:
        captioner = write_captioner(Path(scratch))
        (image,) = write_images(Path(scratch) / "images", 1)
        for _ in range(ROUNDS):
            least = measure_python("-c", "import torch") + forward_pass
            ours = measure_python("-m", "captionlib", "caption", str(image), "-c", str(captioner), "--device", "cpu")
            print(f"# caption {ours:.2f} s, importing PyTorch and a forward pass {least:.2f} s")
            ratios.append(ours / least)
    report("caption-photo", statistics.median(ratios), 2, at_least=False)


if __name__ == "__main__":
    run_benchmark(main)
