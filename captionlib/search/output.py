"""Writes Arrow rows as an aligned table for the terminal, CSV, JSON Lines or Parquet."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from rich.cells import cell_len, set_cell_size

__all__ = ["OutputFormat", "write_output"]

OutputFormat = Literal["table", "csv", "jsonl", "parquet"]

_GAP = "  "
_MIN_WIDTH = 8
_FORMULA = r"^'*[=+\-@\t\r\n]"


def write_output(
    rows: pa.RecordBatchReader,
    sink: BinaryIO,
    output_format: OutputFormat,
    width: int | None = None,
    escape_formulas: bool = True,
) -> int:
    r"""Writes rows as they arrive and returns their number. Only one batch is kept in memory.

    `table` chooses the column widths from the first batch, and truncates values to fit a terminal of `width`
    characters. If `width` is None, values of the first batch are not truncated. `csv` writes nested values as JSON, and
    `jsonl` writes one object per row.

    In CSV, text that a spreadsheet would execute as a formula gets the prefix `'`, unless `escape_formulas` is False.
    Such text begins with `=`, `+`, `-`, `@`, a tab or a line break, possibly after one or more `'`. To restore all
    values, remove one `'` from each text that matches `^'+[=+\-@\t\r\n]`.
    """
    count = 0

    def count_rows() -> Iterator[pa.RecordBatch]:
        nonlocal count
        for batch in rows:
            count += batch.num_rows
            yield batch

    if output_format == "parquet":
        with pq.ParquetWriter(sink, rows.schema, compression="zstd") as writer:
            for batch in count_rows():
                writer.write_batch(batch)
    elif output_format == "csv":
        _write_csv(rows.schema, count_rows(), sink, escape_formulas)
    elif output_format == "jsonl":
        _write_json_lines(rows.schema, count_rows(), sink)
    else:
        _write_table(rows.schema, count_rows(), sink, width)
    return count


def _write_csv(schema: pa.Schema, batches: Iterable[pa.RecordBatch], sink: BinaryIO, escape_formulas: bool) -> None:
    def convert(column: pa.Array) -> pa.Array:
        if _needs_json(column.type):
            return pa.array([_dump_json(value) for value in _to_json_values(column)], pa.string())
        column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        return _escape_formulas(column) if escape_formulas and pa.types.is_string(column.type) else column

    names = convert(pa.array(schema.names, pa.string())).to_pylist()
    empty = [convert(pa.array([], field.type)) for field in schema]
    with pa_csv.CSVWriter(sink, pa.schema(zip(names, (column.type for column in empty), strict=True))) as writer:
        for batch in batches:
            writer.write_batch(pa.RecordBatch.from_arrays([convert(column) for column in batch.columns], names))


def _escape_formulas(texts: pa.Array) -> pa.Array:
    return pc.if_else(pc.match_substring_regex(texts, _FORMULA), pc.binary_join_element_wise("'", texts, ""), texts)


def _write_json_lines(schema: pa.Schema, batches: Iterable[pa.RecordBatch], sink: BinaryIO) -> None:
    for batch in batches:
        columns = [_to_json_values(column) for column in batch.columns]
        objects = (dict(zip(schema.names, values, strict=True)) for values in zip(*columns, strict=True))
        sink.write("".join(f"{_dump_json(row)}\n" for row in objects).encode())


def _write_table(schema: pa.Schema, batches: Iterable[pa.RecordBatch], sink: BinaryIO, width: int | None) -> None:
    """Writes an aligned table. Rich's Table would need all rows at once and take 100 times as long per row."""
    names = [_escape_control_characters(name) for name in schema.names]
    numeric = [_is_number(field.type) for field in schema]
    widths: list[int] = []
    for batch in _merge_single_rows(batches):
        cells = [[_to_cell(value) for value in _to_json_values(column)] for column in batch.columns]
        if not widths:
            widths = [max(map(cell_len, [name, *column])) for name, column in zip(names, cells, strict=True)]
            excess = 0 if width is None else sum(widths) + len(_GAP) * (len(widths) - 1) - width
            if width is not None and excess > 0 and batch.num_rows == 1:
                sink.write(_format_record(names, batch, width).encode())
                return
            _shrink(widths, excess)
            sink.write(_format_line(names, widths, numeric).encode())
            sink.write(_format_line(["─" * size for size in widths], widths, numeric).encode())
        sink.write("".join(_format_line(row, widths, numeric) for row in zip(*cells, strict=True)).encode())
    if not widths:
        sink.write(f"{_GAP.join(names)}\n".encode())


def _merge_single_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Merges batches so that only the last can have a single row. A first batch with one row thus contains all rows."""
    pending: pa.RecordBatch | None = None
    for batch in batches:
        merged = batch if pending is None else pa.concat_batches([pending, batch])
        pending = merged if merged.num_rows < 2 else None
        if pending is None:
            yield merged
    if pending is not None and pending.num_rows:
        yield pending


def _format_record(names: Sequence[str], row: pa.RecordBatch, width: int) -> str:
    """Formats a row that is wider than the terminal, with one line per column or list element."""
    name_width = max(map(cell_len, names))
    lines = []
    for name, column in zip(names, row.columns, strict=True):
        (value,) = _to_json_values(column)
        texts = [_to_cell(value)]
        if isinstance(value, list) and value:
            texts = [_format_element(element, width - name_width - len(_GAP)) for element in value]
        labels = [name, *[""] * (len(texts) - 1)]
        lines += [
            f"{set_cell_size(label, name_width)}{_GAP}{text}\n" for label, text in zip(labels, texts, strict=True)
        ]
    return "".join(lines)


def _format_element(element: Any, width: int) -> str:
    if isinstance(element, list):
        return _truncate(_to_cell(element), max(width, _MIN_WIDTH))
    if isinstance(element, dict):
        return _GAP.join(_to_cell(value) for value in element.values())
    return _to_cell(element)


def _shrink(widths: list[int], excess: int) -> None:
    """Narrows the widest columns by `excess` characters in total, as far as the minimum width allows."""
    for _ in range(excess):
        if max(widths) <= _MIN_WIDTH:
            return
        widths[widths.index(max(widths))] -= 1


def _format_line(cells: Iterable[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = []
    for cell, width, is_number in zip(cells, widths, numeric, strict=True):
        text = _truncate(cell, width)
        padded.append(" " * (width - cell_len(text)) + text if is_number else set_cell_size(text, width))
    return _GAP.join(padded).rstrip() + "\n"


def _truncate(text: str, width: int) -> str:
    return text if cell_len(text) <= width else f"{set_cell_size(text, width - 1)}…"


def _to_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return _escape_control_characters(value)
    return "NULL" if value is None else _escape_control_characters(_dump_json(value))


def _escape_control_characters(text: str) -> str:
    """Escapes characters that would control the terminal or break the line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _needs_json(kind: pa.DataType) -> bool:
    return bool(pa.types.is_nested(kind) or pa.types.is_binary(kind) or kind == pa.month_day_nano_interval())


def _dump_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _to_json_values(column: pa.Array) -> list[Any]:
    return [_to_json_value(value, column.type) for value in column.to_pylist()]


def _to_json_value(value: Any, kind: pa.DataType) -> Any:
    if value is None or not pa.types.is_nested(kind):
        return _to_json_scalar(value, kind)
    if pa.types.is_map(kind):
        return {str(key): _to_json_value(item, kind.item_type) for key, item in value}
    if pa.types.is_struct(kind):
        return {name: _to_json_value(item, kind.field(name).type) for name, item in value.items()}
    return [_to_json_value(item, kind.value_type) for item in value]


def _to_json_scalar(value: Any, kind: pa.DataType) -> Any:
    """Converts a scalar. A float keeps only the digits that are needed to identify it; NaN and infinity become null."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(str(np.float32(value))) if kind.bit_width < 64 else value
    if isinstance(value, Decimal):
        return int(value) if kind.scale == 0 else float(value)
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
