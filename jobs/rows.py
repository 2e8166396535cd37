"""How commands show rows: on the terminal, or in a file that appears whole."""

import os
import shutil
import sys
from collections.abc import Iterator

import click
import pyarrow as pa

from captionlib.search.output import OutputFormat, write_output
from captionlib.storage.folders import stage_file

__all__ = ["first_rows", "print_rows", "save_rows"]


def first_rows(rows: pa.RecordBatchReader, limit: int) -> pa.RecordBatchReader:
    """At most so many of the rows."""
    return pa.RecordBatchReader.from_batches(rows.schema, _first(rows, limit))


def _first(rows: pa.RecordBatchReader, limit: int) -> Iterator[pa.RecordBatch]:
    for batch in rows:
        yield batch.slice(0, limit)
        limit -= batch.num_rows
        if limit <= 0:
            return


def print_rows(rows: pa.RecordBatchReader, form: OutputFormat) -> None:
    """Prints rows, a table as wide as the terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    try:
        count = write_output(rows, sys.stdout.buffer, form, width)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has enough (`| head`); Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if count == 0 and form == "table":
        click.echo("no rows", err=True)


def save_rows(rows: pa.RecordBatchReader, form: OutputFormat, output: str) -> int:
    """Writes a file that appears whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    with stage_file(output) as path, path.open("wb") as file:
        return write_output(rows, file, form)
