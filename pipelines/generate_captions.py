"""Generates captions of images, and optionally embeds the images with a ranker (image-text dual encoder)."""

import os
from dataclasses import replace

from captionlib.data.shards.dataset import create_dataset, open_dataset
from captionlib.data.shards.markers import Totals
from captionlib.data.shards.sampling import open_stage_input
from captionlib.data.shards.schemas import captions_schema
from captionlib.data.shards.stages import ShardJob
from captionlib.errors import ConfigError
from captionlib.models.inference.captioning import (
    SHARED_CAPTIONERS,
    CaptionGeneration,
    GenerationConfig,
    require_attention,
)
from captionlib.models.inference.embedding import SHARED_RANKERS, create_embeddings_dataset
from captionlib.models.inference.image_text_scores import check_needs_no_ranker
from captionlib.models.inference.model_inputs import choose_input_transform
from captionlib.storage.folders import resolve_address
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
    limit: int | None = None,
    device: str = "auto",
    run: RunConfig = RunConfig(),
) -> Totals:
    """Generates a caption for every image of a dataset, or resumes an incomplete run.

    Example:
        >>> totals = captionlib.generate_captions("features", "captioner", "captions")
        >>> totals.rows
        26

    Args:
        source: a complete features dataset, or a complete manifest (list of images), whose images
            are encoded in the same run.
        checkpoint: the captioner's folder, or the address of a model from another library, such as `hf:FOLDER`.
        output: folder of the captions dataset to write.
        config: settings for decoding and image loading.
        ranker: the ranker's folder or address. A ranker adds the column `image_text_score`, which measures how well
            each caption fits its image.
        embeddings: folder of the embeddings dataset to write; requires `ranker`.
        weights: path of the image encoder's weights file; required if the captioner was trained with weights from a
            file, unless the checkpoint contains them.
        limit: caption only a sample of this number of images, evenly spaced over the dataset. To caption all images
            later, use different output folders.
        device: auto, cpu, cuda or cuda:N.
        run: workers, runner and error handling.

    Returns:
        Counts of rows and of failures (images that could not be read) in `output`, with the reasons.

    Raises:
        CheckpointError: a folder contains no captioner or ranker, an encoder differs from that of the features, or
            the captioner lacks attention or a datastore (of captions for reranking) that `config` needs.
        ConfigError: `ranker` is missing but required by `embeddings` or `config`, or the captioner does not support a
            setting.
        DatasetError: the source is incomplete, or an output folder contains a different dataset.
        FailureRatioError: more images failed than `run` allows.
    """
    if ranker is None:
        check_needs_no_ranker(config.decoding)
        if embeddings is not None:
            raise ConfigError("--embeddings requires --ranker, the model that computes them; specify both")
    if embeddings is not None and resolve_address(embeddings) == resolve_address(output):
        raise ConfigError(f"--output and --embeddings: expected different folders, got {os.fspath(output)} twice")
    config = replace(config, loading=run.limit_decoder_processes(config.loading))
    dataset = open_dataset(source).require_complete()
    driver_device, worker_device = run.choose_devices(device)
    captioner, captioner_version = SHARED_CAPTIONERS.load_with_version(checkpoint)
    attention_positions = require_attention(captioner, os.fspath(checkpoint)) if config.attention_maps else None
    description = captioner.describe_generation(config)
    input_transform = choose_input_transform(dataset, captioner, weights, driver_device, run.threads_per_worker)
    loaded_ranker, ranker_version, ranker_input_transform = None, None, None
    ranker_config = {}
    if ranker is not None:
        loaded_ranker, ranker_version = SHARED_RANKERS.load_with_version(ranker)
        ranker_config = {"ranker": loaded_ranker.fingerprint, "sentence_template": loaded_ranker.sentence_template}
        ranker_input_transform = choose_input_transform(
            dataset, loaded_ranker, weights, driver_device, run.threads_per_worker
        )
    stage = CaptionGeneration(
        config,
        captioner_version,
        description,
        input_transform,
        worker_device,
        run.threads_per_worker,
        ranker_version,
        ranker_input_transform,
        embed=embeddings is not None,
    )
    with open_stage_input(dataset, output, limit, run.workers) as stage_input:
        captions = create_dataset(
            output,
            "captions",
            captions_schema(attention_positions, has_scores=ranker is not None),
            config={
                "captioner": captioner.fingerprint,
                "encoder": captioner.encoder,
                **description,
                **ranker_config,
                **stage_input.config,
            },
            **stage_input.input_arguments,
            overwrite=run.overwrite,
        )
        outputs = [captions]
        if loaded_ranker is not None and embeddings is not None:
            outputs.append(create_embeddings_dataset(embeddings, stage_input, loaded_ranker, run.overwrite))
        job = ShardJob(stage_input.dataset, tuple(outputs), stage, run.retry_failures, run.verify)
        return run_job(job, "generate-captions", run)
