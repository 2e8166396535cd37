"""`manifest/` or `features/` to `embeddings/`: embeds images in the joint space of a ranker."""

import os
from dataclasses import replace

from captionlib.data.shards.dataset import open_dataset
from captionlib.data.shards.markers import Totals
from captionlib.data.shards.stages import ShardJob
from captionlib.models.inference.embedding import (
    SHARED_RANKERS,
    EmbeddingConfig,
    ImageEmbedding,
    create_embeddings_dataset,
)
from captionlib.models.inference.feature_source import resolve_encoder
from pipelines.run import RunConfig, run_job

__all__ = ["embed_images"]


def embed_images(
    source: str | os.PathLike[str],
    ranker: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: EmbeddingConfig = EmbeddingConfig(),
    *,
    weights: str | None = None,
    device: str = "auto",
    run: RunConfig = RunConfig(),
) -> Totals:
    """Embeds every image of a dataset, or resumes an earlier run.

    Example:
        >>> totals = captionlib.embed_images("features", "ranker", "embeddings")
        >>> totals.rows
        26

    Args:
        source: a complete features dataset, or a complete manifest, whose images are encoded in the same pass.
        ranker: the ranker's folder.
        output: the embeddings dataset to write, the same as `generate_captions` writes with a ranker.
        config: image loading.
        weights: path of the encoder's weights file; required if the encoder was loaded from a file.
        device: auto, cpu, cuda or cuda:N.
        run: how to run the pipeline.

    Returns:
        Counts of rows and failures, and the reasons of the failures.

    Raises:
        CheckpointError: the folder contains no ranker, or the features come from another encoder.
        DatasetError: the source is incomplete, or `output` contains another dataset.
        FailureRatioError: more images failed than `run` allows.
    """
    config = replace(config, loading=run.divide_decoders(config.loading))
    dataset = open_dataset(source).require_complete()
    driver_device, worker_device = run.resolve_devices(device)
    loaded_ranker, pinned_ranker = SHARED_RANKERS.pin(ranker)
    encoder = resolve_encoder(dataset, loaded_ranker, weights, driver_device, run.threads_per_worker)
    embeddings = create_embeddings_dataset(output, dataset, loaded_ranker, run.overwrite)
    stage = ImageEmbedding(config, pinned_ranker, encoder, worker_device, run.threads_per_worker)
    return run_job(ShardJob(dataset, (embeddings,), stage, run.retry_failures), "embed", run)
