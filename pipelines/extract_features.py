"""Encodes the images of a manifest (list of images) as feature vectors or feature maps."""

import math
import os
from dataclasses import replace

from captionlib.data.shards.dataset import create_dataset, open_dataset
from captionlib.data.shards.markers import Totals
from captionlib.data.shards.sampling import open_stage_input
from captionlib.data.shards.schemas import features_schema
from captionlib.data.shards.stages import ShardJob
from captionlib.models.inference.extraction import ExtractionConfig, FeatureExtraction, load_shared_encoder
from pipelines.run import RunConfig, run_job

__all__ = ["extract_features"]


def extract_features(
    manifest: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: ExtractionConfig = ExtractionConfig(),
    *,
    limit: int | None = None,
    device: str = "auto",
    run: RunConfig = RunConfig(),
) -> Totals:
    """Extracts the features of every image of a manifest, or resumes an incomplete run.

    Example:
        >>> encoder = captionlib.EncoderConfig("squeezenet1_1", "features.7.cat", weights="random:0", pooling="mean")
        >>> totals = captionlib.extract_features("manifest", "features", captionlib.ExtractionConfig(encoder))
        >>> totals.rows, totals.failures
        (26, 0)

    Args:
        manifest: folder of a complete manifest.
        output: folder of the features dataset to write.
        config: settings for the encoder and for image loading.
        limit: encode only a sample of this many images, evenly spaced over the manifest. To encode all images
            later, use a different output folder.
        device: auto, cpu, cuda or cuda:N.
        run: workers, runner and error handling.

    Returns:
        Counts of rows and of failures (images that could not be read), with the reasons for the failures.

    Raises:
        ConfigError: the model, its node (layer), the weights or the device does not exist.
        DatasetError: the manifest is incomplete, or `output` contains a different dataset.
        FailureRatioError: more images failed than `run` allows.
    """
    config = replace(
        config, encoder=config.encoder.resolve_paths(), loading=run.limit_decoder_processes(config.loading)
    )
    source = open_dataset(manifest, "manifest").require_complete()
    driver_device, worker_device = run.choose_devices(device)
    encoder = load_shared_encoder(config.encoder, driver_device, run.threads_per_worker)
    stage = FeatureExtraction(config, encoder.description, worker_device, run.threads_per_worker)
    with open_stage_input(source, output, limit, run.workers) as stage_input:
        features = create_dataset(
            output,
            "features",
            features_schema(math.prod(encoder.shape), config.encoder.stored_dtype),
            config={"encoder": encoder.description, **stage_input.config},
            **stage_input.input_arguments,
            encoder_weights=config.encoder.find_weights_location(),
            overwrite=run.overwrite,
        )
        job = ShardJob(stage_input.dataset, (features,), stage, run.retry_failures, run.verify)
        return run_job(job, "extract-features", run)
