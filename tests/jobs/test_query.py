import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import click
import fsspec
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from captionlib.errors import QueryError, StorageError
from jobs.cli import captionlib
from jobs.query import command
from tests.search.conftest import write_captions


@pytest.fixture
def captions(tmp_path: Path) -> str:
    write_captions(str(tmp_path / "captions"))
    return str(tmp_path / "captions")


def query(*arguments: object) -> Result:
    return CliRunner().invoke(captionlib, ["query", *map(str, arguments)], catch_exceptions=False)


def test_table_is_printed(captions: str) -> None:
    assert query(captions, "--sql", "SELECT image_id, tokens FROM captions WHERE tokens > 6").stdout.splitlines() == [
        "image_id  tokens",
        "────────  ──────",
        "a1             7",
        "b1             7",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--contains", "dog"], ["a1", "b1"]),
        (["--contains", "grass dog"], ["a1"]),
        (["--top", "2"], ["b2", "a2"]),
        (["--image-id", "b1"], ["b1"]),
        (["--sql", "SELECT image_id FROM captions ORDER BY 1"], ["a1", "a2", "b1", "b2"]),
        (["--sql", "SELECT image_id FROM captions ORDER BY 1", "--limit", "3"], ["a1", "a2", "b1"]),
        (["--top", "4", "--limit", "0"], []),
    ],
)
def test_dataset_queries(captions: str, arguments: list[str], expected: list[str]) -> None:
    lines = query(captions, *arguments, "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line)["image_id"] for line in lines] == expected


def test_help_lists_every_option_by_what_it_queries() -> None:
    text = query("--help").output
    sections = ["Query an index:", "Options for an index:", "Query a dataset:", "Options for a dataset:", "Output:"]
    assert [text.index(section) for section in sections] == sorted(text.index(section) for section in sections)
    _, index, index_options, dataset, dataset_options, output = re.split("|".join(sections), text)
    assert re.findall(r"^  (?:-., )?(--[a-z-]+)", index, re.MULTILINE)[:2] == ["--text", "--sentence"]
    assert "--ranker" in index_options
    assert "--sql" in dataset
    assert "--memory" in dataset_options
    assert "--help" in output
    assert all(max(option.opts, key=len) in text for option in command.params if isinstance(option, click.Option))


def test_count_words(captions: str) -> None:
    rows = list(csv.reader(io.StringIO(query(captions, "--count-words", "2", "--format", "csv").stdout)))
    assert rows == [["word", "count"], ["a", "6"], ["dog", "2"]]


@pytest.mark.parametrize(("option", "expected"), [([], "'=1"), (["--no-escape-formulas"], "=1")])
@pytest.mark.parametrize("to_file", [False, True])
def test_formulas_in_csv(captions: str, tmp_path: Path, option: list[str], expected: str, to_file: bool) -> None:
    output = tmp_path / "x.csv"
    arguments = ["--sql", "SELECT '=1' AS x", "--format", "csv", *(["--output", output] if to_file else [])]
    result = query(captions, *arguments, *option)
    assert (output.read_text() if to_file else result.stdout) == f'"x"\n"{expected}"\n'


def test_timeout_stops_a_query(captions: str) -> None:
    with pytest.raises(QueryError, match=r"stopped after 0\.1 seconds; simplify it or raise --timeout"):
        query(captions, "--timeout", 0.1, "--sql", "SELECT sum(hash(range)) FROM range(1000000000000)")


@pytest.mark.parametrize("arguments", [[], ["--top", "1", "--contains", "dog"]])
def test_exactly_one_query_is_required(captions: str, arguments: list[str]) -> None:
    result = query(captions, *arguments)
    assert result.exit_code == 2
    got = "--contains and --top" if arguments else "none"
    assert f"expected one of --sql, --contains, --top, --count-words and --image-id, got {got}" in result.output


def test_no_rows_are_reported_on_stderr(captions: str) -> None:
    result = query(captions, "--contains", "zebra")
    assert result.stdout == "image_id  caption  log_prob  uri\n"
    assert result.stderr == "no rows\n"


def test_output_file_appears_only_when_complete(captions: str, tmp_path: Path) -> None:
    output = tmp_path / "top.parquet"
    result = query(captions, "--top", "2", "--format", "parquet", "--output", output)
    assert result.output == f"{output}: 2 rows\n"
    assert pq.read_table(output)["image_id"].to_pylist() == ["b2", "a2"]
    with pytest.raises(QueryError, match="error here"):
        query(captions, "--sql", "SELECT error('error here') FROM captions", "--output", output)
    assert pq.read_table(output).num_rows == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions", "top.parquet"]


def test_output_can_be_an_address(captions: str) -> None:
    address = f"memory://{uuid4().hex}/top.csv"
    query(captions, "--top", "1", "--format", "csv", "--output", address)
    with fsspec.open(address, "rt") as file:
        assert file.read().splitlines()[1].startswith('"b2",')


def test_output_that_cannot_be_written_raises(captions: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written: File exists"):
        query(captions, "--top", "1", "--output", tmp_path / "file" / "x.csv")


def test_parquet_is_not_printed_on_a_terminal(captions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    result = query(captions, "--top", "1", "--format", "parquet")
    assert result.exit_code == 2
    assert "Parquet is a binary format" in result.output


def test_closed_pipe_ends_the_output_without_an_error(captions: str) -> None:
    command = [sys.executable, "-m", "captionlib", "query", captions, "--format", "csv"]
    command += ["--sql", "SELECT i, repeat('x', 1000) AS x FROM range(1000000) t(i)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == '"i","x"\n'
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_sql_does_not_import_torch(captions: str) -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom jobs.cli import captionlib\n"
        f"assert CliRunner().invoke(captionlib, ['query', {captions!r}, '--top', '1']).exit_code == 0\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
