"""How commands show rows: on the terminal, or in a file that appears whole."""

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import click
import fsspec
import pyarrow as pa

from captionlib.errors import ConfigError
from captionlib.search.output import OutputFormat, write_output

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
        ConfigError: it cannot be written.
    """
    if "://" in output:
        with fsspec.open(output, "wb") as file:
            return write_output(rows, file, form)
    path = Path(output)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            count = write_output(rows, file, form)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return count
