"""The result of decoding."""

from dataclasses import dataclass

__all__ = ["Candidate"]


@dataclass(frozen=True)
class Candidate:
    """One sentence of an n-best list.

    Attributes:
        token_ids: without START and END.
        log_prob: ln p(sentence | image): the sum over its tokens, whatever the strategy and `length_penalty`.
        token_count: tokens that `log_prob` covers: the words and END; no END if `max_tokens` cut the sentence off.
    """

    token_ids: list[int]
    log_prob: float
    token_count: int
