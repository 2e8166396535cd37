import _thread
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.markers import Marker
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, captions_schema, features_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import ConfigError, DatasetError, DecodeError, QueryError
from captionlib.search.sql.queries import find_image
from captionlib.search.sql.session import SqlLimits, open_sql, query_sql
from tests.search.conftest import rows


def test_view_holds_the_shards_that_are_done(captions: str) -> None:
    table = query_sql(captions, "SELECT image_id, candidates[2].log_prob AS second FROM captions ORDER BY image_id")
    assert table.to_pydict() == {"image_id": ["a1", "a2", "b1", "b2"], "second": [-5.5, -4.25, -10.0, -2.5]}


def test_failures_view_holds_the_failures(captions: str) -> None:
    table = query_sql(captions, "SELECT image_id, error FROM failures")
    assert table.to_pylist() == [{"image_id": "bad", "error": "Truncated"}]


def test_failures_of_a_shard_that_finishes_during_the_listing_are_included(
    local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_markers = ShardedDataset.read_markers

    def finish_shard(dataset: ShardedDataset) -> dict[int, Marker]:
        with write_shard(dataset, 2, 1) as writer:
            writer.write_failure({"image_id": "late", "uri": "late.jpg"}, DecodeError("Empty", "no data"))
        return read_markers(dataset)

    monkeypatch.setattr(ShardedDataset, "read_markers", finish_shard)
    assert query_sql(local, "SELECT image_id FROM failures ORDER BY image_id")["image_id"].to_pylist() == [
        "bad",
        "late",
    ]


def test_complete_dataset_is_queried_without_its_markers(local: str) -> None:
    dataset = create_dataset(local, "captions", captions_schema(), config={"beam_width": 5}, shards=3)
    with write_shard(dataset, 2, 1) as writer:
        writer.write(rows(("c1", "done now", -1.0)))
    dataset.finish()
    for marker in (Path(local) / "__shards").iterdir():
        marker.unlink()
    assert query_sql(local, "SELECT count(*) AS n FROM captions")["n"].to_pylist() == [5]


def test_dataset_without_shards_has_empty_views(tmp_path: Path) -> None:
    create_dataset(tmp_path / "new", "captions", captions_schema(), config={}, shards=2)
    assert query_sql(tmp_path / "new", "SELECT caption, log_prob FROM captions").num_rows == 0
    assert query_sql(tmp_path / "new", "SELECT error FROM failures").num_rows == 0


def test_features_and_manifests_can_be_queried(tmp_path: Path) -> None:
    for kind, schema in (("manifest", MANIFEST_SCHEMA), ("features", features_schema(3, "float16"))):
        dataset = create_dataset(tmp_path / kind, kind, schema, config={}, shards=1)
        values = {"image_id": ["x"], "uri": ["x.jpg"], "split": ["val"], "captions": [["a dog", "a cat"]]}
        if kind == "features":
            values["features"] = [np.array([1, 2, 3], np.float16)]
        with write_shard(dataset, 0, 1) as writer:
            known = pa.schema([field for field in schema if field.name in values])
            writer.write(pa.RecordBatch.from_pydict(values, schema=known))
        assert query_sql(tmp_path / kind, f"SELECT captions[2] AS c FROM {kind}")["c"].to_pylist() == ["a cat"]
    assert query_sql(tmp_path / "features", "SELECT list_sum(features) AS s FROM features")["s"].to_pylist() == [6.0]


def test_open_captions_rejects_other_kinds(tmp_path: Path) -> None:
    create_dataset(tmp_path / "manifest", "manifest", MANIFEST_SCHEMA, config={}, shards=1)
    with pytest.raises(DatasetError, match="expected a dataset of kind captions, got manifest"):
        open_sql(tmp_path / "manifest", "captions").__enter__()


def test_parameters_are_never_parsed_as_sql(captions: str) -> None:
    evil = "x' OR '1'='1"
    sql = "SELECT image_id FROM captions WHERE image_id = ? OR caption = ?"
    assert query_sql(captions, sql, [evil, evil]).num_rows == 0
    assert query_sql(captions, sql, ["b2", evil])["image_id"].to_pylist() == ["b2"]


@pytest.mark.parametrize(
    "sql",
    [
        "DESCRIBE captions",
        "SHOW TABLES",
        "SUMMARIZE captions",
        "FROM captions",
        "VALUES (1)",
        "WITH c AS (FROM captions) SELECT count(*) FROM c;",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 5) FROM t",
        "SELECT image_id, c.caption FROM captions, unnest(candidates) AS t(c)",
        "SELECT * FROM captions WHERE tokens IN (FROM range(10)) UNION ALL FROM captions",
    ],
)
def test_every_form_of_select_is_accepted(local: str, sql: str) -> None:
    assert query_sql(local, sql).num_rows > 0


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC 1", "syntax error"),
        ("", "expected one SELECT statement, got 0 statements"),
        ("SELECT 1; SELECT 2", "got 2 statements"),
        ("DROP VIEW captions", "expected a SELECT statement, got DROP; the dataset is read-only"),
        ("SELECT nothing FROM captions", '"nothing" not found'),
        ("FROM images", "The dataset has the views captions and failures"),
        ("SELECT CAST(caption AS INTEGER) FROM captions", "Could not convert string"),
        ("SELECT " + "abs(" * 3000 + "1" + ")" * 3000, "depth|nested too deeply"),
    ],
)
def test_invalid_sql_raises_a_query_error(captions: str, sql: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        query_sql(captions, sql)


def test_error_while_streaming_raises_a_query_error(captions: str) -> None:
    with open_sql(captions) as session:
        reader = session.stream("SELECT CASE WHEN i = 90000 THEN error('late') ELSE 'x' END FROM range(100000) t(i)")
        with pytest.raises(QueryError, match=r"late|Interrupted"):
            reader.read_all()


def test_shard_deleted_during_a_session_raises_a_query_error(local: str) -> None:
    with open_sql(local) as session:
        (Path(local) / "part-00001.parquet").unlink()
        with pytest.raises(QueryError, match="part-00001"):
            session.query("SELECT max(caption) FROM captions")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Restores the default handler of Ctrl-C, which a shell disables for background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_interrupts_a_query(local: str) -> None:
    endless = "SELECT sum(hash(range)) FROM range(1000000000000)"
    for seconds in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.3):  # DuckDB is in another phase each time
        with open_sql(local) as session, pytest.raises(KeyboardInterrupt):
            threading.Timer(seconds, _thread.interrupt_main).start()
            session.query(endless)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_limits_are_applied_and_validated(captions: str) -> None:
    sql = "SELECT current_setting('threads'), current_setting('memory_limit')"
    with open_sql(captions, limits=SqlLimits("300MB", 1)) as session:
        assert session._connection.execute(sql).fetchall() == [(1, "286.1 MiB")]
    with pytest.raises(ConfigError, match=r"query limits: .*[Mm]emory"):
        query_sql(captions, "SELECT 1", limits=SqlLimits("plenty"))


@pytest.mark.parametrize(("text", "expected"), [("300MB", 300_000_000), ("1.5 GiB", 3 * 2**29), ("8gb", 8 * 10**9)])
def test_memory_limit_is_converted_to_bytes(text: str, expected: int) -> None:
    assert SqlLimits(text).memory_bytes == expected


def test_memory_limit_must_be_a_size() -> None:
    with pytest.raises(ConfigError, match="memory: expected a size such as 500MB or 8GB, got 'plenty'"):
        _ = SqlLimits("plenty").memory_bytes


@pytest.mark.parametrize("sql", ["SELEC 1", "SELECT nothing FROM captions", "SELECT list(i) FROM range(10000000) t(i)"])
def test_errors_are_one_line(local: str, sql: str) -> None:
    with pytest.raises(QueryError) as raised:
        query_sql(local, sql, limits=SqlLimits("20MB"))
    assert "\n" not in str(raised.value)


def test_sort_larger_than_memory_spills_to_disk_and_cleans_up(
    local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sql = "SELECT i, hash(i) AS h FROM range(8000000) t(i) ORDER BY h"
    with open_sql(local, limits=SqlLimits("50MB", 1)) as session:
        assert sum(batch.num_rows for batch in session.stream(sql)) == 8_000_000
    with (
        open_sql(local, limits=SqlLimits("50MB", 1, spill="1MB")) as session,
        pytest.raises(QueryError, match=r"failed to offload"),
    ):
        session.query(sql)
    assert [path.name for path in tmp_path.iterdir()] == ["captions"]


def test_threads_can_read_the_same_files_concurrently(tmp_path: Path) -> None:
    dataset = create_dataset(tmp_path / "captions", "captions", captions_schema(), config={}, shards=4)
    for shard in range(4):
        with write_shard(dataset, shard, 20_000) as writer:
            for start in range(0, 20_000, 1000):
                ids = range(shard * 20_000 + start, shard * 20_000 + start + 1000)
                writer.write(rows(*((str(i), f"caption {i * 7919 % 80_000}", -float(i)) for i in ids)))
    with open_sql(tmp_path / "captions", "captions", SqlLimits(threads=8)) as session:
        for _ in range(5):
            top = session.query("SELECT image_id, caption FROM captions ORDER BY log_prob DESC LIMIT 50")
            assert top["image_id"].to_pylist() == [str(i) for i in range(50)]
            assert top["caption"].to_pylist() == [f"caption {i * 7919 % 80_000}" for i in range(50)]
            total = session.query("SELECT sum(CAST(image_id AS INT)) AS s, count(DISTINCT caption) AS d FROM captions")
            assert total.to_pylist() == [{"s": sum(range(80_000)), "d": 80_000}]


def test_lookup_by_id_skips_most_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"memory://{uuid4().hex}"
    dataset = create_dataset(address, "captions", captions_schema(), config={}, shards=1)
    ids = np.random.default_rng(0).permutation(40_000)
    with write_shard(dataset, 0, 40_000) as writer:
        for start in range(0, 40_000, 4096):
            writer.write(rows(*((f"{i:05d}", f"caption {i}", -1.0) for i in ids[start : start + 4096])))
    read: list[int] = []
    cat_file = MemoryFileSystem.cat_file

    def count(self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
        content: bytes = cat_file(self, path, start, end)
        read.append(len(content))
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", count)
    size = dataset.folder.fs.size(dataset.get_part_path(0))
    rows_found = query_sql(address, "SELECT * FROM captions WHERE image_id = ?", ["12345"])
    assert rows_found["caption"].to_pylist() == ["caption 12345"]
    assert 0 < sum(read) < size / 2
    read.clear()
    assert query_sql(address, "SELECT max(hash(c)) FROM captions AS c").num_rows == 1
    assert sum(read) > size / 2


def test_several_datasets_are_queried_as_one(captions: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    dataset = create_dataset(other, "captions", captions_schema(4), config={"beam_width": 1}, shards=1)
    attention = pa.array([[[0.25] * 4]], dataset.schema.field("attention").type)
    with write_shard(dataset, 0, 2) as writer:
        batch = rows(("d1", "a dog of another dataset", -1.0))
        writer.write(pa.RecordBatch.from_arrays([*batch.columns, attention], schema=dataset.schema))
        writer.write_failure({"image_id": "d2", "uri": "images/d2.jpg"}, DecodeError("Empty", "no bytes"))
    table = query_sql([captions, other], "SELECT image_id, attention IS NULL FROM captions ORDER BY image_id")
    assert table.columns[0].to_pylist() == ["a1", "a2", "b1", "b2", "d1"]
    assert table.columns[1].to_pylist() == [True] * 4 + [False]
    failures = query_sql([captions, other], "SELECT error FROM failures ORDER BY error")
    assert failures["error"].to_pylist() == ["Empty", "Truncated"]
    with open_sql([captions, other, captions]) as session:
        assert find_image(session, "a1").num_rows == 2
        with pytest.raises(QueryError, match=r"captions and .*other and .*: no image x"):
            find_image(session, "x")
    create_dataset(tmp_path / "manifest", "manifest", MANIFEST_SCHEMA, config={}, shards=0)
    with pytest.raises(DatasetError, match="expected a dataset of kind captions, got manifest"):
        query_sql([captions, tmp_path / "manifest"], "SELECT 1")


def test_query_reads_one_version_of_a_file_that_is_replaced(local: str) -> None:
    """The new version of the file is longer, so that offsets of the old version are wrong in it."""
    dataset = open_dataset(local)
    with open_sql(local) as session:
        before = session.query("SELECT image_id, caption FROM captions ORDER BY image_id")
        replaced = [(f"n{number}", f"a replaced row {number}", -1.0) for number in range(500)]
        with write_shard(dataset, 0, len(replaced)) as writer:
            writer.write(rows(*replaced))
        assert session.query("SELECT image_id, caption FROM captions ORDER BY image_id").equals(before)
    assert query_sql(local, "SELECT count(*) AS n FROM captions WHERE image_id LIKE 'n%'").to_pylist() == [{"n": 500}]


def test_unreadable_file_is_an_error_of_one_line_that_names_it(local: str) -> None:
    path = Path(local) / "part-00000.parquet"
    path.unlink()
    path.symlink_to(path.name)  # a loop of links
    message = rf"query: {path} cannot be accessed: Too many levels of symbolic links; fix the problem[\w ]+"
    with pytest.raises(QueryError) as raised:
        query_sql(local, "SELECT * FROM captions")
    assert re.fullmatch(message, str(raised.value))
