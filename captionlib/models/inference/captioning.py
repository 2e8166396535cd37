"""Generates captions from image features, or from images by running the encoder in the same pass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from cachetools import LRUCache, cached
from pydantic import PositiveInt

from captionlib.config import configclass
from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.images.loading import LoadingConfig
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, captions_schema
from captionlib.data.shards.stages import ProcessRows
from captionlib.errors import CheckpointError, ConfigError, ImageError
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.devices import resolve_device
from captionlib.models.families.captioner import Caption, CaptionModel, GenerateCaptions, open_captioner
from captionlib.models.families.model import InputTransform
from captionlib.models.families.ranker import RankingModel
from captionlib.models.inference.embedding import SHARED_RANKERS, build_embedding_rows
from captionlib.models.inference.extraction import EncodedRows
from captionlib.models.inference.image_text_scores import check_needs_no_ranker, score_captions
from captionlib.models.inference.model_inputs import open_input_loader
from captionlib.models.inference.shared_models import CheckpointCache, CheckpointVersion

__all__ = [
    "SHARED_CAPTIONERS",
    "CaptionGeneration",
    "GenerationConfig",
    "build_caption_rows",
    "caption_images",
    "require_attention",
]

SHARED_CAPTIONERS: CheckpointCache[CaptionModel] = CheckpointCache(open_captioner)

Row = dict[str, Any]


@configclass
class GenerationConfig:
    """Configuration of caption generation.

    Attributes:
        decoding: beam search or sampling. An image's samples depend only on its id and the seed.
        dtype: dtype of the captioner's computation.
        batch_size: images per batch of the captioner.
        loading: how to fetch and decode images, if captions are generated from images.
        encoder_batch_size: images per batch of the encoder, if captions are generated from images.
        attention_maps: store the attention weights of each token of the best caption; requires a captioner with
            attention.
        prompt: text that the captioner continues or answers, if it accepts prompts.
    """

    decoding: DecodingConfig = field(default_factory=lambda: DecodingConfig(n_best=5))
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: PositiveInt = 100
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    encoder_batch_size: PositiveInt = 32
    attention_maps: bool = False
    prompt: str | None = None

    def __post_init__(self) -> None:
        if self.attention_maps and self.decoding.rerank.method == "image_text":
            raise ConfigError(
                "attention_maps: the captioner computes them for its most probable caption, so they cannot be combined "
                "with decoding.rerank.method image_text; set only one of the two"
            )


def require_attention(captioner: CaptionModel, address: str) -> int:
    """Returns the number of positions of the captioner's attention maps; raises CheckpointError if it has none."""
    if captioner.attention_positions is None:
        raise CheckpointError(
            f"{address}: attention_maps needs a captioner with attention to a feature map, got one without; leave "
            "attention_maps out, or train a captioner with captioner.attention_size on spatial feature maps"
        )
    return captioner.attention_positions


@dataclass(frozen=True)
class CaptionGeneration:
    """Pipeline stage that generates a captions dataset from a features dataset or a manifest (list of images)."""

    config: GenerationConfig
    captioner: CheckpointVersion
    description: Mapping[str, Any]  # expected `CaptionModel.describe_generation`; a worker fails if its own differs
    input_transform: InputTransform | None = None  # None if the dataset contains features
    device: str = "auto"
    threads: int | None = None  # CPU threads of the models; None for PyTorch's default
    ranker: CheckpointVersion | None = None  # scores how well the captions fit the images
    ranker_input_transform: InputTransform | None = None
    embed: bool = False  # whether the ranker's embeddings of the images are a second output

    @property
    def columns(self) -> Sequence[str]:
        names = ["image_id", "uri", "version", "split"]
        return names if self.input_transform else [*names, "width", "height", "content_hash", "features"]

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        config = self.config
        captioner = SHARED_CAPTIONERS.get(self.captioner, self.device)
        self.captioner.require_unchanged("settings", self.description, captioner.describe_generation(config))
        generate = _prepare_once(self.captioner, config, self.description.get("datastore"), self.device)
        ranker = SHARED_RANKERS.get(self.ranker, self.device) if self.ranker else None
        models = [captioner, *([] if ranker is None else [ranker])]
        transforms = [self.input_transform, self.ranker_input_transform][: len(models)]
        with open_input_loader(
            transforms, models, config.loading, config.encoder_batch_size, self.device, self.threads
        ) as load_features:
            yield lambda batches, report_failure: _caption_batches(
                load_features(batches, report_failure), generate, config, ranker, self.embed
            )


def _caption_batches(
    encoded: EncodedRows,
    generate: GenerateCaptions,
    config: GenerationConfig,
    ranker: RankingModel | None = None,
    embed: bool = False,
) -> Iterator[tuple[pa.RecordBatch, ...]]:
    for rows, (inputs, *ranker_inputs) in _rebatch(encoded, config.batch_size):
        captions = generate(inputs, [row["image_id"] for row in rows])
        if ranker is None:
            yield (build_caption_rows(rows, captions),)
            continue
        vectors = ranker.encode_images(ranker_inputs[0])
        scored = build_caption_rows(rows, score_captions(captions, vectors, ranker, config.decoding))
        yield (scored, build_embedding_rows(rows, vectors)) if embed else (scored,)


_prepared_captioners: LRUCache[object, GenerateCaptions] = LRUCache(1)


@cached(_prepared_captioners, condition=Condition())  # threads wait while one prepares
def _prepare_once(
    checkpoint: CheckpointVersion, config: GenerationConfig, _datastore: str | None, device: str
) -> GenerateCaptions:
    """Prepares a captioner once per process, and again if the fingerprint of its datastore changes."""
    return SHARED_CAPTIONERS.get(checkpoint, device).prepare(config)


def build_caption_rows(rows: Sequence[Row], candidates: Sequence[Sequence[Caption]]) -> pa.RecordBatch:
    """Returns rows of a captions dataset from n-best lists."""
    best = [per_image[0] for per_image in candidates]
    maps = [caption.attention for caption in best if caption.attention is not None]
    has_scores = best[0].image_text_score is not None
    schema = captions_schema(maps[0].shape[1] if maps else None, has_scores)
    columns = {
        **{name: [row.get(name) for row in rows] for name in schema.names[: schema.names.index("caption")]},
        "caption": [caption.text for caption in best],
        "log_prob": [caption.log_prob for caption in best],
        "tokens": [caption.token_count for caption in best],
        "candidates": [[_to_candidate(caption) for caption in per_image] for per_image in candidates],
    }
    arrays = [pa.array(values, schema.field(name).type) for name, values in columns.items()]
    if maps:
        offsets = pa.array(np.cumsum([0, *map(len, maps)], dtype=np.int32))
        vectors = numpy_to_vectors(np.concatenate(maps))
        arrays.append(pa.ListArray.from_arrays(offsets, vectors, type=schema.field("attention").type))
    if has_scores:
        arrays.append(pa.array([caption.image_text_score for caption in best], pa.float32()))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _to_candidate(caption: Caption) -> Row:
    return {"caption": caption.text, "log_prob": caption.log_prob, "image_text_score": caption.image_text_score}


def caption_images(
    uris: Sequence[str],
    checkpoint: str,
    config: GenerationConfig = GenerationConfig(),
    *,
    weights: str | None = None,
    device: str = "auto",
    captioner: CaptionModel | None = None,
) -> tuple[list[Row], list[tuple[str, ImageError]]]:
    """Generates captions for images that are not part of a dataset.

    Example:
        >>> rows, failures = captionlib.caption_images(["scenes/images/test-00000.jpg"], "captioner")
        >>> len(rows), len(failures)
        (1, 0)

    Args:
        uris: paths or URLs of the images.
        checkpoint: the captioner's folder or address.
        config: configuration of the generation.
        weights: path of the encoder's weights file; required if the encoder was loaded from a file that the checkpoint
            does not contain.
        device: auto, cpu, cuda or cuda:N.
        captioner: the captioner of `checkpoint`, if it is already loaded. If None, it is loaded.

    Returns:
        Rows of a captions dataset in the given order, and the uri and error of each image that could not be read.

    Raises:
        CheckpointError: the folder contains no captioner, or the captioner lacks attention or a datastore (the
            features and captions of the training images) that `config` requires.
        ConfigError: `weights` are required, or the captioner does not support a setting.
    """
    check_needs_no_ranker(config.decoding)
    captioner = captioner or open_captioner(checkpoint, str(resolve_device(device)))
    if config.attention_maps:
        require_attention(captioner, checkpoint)
    input_transform = captioner.find_input_transform(weights)
    generate = captioner.prepare(config)
    failures: list[tuple[str, ImageError]] = []
    with open_input_loader(
        [input_transform], [captioner], config.loading, config.encoder_batch_size, device, None
    ) as load_features:
        images = [{"image_id": uri, "uri": uri, "split": "", "captions": []} for uri in uris]
        batches = iter([pa.RecordBatch.from_pylist(images, schema=MANIFEST_SCHEMA)])
        encoded = load_features(batches, lambda row, error: failures.append((row["uri"], error)))
        captions = _caption_batches(encoded, generate, config)
        return [row for (batch,) in captions for row in batch.to_pylist()], failures


def _rebatch(encoded: EncodedRows, size: int) -> EncodedRows:
    rows: list[Row] = []
    inputs: list[tuple[npt.NDArray[Any], ...]] = []  # for each row, one array per model
    for more_rows, more_inputs in encoded:
        rows = rows + more_rows
        inputs = [*inputs, *zip(*more_inputs, strict=True)]
        while len(rows) >= size:
            yield rows[:size], list(zip(*inputs[:size], strict=True))
            rows, inputs = rows[size:], inputs[size:]
    if rows:
        yield rows, list(zip(*inputs, strict=True))
