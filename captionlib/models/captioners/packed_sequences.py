"""Sentences of different lengths: padded into a matrix, and laid out tick by tick so that padding is not computed.

Batches of sentences of like length have nothing to gain beside this layout: what a step computes is the tokens alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captionlib.data.text.vocabulary import END, PAD

__all__ = ["PackedSequences", "pack_sequences", "pad_sentences"]


class PackedSequences(NamedTuple):
    """Sentences of different lengths without their padding: all first tokens, then all second tokens, and so on.

    Attributes:
        words: `[tokens] int64`, what is read: START, then the words.
        targets: `[tokens] int64`, what is to be foretold: the words, then END.
        sentences: `[tokens] int64`, the sentence of each token.
        order: `[sentences] int64`, from the longest sentence to the shortest: their order within each tick.
        sizes: how many sentences reach each tick.
    """

    words: Tensor
    targets: Tensor
    sentences: Tensor
    order: Tensor
    sizes: list[int]


def pad_sentences(sentences: Sequence[Sequence[int]]) -> Tensor:
    """Word ids of several sentences as one matrix, `[sentences, longest] int64`, filled with `PAD`."""
    rows = [torch.tensor(sentence, dtype=torch.int64) for sentence in sentences]
    return pad_sequence(rows, batch_first=True, padding_value=PAD)


def pack_sequences(captions: Tensor) -> PackedSequences:
    """Sentences as `pad_sentences` gives them, `[sentences, longest] int64`, without their padding."""
    lengths, order = (captions != PAD).sum(1).sort(descending=True, stable=True)
    boundary = captions.new_full((len(captions), 1), END)
    captions = captions[order]
    words = torch.cat([boundary, captions], 1).t()  # [ticks + 1, sentences]
    targets = torch.cat([captions, torch.full_like(boundary, PAD)], 1).scatter(1, lengths[:, None], END).t()
    real = targets != PAD
    sentences = order.expand_as(real)[real]
    return PackedSequences(words[real], targets[real], sentences, order, real[: int(lengths[0]) + 1].sum(1).tolist())
