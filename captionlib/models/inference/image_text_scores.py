"""Scores how well captions fit their images.

A ranker (dual encoder) computes embeddings of the caption and the image. The score is their cosine similarity.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from captionlib.errors import ConfigError
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.families.captioner import Caption
from captionlib.models.families.ranker import RankingModel

__all__ = ["check_needs_no_ranker", "score_captions"]


def check_needs_no_ranker(decoding: DecodingConfig) -> None:
    """Raises ConfigError if decoding reranks the candidates with a ranker."""
    if decoding.rerank.method == "image_text":
        raise ConfigError(
            "decoding.rerank.method image_text needs a ranker, got none; specify one, or set the method to none"
        )


def score_captions(
    candidates: Sequence[Sequence[Caption]],
    vectors: npt.NDArray[np.float32],
    ranker: RankingModel,
    decoding: DecodingConfig,
) -> list[list[Caption]]:
    """Adds `image_text_score` to all candidates.

    If `decoding.rerank.method` is `image_text`, also sorts the candidates by it and keeps the first `n_best`.
    `vectors` are the ranker's embeddings of the images, `[images, size]`.
    """
    texts = list({caption.text: None for per_image in candidates for caption in per_image})
    embeddings = dict(zip(texts, ranker.encode_sentences(texts), strict=True))
    scored = [
        [replace(caption, image_text_score=float(embeddings[caption.text] @ vector)) for caption in per_image]
        for per_image, vector in zip(candidates, vectors, strict=True)
    ]
    if decoding.rerank.method != "image_text":
        return scored
    return [
        sorted(per_image, key=lambda caption: caption.image_text_score or 0.0, reverse=True)[: decoding.n_best]
        for per_image in scored
    ]
