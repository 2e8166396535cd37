"""Measures captions/s of nucleus sampling from 9,500 words on one thread, relative to sampling from all words."""

import statistics
from functools import partial

import torch

from benchmarks.bars import measure_cpu, report, run_benchmark
from benchmarks.decoding_speed import BATCH, FEATURE_SIZE, build_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder

WORDS, ROUNDS = 9500, 7


def main() -> None:
    torch.set_num_threads(1)
    model = build_captioner(words=WORDS)
    features = torch.randn(BATCH, FEATURE_SIZE, generator=torch.Generator().manual_seed(1))
    decoders = [Decoder(model, DecodingConfig(strategy="sample", top_p=top_p)) for top_p in (1.0, 0.9)]
    ratios = []
    for number in range(ROUNDS + 1):
        plain, nucleus = (measure_cpu(partial(decoder.decode, features)) for decoder in decoders)
        if number:  # the first round warms up
            print(f"# all words {BATCH / plain:.0f} captions/s, nucleus {BATCH / nucleus:.0f}")
            ratios.append(plain / nucleus)
    report("nucleus-sampling", statistics.median(ratios), 0.8)


if __name__ == "__main__":
    run_benchmark(main)
