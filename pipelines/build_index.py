"""Builds a search index from captions and embeddings.

Workers index shards (files) in parallel. One worker then merges the results.
"""

import os
from collections.abc import Collection

import apache_beam as beam
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PBegin, PCollection
from apache_beam.transforms.combiners import Count

from captionlib.errors import DatasetError
from captionlib.search.build import IndexBuild, plan_build
from captionlib.search.config import IndexConfig
from captionlib.search.index_folder import IndexDescription, read_description
from captionlib.storage.folders import Addresses
from pipelines.run import RunConfig, choose_runner, run_pipeline

__all__ = ["BuildIndex", "build_index"]


def build_index(
    captions: Addresses,
    output: str | os.PathLike[str],
    config: IndexConfig = IndexConfig(),
    *,
    embeddings: Addresses | None = None,
    duplicates: str | os.PathLike[str] | None = None,
    removed_ids: Collection[str] = (),
    run: RunConfig = RunConfig(),
) -> tuple[IndexBuild, IndexDescription]:
    """Builds a search index, or updates an existing index after its datasets have changed.

    Example:
        >>> build, description = captionlib.build_index("captions", "index", embeddings="embeddings")
        >>> description.captions_count, description.vectors_count
        (26, 26)

    Args:
        captions: a captions dataset, or several.
        output: the folder of the index.
        config: the configuration of the index.
        embeddings: the embeddings of the same images: one dataset for each captions dataset, in the same order. If
            None, the index is text-only.
        duplicates: a dataset of groups of duplicates, from `find_duplicates`. If set, only one image of each group is
            indexed.
        removed_ids: ids of images that were removed from the datasets. They are removed from the index even if
            the shard that contained them is being written again.
        run: how to run the pipeline.

    Returns:
        The plan of the build, and the description of the index.

    Raises:
        ConfigError: see `plan_build`.
        DuplicateIdError: an image id occurs more than once.
        DatasetError: see `plan_build`; also raised if a concurrent build has replaced the index.
        FingerprintError: see `plan_build`.
    """
    build = plan_build(
        *(captions, embeddings, output, config),
        duplicates=duplicates,
        overwrite=run.overwrite,
        removed_ids=removed_ids,
    )
    choose_runner(run)  # checks the options before the index is changed
    if build.is_done():
        build.remove_unused_files()
    else:
        run_pipeline(BuildIndex(build), "build-index", run)
    description = read_description(build.folder)
    if description is None or description.fingerprint != build.fingerprint:
        raise DatasetError(f"{build.folder.uri}: a concurrent build has replaced the index; run one build at a time")
    return build, description


class BuildIndex(beam.PTransform[PBegin, PCollection[int]]):
    """Runs a planned build. Returns the number of shards that were added."""

    def __init__(self, build: IndexBuild) -> None:
        super().__init__()
        self._build = build

    def expand(self, begin: PBegin) -> PCollection[int]:
        finished: PCollection[int] = (
            begin
            | "Plan" >> beam.Create([None], reshuffle=False)
            | "Train" >> beam.FlatMap(_train, self._build)
            | "Spread" >> beam.Reshuffle()
            | "AddShards" >> beam.Map(_add_shard, self._build)
            | "Count" >> Count.Globally()
            | "Finish" >> beam.Map(_finish, self._build)
        )
        return finished


def _train(_: None, build: IndexBuild) -> tuple[int, ...]:
    """Trains the centroids of the inverted lists. Returns the positions of the shards to add."""
    build.train()
    return build.added


def _add_shard(position: int, build: IndexBuild) -> int:
    build.add_shard(position)
    Metrics.counter("BuildIndex", "rows").inc(build.shards[position].rows)
    return position


def _finish(shards: int, build: IndexBuild) -> int:
    build.finish()
    return shards
