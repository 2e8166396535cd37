"""Measures tokens/s of training a captioner, relative to an independent loop over packed sentences with fused Adam."""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bars import measure_cpu, report, run_benchmark
from benchmarks.synthetic_features import write_features
from benchmarks.training_throughput import CONFIG, IMAGES, ROUNDS, VALIDATION_IMAGES, PlainCaptioner, PlainLoop
from captionlib.data.text.vocabulary import END
from captionlib.training.captioning import train_captioner


class PackedCaptioner(PlainCaptioner):
    """The same captioner on packed inputs: PyTorch's LSTM computes only real tokens."""

    def loss(self, features: Tensor, sentences: list[Tensor]) -> Tensor:
        order = sorted(range(len(sentences)), key=lambda row: -len(sentences[row]))  # packing requires this order
        features, sentences = features[order], [sentences[row] for row in order]
        lengths = torch.tensor([len(ids) + 2 for ids in sentences])  # the image and the start token come first
        boundary = torch.tensor([END])
        words = nn.utils.rnn.pad_sequence([torch.cat([boundary, ids]) for ids in sentences], True, END)
        inputs = torch.cat([self.project(features)[:, None], self.embed(words)], 1)
        packed = nn.utils.rnn.pack_padded_sequence(self.dropout(inputs), lengths, batch_first=True)
        hidden = self.lstm(packed)[0]
        targets = nn.utils.rnn.pad_sequence([torch.cat([boundary, ids, boundary]) for ids in sentences], True, END)
        targets = nn.utils.rnn.pack_padded_sequence(targets, lengths, batch_first=True).data
        images = len(sentences)  # the first step reads the image and predicts nothing
        return F.cross_entropy(self.output(self.dropout(hidden.data[images:])), targets[images:])


def main() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        features = Path(scratch) / "features"
        dataset = write_features(features, IMAGES + VALIDATION_IMAGES, VALIDATION_IMAGES)
        packed = PlainLoop(dataset, PackedCaptioner, fused=True)
        packed.train_epoch()
        ratios = []
        for number in range(ROUNDS):
            theirs = measure_cpu(packed.train_epoch)
            with mock.patch("time.monotonic", time.process_time):  # total_seconds is CPU time, without validation
                (row,) = train_captioner(
                    str(features), Path(scratch) / f"run-{number}", CONFIG, device="cpu", progress=False
                )
            ours = row["total_seconds"]
            print(
                f"# captionlib {packed.tokens / ours:.0f} tokens per CPU second, "
                f"packed loop {packed.tokens / theirs:.0f}"
            )
            ratios.append(theirs / ours)
    report("packed-training", statistics.median(ratios), 1.5)


if __name__ == "__main__":
    run_benchmark(main)
