"""`manifest/` to `features/`: what the encoder sees in each image."""

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
    config: ExtractionConfig,
    *,
    device: str = "auto",
    run: RunConfig = RunConfig(),
) -> Totals:
    """Extracts the features of every image of a manifest, or goes on where a former run stopped.

    Args:
        manifest: a complete manifest dataset.
        output: the features dataset to write.
        config: encoder and loading.
        device: auto, cpu, cuda or cuda:N.
        run: how the pipeline is run.

    Returns:
        Rows, failures and their reasons.

    Raises:
        ConfigError: no such model, node, weights or device.
        DatasetError: the manifest is not complete, or `output` holds something else.
        FailureRatioError: more images failed than the run allows.
    """
    config = replace(
        config, encoder=config.encoder.with_absolute_weights(), loading=run.divide_decoders(config.loading)
    )
    source = open_dataset(manifest, "manifest").require_complete()
    threads = run.threads_per_worker if run.workers > 1 else None
    here, there = run.resolve_devices(device)
    encoder = load_shared_encoder(config.encoder, here, threads)
    dataset = create_dataset(
        output,
        "features",
        features_schema(encoder.size, config.encoder.stored_dtype),
        config={"input": source.fingerprint, "encoder": encoder.description},
        shards=source.shards,
        overwrite=run.overwrite,
    )
    stage = FeatureExtraction(config, encoder.description, there, threads)
    return run_job(ShardJob(source, (dataset,), stage, run.retry_failures), "extract-features", run)
