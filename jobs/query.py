"""The command `captionlib query`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from captionlib.errors import DatasetError
from jobs.options import config_options, weights_option

if TYPE_CHECKING:
    import pyarrow as pa

    from captionlib.search.output import OutputFormat
    from captionlib.search.sql.isolation import OpenRows
    from captionlib.search.sql.session import SqlLimits

__all__ = ["command", "limit_rows"]

_INDEX_QUERIES = ("text", "sentence", "hybrid", "image", "similar", "image_id")
_DATASET_QUERIES = ("sql", "contains", "top", "count_words", "image_id")
_INDEX_OPTIONS = ("where", "sort", "ranker", "captioner", "sentences", "weights", "config", "set")
_SECTIONS = {
    "Query an index": _INDEX_QUERIES,
    "Options for an index": _INDEX_OPTIONS,
    "Query a dataset": _DATASET_QUERIES,
    "Options for a dataset": ("duplicates", "memory", "threads"),
    "Output": ("limit", "timeout", "format", "escape_formulas", "output", "quiet", "verbose", "log_format", "help"),
}


class _SectionedCommand(click.Command):
    """A command whose help groups the options by `_SECTIONS`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        parameters = {max(parameter.opts, key=len): parameter for parameter in self.get_params(ctx)}
        for title, names in _SECTIONS.items():
            records = [parameters[_flag(name)].get_help_record(ctx) for name in names if _flag(name) in parameters]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record])


@click.command(cls=_SectionedCommand)
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
@click.option("--text", metavar="WORDS", help='Captions with these words; "phrases", +required, -excluded.')
@click.option("--sentence", metavar="SENTENCE", help="Images that match a sentence (semantic search); needs --ranker.")
@click.option("--hybrid", metavar="WORDS", help="Combines the rankings of --text and --sentence; needs --ranker.")
@click.option("--image", metavar="FILE", help="Images similar to an image file; needs --ranker.")
@click.option("--similar", metavar="ID", help="Images similar to an image in the index.")
@click.option("--image-id", metavar="ID", help="The row of one image.")
@click.option("--where", metavar="CONDITION", help="SQL condition, such as \"split = 'val' AND log_prob > -10\".")
@click.option(
    "--sort",
    type=click.Choice(["relevance", "log_prob", "image_text_score"]),
    help="Order of the results of --text.  [default: relevance]",
)
@click.option("--ranker", "-r", metavar="FOLDER", help="Ranker (dual encoder) that computed the embeddings.")
@click.option("--captioner", "-c", metavar="FOLDER", help="With --image, caption the image instead of searching.")
@click.option("--sentences", metavar="FILE", help="With --image, rank the sentences in this file, one per line.")
@weights_option
@config_options
@click.option(
    "--sql",
    metavar="SELECT",
    help="A SELECT from the view named after the dataset's kind, such as captions, or from the view failures.",
)
@click.option("--contains", metavar="WORDS", help="Captions with all these words, most probable first.")
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="The N most probable captions.")
@click.option("--count-words", type=click.IntRange(min=1), metavar="N", help="The N most frequent words.")
@click.option("--duplicates", metavar="FOLDER", help="Output of `captionlib deduplicate`, to leave out duplicates.")
@click.option("--memory", default="2GB", show_default=True, help="Memory to use before spilling to disk.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads.  [default: one per core]")
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    metavar="N",
    help="Maximum number of rows.  [default: 20 for an index, all for a dataset]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Stop a query over a dataset, or with --where, after this time.",
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "csv", "jsonl", "parquet"]),
    default="table",
    show_default=True,
    help="Tables are fitted to the terminal; the other formats contain all values in full.",
)
@click.option(
    "--escape-formulas/--no-escape-formulas",
    default=True,
    show_default=True,
    help="In CSV, put a ' before text that a spreadsheet would execute.",
)
@click.option("--output", "-o", metavar="FILE", help="File or fsspec URL to write to.  [default: standard output]")
def command(
    folders: tuple[str, ...],
    memory: str,
    threads: int | None,
    limit: int | None,
    timeout: float,
    output_format: OutputFormat,
    escape_formulas: bool,
    output: str | None,
    overrides: tuple[str, ...],
    **queries_and_options: str | int | None,
) -> None:
    """Search FOLDER: an index, a collection, or a dataset such as captions. Several datasets are queried as one.

    An index is searched by text, sentence or image. --where filters by image_id, uri, split, caption, log_prob, tokens,
    image_text_score, width and height. A remote index is copied to this machine once.

    A dataset is queried with SQL. Its rows are in a view named after its kind: captions, features, manifest, embeddings
    or duplicates. A second view, named failures, contains the images that could not be processed. Both include only
    finished shards (files). SQL from untrusted users is safe: a query cannot change the dataset or access anything
    else. A query is stopped after --timeout, or when it uses 512 MiB more than --memory. The same limits apply to
    --where.

    A collection stands for its index or its captions, depending on the query. If the collection leaves out
    duplicates, so do all queries except --sql. With --sql, the view captions has the rows of all images, and a column
    duplicate_of, which contains the id of the image that is kept.

    \b
    Examples:
      captionlib query index --text "dog catching a frisbee"
      captionlib query index --text '+dog "on the beach" -cat' --where "split = 'val'" --limit 50
      captionlib query index --sentence "two men on a beach" --ranker ranker
      captionlib query index --hybrid "a red bus" --ranker ranker --format jsonl
      captionlib query index --similar 391895
      captionlib query index --image image.jpg --ranker ranker
      captionlib query index --image image.jpg --ranker ranker --sentences sentences.txt
      captionlib query index --image image.jpg --captioner captioner --set decoding.beam_width=10
      captionlib query captions --contains "dog frisbee"
      captionlib query captions --image-id 391895
      captionlib query captions-2025 captions-2026 --contains frisbee
      captionlib query captions --contains dog --duplicates duplicates
      captionlib query holidays --sql "SELECT count(*) FROM captions WHERE duplicate_of IS NULL"
      captionlib query captions --top 20 --format csv --output top.csv
      captionlib query captions --count-words 50
      captionlib query captions --sql "DESCRIBE captions"
      captionlib query captions --sql "SELECT caption, count(*) AS n FROM captions GROUP BY 1 ORDER BY n DESC LIMIT 10"
      captionlib query captions --sql "SELECT image_id, unnest(candidates, recursive := true) FROM captions" --limit 20
      captionlib query captions --sql "SELECT error, count(*) FROM failures GROUP BY 1"
      captionlib query s3://bucket/captions --sql "FROM captions" --format parquet --output all.parquet
    """
    from captionlib.collection import expand_collections, is_collection
    from captionlib.search.index_folder import INDEX_FILE
    from captionlib.search.output import write_output
    from captionlib.search.sql.isolation import run_query
    from captionlib.search.sql.session import SqlLimits
    from captionlib.storage.folders import Folder, stage_file

    if output_format == "parquet" and output is None and sys.stdout.isatty():
        raise click.UsageError("Parquet is a binary format: specify --output FILE, or write to a pipe.")
    values: dict[str, Any] = {name: value for name, value in queries_and_options.items() if value is not None}
    if overrides:
        values["set"] = overrides
    mark_duplicates = False
    if len(folders) == 1 and is_collection(folders[0]):
        folders, mark_duplicates = _resolve_collection(folders[0], values)
    else:
        folders = tuple(expand_collections(folders))
    folder, limits = folders[0], SqlLimits(memory, threads)
    if len(folders) == 1 and Folder(folder).exists(INDEX_FILE):
        advice = "a dataset; query the captions that the index was built from"
        query = _choose_query(values, _INDEX_QUERIES, (*_DATASET_QUERIES, "duplicates"), advice)
        open_rows: OpenRows = partial(_query_index, folder, query, values, 20 if limit is None else limit)
        # Models count towards the memory limit, but the files of the index do not: they are memory-mapped.
        result = run_query(open_rows, limits.memory_bytes, timeout) if "where" in values else open_rows()
    else:
        advice = f"an index, but {' '.join(folders)} is not an index; see `captionlib build-index`"
        query = _choose_query(values, _DATASET_QUERIES, (*_INDEX_QUERIES, *_INDEX_OPTIONS), advice)
        open_rows = partial(_query_dataset, folders, query, values, limit, limits, mark_duplicates)
        result = run_query(open_rows, limits.memory_bytes, timeout)
    with result as rows:
        if output is None:
            _print_rows(rows, output_format, escape_formulas)
            return
        with stage_file(output) as path, path.open("wb") as file:  # the file appears only when it is complete
            count = write_output(rows, file, output_format, escape_formulas=escape_formulas)
        click.echo(f"{output}: {count:,} rows")


def _resolve_collection(folder: str, values: dict[str, Any]) -> tuple[tuple[str, ...], bool]:
    """Returns the folders to query in a collection, and whether duplicates are marked instead of left out.

    Adds the ranker and the duplicates of the collection to `values`, if the query needs them.
    """
    from captionlib.collection import open_collection
    from captionlib.data.shards.markers import SUCCESS_FILE
    from captionlib.search.index_folder import INDEX_FILE
    from captionlib.storage.folders import Folder

    collection = open_collection(folder)
    config = collection.config
    all_queries = dict.fromkeys([*_INDEX_QUERIES, *_DATASET_QUERIES])
    if not values.keys() & all_queries:
        _choose_query(values, list(all_queries), (), "")  # raises an error that names all queries
    if values.keys() & set(_DATASET_QUERIES) - set(_INDEX_QUERIES):
        captions = tuple(collection.list_captions())
        if config.duplicate_threshold is None:
            return captions, False
        if not Folder(collection.duplicates).exists(SUCCESS_FILE):
            raise DatasetError(
                f"{collection.duplicates} is not complete; run `captionlib update {folder}`, or query "
                f"{' '.join(captions)}, which include duplicates"
            )
        mark_duplicates = "duplicates" not in values and ("sql" in values or config.index.keep_duplicates)
        values.setdefault("duplicates", collection.duplicates)
        return captions, mark_duplicates
    if not Folder(collection.index).exists(INDEX_FILE):
        raise DatasetError(f"{folder} has no index yet; run `captionlib update {folder}`")
    if "captioner" not in values and values.keys() & {"sentence", "hybrid", "image"} and config.ranker:
        values.setdefault("ranker", config.ranker)
    return (collection.index,), False


def _choose_query(values: Mapping[str, Any], queries: Sequence[str], refused: Sequence[str], advice: str) -> str:
    """Returns the only one of `queries` in `values`. Options in `refused` are for the kind of folder in `advice`."""
    for name in values:
        if name in refused and name not in queries:
            raise click.UsageError(f"{_flag(name)} is for {advice}.")
    chosen = [name for name in queries if name in values]
    if len(chosen) != 1:
        *flags, last = map(_flag, queries)
        got = " and ".join(map(_flag, chosen)) or "none"
        raise click.UsageError(f"expected one of {', '.join(flags)} and {last}, got {got}.")
    return chosen[0]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@contextmanager
def _query_dataset(
    folders: tuple[str, ...],
    query: str,
    values: Mapping[str, Any],
    limit: int | None,
    limits: SqlLimits,
    mark_duplicates: bool,
) -> Iterator[pa.RecordBatchReader]:
    from captionlib.search.sql.queries import count_words, find_captions, find_image, find_top_captions
    from captionlib.search.sql.session import open_sql

    duplicates = values.get("duplicates")
    with open_sql(folders, limits=limits, duplicates=duplicates, mark_duplicates=mark_duplicates) as session:
        queries: dict[str, Callable[[Any], pa.RecordBatchReader]] = {
            "sql": session.stream,
            "contains": partial(find_captions, session),
            "top": partial(find_top_captions, session),
            "count_words": partial(count_words, session),
            "image_id": lambda image_id: find_image(session, image_id).to_reader(),
        }
        rows = queries[query](values[query])
        yield rows if limit is None else limit_rows(rows, limit)


@contextmanager
def _query_index(folder: str, query: str, values: Mapping[str, Any], limit: int) -> Iterator[pa.RecordBatchReader]:
    yield _search_index(folder, query, values, limit).to_reader()


def _search_index(folder: str, query: str, values: Mapping[str, Any], limit: int) -> pa.Table:
    import pyarrow as pa

    if query == "image":
        return _query_by_image(folder, values, limit)
    needs_ranker = query in ("sentence", "hybrid")
    if needs_ranker and "ranker" not in values:
        raise click.UsageError(f"{_flag(query)} needs --ranker FOLDER, the ranker that computed the embeddings.")
    from captionlib.search.index import open_index  # SQL alone needs neither Faiss nor Tantivy

    index = open_index(folder, values["ranker"] if needs_ranker else None)
    value, where = values[query], values.get("where")
    if query == "image_id":
        return pa.Table.from_pylist([index.get_image(value)])
    if query == "text":
        return index.search_text(value, limit, where=where, sort=values.get("sort", "relevance"))
    search: Callable[..., pa.Table] = getattr(
        index, f"search_{query}"
    )  # search_sentence, search_hybrid or search_similar
    return search(value, limit, where=where)


def _query_by_image(folder: str, values: Mapping[str, Any], limit: int) -> pa.Table:
    from captionlib.models.checkpoints.encoder_file import require_checkpoint_files

    for address in filter(None, map(values.get, ("captioner", "ranker"))):
        require_checkpoint_files(address, values.get("weights"))
    from captionlib.config import load_config
    from captionlib.data.images.fetching import ImageFetcher
    from captionlib.models.families.ranker import open_ranker  # imports torch, which takes seconds
    from captionlib.models.inference.captioning import GenerationConfig
    from captionlib.search.index import open_index
    from captionlib.search.models import ImageQueryModels, read_sentences

    captioner, ranker_folder, sentences_file = map(values.get, ("captioner", "ranker", "sentences"))
    if captioner is None and ranker_folder is None:
        raise click.UsageError("--image needs --ranker FOLDER to find similar images, or --captioner FOLDER.")
    if captioner is not None and sentences_file is not None:
        raise click.UsageError("expected one of --captioner and --sentences, got both.")
    generation = load_config(GenerationConfig, values.get("config"), values.get("set", ()))
    sentences = None if sentences_file is None else read_sentences(sentences_file)
    ranker = open_ranker(ranker_folder, "cpu") if ranker_folder and captioner is None else None
    index = None if ranker is None or sentences is not None else open_index(folder, ranker)
    with (
        ImageFetcher() as fetcher,
        ImageQueryModels(ranker, captioner, values.get("weights"), generation=generation) as models,
    ):
        content = fetcher.fetch(values["image"])
        if captioner is not None:
            return models.caption(content).slice(0, limit)
        vector = models.embed(content)
        if sentences is not None:
            return models.rank_sentences(vector, sentences).slice(0, limit)
    assert index is not None
    return index.search_vector(vector, limit, where=values.get("where"))


def limit_rows(rows: pa.RecordBatchReader, limit: int) -> pa.RecordBatchReader:
    """Returns the first `limit` rows, without reading the rest."""
    import pyarrow as pa

    def slice_batches(remaining: int) -> Iterator[pa.RecordBatch]:
        for batch in rows:
            yield batch.slice(0, remaining)
            remaining -= batch.num_rows
            if remaining <= 0:
                return

    return pa.RecordBatchReader.from_batches(rows.schema, slice_batches(limit))


def _print_rows(rows: pa.RecordBatchReader, output_format: OutputFormat, escape_formulas: bool) -> None:
    """Prints rows; a table is fitted to the width of the terminal."""
    from captionlib.search.output import write_output

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    try:
        count = write_output(rows, sys.stdout.buffer, output_format, width, escape_formulas)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Python would raise the error again on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if count == 0 and output_format == "table":
        click.echo("no rows", err=True)
