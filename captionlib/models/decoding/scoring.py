"""Scores given sentences of one image with a captioner; common beginnings are read once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from captionlib.data.text.vocabulary import END
from captionlib.models.captioners.captioner import ImageState
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.decoding.candidate import Candidate
from captionlib.models.decoding.incremental import IncrementalCaptioner

__all__ = ["score_sentences"]


@torch.inference_mode()
def score_sentences(
    incremental: IncrementalCaptioner, image_state: ImageState, sentences: Sequence[Candidate]
) -> Tensor:
    """Computes the log-probability of each sentence given the image: the sum over its tokens, `[sentences] float32`.

    Args:
        incremental: the captioner.
        image_state: of a single image.
        sentences: of this or of other images; their own log-probabilities are ignored.
    """
    device = incremental.device
    if not sentences:
        return torch.zeros(0, device=device)
    lengths = torch.tensor([sentence.token_count for sentence in sentences], device=device)
    tokens = pad_sentences([[*sentence.token_ids, END][: sentence.token_count] for sentence in sentences]).to(device)
    total = torch.zeros(len(sentences), device=device)
    state, words = incremental.initial_state(image_state), torch.tensor([END], device=device)
    remaining = torch.arange(len(sentences), device=device)  # sentences with a token at this time step
    row = torch.zeros_like(remaining)  # of the state: the beginning of each of these sentences
    for step in range(tokens.shape[1]):
        log_probs, state = incremental.step(state, words)
        token = tokens[remaining, step]
        total[remaining] += log_probs[row, token]
        continues = lengths[remaining] > step + 1
        remaining, classes = remaining[continues], log_probs.shape[1]
        beginnings, row = torch.unique(row[continues] * classes + token[continues], return_inverse=True)
        state, words = state.select(beginnings // classes), beginnings % classes
    return total
