"""`manifest/` or `features/` to `embeddings/`: each image as a vector that sentences find."""

import os
from dataclasses import replace

from captionlib.data.shards.dataset import create_dataset, open_dataset
from captionlib.data.shards.markers import Totals
from captionlib.data.shards.schemas import embeddings_schema
from captionlib.data.shards.stages import ShardJob
from captionlib.models.checkpoints.checkpoint import load_ranker
from captionlib.models.inference.embedding import EmbeddingConfig, ImageEmbedding, PinnedRanker, describe_embeddings
from captionlib.models.inference.feature_source import resolve_encoder
from captionlib.storage.folders import resolve_address
from pipelines.run import RunConfig, run_job

__all__ = ["embed_images"]


def embed_images(
    source: str | os.PathLike[str],
    ranker: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: EmbeddingConfig,
    *,
    weights: str | None = None,
    device: str = "auto",
    run: RunConfig = RunConfig(),
) -> Totals:
    """Embeds every image of a dataset, or goes on where a former run stopped.

    Args:
        source: a complete features dataset; or a manifest, whose images are then encoded in the same pass.
        ranker: the ranker's folder.
        output: the embeddings dataset to write; the same as `generate_captions` writes beside its captions.
        config: how images become features.
        weights: the encoder's weights file, where the ranker learned from features of such a file.
        device: auto, cpu, cuda or cuda:N.
        run: how the pipeline is run.

    Returns:
        Rows, failures and their reasons.

    Raises:
        CheckpointError: no ranker there, or the features are of another encoder than its own.
        DatasetError: the source is not complete, or `output` holds something else.
        FailureRatioError: more images failed than the run allows.
    """
    config = replace(config, loading=run.divide_decoders(config.loading))
    rows = open_dataset(source).require_complete()
    model = load_ranker(os.fspath(ranker))
    threads = run.threads_per_worker if run.workers > 1 else None
    here, there = run.resolve_devices(device)
    encoder = resolve_encoder(rows, model, weights, here, threads)
    dataset = create_dataset(
        output,
        "embeddings",
        embeddings_schema(model.size),
        config=describe_embeddings(rows, model),
        shards=rows.shards,
        overwrite=run.overwrite,
    )
    stage = ImageEmbedding(config, PinnedRanker(resolve_address(ranker), model.fingerprint), encoder, there, threads)
    return run_job(ShardJob(rows, (dataset,), stage, run.retry_failures), "embed", run)
