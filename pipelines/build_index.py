"""Builds a search index from captions and embeddings: workers index shards, and one worker merges the results."""

import os

import apache_beam as beam
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PBegin, PCollection
from apache_beam.transforms.combiners import Count

from captionlib.errors import DatasetError
from captionlib.search.build import IndexBuild, plan_build
from captionlib.search.config import IndexConfig
from captionlib.search.index_folder import IndexDescription, read_description
from pipelines.run import RunConfig, choose_runner, run_pipeline

__all__ = ["BuildIndex", "build_index"]


def build_index(
    captions: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: IndexConfig = IndexConfig(),
    *,
    embeddings: str | os.PathLike[str] | None = None,
    run: RunConfig = RunConfig(),
) -> tuple[IndexBuild, IndexDescription]:
    """Builds a search index, or extends it with new and changed shards of its datasets.

    Example:
        >>> build, description = captionlib.build_index("captions", "index", embeddings="embeddings")
        >>> description.captions_count, description.vectors_count
        (26, 26)

    Args:
        captions: a captions dataset.
        output: the folder of the index.
        config: the configuration of the index.
        embeddings: an embeddings dataset of the same images. If None, the index is text-only.
        run: how to run the pipeline.

    Returns:
        The plan of the build, and the description of the index.

    Raises:
        DatasetError: see `plan_build`; also raised if a concurrent build has replaced the index.
        FingerprintError: see `plan_build`.
    """
    build = plan_build(captions, embeddings, output, config, overwrite=run.overwrite)
    choose_runner(run)
    if not build.is_done():
        run_pipeline(BuildIndex(build), "build-index", run)
    description = read_description(build.folder)
    if description is None or description.fingerprint != build.fingerprint:
        raise DatasetError(f"{build.folder.uri}: a concurrent build has replaced the index; run one build at a time")
    return build, description


class BuildIndex(beam.PTransform[PBegin, PCollection[int]]):
    """Runs a planned build. Elements are positions in `IndexBuild.added`, which lists the shards to index."""

    def __init__(self, build: IndexBuild) -> None:
        super().__init__()
        self._build = build

    def expand(self, begin: PBegin) -> PCollection[int]:
        finished: PCollection[int] = (
            begin
            | "Plan" >> beam.Create([len(self._build.added)], reshuffle=False)
            | "Train" >> beam.FlatMap(_train, self._build)
            | "Spread" >> beam.Reshuffle()
            | "AddShards" >> beam.FlatMap(_add_shard, self._build)
            | "Count" >> Count.Globally()
            | "Finish" >> beam.FlatMap(_finish, self._build)
        )
        return finished


def _train(shards: int, build: IndexBuild) -> list[int]:
    build.train()
    return list(range(shards))


def _add_shard(number: int, build: IndexBuild) -> list[int]:
    build.add_shard(number)
    Metrics.counter("BuildIndex", "rows").inc(build.added[number].rows)
    return [number]


def _finish(shards: int, build: IndexBuild) -> list[int]:
    build.finish()
    return [shards]
