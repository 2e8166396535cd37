"""Prints rows on the terminal, or saves them to a file."""

import os
import shutil
import sys
from collections.abc import Iterator

import click
import pyarrow as pa

from captionlib.search.output import OutputFormat, write_output
from captionlib.storage.folders import stage_file

__all__ = ["limit_rows", "print_rows", "save_rows"]


def limit_rows(rows: pa.RecordBatchReader, limit: int) -> pa.RecordBatchReader:
    """Returns the first `limit` rows, without reading the others."""

    def slice_batches(remaining: int) -> Iterator[pa.RecordBatch]:
        for batch in rows:
            yield batch.slice(0, remaining)
            remaining -= batch.num_rows
            if remaining <= 0:
                return

    return pa.RecordBatchReader.from_batches(rows.schema, slice_batches(limit))


def print_rows(rows: pa.RecordBatchReader, output_format: OutputFormat) -> None:
    """Prints rows; a table is fitted to the width of the terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    try:
        count = write_output(rows, sys.stdout.buffer, output_format, width)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Python would raise the error again on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if count == 0 and output_format == "table":
        click.echo("no rows", err=True)


def save_rows(rows: pa.RecordBatchReader, output_format: OutputFormat, output: str) -> int:
    """Writes rows to a file, which appears only when it is complete; returns the number of rows.

    Raises:
        StorageError: the file cannot be written.
    """
    with stage_file(output) as path, path.open("wb") as file:
        return write_output(rows, file, output_format)
