"""How likely a captioner finds given sentences of one image: words that several begin with are read once."""

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
    """The log-probability of each sentence given the image: the sum over its tokens, `[sentences] float32`.

    Args:
        incremental: the captioner.
        image_state: of the image, the only one.
        sentences: of this or of other images; their own log-probabilities count for nothing.
    """
    if not sentences:
        return torch.zeros(0, device=incremental.device)
    lengths = torch.tensor([one.token_count for one in sentences], device=incremental.device)
    tokens = pad_sentences([[*one.token_ids, END][: one.token_count] for one in sentences]).to(incremental.device)
    total = torch.zeros(len(sentences), device=incremental.device)
    state, words = incremental.start(image_state), torch.tensor([END], device=incremental.device)
    alive = torch.arange(len(sentences), device=incremental.device)  # the sentences that have a token here
    beginning = torch.zeros_like(alive)  # of each, its row of the state
    for tick in range(tokens.shape[1]):
        log_probs, state = incremental.step(state, words)
        token = tokens[alive, tick]
        total[alive] += log_probs[beginning, token]
        goes_on = lengths[alive] > tick + 1
        alive, classes = alive[goes_on], log_probs.shape[1]
        longer, beginning = torch.unique(beginning[goes_on] * classes + token[goes_on], return_inverse=True)
        state, words = state.select(longer // classes), longer % classes
    return total
