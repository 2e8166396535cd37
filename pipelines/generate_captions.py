"""`manifest/` or `features/` to `captions/`, and optionally to `embeddings/` in the same pass."""

import os
from dataclasses import replace

from captionlib.config import to_dict
from captionlib.data.shards.dataset import create_dataset, open_dataset
from captionlib.data.shards.markers import Totals
from captionlib.data.shards.schemas import captions_schema
from captionlib.data.shards.stages import ShardJob
from captionlib.errors import ConfigError
from captionlib.models.decoding.datastore import read_datastore_fingerprint
from captionlib.models.inference.attention_maps import require_attention
from captionlib.models.inference.captioning import (
    SHARED_CAPTIONERS,
    CaptionGeneration,
    GenerationConfig,
)
from captionlib.models.inference.embedding import SHARED_RANKERS, create_embeddings_dataset
from captionlib.models.inference.feature_source import resolve_encoder
from pipelines.run import RunConfig, run_job

__all__ = ["generate_captions"]


def generate_captions(
    source: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: GenerationConfig = GenerationConfig(),
    *,
    ranker: str | os.PathLike[str] | None = None,
    embeddings: str | os.PathLike[str] | None = None,
    weights: str | None = None,
    device: str = "auto",
    run: RunConfig = RunConfig(),
) -> Totals:
    """Captions every image of a dataset, or resumes an earlier run.

    Example:
        >>> totals = captionlib.generate_captions("features", "captioner", "captions")
        >>> totals.rows
        26

    Args:
        source: a complete features dataset, or a complete manifest, whose images are encoded in the same pass.
        checkpoint: the captioner's folder.
        output: the captions dataset to write.
        config: decoding and image loading.
        ranker: folder of a ranker that embeds the images in the same pass; requires `embeddings`.
        embeddings: the embeddings dataset to write; requires `ranker`.
        weights: path of the encoder's weights file; required if the encoder was loaded from a file that the checkpoint
            does not contain.
        device: auto, cpu, cuda or cuda:N.
        run: how to run the pipeline.

    Returns:
        Counts of rows and failures of `output`, and the reasons of the failures; those of `embeddings` are equal.

    Raises:
        CheckpointError: a folder contains no captioner or ranker, the features come from another encoder than theirs,
            or the captioner lacks attention or a datastore that `config` needs.
        ConfigError: only one of `ranker` and `embeddings` is given.
        DatasetError: the source is incomplete, or an output folder contains another dataset.
        FailureRatioError: more images failed than `run` allows.
    """
    if (ranker is None) != (embeddings is None):
        raise ConfigError("--ranker and --embeddings require each other: the model, and the dataset that it writes")
    config = replace(config, loading=run.divide_decoders(config.loading))
    dataset = open_dataset(source).require_complete()
    driver_device, worker_device = run.resolve_devices(device)
    captioner, pinned_captioner = SHARED_CAPTIONERS.pin(checkpoint)
    positions = require_attention(captioner, os.fspath(checkpoint)) if config.attention_maps else None
    datastore = read_datastore_fingerprint(checkpoint, captioner) if config.decoding.rerank.neighbors else None
    encoder = resolve_encoder(dataset, captioner, weights, driver_device, run.threads_per_worker)
    loaded_ranker, pinned_ranker = (None, None) if ranker is None else SHARED_RANKERS.pin(ranker)
    if loaded_ranker is not None:
        loaded_ranker.require_encoder(captioner.encoder)
    captions = create_dataset(
        output,
        "captions",
        captions_schema(positions),
        config={
            "input": dataset.fingerprint,
            "captioner": captioner.fingerprint,
            "encoder": captioner.encoder,
            "decoding": to_dict(config.decoding),
            "dtype": config.dtype,
            "attention_maps": config.attention_maps,
            "datastore": datastore,
        },
        shards=dataset.shards,
        overwrite=run.overwrite,
    )
    outputs = [captions]
    if loaded_ranker is not None and embeddings is not None:
        outputs.append(create_embeddings_dataset(embeddings, dataset, loaded_ranker, run.overwrite))
    stage = CaptionGeneration(
        config, pinned_captioner, encoder, worker_device, run.threads_per_worker, pinned_ranker, datastore
    )
    return run_job(ShardJob(dataset, tuple(outputs), stage, run.retry_failures), "generate-captions", run)
