from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from captionlib.search.rows import COLUMNS, ROWS, RowStore, number_rows, write_rows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RowStore:
    """Three files of 90 rows with gaps between their numbers, as after shards were replaced."""
    folder: Path = tmp_path_factory.mktemp("rows")
    paths = []
    for shard, offset in enumerate((0, 100, 300)):
        rows = [
            {"image_id": f"{offset + n}", "uri": "u", "split": "val", "caption": "é" * n, "log_prob": -n, "tokens": n}
            for n in range(90)
        ]
        schema = pa.schema([ROWS.field(name) for name in COLUMNS])
        paths.append(folder / f"{shard}.arrow")
        write_rows(paths[-1], number_rows([pa.RecordBatch.from_pylist(rows, schema)], offset))
    return RowStore(paths)


@pytest.mark.parametrize("count", [0, 1, 100, 101, 250])
def test_take_returns_rows_in_the_requested_order(store: RowStore, count: int) -> None:
    numbers = np.concatenate([np.arange(90), np.arange(100, 190), np.arange(300, 390)])
    rows = np.random.default_rng(count).permutation(numbers)[:count]
    table = store.take(rows)
    assert table.schema.names == list(COLUMNS)
    assert table["image_id"].to_pylist() == [str(row) for row in rows]
    assert [len(caption) for caption in table["caption"].to_pylist()] == table["tokens"].to_pylist()
