"""`captionlib query`."""

import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import fsspec
import pyarrow as pa

from captionlib.errors import ConfigError
from captionlib.search.questions import count_words, find_captions, find_image, most_likely
from captionlib.search.sql import SqlLimits, SqlSession, open_sql
from captionlib.search.tables import Format, write_rows

__all__ = ["command"]

Question = Callable[[SqlSession], pa.RecordBatchReader]


@click.command()
@click.argument("folder")
@click.option("--sql", metavar="SELECT", help="Any one SELECT; the rows are a view named by the dataset's kind.")
@click.option("--image-id", metavar="ID", help="Everything about one image.")
@click.option(
    "--contains", metavar="WORDS", help="Captions with all of these words, in any order; the most likely first."
)
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="The N captions with the highest log-probability.")
@click.option("--count-words", "words", type=click.IntRange(min=1), metavar="N", help="The N most frequent words.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "jsonl", "parquet"]),
    default="table",
    show_default=True,
    help="A table fits the terminal; the others hold every value whole.",
)
@click.option("--output", "-o", metavar="FILE", help="Where to write, in place of the terminal; may be an address.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N rows.")
@click.option(
    "--memory", default=SqlLimits.memory, show_default=True, help="What DuckDB may hold before it uses the disk."
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="One a core, unless given.")
def command(
    folder: str,
    sql: str | None,
    image_id: str | None,
    contains: str | None,
    top: int | None,
    words: int | None,
    form: Format,
    output: str | None,
    limit: int | None,
    memory: str,
    threads: int | None,
) -> None:
    """Ask FOLDER a question: captions, or any other dataset.

    In SQL the rows are a view named by what they are (captions, features, manifest, embeddings), and the images that
    failed are the view `failures`. Shards that are still being written are not seen. The dataset can only be read, and
    nothing outside it can be reached, so SQL of strangers is safe to run.

    \b
    Examples:
      captionlib query captions --contains "dog frisbee"
      captionlib query captions --image-id 391895
      captionlib query captions --top 20 --format csv --output top.csv
      captionlib query captions --count-words 50
      captionlib query captions --sql "DESCRIBE captions"
      captionlib query captions --sql "SELECT caption, count(*) AS n FROM captions GROUP BY 1 ORDER BY n DESC LIMIT 10"
      captionlib query captions --sql "SELECT image_id, unnest(candidates, recursive := true) FROM captions" --limit 20
      captionlib query captions --sql "SELECT error, count(*) FROM failures GROUP BY 1"
      captionlib query s3://bucket/captions --sql "FROM captions" --format parquet --output all.parquet
    """
    question = _choose_question(sql, image_id, contains, top, words)
    if form == "parquet" and output is None and sys.stdout.isatty():
        raise click.UsageError("Parquet is no text: give --output FILE, or send it into a pipe.")
    with open_sql(folder, limits=SqlLimits(memory, threads)) as session:
        rows = question(session)
        if limit is not None:
            rows = pa.RecordBatchReader.from_batches(rows.schema, _first(rows, limit))
        if output is None:
            _print_rows(rows, form)
        else:
            count = _save_rows(rows, form, output)
            click.echo(f"{output}: {count:,} rows")


def _choose_question(
    sql: str | None, image_id: str | None, contains: str | None, top: int | None, words: int | None
) -> Question:
    questions: dict[str, Question] = {}
    if sql is not None:
        questions["--sql"] = lambda session: session.stream(sql)
    if image_id is not None:
        questions["--image-id"] = lambda session: find_image(session, image_id).to_reader()
    if contains is not None:
        questions["--contains"] = lambda session: find_captions(session, contains)
    if top is not None:
        questions["--top"] = lambda session: most_likely(session, top)
    if words is not None:
        questions["--count-words"] = lambda session: count_words(session, words)
    if len(questions) != 1:
        got = " and ".join(questions) or "none"
        raise click.UsageError(
            f"expected one of --sql, --image-id, --contains, --top and --count-words, got {got}; ask one at a time."
        )
    (question,) = questions.values()
    return question


def _first(rows: pa.RecordBatchReader, limit: int) -> Iterator[pa.RecordBatch]:
    for batch in rows:
        yield batch.slice(0, limit)
        limit -= batch.num_rows
        if limit <= 0:
            return


def _print_rows(rows: pa.RecordBatchReader, form: Format) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    try:
        count = write_rows(rows, sys.stdout.buffer, form, width)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has enough (`| head`); Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if count == 0 and form == "table":
        click.echo("no rows", err=True)


def _save_rows(rows: pa.RecordBatchReader, form: Format, output: str) -> int:
    """Writes a file that appears whole or not at all."""
    if "://" in output:
        with fsspec.open(output, "wb") as file:
            return write_rows(rows, file, form)
    path = Path(output)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            count = write_rows(rows, file, form)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return count
