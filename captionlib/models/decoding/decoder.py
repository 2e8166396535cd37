"""Generates captions for images by beam search or sampling."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.captioners.captioner import CaptionerNetwork
from captionlib.models.decoding.beam_search import search_beam
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.constraints import Constraints, find_forbidden_ids
from captionlib.models.decoding.datastore import Datastore
from captionlib.models.decoding.incremental import Candidate, IncrementalCaptioner
from captionlib.models.decoding.rerank import Reranker
from captionlib.models.decoding.sampling import sample_captions
from captionlib.models.devices import halve_on_out_of_memory

__all__ = ["Decoder"]


class Decoder:
    """Generates captions with a snapshot of a captioner. Later changes to the captioner's weights have no effect.

    Args:
        model: the captioner; decoding runs on its device.
        dtype: dtype of the captioner's computation, float32 or bfloat16.
        vocabulary: the captioner's vocabulary; required if `forbidden_words` is set, or if tokens are not words.
        datastore: features and references of the captioner's training images; required only for `rerank.neighbors`.

    Raises:
        ConfigError: `forbidden_words` or `rerank` cannot be applied; see `find_forbidden_ids` and `Reranker`.
    """

    def __init__(
        self,
        model: CaptionerNetwork,
        config: DecodingConfig | None = None,
        dtype: torch.dtype = torch.float32,
        vocabulary: Vocabulary | None = None,
        datastore: Datastore | None = None,
    ) -> None:
        config = config or DecodingConfig()
        self.config = replace(config, max_tokens=config.find_max_tokens(vocabulary.unit if vocabulary else "words"))
        self._to_key: Callable[[list[int]], Hashable] = tuple  # candidates with the same key are duplicates
        if vocabulary is not None and vocabulary.unit == "subwords":
            self._to_key = vocabulary.decode  # several sequences of subwords may spell the same text
        self._captioner = IncrementalCaptioner(model, dtype)
        self._reranker: Reranker | None = None
        if self.config.rerank.method == "mbr":
            self._reranker = Reranker(self.config.rerank, self._captioner, datastore)
        forbidden_ids = find_forbidden_ids(self.config.forbidden_words, vocabulary)
        self._constraints = Constraints(self.config, torch.tensor(forbidden_ids, device=self._captioner.device))

    @torch.inference_mode()
    def decode(
        self,
        features: Tensor | npt.NDArray[np.float32],
        image_ids: Sequence[str] | None = None,
        prefix: Sequence[int] = (),
    ) -> list[list[Candidate]]:
        """Generates captions for each image, best first. Batches that do not fit into memory are halved.

        UNKNOWN, which stands for rare words, is never generated. Its probability is not redistributed to other words.

        Args:
            features: `[images, feature_size]` or `[images, positions, channels]`, from the encoder.
            image_ids: ids of the images. An image's id and the seed determine its samples. A training image with the
                same id is not used as a neighbor. If None, samples depend on the features instead of the id.
            prefix: token ids that every sentence begins with; log-probabilities include them.

        Returns:
            One to `n_best` distinct candidates per image. If `rerank.method` is `image_text`, up to
            `config.candidate_count` candidates, which `score_captions` reranks.

        Raises:
            DatasetError: features are infinite or NaN, for example after a float16 overflow.
            ConfigError: the prefix has `max_tokens` tokens or more.
        """
        features = torch.as_tensor(features)
        finite = features.isfinite().flatten(1).all(1)
        if not finite.all():
            rows = ", ".join(map(str, (~finite).nonzero()[:5, 0].tolist()))
            raise DatasetError(
                f"features: expected finite values, got infinity or NaN in row {rows} of the batch; extract them again"
            )
        if len(prefix) >= self.config.find_max_tokens():
            raise ConfigError(
                f"decoding: expected a prefix of fewer tokens than max_tokens {self.config.max_tokens}, got "
                f"{len(prefix)}; raise max_tokens or shorten the prefix"
            )

        def decode_part(part: slice) -> list[list[Candidate]]:
            return self._decode_batch(features[part], None if image_ids is None else image_ids[part], prefix)

        parts = halve_on_out_of_memory(decode_part, len(features))
        return [candidates for part in parts for candidates in part]

    def _decode_batch(
        self, features: Tensor, image_ids: Sequence[str] | None, prefix: Sequence[int]
    ) -> list[list[Candidate]]:
        image_state = self._captioner.encode_images(features)
        start = self._captioner.begin(image_state, prefix)
        if self.config.strategy == "beam":
            per_image = search_beam(self._captioner, self.config, self._constraints, start)
        else:
            if image_ids is None:
                seed_keys = [row.tobytes() for row in features.to("cpu", torch.float32).numpy()]
            else:
                seed_keys = [image_id.encode() for image_id in image_ids]
            per_image = sample_captions(self._captioner, self.config, self._constraints, start, seed_keys)
        pools = [self._select_pool(candidates) for candidates in per_image]
        if self._reranker is not None:
            pools = self._reranker.rerank(pools, image_state, image_ids)
        if self.config.rerank.method == "image_text":
            return pools
        return [pool[: self.config.n_best] for pool in pools]

    def _select_pool(self, candidates: list[Candidate]) -> list[Candidate]:
        """Returns the best distinct candidates of an image."""
        exponent = self.config.length_penalty
        ranked = sorted(candidates, key=lambda each: each.log_prob / each.token_count**exponent, reverse=True)
        distinct: dict[Hashable, Candidate] = {}
        for candidate in ranked:
            # `token_count` includes END, and `token_ids` never does. A truncated caption has no END, so both are equal.
            is_truncated = candidate.token_count == len(candidate.token_ids)
            distinct.setdefault((is_truncated, self._to_key(candidate.token_ids)), candidate)
        return list(distinct.values())[: self.config.candidate_count]
