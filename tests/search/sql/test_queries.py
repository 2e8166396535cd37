from pathlib import Path

import pytest

from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.errors import QueryError
from captionlib.search.sql.queries import count_words, find_captions, find_image, find_top_captions
from captionlib.search.sql.session import open_sql


def test_find_image_returns_all_columns(captions: str) -> None:
    with open_sql(captions) as session:
        (row,) = find_image(session, "a2").to_pylist()
    assert row["caption"] == "Two dogs catch a frisbee"
    assert row["candidates"] == [
        {"caption": "Two dogs catch a frisbee", "log_prob": -3.25},
        {"caption": "a dog", "log_prob": -4.25},
    ]


def test_find_image_explains_failures_and_unknown_ids(captions: str) -> None:
    with open_sql(captions) as session:
        with pytest.raises(QueryError, match="image bad has no row: it failed at stage decode with Truncated: "):
            find_image(session, "bad")
        with pytest.raises(QueryError, match="no image A1"):
            find_image(session, "A1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dog", ["a1", "b1"]),
        ("DOG", ["a1", "b1"]),
        ("dogs", ["a2"]),
        ("grass dog", ["a1"]),
        ("dog frisbee", []),
        ("man", []),
        ("café", ["b2"]),
        ("CAFÉ", ["b2"]),
        ("caf", []),
        ("a", ["b2", "a2", "a1", "b1"]),
        (".*", []),
        ("do.", []),
        ("dog' OR 1=1 --", []),
    ],
)
def test_find_captions_matches_whole_words_most_probable_first(captions: str, words: str, expected: list[str]) -> None:
    with open_sql(captions) as session:
        assert find_captions(session, words).read_all()["image_id"].to_pylist() == expected


def test_limits_are_applied(captions: str) -> None:
    with open_sql(captions) as session:
        assert find_captions(session, "a", limit=2).read_all()["image_id"].to_pylist() == ["b2", "a2"]
        assert find_top_captions(session, 3).read_all()["log_prob"].to_pylist() == [-1.5, -3.25, -4.5]


def test_find_captions_rejects_an_empty_query(captions: str) -> None:
    with open_sql(captions) as session, pytest.raises(QueryError, match="expected one or more, got none"):
        find_captions(session, "  ")


def test_count_words_ignores_case(captions: str) -> None:
    with open_sql(captions) as session:
        counts = count_words(session, 4).read_all().to_pydict()
    assert counts == {"word": ["a", "dog", "on", "beach"], "count": [6, 2, 2, 1]}


def test_caption_queries_reject_other_datasets(tmp_path: Path) -> None:
    create_dataset(tmp_path / "manifest", "manifest", MANIFEST_SCHEMA, config={}, shards=1)
    with open_sql(tmp_path / "manifest") as session:
        for find in (lambda: find_captions(session, "dog"), lambda: find_top_captions(session, 1)):
            with pytest.raises(QueryError, match="expected a dataset of kind captions, got manifest"):
                find()
        with pytest.raises(QueryError, match="got manifest; query it with SQL"):
            count_words(session, 1)
