from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from captionlib.errors import DatasetError, QueryError
from captionlib.search.index_folder import compute_hash
from captionlib.search.rows import (
    DETAILS_SCHEMA,
    ROW_SCHEMA,
    DetailStore,
    RowStore,
    find_repeated_id,
    number_rows,
    read_rows,
    write_details,
    write_rows,
)

SIZES = (90, 0, 1300)


def _make_candidates(row: int) -> list[dict[str, object]]:
    return [{"caption": f"caption {row}", "log_prob": -1.5}, {"caption": "second", "log_prob": -2.0}]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Files of rows and details, named after their checksums. One shard is empty."""
    folder: Path = tmp_path_factory.mktemp("rows")
    paths, start = [], 0
    for size in SIZES:
        numbers = range(start, start + size)
        rows = [
            {
                "image_id": f"{n}",
                "uri": "u",
                "split": "val",
                "caption": "é" * (n % 90),
                "log_prob": -n,
                "tokens": n % 90,
            }
            | {"candidates": _make_candidates(n), "references": [f"reference {n}"]}
            for n in numbers
        ]
        written = folder / "rows", folder / "details"
        batch = pa.RecordBatch.from_pylist(rows, pa.schema([*ROW_SCHEMA, *DETAILS_SCHEMA]))
        batches = [batch.slice(position, 600) for position in range(0, size, 600)]
        write_rows(written[0], [each.select(ROW_SCHEMA.names) for each in batches])
        write_details(written[1], (each.select(DETAILS_SCHEMA.names) for each in batches))
        paths.append(
            (written[0].rename(folder / f"r{start}{size}"), written[1].rename(folder / compute_hash(written[1])))
        )
        start += size
    return paths


@pytest.fixture(scope="module")
def store(files: list[tuple[Path, Path]]) -> RowStore:
    return RowStore(rows for rows, _ in files)


@pytest.mark.parametrize("count", [0, 1, 100, 101, 1390])
def test_take_returns_rows_in_the_requested_order(store: RowStore, count: int) -> None:
    rows = np.random.default_rng(count).permutation(len(store))[:count]
    table = store.take(rows)
    assert table.schema == ROW_SCHEMA
    assert table["image_id"].to_pylist() == [str(row) for row in rows]
    assert [len(caption) for caption in table["caption"].to_pylist()] == table["tokens"].to_pylist()


def test_sample_is_evenly_spaced(store: RowStore) -> None:
    assert store.sample(5).tolist() == [0, 347, 694, 1041, 1389]
    assert store.sample(2000).tolist() == list(range(1390))
    assert RowStore([]).sample(5).tolist() == []


def test_filter_returns_row_numbers_across_files(store: RowStore) -> None:
    assert store.find_matching("image_id IN ('3', '89', '90', '1389')").tolist() == [3, 89, 90, 1389]


def test_filter_takes_parameters_and_returns_int64(store: RowStore) -> None:
    rows = store.find_matching("list_contains(?, image_id) AND split = ? -- comment", [["5", "95"], "val"])
    assert (rows.tolist(), rows.dtype, rows.flags.c_contiguous) == ([5, 95], np.int64, True)
    assert store.find_matching("false").dtype == np.int64


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("nothing > 1", 'Binder Error: Referenced column "nothing" not found in FROM clause!'),
        ("error('late')", "Invalid Input Error: late"),
        ("1 = 1) UNION (SELECT 1", "Parser Error: syntax error"),
        ("true) LIMIT (1", "Parser Error: syntax error"),
        ("true), (false", "Parser Error: syntax error"),
        ("getenv('HOME') = ''", "function getenv is not allowed; a query reads only the dataset"),
    ],
)
def test_wrong_condition_is_one_error_with_an_example(store: RowStore, where: str, problem: str) -> None:
    with pytest.raises(QueryError) as raised:
        store.find_matching(where)
    message = str(raised.value)
    assert message.startswith(f"where: {problem}")
    assert message.endswith(
        " Expected a condition over image_id, uri, split, caption, log_prob, tokens, image_text_score, width, height, "
        "version, modified, duplicate_of, such as: split = 'val' AND log_prob > -10"
    )
    assert "\n" not in message


def test_rows_are_numbered_as_int64_even_if_empty(files: list[tuple[Path, Path]]) -> None:
    (batch,) = number_rows([pa.RecordBatch.from_pylist([], ROW_SCHEMA)])
    assert batch.schema.field("row") == pa.field("row", pa.int64(), nullable=False)


def test_damaged_rows_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"no Arrow file")
    with pytest.raises(DatasetError, match=r"rows cannot be read \(.+\); build the index again with --overwrite$"):
        list(read_rows(tmp_path / "rows"))


def test_details_are_compressed_in_batches_of_equal_size(files: list[tuple[Path, Path]]) -> None:
    path = files[-1][1]
    with pa.ipc.open_file(str(path)) as reader:
        sizes = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
        uncompressed = reader.read_all().nbytes
    assert sizes == [256, 256, 256, 256, 256, 20]
    assert path.stat().st_size < uncompressed / 2


@pytest.mark.parametrize("row", [0, 89, 90, 345, 346, 601, 1389])
def test_details_of_a_row_are_read(files: list[tuple[Path, Path]], row: int) -> None:
    assert DetailStore([path for _, path in files], [0, 90, 90]).read(row) == {
        "candidates": [{**candidate, "image_text_score": None} for candidate in _make_candidates(row)],
        "references": [f"reference {row}"],
        "attention": None,
    }


def test_damaged_details_are_detected_when_they_are_read(files: list[tuple[Path, Path]], tmp_path: Path) -> None:
    content = bytearray(files[0][1].read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / files[0][1].name
    damaged.write_bytes(content)
    store = DetailStore([damaged], [0])
    with pytest.raises(DatasetError, match="is damaged: its content does not match its checksum"):
        store.read(0)


def test_ids_that_occur_twice_are_found(files: list[tuple[Path, Path]]) -> None:
    rows = [path for path, _ in files]
    assert find_repeated_id(rows) is None
    duplicate = find_repeated_id([*rows, rows[0], rows[0]])
    assert duplicate is not None
    image_id, count = duplicate
    assert count == 3
    assert int(image_id) < 90
