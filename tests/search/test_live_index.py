"""An open index while builds publish new versions, and the consistency of updated indexes."""

import gc
import logging
import random
import shutil
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings, strategies as st

from captionlib.errors import CaptionlibError, CheckpointError, DatasetError, DuplicateIdError, QueryError
from captionlib.search.build import IndexBuild, plan_build
from captionlib.search.config import IndexConfig
from captionlib.search.index import Index, open_index
from captionlib.search.index_folder import read_description
from captionlib.storage.folders import Folder

from .example_index import WORDS, Row, WordRanker, make_rows, write_captions_dataset, write_embeddings_dataset

SHARDS: dict[int, list[Row]] = {0: make_rows(20), 1: make_rows(20, 20), 2: make_rows(20, 40)}


def write_shards(root: str, shards: Mapping[int, Sequence[Row]], total: int | None = None) -> None:
    write_captions_dataset(f"{root}/captions", shards, total or len(shards))
    write_embeddings_dataset(f"{root}/embeddings", shards, total or len(shards))


def update(root: str, config: IndexConfig = IndexConfig(), *, overwrite: bool = False, index: str = "") -> IndexBuild:
    build = plan_build(f"{root}/captions", f"{root}/embeddings", index or f"{root}/index", config, overwrite=overwrite)
    if not build.is_done():
        build.train()
        for position in build.added:
            build.add_shard(position)
        build.finish()
    return build


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CAPTIONLIB_CACHE", str(tmp_path / "cache"))
    root = str(tmp_path) if request.param == "local" else f"memory://{uuid4().hex}"
    write_shards(root, SHARDS)
    update(root)
    return root


def rename(rows: Sequence[Row], caption: str) -> list[Row]:
    return [(image_id, caption, log_prob) for image_id, _, log_prob in rows]


def image_ids(index: Index, query: str) -> set[str]:
    return set(index.search_text(query, 1000)["image_id"].to_pylist())


def test_open_index_changes_to_a_new_version(root: str) -> None:
    index = open_index(f"{root}/index", WordRanker(), refresh_seconds=0)
    snapshot = index.snapshot()
    write_shards(root, {1: [*rename(SHARDS[1][1:], "a zebra in the snow"), ("new", "a horse", -1.0)]}, 3)
    assert update(root).added == (1,)
    gone, changed = SHARDS[1][0][0], SHARDS[1][1][0]
    assert len(image_ids(index, "zebra")) == 19
    assert index.get_image(changed)["caption"] == "a zebra in the snow"
    assert index.get_details(changed)["candidates"][0]["caption"] == "a zebra in the snow"
    assert index.search_sentence("horse", 1)["image_id"].to_pylist() == ["new"]
    assert index.search_text("zebra", 30, where="log_prob < -35").num_rows < 19
    assert len(index) == 60
    with pytest.raises(QueryError, match=f"no image {gone} in the index"):
        index.get_image(gone)
    assert gone not in index.search_sentence("dog", 100)["image_id"].to_pylist()
    assert image_ids(snapshot, "zebra") == set()
    assert snapshot.get_details(gone)["candidates"][0]["caption"] == SHARDS[1][0][1]


def test_index_checks_for_a_new_version_only_after_the_interval(root: str) -> None:
    index = open_index(f"{root}/index", refresh_seconds=3600)
    manual = open_index(f"{root}/index", refresh_seconds=None)
    write_shards(root, {0: rename(SHARDS[0], "a zebra")}, 3)
    update(root)
    assert image_ids(index, "zebra") == image_ids(manual, "zebra") == set()
    assert manual.refresh()
    assert not manual.refresh()
    assert len(image_ids(manual, "zebra")) == 20


def test_previous_version_stays_readable_after_its_files_are_removed_and_is_then_closed(root: str) -> None:
    index = open_index(f"{root}/index", WordRanker(), refresh_seconds=0)
    snapshot = index.snapshot()
    version = weakref.ref(snapshot._version)
    before = snapshot.search_text("dog", 100), snapshot.search_sentence("dog", 100)
    for number in range(3):
        write_shards(root, {shard: rename(SHARDS[shard], f"version {number}") for shard in SHARDS})
        update(root)
        assert len(image_ids(index, f"+version +{number}")) == 60
    assert snapshot.search_text("dog", 100).equals(before[0])
    assert snapshot.search_sentence("dog", 100).equals(before[1])
    assert snapshot.get_details("im59")["candidates"][0]["caption"] == SHARDS[2][-1][1]
    assert snapshot.search_text("dog", 100, where="tokens = 6").num_rows == before[0].num_rows
    del snapshot
    gc.collect()
    assert version() is None


def test_failed_refresh_keeps_the_open_version_and_warns_once(root: str, caplog: pytest.LogCaptureFixture) -> None:
    index = open_index(f"{root}/index", refresh_seconds=0)
    found = image_ids(index, "dog")
    Folder(f"{root}/index").write("index.json", b"{")
    with caplog.at_level(logging.WARNING):
        assert image_ids(index, "dog") == image_ids(index, "dog") == found
    (record,) = caplog.records
    assert "index.json is damaged" in record.getMessage()
    with pytest.raises(DatasetError, match="is damaged"):
        index.refresh()
    update(root, overwrite=True)
    write_shards(root, {0: rename(SHARDS[0], "a zebra")}, 3)
    update(root)
    assert len(image_ids(index, "zebra")) == 20


def test_version_of_another_ranker_is_not_opened(root: str) -> None:
    index = open_index(f"{root}/index", WordRanker(), refresh_seconds=0)
    shutil.rmtree(f"{root}/embeddings", ignore_errors=True)
    write_embeddings_dataset(f"{root}/other", SHARDS, 3, ranker="other")
    build = plan_build(f"{root}/captions", f"{root}/other", f"{root}/index", IndexConfig(), overwrite=True)
    build.train()
    for position in build.added:
        build.add_shard(position)
    build.finish()
    assert index.search_sentence("dog", 1).num_rows == 1
    with pytest.raises(CheckpointError, match="expected the ranker other"):
        index.refresh()


def test_opening_begins_again_if_a_build_removes_the_files(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builds are published between reading the description and opening the files."""
    from captionlib.search import index as module

    fetch, fetched = module.fetch_locally, []

    def fetch_late(folder: Folder, description: object, cache: Path | None) -> Path:
        if not fetched:
            for number in range(2):
                write_shards(root, {shard: rename(SHARDS[shard], f"version {number}") for shard in SHARDS})
                update(root)
        fetched.append(description)
        return fetch(folder, description, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fetch_locally", fetch_late)
    assert len(image_ids(open_index(f"{root}/index"), "+version +1")) == 60
    assert len(fetched) == 2


def test_concurrent_searches_see_one_version_each(tmp_path: Path) -> None:
    """All captions of a version contain its number, so a search that finds two numbers mixes versions."""
    root = str(tmp_path)
    write_shards(root, {shard: rename(rows, "a dog in version 0") for shard, rows in SHARDS.items()})
    update(root)
    index = open_index(f"{root}/index", WordRanker(), refresh_seconds=0)
    stop, problems, seen = threading.Event(), [], set()

    def search() -> None:
        while not stop.is_set():
            snapshot = index.snapshot()
            tables = [snapshot.search_text("dog", 100), snapshot.search_sentence("dog", 100), index.sample(100)]
            captions = [set(table["caption"].to_pylist()) for table in tables]
            if any(len(each) != 1 for each in captions) or captions[0] != captions[1] or len(tables[0]) != 60:
                problems.append(captions)
            if snapshot.get_details("im3")["candidates"][0]["caption"] not in captions[0]:
                problems.append("candidates")
            seen.update(captions[0])

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(1, 6):
        write_shards(root, {shard: rename(rows, f"a dog in version {number}") for shard, rows in SHARDS.items()})
        update(root)
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(seen) > 1


ROWS = st.lists(st.tuples(st.integers(0, 30), st.sampled_from(WORDS)), max_size=12, unique_by=lambda row: row[0])


@settings(max_examples=6, deadline=None)
@given(steps=st.lists(st.tuples(ROWS, ROWS), min_size=2, max_size=3), kind=st.sampled_from(["flat", "sq8"]))
def test_updated_index_equals_a_new_index(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[list[tuple[int, str]], ...]], kind: str
) -> None:
    """Shards grow, shrink, change and become empty. The files of the vectors are equal, given the same centroids."""
    root = str(tmp_path_factory.mktemp("history"))
    config = IndexConfig(vectors=kind, nlist=1)  # type: ignore[arg-type]
    for step in steps:
        shards = {
            number: [(f"im{number}-{name}", f"a {word}", -1.0 - name) for name, word in rows]
            for number, rows in enumerate(step)
        }
        write_shards(root, shards)
        update(root, config)
    fresh = f"{root}/fresh"
    build = plan_build(f"{root}/captions", f"{root}/embeddings", fresh, config)
    current = read_description(Folder(f"{root}/index"))
    assert current is not None
    if current.trained and build.layout == current.layout:
        Folder(fresh).write(build._trained_file, Path(root, "index", current.trained).read_bytes())
    update(root, config, index=fresh)
    expected = read_description(Folder(fresh))
    assert expected is not None
    assert [shard.rows_file for shard in current.shards] == [shard.rows_file for shard in expected.shards]
    if current.layout == expected.layout:
        assert (current.vectors, current.fingerprint) == (expected.vectors, expected.fingerprint)
    indexes = open_index(f"{root}/index", WordRanker()), open_index(fresh, WordRanker())
    for word in WORDS:
        before, now = (index.search_text(word, 100, where="log_prob > -20") for index in indexes)
        assert before.equals(now)


@pytest.mark.parametrize("step", range(6))
def test_build_that_is_killed_leaves_nothing_behind(root: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build is killed at one of its writes, and the datasets change again before the next build."""
    folder = Folder(f"{root}/index")
    write_shards(root, {0: rename(SHARDS[0], "a zebra")}, 3)
    stage, writes = Folder.stage, iter(range(1000))

    def stage_or_die(self: Folder, name: str) -> object:
        if "/index" in self.uri and next(writes) == step:
            raise KeyboardInterrupt
        return stage(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "stage", stage_or_die)
        try:
            update(root)
        except KeyboardInterrupt:
            assert image_ids(open_index(f"{root}/index"), "zebra") == set()
    write_shards(root, {0: rename(SHARDS[0], "a giraffe")}, 3)
    update(root)
    assert len(image_ids(open_index(f"{root}/index"), "giraffe")) == 20
    description = read_description(folder)
    assert description is not None
    names = {name for name in folder.list() if "-" in name or name == "__temporary"}
    names |= {f"{name}/{file}" for name in ("rows", "details") for file in folder.list(name)}
    assert names == {*description.files, *description.previous}


@pytest.mark.parametrize("lost", ["rows", "__temporary/*/part-00000.faiss", "__temporary/*/part-00000.json"])
def test_interrupted_build_that_lost_a_file_adds_the_shard_again(tmp_path: Path, lost: str) -> None:
    place = str(tmp_path)
    write_shards(place, SHARDS)
    build = plan_build(f"{place}/captions", f"{place}/embeddings", f"{place}/index", IndexConfig())
    build.train()
    build.add_shard(0)
    for path in (tmp_path / "index").glob(lost):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix == ".json":
            path.write_bytes(b"\0")
        else:
            path.unlink()
    update(place)
    assert len(image_ids(open_index(f"{place}/index"), "dog")) > 0
    assert len(open_index(f"{place}/index").sample(1000)) == 60


def test_removed_rows_are_in_no_file_of_the_version(tmp_path: Path) -> None:
    root = str(tmp_path)
    write_shards(root, {0: [*SHARDS[0], ("secretid", "a xylophone", -1.0)], 1: SHARDS[1]})
    update(root)
    write_shards(root, {0: SHARDS[0]}, 2)
    update(root)
    description = read_description(Folder(f"{root}/index"))
    assert description is not None
    for name in description.files:
        path = Path(root, "index", name)
        for file in path.iterdir() if path.is_dir() else [path]:
            content = file.read_bytes()
            assert b"secretid" not in content
            assert b"xylophon" not in content


def test_flipped_bits_are_detected(tmp_path: Path) -> None:
    """Each of 100 flipped bits is detected when the index is opened or searched, or changes no result."""
    root = str(tmp_path)
    write_shards(root, SHARDS)
    update(root)

    def search_all() -> list[object]:
        index = open_index(f"{root}/index", WordRanker())
        rows = [index.get_image(row[0]) | index.get_details(row[0]) for row in SHARDS[1]]
        searches = [index.search_text("dog", 100), index.search_sentence("cat", 100), index.search_similar("im3", 100)]
        return [
            rows,
            *(table.to_pylist() for table in searches),
            len(index),
            index.search_text("a -dog", 9).to_pylist(),
        ]

    expected = search_all()
    files = sorted(path for path in Path(root, "index").rglob("*") if path.is_file() and path.stat().st_size)
    generator = random.Random(0)
    messages = []
    for number in range(100):
        path = files[number % len(files)]
        content = path.read_bytes()
        bit = generator.randrange(8 * len(content))
        path.write_bytes(content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :])
        try:
            assert search_all() == expected, f"bit {bit} of {path}"
        except CaptionlibError as error:
            messages.append(str(error))
        path.write_bytes(content)
    assert len(messages) > 60
    assert all("--overwrite" in message for message in messages)


def test_damaged_index_is_not_updated_but_replaced_with_overwrite(root: str) -> None:
    folder = Folder(f"{root}/index")
    description = read_description(folder)
    assert description is not None
    name = description.shards[0].rows_file
    folder.write(name, folder.read(name).replace(b"im3", b"im4"))
    write_shards(root, {2: rename(SHARDS[2], "a zebra")}, 3)
    with pytest.raises(DatasetError, match=f"{name} is damaged: .*--overwrite"):
        update(root)
    assert update(root, overwrite=True).added == (0, 1, 2)
    assert open_index(f"{root}/index").get_image("im3")["caption"] == SHARDS[0][3][1]
    assert update(root).added == ()


def test_damaged_copy_of_a_remote_index_is_fetched_again(tmp_path: Path) -> None:
    root = f"memory://{uuid4().hex}"
    write_shards(root, SHARDS)
    update(root)
    open_index(f"{root}/index", cache=tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged" + path.read_bytes()[7:])
    index = open_index(f"{root}/index", WordRanker(), cache=tmp_path)
    assert index.search_sentence("dog", 3).num_rows == 3
    assert index.get_details("im3")["candidates"][0]["caption"] == SHARDS[0][3][1]


def test_shard_that_changes_during_a_build_is_an_error(root: str) -> None:
    write_shards(root, {0: rename(SHARDS[0], "a zebra")}, 3)
    build = plan_build(f"{root}/captions", f"{root}/embeddings", f"{root}/index", IndexConfig())
    write_shards(root, {0: rename(SHARDS[0], "a giraffe")}, 3)
    with pytest.raises(DatasetError, match=r"part-00000.parquet has changed since this command started"):
        build.add_shard(0)
    assert image_ids(open_index(f"{root}/index"), "dog")


def test_several_datasets_are_indexed_as_one(root: str) -> None:
    write_captions_dataset(f"{root}/captions-2", {0: make_rows(10, 100)}, 1)
    write_embeddings_dataset(f"{root}/embeddings-2", {0: make_rows(10, 100)}, 1)
    captions, embeddings = ([f"{root}/{kind}", f"{root}/{kind}-2"] for kind in ("captions", "embeddings"))
    build = plan_build(captions, embeddings, f"{root}/index", IndexConfig())
    assert build.added == (3,)
    build.add_shard(3)
    build.finish()
    index = open_index(f"{root}/index", WordRanker())
    assert len(index) == 70
    assert index.get_image("im105")["caption"] == make_rows(10, 100)[5][1]
    assert index.search_sentence("dog", 100).num_rows == 70
    write_captions_dataset(f"{root}/captions-2", {0: [*make_rows(9, 100), ("im7", "a dog", -1.0)]}, 1)
    write_embeddings_dataset(f"{root}/embeddings-2", {0: [*make_rows(9, 100), ("im7", "a dog", -1.0)]}, 1)
    build = plan_build(captions, embeddings, f"{root}/index", IndexConfig())
    build.add_shard(3)
    with pytest.raises(DuplicateIdError, match=r"expected one row per image id in .*captions and .*captions-2, got 2"):
        build.finish()
    assert len(open_index(f"{root}/index")) == 70
    write_captions_dataset(f"{root}/captions-2", {0: [*make_rows(9, 100), ("im100", "a dog", -1.0)]}, 1)
    build = plan_build(captions, None, f"{root}/text", IndexConfig())
    for position in build.added:
        build.add_shard(position)
    with pytest.raises(DuplicateIdError, match=r"per image id in \S*captions-2, got 2 .*; write this dataset again"):
        build.finish()
