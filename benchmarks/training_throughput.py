"""Measures tokens/s of training a captioner, relative to a plain loop over padded batches of the same size."""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bars import report, run_benchmark
from benchmarks.synthetic_features import CAPTIONS_PER_IMAGE, FEATURE_SIZE, write_features
from captionlib.data.batches.captions import read_captions, read_features
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.text.vocabulary import END, PAD, Vocabulary
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig

IMAGES, VALIDATION_IMAGES, ROUNDS = 320, 20, 5
CONFIG = CaptionerTrainingConfig(training=TrainingConfig(epochs=1, optimizer="adam"), min_count=1)


class PlainCaptioner(nn.Module):
    """The same captioner as in a tutorial: an `nn.LSTM` on padded inputs, whose first input is the image."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        config = CONFIG.captioner
        self.project = nn.Linear(FEATURE_SIZE, config.embedding_size)
        self.embed = nn.Embedding(classes, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        self.output = nn.Linear(config.hidden_size, classes)
        self.dropout = nn.Dropout(config.dropout)

    def loss(self, features: Tensor, sentences: list[Tensor]) -> Tensor:
        """Computes the mean negative log-probability of the tokens."""
        boundary = torch.tensor([END])  # END also serves as the start token
        words = nn.utils.rnn.pad_sequence([torch.cat([boundary, ids]) for ids in sentences], True, END)
        targets = nn.utils.rnn.pad_sequence([torch.cat([ids, boundary]) for ids in sentences], True, PAD)
        inputs = torch.cat([self.project(features)[:, None], self.embed(words)], 1)
        hidden, _ = self.lstm(self.dropout(inputs))
        logits = self.output(self.dropout(hidden[:, 1:]))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)


class PlainLoop:
    """A loop over shuffled batches of captions in memory, each with a copy of its image's features."""

    def __init__(
        self, dataset: ShardedDataset, captioner: type[PlainCaptioner] = PlainCaptioner, fused: bool = False
    ) -> None:
        torch.manual_seed(0)
        vocabulary = Vocabulary.from_captions(read_captions(dataset, ["train"]), CONFIG.min_count)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for shard in range(dataset.shards):
            for features, captions in read_features(dataset, shard, frozenset(["train"])):
                for row, sentences in zip(torch.from_numpy(features).float(), captions, strict=True):
                    encoded = [vocabulary.encode(text)[:30] for text in sentences]
                    self._pairs += [(row, torch.tensor(ids)) for ids in encoded]
        self.tokens = sum(len(ids) + 1 for _, ids in self._pairs)
        self._model = captioner(len(vocabulary)).train()
        self._optimizer = torch.optim.Adam(self._model.parameters(), CONFIG.training.learning_rate, fused=fused)

    def train_epoch(self) -> float:
        """Trains for an epoch and returns tokens/s."""
        began = time.perf_counter()
        size = CAPTIONS_PER_IMAGE * CONFIG.batch_images
        for batch in torch.split(torch.randperm(len(self._pairs)), size):
            pairs = [self._pairs[number] for number in batch.tolist()]
            self._step(torch.stack([row for row, _ in pairs]), [ids for _, ids in pairs])
        return self.tokens / (time.perf_counter() - began)

    def _step(self, features: Tensor, sentences: list[Tensor]) -> None:
        loss = self._model.loss(features, sentences)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_value_(self._model.parameters(), 5.0)
        self._optimizer.step()
        loss.item()  # copies the loss to the host, as captionlib does


def main() -> None:
    with TemporaryDirectory() as scratch:
        dataset = write_features(Path(scratch) / "features", IMAGES + VALIDATION_IMAGES, VALIDATION_IMAGES)
        plain = PlainLoop(dataset)
        plain.train_epoch()
        ratios = []
        for number in range(ROUNDS):
            (row,) = train_captioner(
                dataset.folder.uri, Path(scratch) / f"run-{number}", CONFIG, device="cpu", progress=False
            )
            ours, theirs = plain.tokens / row["total_seconds"], plain.train_epoch()
            print(
                f"# captionlib {ours:.0f} tokens/s, plain loop {theirs:.0f} tokens/s, {torch.get_num_threads()} threads"
            )
            ratios.append(ours / theirs)
    report("training-throughput-ratio", statistics.median(ratios), 1.3)


if __name__ == "__main__":
    run_benchmark(main)
