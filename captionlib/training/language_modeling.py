"""Trains language models on sentences or on continuous text. A language model is a captioner without image features."""

import os
from collections.abc import Iterator
from dataclasses import field
from itertools import chain, islice
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from captionlib.config import configclass, to_dict
from captionlib.data.batches.text import SentenceBatches, SequenceBatches, TextBatches
from captionlib.data.text.corpora import TextLayout, open_corpus
from captionlib.data.text.vocabulary import END, PAD, Tokenization, Vocabulary
from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import CaptionerNetwork
from captionlib.models.captioners.language_model import LanguageModelConfig, build_language_model
from captionlib.models.checkpoints.checkpoint import save_language_model
from captionlib.models.checkpoints.folder import add_versions_and_time
from captionlib.models.devices import resolve_device
from captionlib.storage.folders import Folder
from captionlib.training.loop import TrainingConfig, train
from captionlib.training.objective import BatchLoss, Objective, SaveCheckpoint, compute_perplexity
from captionlib.training.state import check_run_folder, delete_run

__all__ = ["LanguageModelObjective", "LanguageModelTrainingConfig", "train_language_model"]


@configclass
class LanguageModelTrainingConfig:
    """Configuration of a language model, its training text and its training.

    Attributes:
        model: the architecture.
        training: settings of the training loop.
        tokenization: what a token is: `words`, `characters`, or subwords (`bpe` or `unigram`), which are trained on the
            text and require `pip install captionlib[subwords]`.
        layout: the layout of a text file, `sentences` (one per line) or `continuous` (one long text).
        train_splits: the training splits, if the text is the captions of a dataset.
        validation_splits: the splits that select the best epoch, if the text is the captions of a dataset.
        validation_fraction: the fraction of a text file that is held out as validation data to select the best epoch.
        min_count: words or characters with fewer occurrences than this are replaced by the UNKNOWN token.
        vocabulary_size: the maximum number of subwords.
        max_tokens: the maximum number of tokens of a sentence in training; longer sentences are truncated. The
            perplexity is that of whole sentences.
        sequence_length: the number of tokens in each of the sequences that a continuous text is split into.
        batch_size: sentences or sequences per batch.
    """

    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    tokenization: Tokenization = "words"
    layout: TextLayout = "sentences"
    train_splits: tuple[str, ...] = ("train", "restval")
    validation_splits: tuple[str, ...] = ("val", "dev")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    min_count: PositiveInt = 5
    vocabulary_size: PositiveInt = 8000
    max_tokens: PositiveInt = 200
    sequence_length: PositiveInt = 128
    batch_size: PositiveInt = 100


class LanguageModelObjective(Objective[npt.NDArray[np.int64], CaptionerNetwork]):
    """Maximizes the log-probability of sentences, or of sequences of a continuous text."""

    def __init__(
        self, model: CaptionerNetwork, training: TextBatches, validation: TextBatches, save: SaveCheckpoint
    ) -> None:
        super().__init__(model, save)
        self._training = training
        self._validation = validation

    def batches(self, seed: int, epoch: int, first_batch: int) -> Iterator[npt.NDArray[np.int64]]:
        return islice(self._training.shuffled(seed, epoch), first_batch, None)

    def steps_per_epoch(self) -> int:
        return self._training.count()

    def loss(self, batch: npt.NDArray[np.int64]) -> BatchLoss:
        log_probs = self._score(batch)
        total = -log_probs.sum()
        return BatchLoss(total / len(log_probs), total.item(), len(log_probs))

    def validate(self) -> dict[str, float]:
        return {"perplexity": compute_perplexity(map(self._score, self._validation.in_order()))}

    def _score(self, batch: npt.NDArray[np.int64]) -> Tensor:
        sentences = torch.from_numpy(batch).to(self._device)
        no_image = torch.zeros(1, 0, device=self._device)  # all sentences share one image without features
        scores = self.model(no_image, sentences, sentences.new_zeros(len(sentences)))
        log_probs: Tensor = scores.log_probs
        # The model appends END to each row, but continuous text has no END. These entries are the last ones, because
        # log_probs is ordered by time step and all sequences of a continuous text are equally long.
        return log_probs if self._training.rows_are_sentences else log_probs[: -len(sentences)]


def train_language_model(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: LanguageModelTrainingConfig,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains a language model, or resumes an interrupted run. `train_captioner` describes the other arguments.

    `source` is a text file, or a features dataset or manifest (a list of images) whose captions are the text.

    Raises:
        DatasetError: the dataset is incomplete or has no captions, or the text is unreadable or too short.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:  # set by torchrun
        raise ConfigError(f"language models are trained by one process, got {processes}; start it without torchrun")
    model_device = resolve_device(device)
    corpus = open_corpus(
        source, config.layout, config.train_splits, config.validation_splits, config.validation_fraction
    )
    folder = Folder(output)
    check_run_folder(folder)
    vocabulary = Vocabulary.from_captions(
        corpus.read_training(), config.min_count, config.tokenization, config.vocabulary_size
    )
    training = _make_batches(corpus.read_training(), vocabulary, config, config.max_tokens)
    validation = _make_batches(corpus.read_validation(), vocabulary, config)
    torch.manual_seed(config.training.seed)
    model = build_language_model(config.model, len(vocabulary))
    model.initialize_bias(torch.from_numpy(vocabulary.log_frequencies()))

    def save(output: Folder, history: dict[str, Any]) -> None:
        provenance = add_versions_and_time({"source": corpus.fingerprint})
        save_language_model(
            output, model, config.model, vocabulary, config.layout, provenance=provenance, training=history
        )

    objective = LanguageModelObjective(model.to(model_device), training, validation, save)
    objective.unigram_perplexity = vocabulary.unigram_perplexity(
        [*row[row != PAD].tolist(), *([END] if validation.rows_are_sentences else [])]
        for batch in validation.in_order()
        for row in batch
    )
    if overwrite:
        delete_run(folder)
    return train(objective, config.training, folder, {"source": corpus.fingerprint, **to_dict(config)}, progress)


def _make_batches(
    texts: Iterator[str], vocabulary: Vocabulary, config: LanguageModelTrainingConfig, max_tokens: int | None = None
) -> TextBatches:
    encoded = map(vocabulary.encode, texts)
    if config.layout == "continuous":
        return SequenceBatches(chain.from_iterable(encoded), config.sequence_length, config.batch_size)
    sentences = (ids[:max_tokens] for ids in encoded)
    return SentenceBatches(sentences, config.batch_size, config.batch_size * config.max_tokens)
