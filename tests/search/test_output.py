import csv
import io
import json
import re
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from captionlib.search.output import OutputFormat, write_output

SCHEMA = pa.schema([("image_id", pa.string()), ("log_prob", pa.float32()), ("tokens", pa.int32())])
NESTED = pa.schema(
    [("id", pa.string()), ("best", pa.list_(pa.struct([("caption", pa.string()), ("p", pa.float32())])))]
)
ROWS = [
    {"image_id": "a", "log_prob": -3.21, "tokens": 5},
    {"image_id": 'b "quoted", b', "log_prob": None, "tokens": 12},
]


def write(rows: list[dict[str, Any]], schema: pa.Schema, output_format: OutputFormat, width: int | None = None) -> str:
    sink = io.BytesIO()
    reader = pa.Table.from_pylist(rows, schema).to_reader(max_chunksize=1)
    assert write_output(reader, sink, output_format, width) == len(rows)
    return sink.getvalue().decode()


def test_table_aligns_columns_with_numbers_to_the_right() -> None:
    assert write(ROWS, SCHEMA, "table").splitlines() == [
        "image_id       log_prob  tokens",
        "─────────────  ────────  ──────",
        "a                 -3.21       5",
        'b "quoted", b      NULL      12',
    ]


def test_table_fits_the_terminal() -> None:
    lines = write([{**ROWS[0], "image_id": "x" * 100}, ROWS[1]], SCHEMA, "table", width=30).splitlines()
    assert max(map(len, lines)) == 30
    assert lines[2].startswith("xxxxxxxxxxx…  ")


def test_table_counts_wide_characters_twice_and_combining_accents_not_at_all() -> None:
    rows = [
        {"image_id": "犬", "tokens": 1},
        {"image_id": "e\u0301e\u0301", "tokens": 2},
        {"image_id": "ab", "tokens": 3},
    ]
    lines = write(rows, pa.schema([("image_id", pa.string()), ("tokens", pa.int8())]), "table").splitlines()
    assert lines[2:] == ["犬             1", "e\u0301e\u0301             2", "ab             3"]


def test_table_escapes_control_characters() -> None:
    text = write([{"image_id": "\x1b[31mred\nline\u202e"}], pa.schema([("image_id", pa.string())]), "table")
    assert text.splitlines()[2] == r"\x1b[31mred\nline\u202e"


def test_single_row_that_is_too_wide_is_shown_as_lines() -> None:
    row = {"id": "a", "best": [{"caption": "a dog on the grass", "p": -3.21}, {"caption": "a dog", "p": -4.0}]}
    assert write([row], NESTED, "table", width=40).splitlines() == [
        "id    a",
        "best  a dog on the grass  -3.21",
        "      a dog  -4",
    ]
    assert write([row, row], NESTED, "table", width=40).count("─") > 0


@pytest.mark.parametrize(
    ("width", "lines"), [(7, ["a  b", "─  ─────", "x  yyyyy"]), (8, ["a  b", "─  ─────", "x  yyyyy"])]
)
def test_single_row_that_fits_is_a_table(width: int, lines: list[str]) -> None:
    row = {"a": "x", "b": "yyyyy"}
    expected = lines if width == 8 else ["a  x", "b  yyyyy"]
    assert write([row], pa.schema({"a": pa.string(), "b": pa.string()}), "table", width).splitlines() == expected


def test_single_row_lists_texts_and_numbers() -> None:
    schema = pa.schema({"words": pa.list_(pa.string()), "n": pa.list_(pa.int8()), "none": pa.list_(pa.int8())})
    text = write([{"words": ["a dog", "b\nc"], "n": [1, 2], "none": []}], schema, "table", 8)
    assert text.splitlines() == ["words  a dog", r"       b\nc", "n      1", "       2", "none   []"]


def test_table_is_indented_like_its_values_and_keeps_accents_beside_control_characters() -> None:
    rows = [{"x": "  é\x07", "y": ""}, {"x": "b", "y": ""}]
    lines = write(rows, pa.schema({"x": pa.string(), "y": pa.string()}), "table").splitlines()
    assert lines == ["x        y", "───────  ─", r"  é\x07", "b"]


def test_nested_lists_are_truncated_to_the_terminal() -> None:
    schema = pa.schema([("id", pa.string()), ("maps", pa.list_(pa.list_(pa.float16(), 9)))])
    text = write([{"id": "a long id " * 5, "maps": [[0.5] * 9, [0.25] * 9]}], schema, "table", 30)
    assert text.splitlines() == [
        f"id    {'a long id ' * 5}",
        "maps  [0.5, 0.5, 0.5, 0.5, 0.…",
        "      [0.25, 0.25, 0.25, 0.25…",
    ]


def test_no_rows_give_only_a_header() -> None:
    assert write([], SCHEMA, "table") == "image_id  log_prob  tokens\n"
    assert write([], SCHEMA, "csv") == '"image_id","log_prob","tokens"\n'
    assert write([], SCHEMA, "jsonl") == ""


def test_csv_can_be_read_by_python() -> None:
    read = list(csv.DictReader(io.StringIO(write(ROWS, SCHEMA, "csv"))))
    assert read == [
        {"image_id": "a", "log_prob": "-3.21", "tokens": "5"},
        {"image_id": 'b "quoted", b', "log_prob": "", "tokens": "12"},
    ]


def test_nested_values_are_json_in_csv() -> None:
    row = {"id": "a", "best": [{"caption": 'a "dog"', "p": -3.21}]}
    (read,) = csv.DictReader(
        io.StringIO(
            write(
                [row],
                NESTED,
                "csv",
            )
        )
    )
    assert json.loads(read["best"]) == [{"caption": 'a "dog"', "p": -3.21}]


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'=1", "''-"]
HARMLESS = ["a = b", "'", "'a", "", " =1", "a dog"]


def write_csv(rows: list[dict[str, Any]], schema: pa.Schema, escape_formulas: bool = True) -> list[list[str]]:
    sink = io.BytesIO()
    write_output(pa.Table.from_pylist(rows, schema).to_reader(), sink, "csv", escape_formulas=escape_formulas)
    return list(csv.reader(io.StringIO(sink.getvalue().decode(), newline="")))


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int8(), pa.string())])
def test_formulas_are_escaped_in_csv_unless_disabled(kind: pa.DataType) -> None:
    rows = [{"=A1": text, "log_prob": -1.5} for text in FORMULAS + HARMLESS]
    schema = pa.schema([("=A1", kind), ("log_prob", pa.float64())])
    expected = [f"'{text}" for text in FORMULAS] + HARMLESS
    assert write_csv(rows, schema) == [["'=A1", "log_prob"], *([text, "-1.5"] for text in expected)]
    assert write_csv(rows, schema, escape_formulas=False) == [
        ["=A1", "log_prob"],
        *([text, "-1.5"] for text in FORMULAS + HARMLESS),
    ]


@given(st.lists(st.text(st.sampled_from("'=+-@\t\r\n a1\""), max_size=4)))
def test_escaped_text_can_be_restored(texts: list[str]) -> None:
    cells = [
        cell for _, cell in write_csv([{"i": 0, "x": x} for x in texts], pa.schema({"i": pa.int8(), "x": pa.string()}))
    ]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for cell in cells)
    assert [re.sub(r"^'(?='*[=+\-@\t\r\n])", "", cell) for cell in cells[1:]] == texts


def test_csv_escapes_formulas_by_default() -> None:
    assert write([{"x": "=1"}], pa.schema({"x": pa.string()}), "csv") == '"x"\n"\'=1"\n'


def test_json_lines_keep_every_digit_and_character() -> None:
    schema = pa.schema(
        {"d": pa.float64(), "h": pa.decimal128(38, 0), "c": pa.decimal128(4, 1), "b": pa.binary(), "t": pa.string()}
    )
    row = {"d": 0.1234567891234, "h": Decimal(2**100 + 1), "c": Decimal("1.5"), "b": b"\xaab", "t": "café"}
    sink = io.BytesIO()
    write_output(pa.Table.from_pylist([row, row], schema).to_reader(), sink, "jsonl")
    line = f'{{"d": 0.1234567891234, "h": {2**100 + 1}, "c": 1.5, "b": "\\\\xaab", "t": "café"}}\n'
    assert sink.getvalue().decode() == 2 * line


def test_json_lines_have_the_shortest_digits_of_float32() -> None:
    lines = write(ROWS, SCHEMA, "jsonl").splitlines()
    assert lines[0] == '{"image_id": "a", "log_prob": -3.21, "tokens": 5}'
    assert json.loads(lines[1]) == ROWS[1]


@pytest.mark.parametrize("output_format", ["table", "csv", "jsonl"])
def test_every_sql_type_can_be_written(output_format: OutputFormat) -> None:
    import duckdb

    sql = """
        SELECT 1.50::DECIMAL(5, 2) AS d, 7::HUGEINT AS h, DATE '2024-02-01' AS day, now() AS t,
        INTERVAL 3 DAYS AS i, '\\xAAb'::BLOB AS b, NULL AS n, MAP {'k': 1.5::FLOAT} AS m, {'x': [1, NULL]} AS s,
        'nan'::DOUBLE AS nan, true AS yes
    """
    with duckdb.connect() as connection:
        table = connection.sql(sql).to_arrow_table()
    sink = io.BytesIO()
    assert write_output(table.to_reader(), sink, output_format) == 1
    text = sink.getvalue().decode()
    assert "2024-02-01" in text
    if output_format == "jsonl":
        row = json.loads(text)
        assert (row["d"], row["h"], row["m"], row["s"]) == (1.5, 7, {"k": 1.5}, {"x": [1, None]})
        assert (row["n"], row["nan"], row["yes"]) == (None, None, True)


def test_parquet_keeps_types() -> None:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(ROWS, SCHEMA)
    assert write_output(table.to_reader(), sink, "parquet") == 2
    assert pq.read_table(io.BytesIO(sink.getvalue())).equals(table)
    assert pq.read_metadata(io.BytesIO(sink.getvalue())).row_group(0).column(0).compression == "ZSTD"
