import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from captionlib.collection import CollectionConfig, SourceConfig, create_collection, open_collection
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.errors import CaptionlibError, ConfigError, DatasetError, LockError, QueryError
from captionlib.search.index import open_index
from captionlib.storage.folders import Folder
from captionlib.storage.lock import lock_folder
from jobs.cli import captionlib
from tests.jobs.test_serve import free_port
from tests.pipelines.conftest import COLORS, write_images
from tests.pipelines.test_embed_images import train_small_ranker


@pytest.fixture(scope="module")
def ranker(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small_ranker(extracted, tmp_path_factory.mktemp("trained") / "ranker")


def run(*arguments: str | Path, catch: bool = False) -> Result:
    return CliRunner().invoke(captionlib, [str(argument) for argument in arguments], catch_exceptions=catch)


@pytest.fixture
def collection(tmp_path: Path, trained: Path, ranker: Path) -> Path:
    """A collection of eight valid images and a broken one, before its first update."""
    write_images(tmp_path / "images")
    folder = tmp_path / "collection"
    result = run("init", folder, "--source", tmp_path / "images", "-c", trained, "-r", ranker)
    assert result.exit_code == 0, result.output
    return folder


def update(collection: Path, *options: str) -> Result:
    return run("update", collection, "--no-progress", "--device", "cpu", *options)


def read_captions(collection: Path) -> dict[str, str]:
    captions = open_dataset(collection / "images" / "captions", "captions").require_complete()
    rows = [row for shard in range(captions.shards) for row in captions.read(shard).to_pylist()]
    return {row["image_id"]: row["caption"] for row in rows}


def test_first_update_goes_from_images_to_an_index(collection: Path) -> None:
    result = update(collection)
    assert result.exit_code == 0, result.output
    assert "9 new, 0 changed, 0 missing, 0 unchanged" in result.output
    assert len(read_captions(collection)) == 8
    index = open_index(collection / "index")
    assert index.get_image("red.png")["caption"] == read_captions(collection)["red.png"]
    assert open_dataset(collection / "images" / "embeddings").is_complete()
    status = run("status", collection)
    assert "failed: Truncated 1" in status.output
    assert "of computing time in all updates" in status.output
    assert "To finish:" not in status.output


def test_next_update_follows_the_source(collection: Path, tmp_path: Path) -> None:
    update(collection)
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "images" / "teal.png")
    (tmp_path / "images" / "white.png").unlink()
    dry = update(collection, "--dry-run")
    assert "1 new, 0 changed, 1 missing, 8 unchanged" in dry.output
    assert "white.png" in read_captions(collection), "a dry run changes nothing"
    result = update(collection, "--allow-removal")
    assert result.exit_code == 0, result.output
    assert "teal.png" in read_captions(collection)
    index = open_index(collection / "index")
    assert index.get_image("teal.png")["uri"].endswith("teal.png")
    with pytest.raises(QueryError, match="white"):
        index.get_image("white.png")


def test_source_may_become_empty(collection: Path, tmp_path: Path) -> None:
    configuration = collection / "collection.yaml"
    configuration.write_text(f"{configuration.read_text()}duplicate_threshold: 0.99\n")
    update(collection)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match=r"no images; .* or use --allow-removal to remove all images"):
        update(collection)
    assert len(read_captions(collection)) == 8
    for options in (["--allow-removal"], []):
        assert "index: 0 captions" in update(collection, *options).output
    assert find_files_with("red.png", collection / "images") == []
    assert "To finish:" not in run("status", collection).output
    assert run("query", collection, "--sentence", "a red field").exit_code == 0
    shutil.rmtree(collection / "index")
    assert "index: 0 captions" in update(collection).output
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "images" / "teal.png")
    assert "index: 1 captions" in update(collection).output


def test_update_without_changes_writes_nothing(collection: Path) -> None:
    update(collection)

    def read_times() -> dict[str, int]:
        files = (path for path in collection.rglob("*") if path.is_file())
        return {str(path): path.stat().st_mtime_ns for path in files if path.suffix in (".parquet", ".faiss")}

    before = read_times()
    assert update(collection).exit_code == 0
    assert read_times() == before


def test_second_update_at_the_same_time_is_refused(collection: Path) -> None:
    with lock_folder(Folder(collection), "captionlib update"), pytest.raises(LockError, match="is in use by"):
        update(collection)


@pytest.mark.parametrize("command", [("remove", "--id", "red.png"), ("compact", "--shard-size", "2")])
def test_dataset_that_another_command_changes_is_refused(manifest: ShardedDataset, command: tuple[str, ...]) -> None:
    name, *options = command
    with lock_folder(manifest.folder, "captionlib prepare"), pytest.raises(LockError, match="is in use by"):
        run(name, manifest.folder.uri, *options)
    assert run(name, manifest.folder.uri, *options).exit_code == 0


def test_several_sources_are_indexed_together(tmp_path: Path, trained: Path, ranker: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (80, 60), "red").save(tmp_path / name / f"{name}.png")
    run("init", tmp_path / "both", *(f"--source={name}={tmp_path / name}" for name in ("one", "two")), "-c", trained)
    result = update(tmp_path / "both")
    assert result.exit_code == 0, result.output
    index = open_index(tmp_path / "both" / "index")
    for name in ("one", "two"):
        assert index.get_image(f"{name}.png")["uri"].endswith(f"{name}/{name}.png")
    configuration = tmp_path / "both" / "collection.yaml"
    configuration.write_text(
        configuration.read_text().replace(f"- name: two\n  addresses:\n  - {tmp_path}/two\n  prepare: {{}}\n", "")
    )
    assert "index: 1 captions" in update(tmp_path / "both").output
    assert "both/two/captions: no longer part of the collection" in run("status", tmp_path / "both").output
    run("remove", tmp_path / "both", "--id", "two.png", "--thumbnails", tmp_path / "thumbnails")
    assert find_files_with("two.png", tmp_path / "both") == [], "also in the datasets of the earlier source"


@pytest.fixture
def two_sources(tmp_path: Path, trained: Path) -> Path:
    """A collection of two sources with four images each, after its first update."""
    write_images(tmp_path / "written")
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        for color in COLORS[number::2]:
            (tmp_path / "written" / f"{color}.png").rename(tmp_path / name / f"{color}.png")
    sources = (f"--source={name}={tmp_path / name}" for name in ("one", "two"))
    run("init", tmp_path / "both", *sources, "-c", trained)
    assert update(tmp_path / "both").exit_code == 0
    return tmp_path / "both"


def test_unreadable_source_stays_as_it_is_while_the_others_are_updated(two_sources: Path, tmp_path: Path) -> None:
    (tmp_path / "one").rename(tmp_path / "unmounted")
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "two" / "teal.png")
    message = f"^source one was not updated: {tmp_path}/one does not exist"
    for options in (["--dry-run"], []):
        with pytest.raises(DatasetError, match=message):
            update(two_sources, *options)
    assert open_index(two_sources / "index").description.captions_count == 9
    assert open_index(two_sources / "index").get_image("teal.png")
    assert not open_dataset(two_sources / "one" / "captions").compute_totals().failures
    (tmp_path / "unmounted").rename(tmp_path / "one")
    result = update(two_sources)
    assert result.exit_code == 0
    assert "one/manifest: 0 new, 0 changed, 0 missing, 4 unchanged" in result.output


def test_source_whose_images_all_fail_does_not_stop_the_others(two_sources: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "one").iterdir():
        path.write_bytes(b"not an image")
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "two" / "teal.png")
    with pytest.raises(DatasetError, match=r"^source one was not updated: .*4 of 4 images \(100.0%\) failed"):
        update(two_sources)
    assert open_index(two_sources / "index").get_image("teal.png")


def test_image_id_in_two_sources_is_an_error_before_images_are_captioned(two_sources: Path, tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "one" / "green.png")
    message = rf"got 'green.png' for {tmp_path}/one/green.png of source one and {tmp_path}/two/green.png of source two"
    with pytest.raises(DatasetError, match=f"^the index was not updated: .* {message}"):
        update(two_sources)
    assert open_dataset(two_sources / "one" / "captions").compute_totals().rows == 4
    with pytest.raises(DatasetError, match="index still contains the images, because it cannot be updated: "):
        open_dataset(two_sources / "one" / "captions").remove_marker(0)
        run("remove", two_sources, "--id", "red.png", "--thumbnails", tmp_path / "thumbnails")
    (tmp_path / "one" / "green.png").unlink()
    with pytest.raises(DatasetError, match=r"^source one was not updated: .* or --allow-removal .* got 'green.png'"):
        update(two_sources)
    assert update(two_sources, "--allow-removal").exit_code == 0
    run("remove", two_sources, "--id", "red.png", "--thumbnails", tmp_path / "thumbnails")
    assert find_files_with("red.png", two_sources) == []


def test_new_source_that_cannot_be_read_is_left_out(two_sources: Path, tmp_path: Path) -> None:
    path = two_sources / "collection.yaml"
    new = f"sources:\n- name: new\n  addresses: [{tmp_path}/nowhere]\n"
    path.write_text(path.read_text().replace("sources:\n", new))
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "two" / "teal.png")
    with pytest.raises(DatasetError, match=r"^source new was not updated: "):
        update(two_sources)
    assert open_index(two_sources / "index").description.captions_count == 9


def test_index_waits_for_an_unreadable_source_if_its_duplicates_are_unknown(collection: Path, tmp_path: Path) -> None:
    path = collection / "collection.yaml"
    path.write_text(f"{path.read_text()}duplicate_threshold: 0.99\n")
    update(collection)
    new = f"sources:\n- name: new\n  addresses: [{tmp_path}/new]\n"
    path.write_text(path.read_text().replace("sources:\n", new))
    (tmp_path / "new").mkdir()
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "new" / "teal.png")
    open_dataset(collection / "images" / "embeddings").mark_incomplete()
    (tmp_path / "images").rename(tmp_path / "unmounted")
    with pytest.raises(
        DatasetError, match=r"^source images was not updated: .*; the index was not updated: .*embeddings"
    ):
        update(collection)
    assert open_index(collection / "index").get_image("red.png")


def test_configuration_holds_absolute_addresses(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    run("init", "collection", "--source", "images", "-c", trained, "--set", "generation.decoding.beam_width=9")
    config = open_collection("collection").config
    assert config.sources[0].addresses == (str(tmp_path / "images"),)
    assert config.generation == {"decoding": {"beam_width": 9}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("captioner: nowhere", "nowhere is not a checkpoint"),
        ("ranker: ''", "expected a path or URL, got an empty string"),
        ("generation: {decoding: {beam_widht: 2}}", "unknown key decoding.beam_widht"),
    ],
)
def test_settings_are_checked_before_the_sources_are_read(collection: Path, setting: str, message: str) -> None:
    key = setting.partition(":")[0]
    path = collection / "collection.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*lines, setting]))
    with pytest.raises(CaptionlibError, match=message):
        update(collection)
    assert not (collection / "images").exists()


def test_status_after_a_file_was_deleted(collection: Path) -> None:
    update(collection)
    (collection / "images" / "captions" / "part-00000.parquet").unlink()
    status = run("status", collection).output
    assert "captions: 0 images, 0 of 1 shards finished" in status
    assert "To finish:" in status


def test_status_before_the_first_update(collection: Path) -> None:
    result = run("status", collection)
    assert "manifest: not started" in result.output
    assert "captionlib update" in result.output


def test_served_captions_of_uploaded_images_have_the_settings_of_the_collection(
    collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["serve", collection], ["query", collection, "--text", "red"]):
        with pytest.raises(DatasetError, match="has no index yet; run `captionlib update"):
            run(*arguments)
    configuration = collection / "collection.yaml"
    configuration.write_text(f"{configuration.read_text()}generation: {{decoding: {{beam_width: 9}}}}\n")
    update(collection)
    monkeypatch.setattr("jobs.serve._run_server", lambda *_: None)
    decoding = []
    for options in ([], ["--set", "decoding.max_tokens=7"]):
        monkeypatch.setenv("CAPTIONLIB_APP_CONFIG", "")
        assert run("serve", collection, "--port", str(free_port()), *options).exit_code == 0
        values = json.loads(os.environ["CAPTIONLIB_APP_CONFIG"])["generation"]["decoding"]
        decoding.append((values["beam_width"], values["max_tokens"]))
    assert decoding == [(9, None), (9, 7)]


def test_query_and_serve_accept_a_collection(collection: Path) -> None:
    update(collection)
    found = run("query", collection, "--image-id", "red.png", "--format", "jsonl")
    assert found.exit_code == 0, found.output
    assert read_captions(collection)["red.png"] in found.output
    without_query = run("query", collection, catch=True)
    assert "expected one of --text, " in without_query.output
    assert "--sql, --contains, " in without_query.output
    by_sentence = run("query", collection, "--sentence", "a red field", "--format", "jsonl", "--limit", "3")
    assert by_sentence.exit_code == 0, by_sentence.output
    assert by_sentence.output.count("\n") == 3


def test_export_and_query_accept_a_collection_and_inspect_names_status(collection: Path, tmp_path: Path) -> None:
    update(collection)
    exported = run("export", collection, "--to", "txt", "-o", tmp_path / "out", "--no-progress")
    assert exported.exit_code == 0, exported.output
    texts = sorted(path.read_text() for path in (tmp_path / "out").rglob("*.txt"))
    assert texts == sorted(read_captions(collection).values())
    count = ("--sql", "SELECT count(*) AS n FROM captions", "--format", "jsonl")
    assert run("query", collection, collection / "images" / "captions", *count).output.strip() == '{"n": 16}'
    with pytest.raises(DatasetError, match=r"is a collection \(created by `captionlib init`\); run `captionlib status"):
        run("inspect", collection)


def find_files_with(text: str, folder: Path) -> list[str]:
    """Returns the files that contain a text, also inside of Parquet and Arrow files."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content += str(pq.read_table(path).to_pydict()).encode()
        if path.suffix == ".arrow":
            content += str(pa.ipc.open_file(pa.py_buffer(content)).read_all().to_pydict()).encode()
        if text.encode() in content:
            found.append(str(path))
    return found


def test_removed_images_leave_no_trace_and_do_not_come_back(collection: Path, tmp_path: Path) -> None:
    update(collection)
    assert find_files_with("white.png", collection)
    before = read_captions(collection)
    run("remove", collection, "--id", "white.png", "--id", "broken.png", "--dry-run")
    assert read_captions(collection) == before
    options = ("--reason", "asked", "--thumbnails", tmp_path / "thumbnails")
    result = run("remove", collection, "--id", "white.png", "--id", "broken.png", *options)
    assert result.exit_code == 0, result.output
    assert find_files_with("white.png", collection) == find_files_with("broken.png", collection) == []
    after = read_captions(collection)
    assert after == {image_id: text for image_id, text in before.items() if image_id != "white.png"}
    again = update(collection)
    assert "0 new, 0 changed, 0 missing, 7 unchanged" in again.output
    assert read_captions(collection) == after
    assert open_index(collection / "index").get_image("red.png")["caption"] == after["red.png"]


def test_images_are_removed_from_a_collection_whose_update_was_killed(collection: Path, tmp_path: Path) -> None:
    update(collection)
    captions = open_dataset(collection / "images" / "captions")
    captions.remove_marker(0)  # as if the command had been killed just before it wrote the marker
    (collection / "index" / "index.json").unlink()  # as if the first build of the index had been killed
    assert find_files_with("white.png", collection / "index")
    run("remove", collection, "--id", "white.png", "--thumbnails", tmp_path / "thumbnails")
    assert find_files_with("white.png", collection) == []
    assert update(collection).exit_code == 0
    assert len(read_captions(collection)) == 7


def test_removed_images_do_not_come_back_with_another_source(two_sources: Path, tmp_path: Path) -> None:
    run("remove", two_sources, "--id", "red.png", "--thumbnails", tmp_path / "thumbnails")
    run("remove", two_sources / "two" / "manifest", "--id", "blue.png")
    (tmp_path / "one").rename(tmp_path / "new")
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "new" / "teal.png")
    path = two_sources / "collection.yaml"
    path.write_text(path.read_text().replace("name: one", "name: new").replace(f"{tmp_path}/one", f"{tmp_path}/new"))
    result = update(two_sources)
    assert result.exit_code == 0, result.output
    assert "new/manifest: 4 new" in result.output
    assert "Skipped: 1 removed with captionlib remove" in result.output
    assert find_files_with("red.png", two_sources) == []
    assert find_files_with("blue.png", two_sources / "new"), "it was removed from another source only"


def test_ids_that_are_not_found_are_named(collection: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected datasets, got none; run `captionlib update .*` first"):
        run("remove", collection, "--id", "red.png")
    update(collection)
    ids = tmp_path / "ids.txt"
    ids.write_bytes("\ufeffred.png\r\n\r\nline\u2028separator\r\n".encode())
    result = run("remove", collection, "--ids", ids, "--dry-run")
    assert "captions: 1 of 2 images" in result.output
    assert "Not found: 1 ids, for example 'line\\u2028separator'" in result.output
    with pytest.raises(ConfigError, match="--id: expected text in UTF-8, got "):
        run("remove", collection, "--id", "\udce9")
    assert run("remove", collection, "--id", "", catch=True).exit_code == 2


def test_remove_names_the_manifest_that_would_add_the_images_again(collection: Path) -> None:
    update(collection)
    result = run("remove", collection / "images" / "captions", "--id", "red.png")
    assert "the next update of the manifest adds the images again" in result.output
    assert "red.png" not in read_captions(collection)


def test_nothing_is_removed_if_the_references_of_an_index_cannot_be_read(
    collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(collection)
    monkeypatch.setattr("captionlib.search.inputs.find_manifest", mock.Mock(side_effect=DatasetError("unreadable")))
    with pytest.raises(DatasetError, match="unreadable"):
        run("remove", collection / "images" / "captions", collection / "index", "--id", "red.png")
    assert "red.png" in read_captions(collection)


def test_compacting_a_collection_before_its_first_update_is_an_error(collection: Path) -> None:
    with pytest.raises(DatasetError, match=r"got none; run `captionlib update .*` first"):
        run("compact", collection)


def test_compacted_collection_has_nothing_to_process(collection: Path) -> None:
    settings = (collection / "collection.yaml").read_text()
    (collection / "collection.yaml").write_text(settings.replace("prepare: {}", "prepare: {shard_size: 2}"))
    update(collection)
    before = read_captions(collection)
    (collection / "collection.yaml").write_text(settings)
    result = run("compact", collection, "--no-progress")
    assert result.exit_code == 0, result.output
    assert f"{collection}/images/captions: 5 shards became 1\n" in result.output
    assert (
        "index: 8 captions\n  its datasets or settings have changed since it was built"
        in run("status", collection).output
    )
    written = (collection / "images" / "captions" / "part-00000.parquet").stat().st_mtime_ns
    assert update(collection).exit_code == 0
    assert read_captions(collection) == before
    assert (collection / "images" / "captions" / "part-00000.parquet").stat().st_mtime_ns == written
    assert len(open_index(collection / "index").description.shards) == 1
    assert run("compact", collection, "--no-progress").output.count("nothing to do") == 3


def test_models_of_other_families_keep_their_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blip").mkdir()
    sources = (SourceConfig("images", ("images",)),)
    collection = create_collection("local", CollectionConfig(sources, "hf:blip"))
    assert collection.config.captioner == f"hf:{tmp_path}/blip"
    collection = create_collection("hub", CollectionConfig(sources, "hf:organization/blip@main", "clip"))
    assert (collection.config.captioner, collection.config.ranker) == ("hf:organization/blip@main", f"{tmp_path}/clip")


def test_collection_leaves_duplicates_out_of_its_index(collection: Path, tmp_path: Path) -> None:
    configuration = collection / "collection.yaml"
    configuration.write_text(f"{configuration.read_text()}duplicate_threshold: 0.99\n")
    Image.open(tmp_path / "images" / "red.png").resize((40, 30)).save(tmp_path / "images" / "small-red.png")
    result = update(collection)
    assert result.exit_code == 0, result.output
    groups = {row["image_id"]: row["group"] for row in open_dataset(collection / "duplicates").read(0).to_pylist()}
    assert groups["small-red.png"] == groups["red.png"]
    left_out = sum(image_id != group for image_id, group in groups.items())
    kept = 9 - left_out
    status = run("status", collection).output
    assert f"duplicates: {len(groups) - left_out} groups, {left_out} of 9 images are left out of the index" in status
    assert "To finish:" not in status
    removed = next((collection / "images" / "captions").glob("part-*.parquet"))
    content = removed.read_bytes()
    removed.unlink()
    assert f"duplicates: {len(groups) - left_out} groups" in run("status", collection).output
    assert "To finish:" in run("status", collection).output
    removed.write_bytes(content)
    assert open_index(collection / "index").description.captions_count == kept
    with pytest.raises(QueryError, match="no image small-red"):
        open_index(collection / "index").get_image("small-red.png")
    check_queries_of_duplicates(collection, kept)
    configuration.write_text(
        configuration.read_text().replace("duplicate_threshold: 0.99", "duplicate_threshold: 0.98")
    )
    status = run("status", collection).output
    assert "duplicates: not started, or the images or the threshold have changed" in status
    assert "To finish:" in status
    configuration.write_text(
        configuration.read_text().replace("duplicate_threshold: 0.98", "duplicate_threshold: 0.99")
    )
    again = run("deduplicate", collection, "-o", tmp_path / "again", "--threshold", "0.99", "--no-progress")
    assert again.exit_code == 0, again.output
    assert open_dataset(tmp_path / "again").read(0).equals(open_dataset(collection / "duplicates").read(0))
    removed = run("remove", collection, "--id", groups["red.png"], "--thumbnails", tmp_path / "thumbnails")
    assert removed.exit_code == 0, removed.output
    assert "red.png" in open_index(collection / "index").get_image("small-red.png")["uri"]


def check_queries_of_duplicates(collection: Path, kept: int) -> None:
    """Checks that SQL sees the nine images of a collection and marks the duplicates, which other queries leave out."""

    def count(*options: str) -> int:
        result = run("query", collection, *options, "--format", "jsonl")
        assert result.exit_code == 0, result.output
        return len(result.output.splitlines())

    assert count("--top", "20") == kept
    assert count("--sql", "FROM captions") == 9
    assert count("--sql", "FROM captions WHERE duplicate_of IS NULL") == kept
    assert count("--sql", "FROM captions", "--duplicates", str(collection / "duplicates")) == kept
    configuration = collection / "collection.yaml"
    text = configuration.read_text()
    configuration.write_text(f"{text}index: {{keep_duplicates: true}}\n")
    assert count("--top", "20") == 9
    configuration.write_text(text)


def test_query_that_leaves_out_duplicates_needs_an_update(collection: Path) -> None:
    configuration = collection / "collection.yaml"
    configuration.write_text(f"{configuration.read_text()}duplicate_threshold: 0.99\n")
    with pytest.raises(DatasetError, match="duplicates is not complete; run `captionlib update"):
        run("query", collection, "--sql", "FROM captions")
