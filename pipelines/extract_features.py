"""`manifest/` to `features/`: encodes images as feature vectors."""

import os
from dataclasses import replace

from captionlib.data.shards.dataset import create_dataset, open_dataset
from captionlib.data.shards.markers import Totals
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
    device: str = "auto",
    run: RunConfig = RunConfig(),
) -> Totals:
    """Extracts the features of every image of a manifest, or resumes an earlier run.

    Example:
        >>> encoder = captionlib.EncoderConfig("squeezenet1_1", "features.7.cat", "random:0", pooling="mean")
        >>> totals = captionlib.extract_features("manifest", "features", captionlib.ExtractionConfig(encoder))
        >>> totals.rows, totals.failures
        (26, 0)

    Args:
        manifest: a complete manifest dataset.
        output: the features dataset to write.
        config: encoder and image loading.
        device: auto, cpu, cuda or cuda:N.
        run: how to run the pipeline.

    Returns:
        Counts of rows and failures, and the reasons of the failures.

    Raises:
        ConfigError: the model, the node, the weights or the device does not exist.
        DatasetError: the manifest is incomplete, or `output` contains another dataset.
        FailureRatioError: more images failed than `run` allows.
    """
    config = replace(
        config, encoder=config.encoder.with_absolute_weights(), loading=run.divide_decoders(config.loading)
    )
    source = open_dataset(manifest, "manifest").require_complete()
    driver_device, worker_device = run.resolve_devices(device)
    encoder = load_shared_encoder(config.encoder, driver_device, run.threads_per_worker)
    features = create_dataset(
        output,
        "features",
        features_schema(encoder.size, config.encoder.stored_dtype),
        config={"input": source.fingerprint, "encoder": encoder.description},
        shards=source.shards,
        overwrite=run.overwrite,
    )
    stage = FeatureExtraction(config, encoder.description, worker_device, run.threads_per_worker)
    return run_job(ShardJob(source, (features,), stage, run.retry_failures), "extract-features", run)
