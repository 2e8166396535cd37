"""CIDEr of the captions that a captioner writes for held-out images, as it stands in the middle of its training."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from captionlib.data.batches.captions import read_features, read_references
from captionlib.data.batches.images import ImageBatches
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import ConfigError
from captionlib.evaluation.caption_scores import CiderScorer
from captionlib.models.captioners.captioner import Captioner
from captionlib.models.captioners.end_to_end import ImageCaptioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder

__all__ = ["CiderValidation", "ImageCiderValidation"]

_IMAGES = 100  # decoded together


class CiderValidation:
    """The validation images of a features dataset and what people said of them.

    Args:
        dataset: `features/`, complete.
        splits: which rows; those without sentences are left out.
        vocabulary: of the captioner.
        decoding: how its captions are searched for.

    Raises:
        ConfigError: there is no Java, which CIDEr's tokenizer needs; or there are to be neighbors, which a captioner
            that is still learning does not remember.
        DatasetError: there are fewer than two images with sentences.
    """

    def __init__(
        self, dataset: ShardedDataset, splits: Sequence[str], vocabulary: Vocabulary, decoding: DecodingConfig
    ) -> None:
        self._dataset = dataset
        self._splits = frozenset(splits)
        self._vocabulary = vocabulary
        self._decoding = _without_neighbours(decoding)
        self._scorer = CiderScorer(list(read_references(dataset, splits)))

    def score(self, model: Captioner) -> float:
        """CIDEr of the captions that the model writes now."""
        decoder = Decoder(model, self._decoding)
        captions = [
            self._vocabulary.decode(candidates[0].token_ids)
            for features in self._images()
            for candidates in decoder.decode(features)
        ]
        return self._scorer.score(captions)

    def _images(self) -> Iterator[npt.NDArray[np.float32]]:
        for shard in range(self._dataset.shards):
            for rows, captions in read_features(self._dataset, shard, self._splits):
                kept = rows[[bool(sentences) for sentences in captions]]
                for begin in range(0, len(kept), _IMAGES):
                    yield kept[begin : begin + _IMAGES].astype(np.float32)


class ImageCiderValidation:
    """The same where the captioner sees the images themselves. One that cannot be had counts as an empty caption.

    Args:
        rows: of the manifest, see `read_rows`.
        batches: their images.
        vocabulary: of the captioner.
        decoding: how its captions are searched for.

    Raises:
        ConfigError: there is no Java, which CIDEr's tokenizer needs; or there are to be neighbors, which a captioner
            that is still learning does not remember.
        DatasetError: there are fewer than two images.
    """

    def __init__(self, rows: pa.Table, batches: ImageBatches, vocabulary: Vocabulary, decoding: DecodingConfig) -> None:
        self._ids: list[str] = rows["image_id"].to_pylist()
        self._batches = batches
        self._vocabulary = vocabulary
        self._decoding = _without_neighbours(decoding)
        self._scorer = CiderScorer(rows["captions"].to_pylist())

    def score(self, model: ImageCaptioner) -> float:
        """CIDEr of the captions that the model writes now."""
        decoder = Decoder(model.captioner, self._decoding)
        captions: dict[str, str] = {}
        for rows, pixels in self._batches.images_in_order():
            features = model.encoder.encode(torch.from_numpy(pixels).to(model.encoder.scale.device)).float()
            for row, candidates in zip(rows, decoder.decode(features), strict=True):
                captions[row["image_id"]] = self._vocabulary.decode(candidates[0].token_ids)
        return self._scorer.score([captions.get(image_id, "") for image_id in self._ids])


def _without_neighbours(decoding: DecodingConfig) -> DecodingConfig:
    if decoding.rerank.neighbors:
        raise ConfigError(
            f"decoding.rerank.neighbors: expected 0 while a captioner learns, got {decoding.rerank.neighbors}; it remembers "
            "what it learned from afterwards (captionlib build-datastore)"
        )
    return decoding
