import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from captionlib.errors import CheckpointError, FetchError, QueryError
from captionlib.models.encoders.encoder import EncoderConfig, load_encoder
from jobs.cli import captionlib
from tests.search.example_index import WordRanker, make_rows, write_captions_dataset, write_embeddings_dataset


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Builds an index with the command."""
    folder = tmp_path_factory.mktemp("query")
    shards = {0: make_rows(40), 1: make_rows(40, 40)}
    write_captions_dataset(str(folder / "captions"), shards, 2)
    write_embeddings_dataset(str(folder / "embeddings"), shards, 2)
    result = run("build-index", folder / "captions", "-e", folder / "embeddings", "-o", folder / "index")
    assert result.output.splitlines() == [
        f"{folder / 'index'}: 80 captions, 80 vectors (Flat, exhaustive search), in 2 shards",
        "2 shards added, 0 removed, 0 unchanged",
    ]
    return str(folder / "index")


@pytest.fixture
def ranker(monkeypatch: pytest.MonkeyPatch) -> str:
    """Replaces the loading of a checkpoint by a ranker of words with a small image encoder."""
    model = WordRanker()
    model.encoder = load_encoder(
        EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", pooling="mean")
    ).description
    monkeypatch.setattr("captionlib.models.families.ranker.open_ranker", lambda folder, device="cpu": model)
    monkeypatch.setattr("captionlib.models.checkpoints.encoder_file.require_checkpoint_files", lambda *_: None)
    return "ranker"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(captionlib, [*map(str, arguments)], catch_exceptions=False)


def captions(*arguments: object) -> list[str]:
    lines = run("query", *arguments, "--format", "jsonl").stdout.splitlines()
    return [json.loads(line)["caption"] for line in lines]


def test_text_query(index: str) -> None:
    assert len(captions(index, "--text", "dogs")) == 20
    assert set(captions(index, "--text", "+dogs +cats")) == {"a dog and a cat", "a cat and a dog"}
    assert len(captions(index, "--text", "dog -cat", "--limit", 3)) == 3
    assert captions(index, "--text", "dog", "--where", "image_id = 'im3'") == ["a dog and a horse"]
    assert captions(index, "--text", "dog", "--sort", "log_prob", "--limit", 1) == ["a dog and a cat"]


def test_sentence_hybrid_and_similar_queries(index: str, ranker: str) -> None:
    both = {"a dog and a cat", "a cat and a dog"}
    assert set(captions(index, "--sentence", "a cat and a dog", "-r", ranker, "--limit", 3)) == both
    assert set(captions(index, "--hybrid", "cat dog", "-r", ranker, "--limit", 3)) == both
    assert set(captions(index, "--similar", "im0", "--limit", 3)) == both


def test_image_query(index: str, ranker: str, tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "image.png")
    arguments = (index, "--image", tmp_path / "image.png", "--ranker", ranker)
    similar = captions(*arguments, "--limit", 5, "--where", "log_prob > -30")
    assert len(similar) == 5
    (tmp_path / "sentences.txt").write_text("a dog\n\n a cat \na train\n", encoding="utf-8")
    lines = run("query", *arguments, "--sentences", tmp_path / "sentences.txt", "--format", "jsonl").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert sorted(row["sentence"] for row in rows) == ["a cat", "a dog", "a train"]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    with pytest.raises(FetchError):
        captions(index, "--image", tmp_path / "nothing.png", "--ranker", ranker)


def test_inspect_describes_an_index(index: str) -> None:
    lines = run("inspect", index).output.splitlines()
    assert lines[0] == f"{index}: index, complete"
    assert "  vectors      80, Flat in 1 lists, 1 probed per query" in lines
    assert "    ranker: ranker-of-words" in lines
    assert json.loads(run("inspect", index, "--json").output)["captions_count"] == 80


def test_image_id_query(index: str) -> None:
    assert captions(index, "--image-id", "im5") == ["a dog and a train"]
    with pytest.raises(QueryError, match="no image im500 in the index"):
        captions(index, "--image-id", "im500")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --text, --sentence, --hybrid, --image, --similar and --image-id, got none"),
        (["--text", "a", "--similar", "b"], "got --text and --similar."),
        (["--sentence", "a dog"], "--sentence needs --ranker FOLDER"),
        (["--image", "image.jpg"], "--image needs --ranker FOLDER to find similar images, or --captioner FOLDER"),
        (["--sql", "SELECT 1"], "--sql is for a dataset; query the captions that the index was built from"),
    ],
)
def test_invalid_options_are_rejected(index: str, arguments: list[str], message: str) -> None:
    result = run("query", index, *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_index_query_of_a_dataset_is_rejected(index: str) -> None:
    captions = Path(index).parent / "captions"
    result = run("query", captions, "--text", "dog")
    assert result.exit_code == 2
    assert f"--text is for an index, but {captions} is not an index; see `captionlib build-index`" in result.output


def test_another_ranker_is_rejected(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = WordRanker()
    model.fingerprint = "another"
    monkeypatch.setattr("captionlib.models.families.ranker.open_ranker", lambda folder, device="cpu": model)
    with pytest.raises(CheckpointError, match="expected the ranker ranker-of-words"):
        captions(index, "--sentence", "a dog", "--ranker", "other")


def test_where_is_limited_in_time_and_memory(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "(SELECT sum(hash(range)) FROM range(1000000000000)) > 0"
    with pytest.raises(QueryError, match=r"^query: stopped after 0\.5 seconds; simplify it or raise --timeout$"):
        captions(index, "--text", "dog", "--where", endless, "--timeout", 0.5)
    monkeypatch.setattr("captionlib.search.sql.isolation._UNTRACKED_BYTES", 2**27)
    large = "length(repeat(caption, 200000000)) > 0"
    with pytest.raises(QueryError, match=r"^query: needs more than 0\.1 GB of memory; simplify it or raise --memory$"):
        captions(index, "--text", "dog", "--where", large, "--memory", "100MB")


def test_errors_are_the_same_with_a_condition(index: str, ranker: str, tmp_path: Path) -> None:
    where = ("--where", "split = 'val'")
    result = run("query", index, "--sentence", "a dog", *where)
    assert result.exit_code == 2
    assert "--sentence needs --ranker FOLDER" in result.output
    with pytest.raises(FetchError) as error:
        captions(index, "--image", tmp_path / "nothing.png", "--ranker", ranker, *where)
    assert error.value.reason == "NotFound"
