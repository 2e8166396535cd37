"""Arrow rows as text and files: an aligned table for a person, CSV, JSON lines and Parquet for what comes next."""

import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

__all__ = ["Format", "write_rows"]

Format = Literal["table", "csv", "jsonl", "parquet"]

_GAP = "  "
_NARROWEST = 8


def write_rows(rows: pa.RecordBatchReader, sink: BinaryIO, form: Format, width: int | None = None) -> int:
    """Writes rows as they come; memory holds a batch.

    Args:
        rows: what to write.
        sink: where to, as bytes; text is UTF-8.
        form: `table` aligns columns by the first batch; `csv` has JSON where a value is nested; `jsonl` is an object a
            row; `parquet` keeps every type.
        width: columns of the terminal that a table must fit into; None writes all values whole.

    Returns:
        How many rows there were.
    """
    if form == "parquet":
        return _write_parquet(rows, sink)
    if form == "csv":
        return _write_csv(rows, sink)
    lines = _table_lines if form == "table" else _json_lines
    count = 0
    for some, text in lines(rows, width):
        count += some
        sink.write(text.encode())
    return count


def _write_parquet(rows: pa.RecordBatchReader, sink: BinaryIO) -> int:
    count = 0
    with pq.ParquetWriter(sink, rows.schema, compression="zstd") as writer:
        for batch in rows:
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def _write_csv(rows: pa.RecordBatchReader, sink: BinaryIO) -> int:
    count = 0
    schema = pa.schema(
        [pa.field(field.name, pa.string()) if _needs_json(field.type) else field for field in rows.schema]
    )
    with pa_csv.CSVWriter(sink, schema) as writer:
        for batch in rows:
            columns = [
                pa.array([_to_json(value) for value in _plain_column(column)], pa.string())
                if _needs_json(column.type)
                else column
                for column in batch.columns
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            count += batch.num_rows
    return count


def _needs_json(kind: pa.DataType) -> bool:
    return bool(pa.types.is_nested(kind) or pa.types.is_binary(kind) or kind == pa.month_day_nano_interval())


def _json_lines(rows: pa.RecordBatchReader, _width: int | None) -> Iterator[tuple[int, str]]:
    names = rows.schema.names
    for batch in rows:
        columns = [_plain_column(column) for column in batch.columns]
        objects = (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
        yield batch.num_rows, "".join(f"{_to_json(row)}\n" for row in objects)


def _table_lines(rows: pa.RecordBatchReader, width: int | None) -> Iterator[tuple[int, str]]:
    names = [_printable(name) for name in rows.schema.names]
    numeric = [_is_number(field.type) for field in rows.schema]
    widths: list[int] | None = None
    for batch in _merged(rows):
        cells = [[_cell(value) for value in _plain_column(column)] for column in batch.columns]
        if widths is None:
            natural = [max(map(_width_of, [name, *column])) for name, column in zip(names, cells, strict=True)]
            if batch.num_rows == 1 and width is not None and sum(natural) + len(_GAP) * (len(natural) - 1) > width:
                yield 1, _record(names, batch, width)
                return
            widths = _fit(natural, width)
            yield 0, _line(names, widths, numeric) + _line(["─" * size for size in widths], widths, numeric)
        yield batch.num_rows, "".join(_line(row, widths, numeric) for row in zip(*cells, strict=True))
    if widths is None:
        yield 0, _line(names, [_width_of(name) for name in names], numeric)


def _merged(rows: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """The same rows; the first batch has a single row only where there is but one."""
    waiting: pa.RecordBatch | None = None
    for batch in rows:
        together = batch if waiting is None else pa.concat_batches([waiting, batch])
        waiting = together if together.num_rows < 2 else None
        if waiting is None:
            yield together
    if waiting is not None and waiting.num_rows:
        yield waiting


def _record(names: Sequence[str], row: pa.RecordBatch, width: int) -> str:
    """One row wider than the terminal: a line a column, and a line an element of a list; inner lists are cut."""
    margin = max(map(_width_of, names))
    lines = []
    for name, column in zip(names, row.columns, strict=True):
        (value,) = _plain_column(column)
        elements = [_element(item, width - margin - len(_GAP)) for item in value] if isinstance(value, list) else []
        elements = elements or [_cell(value)]
        titles = [name, *[""] * (len(elements) - 1)]
        lines += [f"{_pad(title, margin)}{_GAP}{text}\n" for title, text in zip(titles, elements, strict=True)]
    return "".join(lines)


def _element(value: Any, width: int) -> str:
    if isinstance(value, list):
        return _shorten(_cell(value), max(width, _NARROWEST))
    return _GAP.join(_cell(part) for part in value.values()) if isinstance(value, dict) else _cell(value)


def _fit(natural: Sequence[int], width: int | None) -> list[int]:
    """Takes width from the widest columns until all fit, or until all are narrow."""
    widths = list(natural)
    if width is None:
        return widths
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    while excess > 0 and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
        excess -= 1
    return widths


def _line(cells: Iterable[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = [_pad(_shorten(cell, size), size, right) for cell, size, right in zip(cells, widths, numeric, strict=True)]
    return _GAP.join(padded).rstrip() + "\n"


def _pad(text: str, width: int, right: bool = False) -> str:
    space = " " * (width - _width_of(text))
    return space + text if right else text + space


def _shorten(text: str, width: int) -> str:
    if _width_of(text) <= width:
        return text
    while _width_of(text) > width - 1:
        text = text[:-1]
    return f"{text}…"


def _width_of(text: str) -> int:
    """Columns that a terminal takes for a text: two for wide characters, none for accents that combine."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return _printable(value)
    return "NULL" if value is None else _printable(_to_json(value))


def _printable(text: str) -> str:
    """A text without what would steer a terminal or break a line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _plain_column(column: pa.Array) -> list[Any]:
    return [_plain(value, column.type) for value in column.to_pylist()]


def _plain(value: Any, kind: pa.DataType) -> Any:
    """A value as JSON has it."""
    if value is None or not pa.types.is_nested(kind):
        return _plain_scalar(value, kind)
    if pa.types.is_map(kind):
        return {str(key): _plain(item, kind.item_type) for key, item in value}
    if pa.types.is_struct(kind):
        return {name: _plain(item, kind.field(name).type) for name, item in value.items()}
    return [_plain(item, kind.value_type) for item in value]


def _plain_scalar(value: Any, kind: pa.DataType) -> Any:
    """A 32-bit number gets the digits that it has, not those of its 64-bit neighbour; what is no number is null."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(str(np.float32(value))) if kind.bit_width < 64 else value
    if isinstance(value, Decimal):
        return int(value) if kind.scale == 0 else float(value)
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
