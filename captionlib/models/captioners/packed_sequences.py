"""Converts sentences of different lengths to a padded matrix, and packs them, so that no padding is computed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captionlib.data.text.vocabulary import END, PAD

__all__ = ["PackedSequences", "pack_sequences", "pad_sentences"]


class PackedSequences(NamedTuple):
    """Sentences without padding: all first tokens, then all second tokens, and so on.

    Attributes:
        words: `[tokens] int64`, the inputs: START (the same id as END), then the words.
        targets: `[tokens] int64`, the outputs: the words, then END.
        sentences: `[tokens] int64`, the index of each token's sentence.
        order: `[sentences] int64`, sentence indices from longest to shortest, the order within each time step.
        batch_sizes: the number of sentences that reach each time step.
    """

    words: Tensor
    targets: Tensor
    sentences: Tensor
    order: Tensor
    batch_sizes: list[int]


def pad_sentences(sentences: Sequence[Sequence[int]]) -> Tensor:
    """Returns token ids as a matrix, `[sentences, longest] int64`, padded with `PAD`."""
    rows = [torch.tensor(sentence, dtype=torch.int64) for sentence in sentences]
    return pad_sequence(rows, batch_first=True, padding_value=PAD)


def pack_sequences(captions: Tensor) -> PackedSequences:
    """Packs the output of `pad_sentences`, `[sentences, longest] int64`."""
    lengths, order = (captions != PAD).sum(1).sort(descending=True, stable=True)
    end_column = captions.new_full((len(captions), 1), END)
    captions = captions[order]
    words = torch.cat([end_column, captions], 1).t()  # [time steps, sentences]
    targets = torch.cat([captions, torch.full_like(end_column, PAD)], 1).scatter(1, lengths[:, None], END).t()
    is_token = targets != PAD
    sentences = order.expand_as(is_token)[is_token]
    batch_sizes = is_token[: int(lengths[0]) + 1].sum(1).tolist()
    return PackedSequences(words[is_token], targets[is_token], sentences, order, batch_sizes)
