from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from captionlib.errors import DatasetError, QueryError
from captionlib.search.build import plan_build
from captionlib.search.config import IndexConfig, VectorLayout
from captionlib.search.index import Filter, Index, fuse_rankings, open_index
from captionlib.search.vector_index import (
    Hits,
    RowMove,
    VectorIndex,
    merge_indexes,
    write_partial_index,
    write_trained_index,
)

from .example_index import Row, WordRanker, make_rows, write_captions_dataset, write_embeddings_dataset

SENTENCES: list[Row] = [
    ("a1", "a dog runs on the grass", -4.5),
    ("a2", "Two dogs catch a frisbee", -3.25),
    ("b1", "a woman holds a hot dog", -9.0),
    ("b2", "a café on a sunny beach", -1.5),
    ("b3", "the beach is empty, no dog on it", -2.0),
]


def build_index(tmp_path: Path, rows: list[Row], config: IndexConfig | None = None, shards: int = 2) -> Index:
    pieces = {shard: rows[shard::shards] for shard in range(shards)}
    write_captions_dataset(str(tmp_path / "captions"), pieces, shards)
    write_embeddings_dataset(str(tmp_path / "embeddings"), pieces, shards)
    build = plan_build(tmp_path / "captions", tmp_path / "embeddings", tmp_path / "index", config or IndexConfig())
    build.train()
    for shard in range(shards):
        build.add_shard(shard)
    build.finish()
    return open_index(tmp_path / "index", WordRanker())


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(tmp_path_factory.mktemp("few"), SENTENCES)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(tmp_path_factory.mktemp("many"), make_rows(2000), IndexConfig(vectors="sq8"))


def ids(table: pa.Table) -> list[str]:
    names: list[str] = table["image_id"].to_pylist()
    return names


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("frisbee", {"a2"}),
        ("dog", {"a1", "a2", "b1", "b3"}),
        ("DOGS running", {"a1", "a2", "b1", "b3"}),
        ("+dog +grass", {"a1"}),
        ("dog -beach -frisbee", {"a1", "b1"}),
        ("-dog", {"b2"}),
        ('"hot dog"', {"b1"}),
        ('"dog hot"', set()),
        ('"beach is empty"', {"b3"}),
        ('beach -"sunny beach"', {"b3"}),
        ("cafe", {"b2"}),
        ("café", {"b2"}),
        ("hot-dog", {"b1"}),
        ('"hot dog', {"b1"}),
        ("image_id:a1 frisbee", {"a2"}),
        ("dog AND frisbee", {"a1", "a2", "b1", "b3"}),
        ("[a TO z] frisbee ^3 OR (", {"a2"}),
        ("zebra", set()),
    ],
)
def test_text_query_matches_words_phrases_and_signs(few: Index, query: str, expected: set[str]) -> None:
    assert set(ids(few.search_text(query))) == expected
    assert few.search_text_and_count(query, 2)[1].total == len(expected)


def test_captions_with_more_of_the_words_rank_higher(few: Index) -> None:
    table = few.search_text("dog frisbee")
    assert ids(table)[0] == "a2"
    names = ["image_id", "uri", "split", "caption", "log_prob", "tokens", "image_text_score"]
    assert table.column_names == [*names, "width", "height", "score"]
    scores = table["score"].to_pylist()
    assert scores == sorted(scores, reverse=True)


def test_results_can_be_sorted_by_log_prob(few: Index) -> None:
    assert ids(few.search_text("dog", sort="log_prob")) == ["b3", "a2", "a1", "b1"]


@pytest.mark.parametrize("query", ["", "  ", "the", '""', "+ -", "?!", "a " * 3])
def test_text_query_without_words_is_rejected(few: Index, query: str) -> None:
    with pytest.raises(QueryError, match="expected words to search for"):
        few.search_text(query)


def test_text_query_with_too_many_words_is_rejected(few: Index) -> None:
    with pytest.raises(QueryError, match="expected at most 64 words and phrases, got 65"):
        few.search_text(" ".join(f"word{number}" for number in range(65)))


@settings(max_examples=200, deadline=None)
@given(query=st.text(max_size=60))
def test_no_text_is_a_syntax_error(few: Index, query: str) -> None:
    with suppress(QueryError):
        assert few.search_text(query).num_rows <= 5


def test_language_none_matches_words_as_written(tmp_path: Path) -> None:
    index = build_index(tmp_path, SENTENCES, IndexConfig("none"))
    assert set(ids(index.search_text("dogs"))) == {"a2"}
    assert set(ids(index.search_text("the"))) == {"a1", "b3"}


@pytest.mark.parametrize(
    "where",
    [
        "split = 'test' AND log_prob > -5",
        "caption LIKE '%dog%' -- and no more",
        "image_id IN ('a1', 'b2')",
        Filter(split="test"),
        Filter(min_log_prob=-3.25),
        Filter("tokens > 6", "test", -5.0),
        Filter(split="train"),
    ],
)
def test_filters_apply_to_every_kind_of_search(few: Index, where: str | Filter) -> None:
    matching = {row for row in (name for name, _, _ in SENTENCES) if _matches(few, row, where)}
    assert set(ids(few.search_text("dog beach cafe", 10, where=where))) == matching
    assert set(ids(few.search_sentence("dog", 10, where=where))) == matching
    assert set(ids(few.search_hybrid("dog beach", 10, where=where))) == matching
    assert set(ids(few.search_similar("a1", 10, where=where))) == matching - {"a1"}


def _matches(index: Index, image_id: str, where: str | Filter) -> bool:
    row = index.get_image(image_id)
    if isinstance(where, str):
        dog, probable = "dog" in row["caption"], row["log_prob"] > -5
        return {"s": probable, "c": dog, "i": image_id in ("a1", "b2")}[where[0]]
    return (
        (where.split is None or row["split"] == where.split)
        and (where.min_log_prob is None or row["log_prob"] >= where.min_log_prob)
        and (where.where is None or row["tokens"] > 6)
    )


@pytest.mark.parametrize("where", ["log_prob < -49", "image_id = 'im77'", "FALSE", "caption LIKE '%pizza%'", "TRUE"])
@pytest.mark.parametrize("limit", [1, 7, 2000])
def test_search_returns_limit_rows_while_more_match(many: Index, where: str, limit: int) -> None:
    names = set(many._version.rows.find_matching(where).tolist())
    assert many.search_sentence("dog", limit, where=where).num_rows == min(limit, len(names))
    pizza = many.search_text("pizza", 2000)
    matching = len(set(ids(pizza)) & set(ids(many.search_text("a -zebra dog cat frisbee beach", 2000, where=where))))
    assert many.search_text("pizza", limit, where=where).num_rows >= min(limit, matching)


def test_filter_matching_many_rows_still_returns_all_text_hits(many: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.search.text_index._MAX_TERM_SET", 0)
    exact = {row["image_id"] for row in many.search_text("pizza", 2000).to_pylist() if row["log_prob"] < -45}
    assert len(exact) > 10
    table = many.search_text("pizza", 2000, where="log_prob < -45")
    assert set(ids(table)) == exact
    assert ids(many.search_text("pizza", 5, where="log_prob < -45")) == ids(table)[:5]
    assert many.search_text("pizza", 5, where="FALSE").num_rows == 0


def test_hybrid_search_honors_required_and_excluded_words(many: Index) -> None:
    table = many.search_hybrid("dog -cat -pizza", 500)
    assert all("cat" not in caption and "pizza" not in caption for caption in table["caption"].to_pylist())
    assert table.num_rows == 500
    both = many.search_hybrid("dog +cat", 2000)["caption"].to_pylist()
    assert len(both) == many.search_text_and_count("+cat")[1].total
    assert all("cat" in caption for caption in both)
    assert many.search_hybrid("-cat", 3).num_rows == 3
    with pytest.raises(QueryError, match="sentence: expected words, got none"):
        many.search_sentence("  ")


def test_offset_continues_the_previous_page(many: Index) -> None:
    for search in (many.search_text, many.search_sentence, many.search_hybrid):
        whole = ids(search("dog cat", 30))
        assert ids(search("dog cat", 10, 0)) + ids(search("dog cat", 20, 10)) == whole
    assert ids(many.search_similar("im3", 10, 5)) == ids(many.search_similar("im3", 15))[5:]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("colour = 'red'", 'where: .*"colour" not found'),
        ("1 = 1) UNION SELECT 1 --", "where: .*syntax error"),
        ("TRUE); DROP TABLE captions; --", "where: .*"),
        ("image_id = ?", "where: "),
        ("row IN (SELECT file FROM glob('/etc/*'))", "table function glob is not allowed"),
        ("", "where: .*Expected a condition over image_id, uri, split, caption, log_prob, tokens"),
    ],
)
def test_invalid_condition_is_rejected(few: Index, where: str, message: str) -> None:
    with pytest.raises(QueryError, match=f"(?s){message}"):
        few.search_text("dog", where=where)


def test_get_image_and_search_similar(few: Index, many: Index) -> None:
    assert few.get_image("b2")["caption"] == "a café on a sunny beach"
    name = "im3"
    caption = many.get_image(name)["caption"]
    near = many.search_similar(name, 20)
    assert name not in ids(near)
    words = set(caption.split())
    assert all(set(other.split()) == words for other in near["caption"].to_pylist())
    with pytest.raises(QueryError, match="no image a9 in the index"):
        few.get_image("a9")
    with pytest.raises(QueryError, match="no image A1 in the index"):
        few.search_similar("A1")


def test_unsupported_searches_are_rejected(tmp_path: Path) -> None:
    build_index(tmp_path, SENTENCES)
    without = open_index(tmp_path / "index")
    assert without.has_vectors
    assert not without.supports_sentences
    with pytest.raises(QueryError, match="searching by sentence requires the ranker"):
        without.search_sentence("a dog")
    with pytest.raises(QueryError, match=r"expected a vector of shape \[8\], got \[3\]"):
        without.search_vector(np.zeros(3, np.float32))
    plan = plan_build(tmp_path / "captions", None, tmp_path / "text", IndexConfig())
    for shard in range(2):
        plan.add_shard(shard)
    plan.finish()
    with pytest.raises(QueryError, match="the index contains only text"):
        open_index(tmp_path / "text", WordRanker()).search_sentence("a dog")
    with pytest.raises(DatasetError, match="is not an index"):
        open_index(tmp_path / "captions")


def test_fuse_rankings_sums_reciprocal_ranks() -> None:
    def hits(*rows: int) -> Hits:
        return Hits(np.array(rows, np.int64), np.zeros(len(rows), np.float32))

    fused = fuse_rankings([hits(4, 2, 9), hits(2, 7)])
    assert fused.rows.tolist() == [2, 4, 7, 9]
    np.testing.assert_allclose(fused.scores, [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63], rtol=1e-6)
    assert len(fuse_rankings([hits(), hits()])) == 0


@pytest.mark.parametrize(("kind", "min_recall"), [("flat", 1.0), ("sq8", 0.95), ("pq", 0.5)])
def test_vector_search_reaches_the_recall_of_its_encoding(tmp_path: Path, kind: str, min_recall: float) -> None:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(50, 32))
    vectors = (centers[generator.integers(50, size=4000)] + generator.normal(size=(4000, 32))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    layout = VectorLayout.choose(IndexConfig(vectors=kind), 4000, 32)  # type: ignore[arg-type]
    write_trained_index(layout, vectors, tmp_path / "trained")
    for part in range(2):
        rows = np.arange(2000 * part, 2000 * part + 2000)
        write_partial_index(tmp_path / "trained", rows, vectors[rows], tmp_path / f"part{part}")
    parts = [tmp_path / "part0", tmp_path / "part1"]
    assert merge_indexes(tmp_path / "trained", [], parts, tmp_path / "all") == 4000
    index = VectorIndex(tmp_path / "all", layout, 4000)
    recalls = []
    for query in vectors[:100]:
        exact = set(np.argsort(-(vectors @ query))[:10].tolist())
        recalls.append(len(exact & set(index.search(query, 10).rows.tolist())) / 10)
    assert np.mean(recalls) >= min_recall
    vector = index.get_vector(7)
    assert vector is not None
    assert float(vector @ vectors[7]) > (0.9 if kind == "pq" else 0.999)
    assert index.get_vector(4000) is None


@pytest.mark.parametrize("passing", [1000, 100, 10])
def test_recall_does_not_drop_under_a_filter(tmp_path: Path, passing: int) -> None:
    """Without more probes for fewer matching rows, or with too few hits, the recall is below 0.5."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(20_000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    layout = VectorLayout(16, "SQ8", 128, 8, len(vectors))
    write_trained_index(layout, vectors[:4000], tmp_path / "trained")
    write_partial_index(tmp_path / "trained", np.arange(len(vectors)), vectors, tmp_path / "all")
    index = VectorIndex(tmp_path / "all", layout, len(vectors))
    matching = np.sort(generator.choice(len(vectors), passing, replace=False))
    found = 0
    for query in vectors[:50]:
        exact = matching[np.argsort(-(vectors[matching] @ query))[:10]]
        hits = index.search(query, 10, matching)
        assert len(hits) == 10
        assert np.isin(hits.rows, matching).all()
        found += np.isin(exact, hits.rows).sum()
    assert found / 500 >= 0.9


def test_hits_with_equal_scores_do_not_depend_on_the_limit(tmp_path: Path) -> None:
    vectors = np.repeat(np.eye(4, dtype=np.float32), 50, axis=0)
    layout = VectorLayout(4, "Flat", 1, 1, len(vectors))
    write_trained_index(layout, vectors, tmp_path / "trained")
    rows = np.random.default_rng(0).permutation(len(vectors))
    write_partial_index(tmp_path / "trained", rows, vectors[rows], tmp_path / "part")
    merge_indexes(tmp_path / "trained", [], [tmp_path / "part"], tmp_path / "all")
    index = VectorIndex(tmp_path / "all", layout, len(vectors))
    for limit in (1, 7, 49, 50):
        assert index.search(vectors[60], limit).rows.tolist() == list(range(50, 50 + limit))


def test_moved_rows_keep_their_vectors_and_others_are_removed(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(300, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    layout = VectorLayout(8, "SQ8", 4, 4, 300)
    write_trained_index(layout, vectors, tmp_path / "trained")
    write_partial_index(tmp_path / "trained", np.arange(200), vectors[:200], tmp_path / "base")
    write_partial_index(tmp_path / "trained", np.arange(50, 150), vectors[200:], tmp_path / "part")
    moves = [RowMove(150, 200, 0), RowMove(10, 60, 150)]  # rows 150 to 199 become rows 0 to 49
    assert merge_indexes(tmp_path / "base", moves, [tmp_path / "part"], tmp_path / "all") == 200
    expected = np.concatenate([vectors[150:200], vectors[200:], vectors[10:60]])
    write_partial_index(tmp_path / "trained", np.arange(200), expected, tmp_path / "fresh")
    assert (tmp_path / "all").read_bytes() == (tmp_path / "fresh").read_bytes()


def test_two_names_of_a_split_select_the_same_images(few: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.data.splits._VALIDATION_NAMES", frozenset({"test", "dev"}))
    for search in (few.search_text, few.search_hybrid):
        expected = search("dog", where=Filter(split="test"))
        assert expected.num_rows > 0
        assert ids(search("dog", where=Filter(split="dev"))) == ids(expected)
        assert search("dog", where=Filter(split="train")).num_rows == 0


def test_lone_surrogates_are_a_query_error(few: Index) -> None:
    for search in (few.search_text, few.search_sentence, few.search_hybrid):
        with pytest.raises(QueryError, match="expected valid Unicode"):
            search("a \ud83d dog")
