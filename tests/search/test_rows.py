from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from captionlib.errors import DatasetError
from captionlib.search.index_folder import compute_hash
from captionlib.search.rows import CANDIDATES, COLUMNS, ROWS, CandidateStore, RowStore, find_duplicate_id, write_rows

SIZES = (90, 0, 1300)


def _make_candidates(row: int) -> list[dict[str, object]]:
    return [{"caption": f"caption {row}", "log_prob": -1.5}, {"caption": "second", "log_prob": -2.0}]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Files of rows and candidates, named after their checksums. One shard is empty."""
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
            | {"candidates": _make_candidates(n)}
            for n in numbers
        ]
        written = folder / "rows", folder / "candidates"
        batch = pa.RecordBatch.from_pylist(rows, pa.schema([*ROWS, *CANDIDATES]))
        write_rows(*written, [batch.slice(position, 600) for position in range(0, size, 600)])
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
    assert table.schema.names == list(COLUMNS)
    assert table["image_id"].to_pylist() == [str(row) for row in rows]
    assert [len(caption) for caption in table["caption"].to_pylist()] == table["tokens"].to_pylist()


def test_sample_is_evenly_spaced(store: RowStore) -> None:
    assert store.sample(5).tolist() == [0, 347, 694, 1041, 1389]
    assert store.sample(2000).tolist() == list(range(1390))
    assert RowStore([]).sample(5).tolist() == []


def test_filter_returns_row_numbers_across_files(store: RowStore) -> None:
    assert store.find_matching("image_id IN ('3', '89', '90', '1389')").tolist() == [3, 89, 90, 1389]


@pytest.mark.parametrize("row", [0, 89, 90, 601, 602, 1389])
def test_candidates_of_a_row_are_read(files: list[tuple[Path, Path]], row: int) -> None:
    candidates = CandidateStore([path for _, path in files], [0, 90, 90]).read(row)
    assert candidates == _make_candidates(row)


def test_damaged_candidates_are_noticed_when_they_are_read(files: list[tuple[Path, Path]], tmp_path: Path) -> None:
    content = bytearray(files[0][1].read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / files[0][1].name
    damaged.write_bytes(content)
    store = CandidateStore([damaged], [0])
    with pytest.raises(DatasetError, match="is damaged: its content does not match its checksum"):
        store.read(0)


def test_ids_that_occur_twice_are_found(files: list[tuple[Path, Path]]) -> None:
    rows = [path for path, _ in files]
    assert find_duplicate_id(rows) is None
    duplicate = find_duplicate_id([*rows, rows[0], rows[0]])
    assert duplicate is not None
    assert duplicate.rows == 3
    assert int(duplicate.image_id) < 90
