"""Fits a language model on sentences alone, or on one running text: what people wrote is to become likely."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captionlib.config import to_dict
from captionlib.data.batches.text import SentenceBatches, SequenceBatches, TextBatches
from captionlib.data.text.corpora import Corpus, TextLayout, open_corpus
from captionlib.data.text.vocabulary import Level, Vocabulary
from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import Captioner
from captionlib.models.captioners.language_model import LanguageModelConfig, build_language_model
from captionlib.models.checkpoints.checkpoint import save_language_model
from captionlib.models.checkpoints.folder import stamp_provenance
from captionlib.models.devices import resolve_device
from captionlib.storage.folders import Folder
from captionlib.training.curves import draw_curves
from captionlib.training.loop import TrainingConfig, claim_folder, seed_everything, train
from captionlib.training.objective import BatchLoss, perplexity

__all__ = ["LanguageModelObjective", "LanguageModelTrainingConfig", "train_language_model"]


@dataclass(frozen=True)
class LanguageModelTrainingConfig:
    """A language model, its text, and how it is trained.

    Attributes:
        model: the network.
        training: the loop.
        level: whether the text is cut into words or characters.
        layout: how a text file is read: `sentences`, a line a sentence, or `continuous`, one text that never ends.
        train_splits: of a dataset, the rows to learn from.
        validation_splits: of a dataset, the rows that decide which epoch is best.
        validation_fraction: of a text file, the share that decides.
        min_count: words or characters seen less often become UNKNOWN.
        max_tokens: longer sentences are cut while training.
        sequence_length: tokens of the windows that a running text is cut into.
        batch_size: sentences or windows a batch.
    """

    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    level: Level = "words"
    layout: TextLayout = "sentences"
    train_splits: tuple[str, ...] = ("train", "restval")
    validation_splits: tuple[str, ...] = ("val", "dev")
    validation_fraction: float = 0.05
    min_count: int = 5
    max_tokens: int = 200
    sequence_length: int = 128
    batch_size: int = 100

    def __post_init__(self) -> None:
        for name in ("min_count", "max_tokens", "sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"validation_fraction: expected a share above 0 and below 1, got {self.validation_fraction}"
            )


class LanguageModelObjective:
    """The log-probability of sentences, or of windows of a text."""

    score_name = "perplexity"

    def __init__(
        self,
        model: Captioner,
        training: TextBatches,
        validation: TextBatches,
        save: Callable[[Folder, Captioner, dict[str, Any]], object],
    ) -> None:
        self.model: Captioner = model
        self._training = training
        self._validation = validation
        self._save = save
        self._device = model.output.weight.device

    def batches(self, seed: int, epoch: int, first: int) -> Iterator[npt.NDArray[np.int64]]:
        return islice(self._training.epoch(seed, epoch), first, None)

    def steps(self) -> int:
        return self._training.count()

    def loss(self, batch: npt.NDArray[np.int64]) -> BatchLoss:
        """Mean negative log-probability a token; see `Objective.loss`."""
        log_probs = self._log_probs(batch, self._training.sentences_end)
        total = -log_probs.sum()
        return BatchLoss(total / len(log_probs), total.item(), len(log_probs))

    def validate(self) -> dict[str, float]:
        """Perplexity of the held-out text: exp(-sum ln p / tokens); a sentence's END is a token, as in captioning."""
        ends = self._validation.sentences_end
        return {"perplexity": perplexity(self._log_probs(batch, ends) for batch in self._validation.in_order())}

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        self._save(output, self.model, training)
        draw_curves(output, training["history"])

    def _log_probs(self, batch: npt.NDArray[np.int64], sentences_end: bool) -> Tensor:
        sentences = torch.from_numpy(batch).to(self._device)
        nothing = torch.zeros(1, 0, device=self._device)  # one image of no features, for all of them
        scores = self.model(nothing, sentences, sentences.new_zeros(len(sentences)))
        log_probs: Tensor = scores.log_probs
        # Windows are equally long, so that their last tokens are the END that the text does not have there.
        return log_probs if sentences_end else log_probs[: -len(sentences)]


def train_language_model(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: LanguageModelTrainingConfig,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains a language model, or goes on with a run that was stopped.

    Args:
        source: a features or manifest dataset, whose captions are learned; or a text file.
        output: the run's folder: the best epoch's checkpoint, the metrics, the curves, and the state to go on from.
        config: the language model and how it is trained.
        device: where.
        overwrite: replace a run of another configuration.
        progress: show a bar.

    Returns:
        One mapping an epoch, see `train`.

    Raises:
        DatasetError: the dataset is not complete or lacks sentences, or the text cannot be read or is too short.
    """
    corpus = open_corpus(
        source, config.layout, config.train_splits, config.validation_splits, config.validation_fraction
    )
    folder = Folder(output)
    claim_folder(folder, overwrite)
    target = resolve_device(device)
    vocabulary = Vocabulary.from_captions(corpus.training(), config.min_count, config.level)
    training = _make_batches(corpus.training(), vocabulary, config)
    validation = _make_batches(corpus.validation(), vocabulary, config)
    seed_everything(config.training.seed)
    model = build_language_model(config.model, len(vocabulary))
    model.initialize_bias(torch.from_numpy(vocabulary.log_frequencies()))
    save = partial(_save, vocabulary=vocabulary, corpus=corpus, config=config)
    objective = LanguageModelObjective(model.to(target), training, validation, save)
    return train(objective, config.training, folder, {"source": corpus.fingerprint, **to_dict(config)}, progress)


def _make_batches(texts: Iterator[str], vocabulary: Vocabulary, config: LanguageModelTrainingConfig) -> TextBatches:
    encoded = map(vocabulary.encode, texts)
    if config.layout == "continuous":
        return SequenceBatches(chain.from_iterable(encoded), config.sequence_length, config.batch_size)
    return SentenceBatches((ids[: config.max_tokens] for ids in encoded), config.batch_size)


def _save(
    output: Folder,
    model: Captioner,
    training: dict[str, Any],
    *,
    vocabulary: Vocabulary,
    corpus: Corpus,
    config: LanguageModelTrainingConfig,
) -> None:
    provenance = stamp_provenance({"source": corpus.fingerprint})
    save_language_model(
        output, model, config.model, vocabulary, config.layout, provenance=provenance, training=training
    )
