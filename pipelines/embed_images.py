"""Embeds images in the joint embedding space of a ranker, a dual encoder for image-text retrieval."""

import os
from dataclasses import replace

from captionlib.data.shards.dataset import open_dataset
from captionlib.data.shards.markers import Totals
from captionlib.data.shards.sampling import StageInput
from captionlib.data.shards.stages import ShardJob
from captionlib.models.inference.embedding import (
    SHARED_RANKERS,
    EmbeddingConfig,
    ImageEmbedding,
    create_embeddings_dataset,
)
from captionlib.models.inference.model_inputs import choose_input_transform
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
    """Embeds every image of a dataset, or resumes an incomplete run.

    Example:
        >>> totals = captionlib.embed_images("features", "ranker", "embeddings")
        >>> totals.rows
        26

    Args:
        source: a complete features dataset, or a complete manifest (list of images). The images of a manifest are
            encoded first.
        ranker: the ranker's folder, or the address of a model from another library, such as `hf:FOLDER`.
        output: folder of the embeddings dataset to write. `generate_captions` also writes such a dataset if its
            argument `embeddings` is set.
        config: settings for image loading.
        weights: path of the image encoder's weights file; required if the ranker was trained with an encoder
            whose weights came from a file.
        device: auto, cpu, cuda or cuda:N.
        run: workers, runner and error handling.

    Returns:
        Counts of rows and of failures (images that could not be read), with the reasons for the failures.

    Raises:
        CheckpointError: `ranker` is not a ranker, or the features come from a different encoder.
        DatasetError: the source is incomplete, or `output` contains a different dataset.
        FailureRatioError: more images failed than `run` allows.
    """
    config = replace(config, loading=run.limit_decoder_processes(config.loading))
    dataset = open_dataset(source).require_complete()
    driver_device, worker_device = run.choose_devices(device)
    loaded_ranker, ranker_version = SHARED_RANKERS.load_with_version(ranker)
    ranker_input_transform = choose_input_transform(
        dataset, loaded_ranker, weights, driver_device, run.threads_per_worker
    )
    embeddings = create_embeddings_dataset(output, StageInput(dataset), loaded_ranker, run.overwrite)
    stage = ImageEmbedding(config, ranker_version, ranker_input_transform, worker_device, run.threads_per_worker)
    return run_job(ShardJob(dataset, (embeddings,), stage, run.retry_failures, run.verify), "embed", run)
