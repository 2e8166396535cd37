"""Reranks the candidate captions of an image by minimum Bayes risk (Kumar & Byrne 2004) on CIDEr-D.

    score(a) = sum_b p(b) ** (1 / temperature) CIDEr-D(a, b)

Here, a and b are candidates, and p is the captioner's probability.

With neighbors (the training images most similar to the image), the score is multiplied by the CIDEr-D of the candidate
against the reference captions of the neighbors, after Devlin et al. 2015 (arXiv 1505.04467).

With a mutual information weight w, the score is multiplied by (p(a | image) / p(a | mean features)) ** w, after Li et
al. 2016 (arXiv 1510.03055). This penalizes captions that fit any image. The mean features are those of the training
images.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from captionlib.config import configclass
from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import ImageState
from captionlib.models.decoding.cider_d import CiderD
from captionlib.models.decoding.datastore import Datastore, Neighbors
from captionlib.models.decoding.incremental import Candidate, IncrementalCaptioner, score_sentences

__all__ = ["RerankConfig", "Reranker", "rerank_candidates"]

Weights = npt.NDArray[np.float64]


@configclass
class RerankConfig:
    """How to rerank the candidates of the beam.

    Attributes:
        method: `mbr` ranks by minimum Bayes risk on CIDEr-D; `image_text` ranks by the similarity of caption and image,
            computed by a ranker (dual encoder for image-text retrieval); `none` keeps the order of the beam.
        temperature: candidates are weighted by p ** (1 / temperature); a low value favors the most probable ones.
            3 works well with a beam of 30. With neighbors, use 4 to 8 and a wider beam.
        pool_size: number of the beam's best candidates to rerank. If None, the whole beam is reranked.
        neighbors: number of similar training images to use; the candidates are compared with the references of these
            images. 60 works well. Requires the captioner's datastore (`captionlib build-datastore`).
        mutual_information_weight: exponent w of p(caption | image) / p(caption | mean features of the training images).
            A higher value favors captions that are specific to the image; 0.02 works well.
    """

    method: Literal["none", "mbr", "image_text"] = "none"
    temperature: PositiveFloat = 3.0
    pool_size: PositiveInt | None = None
    neighbors: NonNegativeInt = 0
    mutual_information_weight: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        used_fields = {"none": ("method",), "image_text": ("method", "pool_size")}.get(self.method)
        if used_fields is None:
            return
        for name, default in vars(RerankConfig(method="mbr")).items():
            if name not in used_fields and getattr(self, name) != default:
                raise ConfigError(
                    f"rerank: {name} {getattr(self, name)} has no effect with method {self.method}; set rerank.method "
                    "to mbr"
                )


class Reranker:
    """Reranks the candidates of many images.

    Raises:
        ConfigError: `neighbors` is set but there is no datastore, or `mutual_information_weight` is set but the
            captioner does not store the mean features of the training images.
    """

    def __init__(self, config: RerankConfig, captioner: IncrementalCaptioner, datastore: Datastore | None) -> None:
        if config.neighbors and datastore is None:
            raise ConfigError(
                f"decoding.rerank.neighbors {config.neighbors} needs the captioner's datastore, got none; build it "
                "with `captionlib build-datastore`, or set decoding.rerank.neighbors to 0"
            )
        self._config = config
        self._captioner = captioner
        self._datastore = datastore if config.neighbors else None
        self._cider = CiderD() if self._datastore is None else self._datastore.cider
        self._mean_features = captioner.encode_mean_features() if config.mutual_information_weight else None

    def rerank(
        self, pools: Sequence[Sequence[Candidate]], image_state: ImageState, image_ids: Sequence[str] | None
    ) -> list[list[Candidate]]:
        """Reranks the candidates of each image. An image with a known id is not its own neighbor."""
        neighbors: list[Neighbors] | list[None] = [None] * len(pools)
        if self._datastore is not None:
            vectors = image_state.features.cpu().numpy()
            neighbors = self._datastore.find_neighbors(vectors, self._config.neighbors, image_ids)
        factors: list[Weights] | list[None] = [None] * len(pools)
        if self._mean_features is not None:
            factors = self._compute_factors(pools, self._mean_features)
        return [
            rerank_candidates(pool, self._config.temperature, self._cider, image_neighbors, image_factors)
            for pool, image_neighbors, image_factors in zip(pools, neighbors, factors, strict=True)
        ]

    def _compute_factors(self, pools: Sequence[Sequence[Candidate]], mean_features: ImageState) -> list[Weights]:
        """Computes (p(a | image) / p(a | mean features)) ** w, divided by the largest value of each pool."""
        candidates = [candidate for pool in pools for candidate in pool]
        log_probs = np.array([candidate.log_prob for candidate in candidates])
        mean_log_probs = score_sentences(self._captioner, mean_features, candidates).cpu().numpy()
        gains = self._config.mutual_information_weight * (log_probs - mean_log_probs)
        ends = np.cumsum([len(pool) for pool in pools])
        per_image = [gains[end - len(pool) : end] for pool, end in zip(pools, ends, strict=True)]
        return [np.exp(image_gains - image_gains.max()) for image_gains in per_image]


def rerank_candidates(
    candidates: Sequence[Candidate],
    temperature: float,
    cider: CiderD,
    neighbors: Neighbors | None = None,
    factors: Weights | None = None,
) -> list[Candidate]:
    """Orders the candidates of one image by minimum Bayes risk. Ties, up to floating-point error, keep their order.

    `factors` are multiplied with the scores, `[candidates] float64`.
    """
    log_probs = np.array([candidate.log_prob for candidate in candidates])
    weights = np.exp((log_probs - log_probs.max()) / temperature)
    sentences = [candidate.token_ids for candidate in candidates]
    scores = cider.compare(sentences, sentences) @ (weights / weights.sum())
    if neighbors is not None:
        scores *= cider.compare(sentences, neighbors.references) @ neighbors.weights
    if factors is not None:
        scores *= factors
    return [candidates[index] for index in np.argsort(-scores.round(12), kind="stable")]
