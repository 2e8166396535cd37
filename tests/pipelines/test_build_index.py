from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import pytest

import captionlib.search
from captionlib.errors import CheckpointError, ConfigError, DatasetError, FingerprintError
from captionlib.search.index_config import IndexConfig
from captionlib.search.index_files import read_description
from captionlib.search.planning import plan_build
from captionlib.storage.folders import Folder
from pipelines.build_index import build_index
from pipelines.run import RunConfig
from tests.search.indexes import SIZE, Row, WordRanker, make_rows, write_texts, write_vectors

SHARDS: dict[int, Sequence[Row]] = {0: make_rows(30), 1: make_rows(30, 30), 2: make_rows(30, 60)}
FAILED = {1: ["broken"]}
NO_PROGRESS = RunConfig(progress=False)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CAPTIONLIB_CACHE", str(tmp_path / "cache"))
    return str(tmp_path) if request.param == "local" else f"memory://{uuid4().hex}"


def write_both(place: str, shards: dict[int, Sequence[Row]] | None = None, total: int = 3) -> tuple[str, str]:
    some = SHARDS if shards is None else shards
    failed = {shard: names for shard, names in FAILED.items() if shard in some}
    write_texts(f"{place}/captions", some, total, failed)
    write_vectors(f"{place}/embeddings", some, total, failed)
    return f"{place}/captions", f"{place}/embeddings"


def ids(index: "captionlib.search.Index", question: str) -> list[str]:
    return sorted(index.sentence(question, 3)["image_id"].to_pylist())


def test_an_index_answers_words_and_sentences(place: str) -> None:
    captions, embeddings = write_both(place)
    build, description = build_index(captions, f"{place}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    assert len(build.added) == 3
    assert (description.captions_count, description.vectors_count, description.capacity) == (90, 90, 90)
    assert description.layout is not None
    assert description.layout.size == SIZE
    index = captionlib.search.open(f"{place}/index", WordRanker())
    assert index.text("dogs", 90).num_rows == sum(
        "dog" in caption for some in SHARDS.values() for _, caption, _ in some
    )
    assert set(index.sentence("dog cat", 4)["caption"].to_pylist()) == {"a dog and a cat", "a cat and a dog"}
    assert Folder(f"{place}/index").list("_temporary") == []


def test_text_alone_needs_no_embeddings(place: str) -> None:
    captions, _ = write_both(place)
    _, description = build_index(captions, f"{place}/index", IndexConfig(), run=NO_PROGRESS)
    assert (description.captions_count, description.vectors_count, description.vectors) == (90, 0, "")
    assert captionlib.search.open(f"{place}/index").text("+pizza +train", 5).num_rows > 0


def test_a_second_run_has_nothing_to_do(place: str) -> None:
    captions, embeddings = write_both(place)
    for expected in (3, 0):
        build, description = build_index(
            captions, f"{place}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS
        )
        assert len(build.added) == expected
    assert description.captions_count == 90


def test_only_shards_that_are_new_are_added(place: str) -> None:
    captions, embeddings = write_both(place, {0: SHARDS[0], 2: SHARDS[2]})
    _, before = build_index(captions, f"{place}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    assert not before.is_complete
    open_before = captionlib.search.open(f"{place}/index", WordRanker())
    write_both(place)
    build, after = build_index(captions, f"{place}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    assert [shard.shard for shard in build.added] == [1]
    assert after.is_complete
    assert (after.captions_count, after.vectors_count, after.trained) == (90, 90, before.trained)
    index = captionlib.search.open(f"{place}/index", WordRanker())
    for name, caption, _ in SHARDS[1]:
        assert index.image(name)["caption"] == caption
        assert name in index.sentence(caption, 10)["image_id"].to_pylist()
    assert open_before.text("dog", 90).num_rows < index.text("dog", 90).num_rows, "who has the old one open keeps it"


def test_a_shard_that_was_written_again_is_replaced(place: str) -> None:
    captions, embeddings = write_both(place)
    build_index(captions, f"{place}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    again = [*SHARDS[1], ("broken", "a dog and a zebra", -1.0)]
    write_texts(captions, {1: again}, 3)
    write_vectors(embeddings, {1: again}, 3)
    build, description = build_index(captions, f"{place}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    assert ([one.shard for one in build.added], [one.shard for one in build.removed]) == ([1], [1])
    assert (description.captions_count, description.vectors_count, description.capacity) == (91, 91, 121)
    index = captionlib.search.open(f"{place}/index", WordRanker())
    assert index.text("zebra")["image_id"].to_pylist() == ["broken"]
    found = index.sentence("dog", 91)["image_id"].to_pylist()
    assert len(found) == len(set(found)) == 91
    assert index.similar("broken", 90).num_rows == 90
    assert index.text("a dog", 91, where="split = 'test'").num_rows == index.text("a dog", 91).num_rows


def test_files_of_older_versions_are_removed_one_build_later(place: str) -> None:
    captions = f"{place}/captions"
    for shard in range(3):
        write_texts(captions, {shard: SHARDS[shard]}, 3)
        build_index(captions, f"{place}/index", IndexConfig(), run=NO_PROGRESS)
    names = Folder(f"{place}/index").list()
    assert sum(name.startswith("text-") for name in names) == 2
    description = read_description(Folder(f"{place}/index"))
    assert description is not None
    assert set(names) == {"index.json", "rows", description.text, *description.previous}


@pytest.mark.parametrize("step", ["train", "add_shard", "finish"])
def test_a_build_that_died_is_gone_on_with(place: str, step: str) -> None:
    captions, embeddings = write_both(place)
    build = plan_build(captions, embeddings, f"{place}/index", IndexConfig())
    build.train()
    if step != "train":
        build.add_shard(1)
    if step == "finish":
        build.add_shard(0)
        Folder(f"{place}/index").write(f"text-{build.fingerprint[:12]}/meta.json", b"half of it")
    with pytest.raises(DatasetError, match="is no index"):
        captionlib.search.open(f"{place}/index")
    _, description = build_index(captions, f"{place}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    assert description.vectors_count == 90
    assert captionlib.search.open(f"{place}/index", WordRanker()).text("dog").num_rows == 20


def test_every_step_may_run_twice(tmp_path: Path) -> None:
    captions, embeddings = write_both(str(tmp_path))
    run = RunConfig(progress=False, beam_options=("--direct_runner_bundle_repeat=1",))
    _, description = build_index(captions, tmp_path / "index", IndexConfig(), embeddings=embeddings, run=run)
    assert (description.captions_count, description.vectors_count) == (90, 90)


def test_captions_without_a_vector_are_found_by_their_words(place: str) -> None:
    write_texts(f"{place}/captions", {0: SHARDS[0]}, 1)
    write_vectors(f"{place}/embeddings", {0: SHARDS[0][:-1]}, 1, {0: [SHARDS[0][-1][0]]})
    build_index(f"{place}/captions", f"{place}/index", IndexConfig(), embeddings=f"{place}/embeddings", run=NO_PROGRESS)
    index = captionlib.search.open(f"{place}/index", WordRanker())
    assert index.sentence("dog", 40).num_rows == 29
    assert index.image(SHARDS[0][-1][0])["caption"] == SHARDS[0][-1][1]


@pytest.mark.parametrize(
    ("others", "total", "message"),
    [
        ({0: make_rows(30)}, 2, "expected 3 shards, got 2"),
        ({0: make_rows(29), 1: SHARDS[1], 2: SHARDS[2]}, 3, "part-00000 has 30 images there and 29 here"),
        ({0: make_rows(30, 100), 1: SHARDS[1], 2: SHARDS[2]}, 3, "image im129 has neither a row nor a failure in part"),
    ],
)
def test_embeddings_of_other_images_are_refused(
    tmp_path: Path, others: dict[int, Sequence[Row]], total: int, message: str
) -> None:
    write_texts(str(tmp_path / "captions"), SHARDS, 3)
    write_vectors(str(tmp_path / "embeddings"), others, total)
    with pytest.raises(DatasetError, match=f"do not belong together: {message}"):
        build_index(tmp_path / "captions", tmp_path / "index", IndexConfig(), embeddings=tmp_path / "embeddings")
    assert not (tmp_path / "index").exists()


def test_embeddings_of_other_images_in_a_later_shard_are_refused(tmp_path: Path) -> None:
    write_texts(str(tmp_path / "captions"), SHARDS, 3)
    write_vectors(str(tmp_path / "embeddings"), {**SHARDS, 2: make_rows(30, 200)}, 3)
    with pytest.raises(DatasetError, match="do not belong together: image im229 has neither a row"):
        build_index(tmp_path / "captions", tmp_path / "index", IndexConfig(), embeddings=tmp_path / "embeddings")
    assert not (tmp_path / "index" / "index.json").exists()


def test_an_index_of_something_else_is_refused_unless_it_may_be_replaced(place: str) -> None:
    captions, embeddings = write_both(place)
    build_index(captions, f"{place}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    with pytest.raises(FingerprintError, match="language: was 'english', now 'german'"):
        build_index(captions, f"{place}/index", IndexConfig("german"), embeddings=embeddings, run=NO_PROGRESS)
    with pytest.raises(FingerprintError, match=r"embeddings: was '[0-9a-f]+', now None"):
        build_index(captions, f"{place}/index", IndexConfig(), run=NO_PROGRESS)
    build, description = build_index(
        captions,
        f"{place}/index",
        IndexConfig("german"),
        embeddings=embeddings,
        run=RunConfig(progress=False, overwrite=True),
    )
    assert len(build.added) == 3
    assert description.config.language == "german"
    assert captionlib.search.open(f"{place}/index").text("Hund dog").num_rows == 20


def test_an_index_that_has_grown_out_of_its_layout_is_built_anew(tmp_path: Path) -> None:
    config = IndexConfig(vectors="sq8", lists=4)
    write_texts(str(tmp_path / "captions"), {0: SHARDS[0][:5]}, 2)
    write_vectors(str(tmp_path / "embeddings"), {0: SHARDS[0][:5]}, 2)
    arguments = (tmp_path / "captions", tmp_path / "index", config)
    build_index(*arguments, embeddings=tmp_path / "embeddings", run=NO_PROGRESS)
    write_texts(str(tmp_path / "captions"), {1: make_rows(200, 30)}, 2)
    write_vectors(str(tmp_path / "embeddings"), {1: make_rows(200, 30)}, 2)
    build, description = build_index(*arguments, embeddings=tmp_path / "embeddings", run=NO_PROGRESS)
    assert (build.base, len(build.added), description.vectors_count) == (None, 2, 205)


def test_nothing_done_and_strangers_and_wrong_kinds_are_refused(tmp_path: Path) -> None:
    captions, embeddings = write_both(str(tmp_path), {})
    with pytest.raises(DatasetError, match="expected shards that are done in both"):
        plan_build(captions, embeddings, tmp_path / "index", IndexConfig())
    with pytest.raises(DatasetError, match="expected a dataset of kind captions, got embeddings"):
        plan_build(embeddings, None, tmp_path / "index", IndexConfig())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    with pytest.raises(DatasetError, match=r"holds files that are no index \(photo.jpg\)"):
        plan_build(captions, None, tmp_path / "mine", IndexConfig())
    with pytest.raises(ConfigError, match="language: expected one of none, arabic"):
        IndexConfig("klingon")


def test_another_ranker_is_refused(place: str) -> None:
    captions, embeddings = write_both(place)
    build_index(captions, f"{place}/index", IndexConfig(), embeddings=embeddings, run=NO_PROGRESS)
    ranker = WordRanker()
    ranker.fingerprint = "another"
    with pytest.raises(
        CheckpointError, match="expected the ranker ranker-of-words, which made its vectors, got another"
    ):
        captionlib.search.open(f"{place}/index", ranker)


def test_a_remote_index_is_copied_once_and_an_old_copy_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"memory://{uuid4().hex}"
    for shard in range(2):
        write_texts(f"{address}/captions", {shard: SHARDS[shard]}, 3)
        build_index(f"{address}/captions", f"{address}/index", IndexConfig(), run=NO_PROGRESS)
        assert captionlib.search.open(f"{address}/index", cache=tmp_path).text("dog", 40).num_rows > 0
    (place,) = tmp_path.iterdir()
    description = read_description(Folder(f"{address}/index"))
    assert description is not None
    assert [copy.name for copy in place.iterdir()] == [description.fingerprint]
    for name in description.files:
        Folder(f"{address}/index").remove(name)
    assert captionlib.search.open(f"{address}/index", cache=tmp_path).text("dog", 40).num_rows > 0
