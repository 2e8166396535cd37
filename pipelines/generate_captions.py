"""`manifest/` or `features/` to `captions/`: what the captioner says of each image."""

import os
from dataclasses import replace

from captionlib.config import to_dict
from captionlib.data.datasets import create_dataset, open_dataset
from captionlib.data.schemas import captions_schema
from captionlib.data.shards import ShardedDataset, Totals
from captionlib.data.stages import ShardJob
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.checkpoints import LoadedCaptioner, load_captioner
from captionlib.models.encoder import EncoderConfig, encoder_config
from captionlib.models.extraction import open_encoder
from captionlib.models.generation import CaptionGeneration, GenerationConfig
from pipelines.run import RunConfig, run_job

__all__ = ["generate_captions"]


def generate_captions(
    source: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: GenerationConfig,
    *,
    weights: str | None = None,
    device: str = "auto",
    run: RunConfig = RunConfig(),
) -> Totals:
    """Captions every image of a dataset, or goes on where a former run stopped.

    Args:
        source: a complete features dataset; or a manifest, whose images are then encoded in the same pass.
        checkpoint: the captioner's folder.
        output: the captions dataset to write.
        config: how captions are made.
        weights: the encoder's weights file, where the captioner learned from features of such a file.
        device: auto, cpu, cuda or cuda:N.
        run: how the pipeline is run.

    Returns:
        Rows, failures and their reasons.

    Raises:
        CheckpointError: no captioner there, or the features are of another encoder than its own.
        DatasetError: the source is not complete, or `output` holds something else.
        FailureRatioError: more images failed than the run allows.
    """
    config = replace(config, loading=run.share(config.loading))
    rows = open_dataset(source).require_complete()
    captioner = load_captioner(os.fspath(checkpoint))
    threads = run.threads if run.workers > 1 else None
    encoder = _encoder_for(rows, captioner, weights, device, threads)
    dataset = create_dataset(
        output,
        "captions",
        captions_schema(),
        config={
            "input": rows.fingerprint,
            "captioner": captioner.fingerprint,
            "encoder": captioner.encoder,
            "decoding": to_dict(config.decoding),
            "dtype": config.dtype,
        },
        shards=rows.shards,
        overwrite=run.overwrite,
    )
    stage = CaptionGeneration(config, os.fspath(checkpoint), captioner.fingerprint, encoder, device, threads)
    return run_job(ShardJob(rows, (dataset,), stage, run.retry_failures), "generate-captions", run)


def _encoder_for(
    source: ShardedDataset, captioner: LoadedCaptioner, weights: str | None, device: str, threads: int | None
) -> EncoderConfig | None:
    """The encoder that has to run first, checked; None where the source has features, which are checked instead."""
    if source.kind == "features":
        if weights is not None:
            raise ConfigError(f"--weights is for captioning images; {source.folder.uri} already holds features")
        captioner.require_encoder(source.config["encoder"])
        return None
    if source.kind != "manifest":
        raise DatasetError(f"{source.folder.uri}: expected a dataset of kind features or manifest, got {source.kind}")
    config = encoder_config(captioner.encoder, weights)
    captioner.require_encoder(open_encoder(config, device, threads).description)
    return config
