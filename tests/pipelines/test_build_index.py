from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import pytest

from captionlib.data.shards.dataset import open_dataset
from captionlib.errors import CheckpointError, ConfigError, DamagedShardError, DatasetError, FingerprintError
from captionlib.search.build import plan_build
from captionlib.search.config import IndexConfig
from captionlib.search.index import open_index
from captionlib.search.index_folder import read_description
from captionlib.storage.folders import Folder
from pipelines.build_index import build_index
from pipelines.run import RunConfig
from tests.search.example_index import (
    SIZE,
    Row,
    WordRanker,
    make_rows,
    write_captions_dataset,
    write_embeddings_dataset,
)

SHARDS: dict[int, Sequence[Row]] = {0: make_rows(30), 1: make_rows(30, 30), 2: make_rows(30, 60)}
FAILED = {1: ["broken"]}
NO_PROGRESS = RunConfig(progress=False)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CAPTIONLIB_CACHE", str(tmp_path / "cache"))
    return str(tmp_path) if request.param == "local" else f"memory://{uuid4().hex}"


def write_both(root: str, shards: dict[int, Sequence[Row]] | None = None, total: int = 3) -> tuple[str, str]:
    rows = SHARDS if shards is None else shards
    failed = {shard: names for shard, names in FAILED.items() if shard in rows}
    write_captions_dataset(f"{root}/captions", rows, total, failed)
    write_embeddings_dataset(f"{root}/embeddings", rows, total, failed)
    return f"{root}/captions", f"{root}/embeddings"


def test_index_supports_text_and_sentence_search(root: str) -> None:
    captions, embeddings = write_both(root)
    build, description = build_index(captions, f"{root}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    assert len(build.added) == 3
    assert (description.captions_count, description.vectors_count) == (90, 90)
    assert description.layout is not None
    assert description.layout.dimension == SIZE
    index = open_index(f"{root}/index", WordRanker())
    assert index.search_text("dogs", 90).num_rows == sum(
        "dog" in caption for rows in SHARDS.values() for _, caption, _ in rows
    )
    assert set(index.search_sentence("dog cat", 4)["caption"].to_pylist()) == {"a dog and a cat", "a cat and a dog"}
    assert Folder(f"{root}/index").list("__temporary") == []


def test_text_only_index_needs_no_embeddings(root: str) -> None:
    captions, _ = write_both(root)
    _, description = build_index(captions, f"{root}/index", IndexConfig(), run=NO_PROGRESS)
    assert (description.captions_count, description.vectors_count, description.vectors) == (90, 0, "")
    assert open_index(f"{root}/index").search_text("+pizza +train", 5).num_rows > 0


def test_unfinished_shards_stay_in_the_index_if_the_order_of_the_datasets_changes(tmp_path: Path) -> None:
    rows = {"a": make_rows(10), "b": make_rows(10, 10), "c": make_rows(10, 20)}
    for name in ("a", "b"):
        write_captions_dataset(str(tmp_path / name), {0: rows[name]}, 1).finish()
    build_index([tmp_path / "a", tmp_path / "b"], tmp_path / "index", run=NO_PROGRESS)
    open_dataset(tmp_path / "b").remove_marker(0)
    # Without c, the call would raise an error, because no shard would be finished.
    write_captions_dataset(str(tmp_path / "b"), {1: rows["c"]}, 2)
    _, description = build_index([tmp_path / "b", tmp_path / "a"], tmp_path / "index", run=NO_PROGRESS)
    assert description.captions_count == 30
    _, description = build_index([tmp_path / "b"], tmp_path / "index", run=NO_PROGRESS)
    assert description.captions_count == 20
    index = open_index(tmp_path / "index")
    assert [index.get_image(image_id)["caption"] for image_id, _, _ in rows["b"]] == [row[1] for row in rows["b"]]


def test_removed_images_are_not_kept_for_an_unfinished_shard(root: str) -> None:
    captions, embeddings = write_both(root)
    build_index(captions, f"{root}/index", embeddings=embeddings, run=NO_PROGRESS)
    for shard in (1, 2):
        open_dataset(captions).remove_marker(shard)

    def build(*removed_ids: str) -> int:
        return build_index(captions, f"{root}/index", embeddings=embeddings, removed_ids=removed_ids, run=NO_PROGRESS)[
            1
        ].captions_count

    assert build() == build("im0") == 90
    assert build("broken") == 60, "a failure of shard 1"
    assert build("im70") == 30


def test_second_run_does_nothing(root: str) -> None:
    captions, embeddings = write_both(root)
    for expected in (3, 0):
        build, description = build_index(
            captions, f"{root}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS
        )
        assert len(build.added) == expected
    assert description.captions_count == 90


def test_second_run_adds_only_new_shards(root: str) -> None:
    captions, embeddings = write_both(root, {0: SHARDS[0], 2: SHARDS[2]})
    _, before = build_index(captions, f"{root}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    assert len(before.shards) == 2
    open_before = open_index(f"{root}/index", WordRanker(), refresh_seconds=None)
    write_both(root)
    build, after = build_index(captions, f"{root}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    assert build.added == (1,)
    assert len(after.shards) == 3
    assert (after.captions_count, after.vectors_count, after.trained) == (90, 90, before.trained)
    index = open_index(f"{root}/index", WordRanker())
    for name, caption, _ in SHARDS[1]:
        assert index.get_image(name)["caption"] == caption
        assert name in index.search_sentence(caption, 10)["image_id"].to_pylist()
    assert open_before.search_text("dog", 90).num_rows < index.search_text("dog", 90).num_rows, (
        "an open index keeps its version"
    )


def test_rewritten_shard_is_replaced(root: str) -> None:
    captions, embeddings = write_both(root)
    build_index(captions, f"{root}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    again = [*SHARDS[1], ("broken", "a dog and a zebra", -1.0)]
    write_captions_dataset(captions, {1: again}, 3)
    write_embeddings_dataset(embeddings, {1: again}, 3)
    build, description = build_index(captions, f"{root}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    assert (build.added, build.removed) == ((1,), 1)
    assert (description.captions_count, description.vectors_count) == (91, 91)
    index = open_index(f"{root}/index", WordRanker())
    assert index.search_text("zebra")["image_id"].to_pylist() == ["broken"]
    image_ids = index.search_sentence("dog", 91)["image_id"].to_pylist()
    assert len(image_ids) == len(set(image_ids)) == 91
    assert index.search_similar("broken", 90).num_rows == 90
    assert index.search_text("a dog", 91, where="split = 'test'").num_rows == index.search_text("a dog", 91).num_rows


def test_files_of_a_version_are_removed_two_builds_later(root: str) -> None:
    captions = f"{root}/captions"
    for shard in range(3):
        write_captions_dataset(captions, {shard: SHARDS[shard]}, 3)
        build_index(captions, f"{root}/index", IndexConfig(), run=NO_PROGRESS)
    names = Folder(f"{root}/index").list()
    assert sum(name.startswith("text-") for name in names) == 2
    description = read_description(Folder(f"{root}/index"))
    assert description is not None
    assert set(names) == {"index.json", "rows", "details", description.text, *description.previous}


@pytest.mark.parametrize("step", ["train", "add_shard", "finish"])
def test_interrupted_build_is_resumed(root: str, step: str) -> None:
    captions, embeddings = write_both(root)
    build = plan_build(captions, embeddings, f"{root}/index", IndexConfig())
    build.train()
    if step != "train":
        build.add_shard(1)
    if step == "finish":
        build.add_shard(0)
        Folder(f"{root}/index").write(f"text-{build.fingerprint[:12]}/meta.json", b"half of it")
    with pytest.raises(DatasetError, match="is not an index"):
        open_index(f"{root}/index")
    _, description = build_index(captions, f"{root}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    assert description.vectors_count == 90
    assert open_index(f"{root}/index", WordRanker()).search_text("dog").num_rows == 20


def test_every_step_can_run_twice(tmp_path: Path) -> None:
    captions, embeddings = write_both(str(tmp_path))
    run = RunConfig(progress=False, beam_options=("--direct_runner_bundle_repeat=1",))
    _, description = build_index(captions, tmp_path / "index", IndexConfig(), embeddings=embeddings, run=run)
    assert (description.captions_count, description.vectors_count) == (90, 90)


def test_captions_without_embedding_are_found_by_text(root: str) -> None:
    write_captions_dataset(f"{root}/captions", {0: SHARDS[0]}, 1)
    write_embeddings_dataset(f"{root}/embeddings", {0: SHARDS[0][:-1]}, 1, {0: [SHARDS[0][-1][0]]})
    build_index(f"{root}/captions", f"{root}/index", IndexConfig(), embeddings=f"{root}/embeddings", run=NO_PROGRESS)
    index = open_index(f"{root}/index", WordRanker())
    assert index.search_sentence("dog", 40).num_rows == 29
    assert index.get_image(SHARDS[0][-1][0])["caption"] == SHARDS[0][-1][1]


@pytest.mark.parametrize(
    ("others", "total", "message"),
    [
        ({0: make_rows(30)}, 2, "the captions have 3 shards, the embeddings have 2"),
        (
            {0: make_rows(29), 1: SHARDS[1], 2: SHARDS[2]},
            3,
            "part-00000 has 30 images in the captions, but",
        ),
        ({0: make_rows(30, 100), 1: SHARDS[1], 2: SHARDS[2]}, 3, "image im129 has neither a row nor a failure in part"),
    ],
)
def test_embeddings_of_other_images_are_rejected(
    tmp_path: Path, others: dict[int, Sequence[Row]], total: int, message: str
) -> None:
    write_captions_dataset(str(tmp_path / "captions"), SHARDS, 3)
    write_embeddings_dataset(str(tmp_path / "embeddings"), others, total)
    with pytest.raises(DatasetError, match=f"cover different images: {message}"):
        build_index(tmp_path / "captions", tmp_path / "index", IndexConfig(), embeddings=tmp_path / "embeddings")
    assert not (tmp_path / "index").exists()


def test_embeddings_of_other_images_in_a_later_shard_are_rejected(tmp_path: Path) -> None:
    write_captions_dataset(str(tmp_path / "captions"), SHARDS, 3)
    write_embeddings_dataset(str(tmp_path / "embeddings"), {**SHARDS, 2: make_rows(30, 200)}, 3)
    with pytest.raises(DatasetError, match="cover different images: image im229 has neither a row"):
        build_index(tmp_path / "captions", tmp_path / "index", IndexConfig(), embeddings=tmp_path / "embeddings")
    assert not (tmp_path / "index" / "index.json").exists()


def test_index_of_another_configuration_is_replaced_only_with_overwrite(root: str) -> None:
    captions, embeddings = write_both(root)
    build_index(captions, f"{root}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    with pytest.raises(FingerprintError, match="language: was 'english', now 'german'"):
        build_index(captions, f"{root}/index", IndexConfig("german"), embeddings=embeddings, run=NO_PROGRESS)
    with pytest.raises(FingerprintError, match=r"embeddings: was '[0-9a-f]+', now None"):
        build_index(captions, f"{root}/index", IndexConfig(), run=NO_PROGRESS)
    build, description = build_index(
        captions,
        f"{root}/index",
        IndexConfig("german"),
        embeddings=embeddings,
        run=RunConfig(progress=False, overwrite=True),
    )
    assert len(build.added) == 3
    assert description.config.language == "german"
    assert open_index(f"{root}/index").search_text("Hund dog").num_rows == 20


def test_index_that_outgrows_its_layout_is_rebuilt(tmp_path: Path) -> None:
    config = IndexConfig(vectors="sq8", nlist=4)
    write_captions_dataset(str(tmp_path / "captions"), {0: SHARDS[0][:5]}, 2)
    write_embeddings_dataset(str(tmp_path / "embeddings"), {0: SHARDS[0][:5]}, 2)
    arguments = (tmp_path / "captions", tmp_path / "index", config)
    build_index(*arguments, embeddings=tmp_path / "embeddings", run=NO_PROGRESS)
    write_captions_dataset(str(tmp_path / "captions"), {1: make_rows(200, 30)}, 2)
    write_embeddings_dataset(str(tmp_path / "embeddings"), {1: make_rows(200, 30)}, 2)
    build, description = build_index(*arguments, embeddings=tmp_path / "embeddings", run=NO_PROGRESS)
    assert (build.base, len(build.added), description.vectors_count) == (None, 2, 205)


def test_index_of_images_that_all_failed_has_no_rows(tmp_path: Path) -> None:
    write_captions_dataset(str(tmp_path / "captions"), {0: []}, 1, {0: ["broken"]})
    write_embeddings_dataset(str(tmp_path / "embeddings"), {0: []}, 1, {0: ["broken"]})
    arguments = {"embeddings": tmp_path / "embeddings", "run": NO_PROGRESS}
    build_index(tmp_path / "captions", tmp_path / "index", IndexConfig(vectors="sq8"), **arguments)  # type: ignore[arg-type]
    index = open_index(tmp_path / "index", WordRanker())
    assert index.search_text("dog").num_rows == index.search_sentence("dog").num_rows == index.sample().num_rows == 0


def test_unsuitable_folders_are_rejected(tmp_path: Path) -> None:
    captions, embeddings = write_both(str(tmp_path), {})
    with pytest.raises(DatasetError, match="expected shards that are complete in both"):
        plan_build(captions, embeddings, tmp_path / "index", IndexConfig())
    with pytest.raises(DatasetError, match="expected a dataset of kind captions, got embeddings"):
        plan_build(embeddings, None, tmp_path / "index", IndexConfig())
    (tmp_path / "mine").mkdir()
    for name in "abcd":
        (tmp_path / "mine" / name).touch()
    with pytest.raises(DatasetError, match=r"contains files that are not part of an index \(a, b, c\)"):
        plan_build(captions, None, tmp_path / "mine", IndexConfig())
    with pytest.raises(ConfigError, match="language: expected one of none, arabic"):
        IndexConfig("klingon")


@pytest.mark.parametrize("damaged", ["captions", "embeddings"])
def test_missing_marker_is_an_error_rather_than_a_smaller_index(tmp_path: Path, damaged: str) -> None:
    captions, embeddings = write_both(str(tmp_path))
    for folder in (captions, embeddings):
        open_dataset(folder).finish(max_failure_ratio=1)
    (tmp_path / damaged / "__shards" / "part-00001.json").unlink()
    with pytest.raises(DamagedShardError, match="its marker is missing"):
        plan_build(captions, embeddings, tmp_path / "index", IndexConfig())


def test_opening_with_another_ranker_is_rejected(root: str) -> None:
    captions, embeddings = write_both(root)
    build_index(captions, f"{root}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    ranker = WordRanker()
    ranker.fingerprint = "another"
    with pytest.raises(
        CheckpointError, match="expected the ranker ranker-of-words, which computed the embeddings, got another"
    ):
        open_index(f"{root}/index", ranker)


def test_remote_index_is_copied_once_and_replaces_its_old_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"memory://{uuid4().hex}"
    for shard in range(2):
        write_captions_dataset(f"{address}/captions", {shard: SHARDS[shard]}, 3)
        build_index(f"{address}/captions", f"{address}/index", IndexConfig(), run=NO_PROGRESS)
        assert open_index(f"{address}/index", cache=tmp_path).search_text("dog", 40).num_rows > 0
    (root,) = tmp_path.iterdir()
    description = read_description(Folder(f"{address}/index"))
    assert description is not None
    copies = {str(path.relative_to(root)) for path in root.rglob("*") if "text-" not in path.parent.name}
    assert copies == {*description.files, "rows", "details"}
    for name in description.files:
        Folder(f"{address}/index").remove(name)
    assert open_index(f"{address}/index", cache=tmp_path).search_text("dog", 40).num_rows > 0
