import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from captionlib.data.ingestion.prepare import PrepareConfig, prepare
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.sources.rows import SourceOptions
from captionlib.errors import ConfigError, DatasetError, DuplicateIdError
from tests.data.sources.source_files import write_empty_files

UNCHECKED = PrepareConfig(shard_size=2, check_images=False)


def write_csv(path: Path, ids: list[str]) -> Path:
    path.write_text("id,url\n" + "".join(f"{name},{name}.jpg\n" for name in ids))
    return path


def read_image_ids(folder: Path) -> list[str]:
    dataset = open_dataset(folder, "manifest").require_complete()
    return [row["image_id"] for shard in range(dataset.shards) for row in dataset.read(shard).to_pylist()]


def read_parquet_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_prepare_splits_rows_into_shards_in_order(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", list("edcba"))
    summary = prepare(source, tmp_path / "manifest", UNCHECKED)
    assert (summary.images, summary.shards, summary.splits) == (5, 3, {"": 5})
    assert read_image_ids(tmp_path / "manifest") == list("edcba")


def test_prepare_is_deterministic_and_skips_a_second_run(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", list("abc"))
    prepare(source, tmp_path / "one", UNCHECKED)
    prepare(source, tmp_path / "two", UNCHECKED)
    assert read_parquet_files(tmp_path / "one") == read_parquet_files(tmp_path / "two")
    assert prepare(source, tmp_path / "one", UNCHECKED).already_prepared


def test_prepare_of_another_source_needs_permission(tmp_path: Path) -> None:
    prepare(write_csv(tmp_path / "a.csv", ["a"]), tmp_path / "manifest", UNCHECKED)
    other = write_csv(tmp_path / "b.csv", ["b"])
    with pytest.raises(DatasetError, match=r"1 of 1 images are not in the source; .*mounted.*--allow-removal"):
        prepare(other, tmp_path / "manifest", UNCHECKED)
    assert read_image_ids(tmp_path / "manifest") == ["a"]
    prepare(other, tmp_path / "manifest", UNCHECKED, overwrite=True)
    assert read_image_ids(tmp_path / "manifest") == ["b"]


def test_duplicate_id_is_an_error_naming_both_rows_and_writes_nothing(tmp_path: Path) -> None:
    first, second = write_csv(tmp_path / "a.csv", ["x", "same"]), write_csv(tmp_path / "b.csv", ["y", "same"])
    with pytest.raises(DuplicateIdError, match=r"got 2 with 'same': .*a\.csv, line 3, and .*b\.csv, line 3"):
        prepare([first, second], tmp_path / "manifest", UNCHECKED)
    assert not (tmp_path / "manifest").exists()


def test_duplicates_are_found_in_every_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.data.ingestion.staging._IDS_PER_PASS", 3)
    names = [str(number) for number in range(20)]
    prepare(write_csv(tmp_path / "good.csv", names), tmp_path / "good", UNCHECKED)
    with pytest.raises(DuplicateIdError, match="'13'"):
        prepare(write_csv(tmp_path / "bad.csv", [*names, "13"]), tmp_path / "bad", UNCHECKED)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.from_regex(r"[a-z]{1,3}", fullmatch=True), unique=True, min_size=1, max_size=12), st.integers(1, 5))
def test_manifest_holds_every_row_once(tmp_path_factory: pytest.TempPathFactory, names: list[str], size: int) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    config = PrepareConfig(shard_size=size, check_images=False)
    summary = prepare(write_csv(folder / "a.csv", names), folder / "out", config)
    assert summary.shards == -(-len(names) // size)
    assert read_image_ids(folder / "out") == names


def test_limit_and_splits_select_rows(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text("id,url,split\n" + "".join(f"{n},{n}.jpg,{'even' if n % 2 == 0 else 'odd'}\n" for n in range(9)))
    config = PrepareConfig(splits=("odd",), limit=3, check_images=False)
    summary = prepare(source, tmp_path / "manifest", config)
    assert read_image_ids(tmp_path / "manifest") == ["1", "3", "5"]
    assert summary.skipped == {"in a different split": 3}


@pytest.mark.parametrize(("split", "name"), [("val", "dev"), ("dev", "val")])
def test_val_and_dev_select_each_other(tmp_path: Path, split: str, name: str) -> None:
    (tmp_path / "a.csv").write_text(f"id,url,split\n1,1.jpg,{split}\n2,2.jpg,train\n")
    summary = prepare(tmp_path / "a.csv", tmp_path / "manifest", replace(UNCHECKED, splits=(name,)))
    assert summary.splits == {split: 1}


def test_list_of_missing_images_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", ["a", "b"])
    with pytest.raises(DatasetError, match=r"none of the first 2 images exists; the first is expected at .*a\.jpg"):
        prepare(source, tmp_path / "manifest")
    assert not (tmp_path / "manifest").exists()
    write_empty_files(tmp_path / "images", ["b.jpg"])
    config = PrepareConfig(options=SourceOptions(image_root=str(tmp_path / "images")))
    assert prepare(source, tmp_path / "manifest", config).images == 2


def test_refused_uris_are_not_opened_and_become_rows(tmp_path: Path) -> None:
    connections: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        evil = f"reference://x::http://127.0.0.1:{server.getsockname()[1]}/refs.json"
        (tmp_path / "evil.csv").write_text(f"image_id,uri\na,{evil}\n")
        with pytest.raises(DatasetError, match=r"none of the first 1 images exists; .*BadAddress: "):
            prepare(tmp_path / "evil.csv", tmp_path / "none")
        write_empty_files(tmp_path, ["b.jpg"])
        (tmp_path / "both.csv").write_text(f"image_id,uri\na,{evil}\nb,b.jpg\n")
        assert prepare(tmp_path / "both.csv", tmp_path / "both").images == 2
        server.settimeout(0.05)
        with suppress(TimeoutError):
            connections.append(server.accept())
    assert connections == []


def test_source_that_chains_file_systems_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chains file systems"):
        prepare("simplecache::http://127.0.0.1:9/a.csv", tmp_path / "manifest")


def test_empty_source_is_an_error_naming_skipped_items(tmp_path: Path) -> None:
    write_empty_files(tmp_path, ["images/readme.txt"])
    message = r"no images; format folder expects .*skipped: not an image: extension \.txt \(1\)"
    with pytest.raises(DatasetError, match=message):
        prepare(tmp_path / "images", tmp_path / "manifest")


def test_overwrite_does_not_touch_a_folder_of_other_files(tmp_path: Path) -> None:
    write_empty_files(tmp_path, ["thesis/chapter1.tex"])
    with pytest.raises(DatasetError, match="contains files that captionlib did not write"):
        prepare(write_csv(tmp_path / "a.csv", ["a"]), tmp_path / "thesis", UNCHECKED, overwrite=True)
    assert (tmp_path / "thesis/chapter1.tex").exists()


@pytest.mark.parametrize(("line", "expected"), [("  ,a.jpg", "id as text or an integer"), ("1,", "url as text")])
def test_row_without_id_or_uri_is_skipped_naming_the_line(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "a.csv").write_text(f"id,url\n0,0.jpg\n{line}\n")
    summary = prepare(tmp_path / "a.csv", tmp_path / "manifest", UNCHECKED)
    [(reason, example)] = summary.examples.items()
    assert (summary.images, summary.skipped) == (1, {reason: 1})
    assert example == f"{tmp_path}/a.csv, line 3: expected {expected}, got blank text"
    with pytest.raises(DatasetError, match=rf"a\.csv, line 3: expected {expected}, got blank text"):
        prepare(tmp_path / "a.csv", tmp_path / "strict", replace(UNCHECKED, strict=True))


@pytest.mark.parametrize("values", [{"source_format": "zip"}, {"shard_size": 0}, {"limit": 0}])
def test_config_rejects_invalid_values(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))}: .*, got"):
        PrepareConfig(**values)  # type: ignore[arg-type]
