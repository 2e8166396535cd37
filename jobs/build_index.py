"""`captionlib build-index`."""

import click

from captionlib.config import load_config
from captionlib.search.index_config import LANGUAGES, IndexConfig, VectorLayout
from jobs.options import config_options
from pipelines.build_index import build_index
from pipelines.run import RunConfig

__all__ = ["command"]


@click.command()
@click.argument("captions")
@click.option("--embeddings", "-e", metavar="FOLDER", help="The vectors of the same images, for sentences and images.")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The index to write, or to add to.")
@click.option(
    "--language", type=click.Choice(LANGUAGES), help="Short for --set language=...; none cuts no endings off."
)
@config_options
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Local processes.")
@click.option("--overwrite", is_flag=True, help="Replace an index of other datasets or of another configuration.")
@click.argument("beam_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- BEAM OPTIONS]")
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
    """Index CAPTIONS, and the embeddings of the same images, to be searched by `query` and `serve`.

    Words are found without regard to their endings. Vectors are compared one by one in a small set; in a large one they
    are kept in inverted lists, a byte a number. A second run adds the shards that are new or were written again, and
    leaves the others as they are. Whoever has the index open goes on with what it was.

    \b
    Examples:
      captionlib build-index captions -o index
      captionlib build-index captions -e embeddings -o index --workers 2
      captionlib build-index captions -e embeddings -o index --language german --overwrite
      captionlib build-index captions -e embeddings -o index --set vectors=pq --set probes=128
      captionlib build-index s3://b/captions -e s3://b/embeddings -o s3://b/index -- --runner=FlinkRunner
    """
    if language is not None:
        overrides = (*overrides, f"language={language}")
    build, index = build_index(
        captions,
        output,
        load_config(IndexConfig, config, overrides),
        embeddings=embeddings,
        run=RunConfig(workers, beam_options, overwrite=overwrite),
    )
    layout = index.layout
    vectors = f"{index.vectors_count:,} vectors ({_kind(layout)})" if layout else "no vectors"
    click.echo(f"{output}: {index.captions_count:,} captions, {vectors}, in {len(index.shards):,} shards")
    click.echo(f"{len(build.added):,} shards added, {len(build.removed):,} taken out, {len(build.kept):,} kept")
    if not index.is_complete:
        missing = index.captions.shards - len(index.shards)
        click.echo(f"{missing:,} shards are not written yet; run the same command again when they are", err=True)


def _kind(layout: VectorLayout) -> str:
    if layout.lists == 1:
        return f"{layout.code}, all compared"
    return f"{layout.code}, {layout.lists:,} lists, {layout.probes:,} of them a question"
