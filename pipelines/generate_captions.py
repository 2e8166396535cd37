"""`manifest/` or `features/` to `captions/`: what the captioner says of each image; and to `embeddings/` beside it."""

import os
from dataclasses import replace
from typing import Any

from captionlib.config import to_dict
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.markers import Totals
from captionlib.data.shards.schemas import captions_schema, embeddings_schema
from captionlib.data.shards.stages import ShardJob
from captionlib.errors import ConfigError
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner, load_captioner, load_ranker
from captionlib.models.inference.attention_maps import require_attention
from captionlib.models.inference.captioning import CaptionGeneration, GenerationConfig, find_datastore_fingerprint
from captionlib.models.inference.embedding import PinnedRanker, describe_embeddings
from captionlib.models.inference.feature_source import resolve_encoder
from captionlib.storage.folders import resolve_address
from pipelines.run import RunConfig, run_job

__all__ = ["generate_captions"]


def generate_captions(
    source: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: GenerationConfig,
    *,
    ranker: str | os.PathLike[str] | None = None,
    embeddings: str | os.PathLike[str] | None = None,
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
        ranker: the folder of a ranker that embeds the images in the same pass.
        embeddings: the embeddings dataset to write, with a ranker.
        weights: the encoder's weights file, where the captioner learned from features of such a file.
        device: auto, cpu, cuda or cuda:N.
        run: how the pipeline is run.

    Returns:
        Rows, failures and their reasons; those of `embeddings` are the same.

    Raises:
        CheckpointError: no captioner or ranker there, or the features are of another encoder than theirs; or maps are
            asked of a captioner without attention, or neighbors of one without memory.
        ConfigError: a ranker without a place for its embeddings, or the other way round.
        DatasetError: the source is not complete, or `output` holds something else.
        FailureRatioError: more images failed than the run allows.
    """
    config = replace(config, loading=run.divide_decoders(config.loading))
    if (ranker is None) != (embeddings is None):
        raise ConfigError("--ranker and --embeddings belong together: the model, and the dataset that it writes")
    rows = open_dataset(source).require_complete()
    captioner = load_captioner(os.fspath(checkpoint))
    positions = require_attention(captioner, os.fspath(checkpoint)) if config.attention_maps else None
    memory = find_datastore_fingerprint(os.fspath(checkpoint), captioner, config.decoding)
    threads = run.threads_per_worker if run.workers > 1 else None
    here, there = run.resolve_devices(device)
    encoder = resolve_encoder(rows, captioner, weights, here, threads)
    embedder = None if ranker is None else load_ranker(os.fspath(ranker))
    if embedder is not None:
        embedder.require_encoder(captioner.encoder)
    dataset = create_dataset(
        output,
        "captions",
        captions_schema(positions),
        config=_describe_captions(rows, captioner, config, memory),
        shards=rows.shards,
        overwrite=run.overwrite,
    )
    outputs, folder = [dataset], None
    if embedder is not None and ranker is not None and embeddings is not None:
        folder = PinnedRanker(resolve_address(ranker), embedder.fingerprint)
        outputs.append(
            create_dataset(
                embeddings,
                "embeddings",
                embeddings_schema(embedder.size),
                config=describe_embeddings(rows, embedder),
                shards=rows.shards,
                overwrite=run.overwrite,
            )
        )
    stage = CaptionGeneration(
        config, resolve_address(checkpoint), captioner.fingerprint, encoder, there, threads, folder, memory
    )
    return run_job(ShardJob(rows, tuple(outputs), stage, run.retry_failures), "generate-captions", run)


def _describe_captions(
    source: ShardedDataset, captioner: LoadedCaptioner, config: GenerationConfig, memory: str | None
) -> dict[str, Any]:
    """All that the rows depend on, for their fingerprint."""
    return {
        "input": source.fingerprint,
        "captioner": captioner.fingerprint,
        "encoder": captioner.encoder,
        "decoding": to_dict(config.decoding),
        "dtype": config.dtype,
        "attention_maps": config.attention_maps,
        "memory": memory,
    }
