"""Writes sentences for images: searches for the likeliest, or draws them, by configuration."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.captioners.captioner import Captioner, ImageState
from captionlib.models.decoding.beam_search import search_beam
from captionlib.models.decoding.candidate import Candidate
from captionlib.models.decoding.cider_d import CiderD
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.constraints import Constraints, forbidden_ids
from captionlib.models.decoding.datastore import Datastore
from captionlib.models.decoding.incremental import IncrementalCaptioner
from captionlib.models.decoding.rerank import Neighbors, rerank_candidates
from captionlib.models.decoding.sampling import sample_captions
from captionlib.models.decoding.scoring import score_sentences
from captionlib.models.devices import halve_on_out_of_memory

__all__ = ["Decoder"]


class Decoder:
    """Writes sentences for images with a snapshot of a captioner. After a change of the weights make a new one.

    Args:
        model: the captioner; decoding runs on its device.
        config: how sentences are searched for, or drawn.
        dtype: what the captioner computes in, float32 or bfloat16; probabilities are summed in float32.
        vocabulary: the captioner's words; only `forbidden_words` need it.
        datastore: what the captioner remembers; only `neighbors` need it.

    Raises:
        ConfigError: words are forbidden that are no single words, or without a vocabulary; or there are to be
            neighbors, and no memory; or specificity counts, and the captioner knows no average image.
    """

    def __init__(
        self,
        model: Captioner,
        config: DecodingConfig | None = None,
        dtype: torch.dtype = torch.float32,
        vocabulary: Vocabulary | None = None,
        datastore: Datastore | None = None,
    ) -> None:
        self.config = config or DecodingConfig()
        if self.config.rerank.neighbors and datastore is None:
            raise ConfigError(
                f"decoding: neighbors {self.config.rerank.neighbors} are for a captioner that remembers what it learned "
                "from, got none here; set decoding.rerank.neighbors to 0"
            )
        self._datastore = datastore if self.config.rerank.neighbors else None
        self._cider = CiderD() if self._datastore is None else self._datastore.cider
        self._incremental = IncrementalCaptioner(model, dtype)
        self._average = (
            self._incremental.encode_average_image() if self.config.rerank.mutual_information_weight else None
        )
        forbidden = torch.tensor(
            forbidden_ids(self.config.forbidden_words, vocabulary), device=self._incremental.device
        )
        self._constraints = Constraints(self.config, forbidden)

    @torch.inference_mode()
    def decode(
        self,
        features: Tensor | npt.NDArray[np.float32],
        keys: Sequence[str] | None = None,
        prefix: Sequence[int] = (),
    ) -> list[list[Candidate]]:
        """Sentences for each image, the best first; a batch that does not fit into the device's memory is halved.

        UNKNOWN is never written; its probability is not given to others, so log-probabilities remain the model's own.

        Args:
            features: `[images, feature_size]` or `[images, positions, channels]`, as the encoder gave them; 100 images
                are a good batch.
            keys: what tells each image from others, such as its id: with the seed it decides what is drawn for the
                image, whatever else is in the batch, and no image is a neighbour of its own. None draws by the
                features.
            prefix: word ids that every sentence begins with; its log-probability counts them.

        Returns:
            For each image one to `n_best` candidates, all different.

        Raises:
            DatasetError: features are infinite or no numbers, as after an overflow of float16.
            ConfigError: the prefix is as long as sentences may be.
        """
        features = torch.as_tensor(features)
        finite = features.isfinite().flatten(1).all(1)
        if not finite.all():
            rows = ", ".join(map(str, (~finite).nonzero()[:5, 0].tolist()))
            raise DatasetError(
                f"features: expected finite numbers, got others in row {rows} of the batch; extract anew"
            )
        if len(prefix) >= self.config.max_tokens:
            raise ConfigError(
                f"decoding: expected a prefix of fewer words than max_tokens {self.config.max_tokens}, got "
                f"{len(prefix)}; allow longer sentences or give fewer words"
            )

        def write(part: slice) -> list[list[Candidate]]:
            return self._write(features[part], None if keys is None else keys[part], prefix)

        return [some for part in halve_on_out_of_memory(write, len(features)) for some in part]

    def _write(self, features: Tensor, keys: Sequence[str] | None, prefix: Sequence[int]) -> list[list[Candidate]]:
        image_state = self._incremental.encode_images(features)
        start = self._incremental.begin(image_state, prefix)
        if self.config.strategy == "beam":
            found = search_beam(self._incremental, self.config, self._constraints, start)
        else:
            drawn_by = _keys_of(features) if keys is None else [key.encode() for key in keys]
            found = sample_captions(self._incremental, self.config, self._constraints, start, drawn_by)
        pools = [self._likeliest(candidates) for candidates in found]
        if self.config.rerank.method == "mbr":
            pools = self._order_by_consensus(pools, image_state, keys)
        return [pool[: self.config.n_best] for pool in pools]

    def _likeliest(self, candidates: list[Candidate]) -> list[Candidate]:
        exponent = self.config.length_penalty
        different: dict[tuple[int, ...], Candidate] = {}
        for candidate in candidates:
            different.setdefault((candidate.token_count, *candidate.token_ids), candidate)
        ordered = sorted(different.values(), key=lambda one: one.log_prob / one.token_count**exponent, reverse=True)
        return ordered[: self.config.pool_size]

    def _order_by_consensus(
        self, pools: list[list[Candidate]], image_state: ImageState, keys: Sequence[str] | None
    ) -> list[list[Candidate]]:
        neighbors: list[Neighbors] | list[None] = [None] * len(pools)
        if self._datastore is not None:
            neighbors = self._datastore.find_neighbors(
                image_state.vector.cpu().numpy(), self.config.rerank.neighbors, keys
            )
        factors = [None] * len(pools) if self._average is None else self._specificity_of(pools, self._average)
        return [
            rerank_candidates(pool, self.config.rerank.temperature, self._cider, of_image, factor)
            for pool, of_image, factor in zip(pools, neighbors, factors, strict=True)
        ]

    def _specificity_of(self, pools: list[list[Candidate]], average: ImageState) -> list[npt.NDArray[np.float64]]:
        together = [candidate for pool in pools for candidate in pool]
        here = np.array([candidate.log_prob for candidate in together])
        average_log_probs = score_sentences(self._incremental, average, together).cpu().numpy()
        gains = self.config.rerank.mutual_information_weight * (here - average_log_probs)
        ends = np.cumsum([len(pool) for pool in pools])
        of_pools = [gains[end - len(pool) : end] for pool, end in zip(pools, ends, strict=True)]
        return [np.exp(some - some.max()) for some in of_pools]


def _keys_of(features: Tensor) -> list[bytes]:
    return [row.tobytes() for row in features.to("cpu", torch.float32).numpy()]
