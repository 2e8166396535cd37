"""The command `captionlib build-index`."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.options import config_options, progress_option, serve_option, serve_when_done, workers_option

if TYPE_CHECKING:
    from captionlib.search.config import VectorLayout

__all__ = ["command"]


@click.command()
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="CAPTIONS... [-- BEAM OPTIONS]")
@click.option(
    "--embeddings",
    "-e",
    multiple=True,
    metavar="FOLDER",
    help="Embeddings of the same images, for semantic search. Repeatable: one for each of CAPTIONS, in the same order.",
)
@click.option(
    "--duplicates", metavar="FOLDER", help="Output of `captionlib deduplicate`, to leave out or mark duplicates."
)
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The index to create or update.")
@click.option("--language", metavar="NAME", help="Caption language, such as german; short for --set language=...")
@click.option("--thumbnails", metavar="FOLDER", help="Also create thumbnails in FOLDER, for `serve --thumbnails`.")
@config_options
@workers_option
@progress_option
@serve_option
@click.option(
    "--overwrite", is_flag=True, help="Replace an index that is damaged or has different datasets or settings."
)
def command(
    arguments: tuple[str, ...],
    embeddings: tuple[str, ...],
    duplicates: str | None,
    output: str,
    language: str | None,
    thumbnails: str | None,
    config: str | None,
    overrides: tuple[str, ...],
    workers: int,
    progress: bool,
    serve: int | None,
    overwrite: bool,
) -> None:
    """Index CAPTIONS, and optionally embeddings of the same images, for `query` and `serve`.

    Words are stemmed, so dogs matches dog. Small sets of vectors are searched exhaustively. Large sets are stored in
    inverted lists with one byte per dimension.

    Run the command again after the datasets have changed. It indexes only new and changed shards, and removes shards
    that no longer exist. `serve` and other programs that have the index open switch to the new version. An image id may
    occur only once in all CAPTIONS.

    With --duplicates, only the largest image of each group of duplicates is indexed. If you run the command again
    without --duplicates, it adds the other images. With --set keep_duplicates=true, duplicates are indexed and marked,
    and a search in the web application can leave them out.

    The index also lists the images that could not be captioned. It contains the reference captions if the manifest
    (list of images) of CAPTIONS still exists. If it exists but cannot be read, the command fails, unless
    --set references=false leaves the references out.

    \b
    Examples:
      captionlib build-index captions -o index
      captionlib build-index captions -o index --serve
      captionlib build-index captions -e embeddings -o index --workers 2
      captionlib build-index captions -o index --thumbnails thumbnails
      captionlib build-index captions-2025 captions-2026 -e embeddings-2025 -e embeddings-2026 -o index
      captionlib build-index captions -e embeddings -o index --duplicates duplicates
      captionlib build-index captions -e embeddings -o index --language german --overwrite
      captionlib build-index captions -e embeddings -o index --set vectors=pq --set nprobe=128
      captionlib build-index s3://b/captions -e s3://b/embeddings -o s3://b/index -- --runner=FlinkRunner
    """
    from captionlib.config import load_config
    from captionlib.search.config import IndexConfig
    from pipelines.build_index import build_index
    from pipelines.run import RunConfig

    if language is not None:
        overrides = (*overrides, f"language={language}")
    # click allows only one argument of variable length. Beam options begin with "-", and files of them with "@".
    captions = tuple(takewhile(lambda argument: not argument.startswith(("-", "@")), arguments))
    beam_options = arguments[len(captions) :]
    if not captions:
        raise click.UsageError("expected one or more folders CAPTIONS before the options of Beam, got none.")
    settings = load_config(IndexConfig, config, overrides)
    run = RunConfig(workers, beam_options, overwrite=overwrite)
    build, index = build_index(captions, output, settings, embeddings=embeddings, duplicates=duplicates, run=run)
    if build.replaced_layout is not None:
        old = f"{_describe_layout(build.replaced_layout)}, for {build.replaced_layout.rows:,} rows"
        click.echo(
            f"The index now has {index.captions_count:,} rows, so its vector layout ({old}) was replaced", err=True
        )
    vectors = f"{index.vectors_count:,} vectors ({_describe_layout(index.layout)})" if index.layout else "no vectors"
    click.echo(f"{output}: {index.captions_count:,} captions, {vectors}, in {len(index.shards):,} shards")
    added = len(build.added)
    click.echo(f"{added:,} shards added, {build.removed:,} removed, {len(build.shards) - added:,} unchanged")
    if build.pending:
        click.echo(f"{build.pending:,} shards are not finished; run this command again when they are", err=True)
    if thumbnails is not None:
        _create_thumbnails(output, thumbnails, progress)
    serve_when_done(output, serve)


def _create_thumbnails(index: str, folder: str, progress: bool) -> None:
    from captionlib.search.index import open_index
    from captionlib.serving.config import ServingConfig
    from captionlib.serving.thumbnails import create_thumbnails

    uris = list(open_index(index, refresh_seconds=None).list_uris())
    failures = create_thumbnails(Path(folder), uris, ServingConfig(), progress)
    click.echo(f"{folder}: {len(uris) - failures:,} thumbnails")
    if failures:
        click.echo(f"{failures:,} images cannot be read, so they have no thumbnail", err=True)


def _describe_layout(layout: VectorLayout) -> str:
    if layout.nlist == 1:
        return f"{layout.encoding}, exhaustive search"
    return f"{layout.encoding}, {layout.nlist:,} lists, {layout.nprobe:,} visited per query"
