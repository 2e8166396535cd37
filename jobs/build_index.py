"""The command `captionlib build-index`."""

import click

from captionlib.config import load_config
from captionlib.search.config import LANGUAGES, IndexConfig, VectorLayout
from jobs.options import beam_argument, config_options, workers_option
from pipelines.build_index import build_index
from pipelines.run import RunConfig

__all__ = ["command"]


@click.command()
@click.argument("captions")
@click.option("--embeddings", "-e", metavar="FOLDER", help="Embeddings of the same images, for semantic search.")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The index to create or extend.")
@click.option("--language", type=click.Choice(LANGUAGES), help="Caption language; same as --set language=...")
@config_options
@workers_option
@click.option("--overwrite", is_flag=True, help="Replace an index built with different datasets or settings.")
@beam_argument
def command(
    captions: str,
    embeddings: str | None,
    output: str,
    language: str | None,
    config: str | None,
    overrides: tuple[str, ...],
    workers: int,
    overwrite: bool,
    beam_options: tuple[str, ...],
) -> None:
    """Index CAPTIONS, and optionally embeddings of the same images, for `query` and `serve`.

    Words are stemmed, so dogs matches dog. Small sets of vectors are searched exhaustively. Large sets are stored in
    inverted lists with one byte per dimension. A second run indexes only new and changed shards. Readers that have the
    index open keep the version that they opened.

    \b
    Examples:
      captionlib build-index captions -o index
      captionlib build-index captions -e embeddings -o index --workers 2
      captionlib build-index captions -e embeddings -o index --language german --overwrite
      captionlib build-index captions -e embeddings -o index --set vectors=pq --set nprobe=128
      captionlib build-index s3://b/captions -e s3://b/embeddings -o s3://b/index -- --runner=FlinkRunner
    """
    if language is not None:
        overrides = (*overrides, f"language={language}")
    settings = load_config(IndexConfig, config, overrides)
    run = RunConfig(workers, beam_options, overwrite=overwrite)
    build, index = build_index(captions, output, settings, embeddings=embeddings, run=run)
    vectors = f"{index.vectors_count:,} vectors ({_describe_layout(index.layout)})" if index.layout else "no vectors"
    click.echo(f"{output}: {index.captions_count:,} captions, {vectors}, in {len(index.shards):,} shards")
    click.echo(f"{len(build.added):,} shards added, {len(build.removed):,} removed, {len(build.unchanged):,} unchanged")
    if not index.is_complete:
        missing = index.captions.shards - len(index.shards)
        click.echo(f"{missing:,} shards have not been written; run this command again when they are", err=True)


def _describe_layout(layout: VectorLayout) -> str:
    if layout.nlist == 1:
        return f"{layout.encoding}, exhaustive search"
    return f"{layout.encoding}, {layout.nlist:,} lists, {layout.nprobe:,} visited per query"
