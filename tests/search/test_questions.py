from pathlib import Path

import pytest

from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.errors import QueryError
from captionlib.search.questions import count_words, find_captions, find_image, most_likely
from captionlib.search.sql import open_sql


def test_an_image_is_found_with_everything_about_it(captions: str) -> None:
    with open_sql(captions) as session:
        (row,) = find_image(session, "a2").to_pylist()
    assert row["caption"] == "Two dogs catch a frisbee"
    assert row["candidates"] == [
        {"caption": "Two dogs catch a frisbee", "log_prob": -3.25},
        {"caption": "a dog", "log_prob": -4.25},
    ]


def test_a_failed_image_is_answered_with_its_reason_and_an_unknown_one_so(captions: str) -> None:
    with open_sql(captions) as session:
        with pytest.raises(QueryError, match="image bad has no row, it failed at decode with Truncated: ends early"):
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
def test_captions_are_found_by_whole_words_the_most_likely_first(
    captions: str, words: str, expected: list[str]
) -> None:
    with open_sql(captions) as session:
        assert find_captions(session, words).read_all()["image_id"].to_pylist() == expected


def test_only_so_many_are_given(captions: str) -> None:
    with open_sql(captions) as session:
        assert find_captions(session, "a", limit=2).read_all()["image_id"].to_pylist() == ["b2", "a2"]
        assert most_likely(session, 3).read_all()["log_prob"].to_pylist() == [-1.5, -3.25, -4.5]


def test_no_words_are_no_question(captions: str) -> None:
    with open_sql(captions) as session, pytest.raises(QueryError, match="expected one or more words"):
        find_captions(session, "  ")


def test_words_are_counted_case_apart(captions: str) -> None:
    with open_sql(captions) as session:
        counted = count_words(session, 4).read_all().to_pydict()
    assert counted == {"word": ["a", "dog", "on", "beach"], "count": [6, 2, 2, 1]}


def test_questions_about_captions_need_captions(tmp_path: Path) -> None:
    create_dataset(tmp_path / "manifest", "manifest", MANIFEST_SCHEMA, config={}, shards=1)
    with open_sql(tmp_path / "manifest") as session:
        for question in (lambda: find_captions(session, "dog"), lambda: most_likely(session, 1)):
            with pytest.raises(QueryError, match="expected a dataset of kind captions for this question, got manifest"):
                question()
        with pytest.raises(QueryError, match="got manifest; ask it by SQL"):
            count_words(session, 1)
