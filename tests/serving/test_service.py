"""Searching by image with a captioner, with a ranker, with both and with neither."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import cast
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from captionlib.errors import QueryError
from captionlib.search.index import Index, open_index
from captionlib.search.models import ImageQueryModels
from captionlib.serving.config import ServingConfig
from captionlib.serving.service import (
    CursorError,
    Search,
    SearchService,
    _compute_word_probability,
    _make_cursor,
    _to_candidates,
    read_cursor,
)
from tests.search.example_index import WordRanker
from tests.serving.example_site import make_site


class Models:
    """Stands for the models of a server."""

    def __init__(self, can_caption: bool, can_embed: bool) -> None:
        self.can_caption = can_caption
        self.can_embed = can_embed

    def caption(self, content: bytes) -> pa.Table:
        assert self.can_caption
        return pa.table({"caption": [content.decode()], "log_prob": [-1.0], "tokens": [4]})

    def embed(self, _content: bytes) -> npt.NDArray[np.float32]:
        assert self.can_embed
        return WordRanker().encode_sentences(["a dog and a cat"])[0]

    def rank_sentences(self, _vector: npt.NDArray[np.float32], sentences: list[str]) -> pa.Table:
        return pa.table({"sentence": sentences, "score": [0.5] * len(sentences)})


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder: Path = tmp_path_factory.mktemp("site")
    make_site(folder, 60, with_models=False)
    return open_index(folder / "index", refresh_seconds=None)


def make_service(index: Index, can_caption: bool, can_embed: bool, sentences: list[str] | None = None) -> SearchService:
    models = cast(ImageQueryModels, Models(can_caption, can_embed))
    return SearchService(index, ServingConfig(), models, sentences or [])


@pytest.mark.parametrize(("can_caption", "can_embed"), [(True, False), (False, True), (True, True)])
def test_results_of_the_available_models_are_returned(index: Index, can_caption: bool, can_embed: bool) -> None:
    found = make_service(index, can_caption, can_embed).search_by_image(b"a dog")
    assert [row.caption for row in found.captions] == ["a dog"] * can_caption
    assert [row.word_probability for row in found.captions] == [pytest.approx(math.exp(-1 / 4))] * can_caption
    assert len(found.images) == 24 * can_embed
    assert len(found.sentences) == 10 * can_embed
    assert {row.sentence for row in found.sentences} <= {image.caption for image in found.images}


def test_configured_sentences_replace_the_captions_of_similar_images(index: Index) -> None:
    found = make_service(index, False, True, ["a", "b"]).search_by_image(b"")
    assert [row.sentence for row in found.sentences] == ["a", "b"]


@pytest.mark.parametrize(("offset", "is_valid"), [(0, True), (10_100, True), (10_101, False)])
def test_cursor_has_a_maximum(offset: int, is_valid: bool) -> None:
    cursor, search = _make_cursor(offset, Search("dog")), Search("dog")
    with nullcontext() if is_valid else pytest.raises(CursorError):
        assert read_cursor(cursor, search) == offset


def test_pages_end_at_the_maximum_offset(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.serving.service.MAX_OFFSET", 2)
    service = SearchService(index, ServingConfig())
    searches = [service.search(Search("dog"), offset, 1) for offset in range(3)]
    failures = [service.find_failures("Truncated", None, offset, 1) for offset in range(2)]
    assert [each.next_cursor is not None for each in (*searches, *failures)] == [True, True, False, True, False]
    monkeypatch.setattr("captionlib.serving.service.MAX_OFFSET", 0)
    assert service.find_failures(None, None, 0, 1).next_cursor is None


@pytest.mark.parametrize(("tokens", "expected"), [(3, math.exp(-1 / 3)), (4, None)])
def test_tokens_of_candidates_are_counted_only_if_they_are_words(tokens: int, expected: float | None) -> None:
    row = {"tokens": tokens, "caption": "a dog"}
    (candidate,) = _to_candidates([{"caption": "a cat", "log_prob": -1.0}], row)
    assert candidate.word_probability == expected


def test_word_probability_is_at_most_one() -> None:
    assert [_compute_word_probability(*each) for each in ((0.5, 2), (-1.0, 0))] == [1.0, math.exp(-1)]


def test_models_are_closed_with_the_service(index: Index) -> None:
    models = mock.Mock()
    with SearchService(index, ServingConfig(), models):
        models.close.assert_not_called()
    models.close.assert_called_once_with()


def test_image_search_needs_models(index: Index) -> None:
    service = SearchService(index, ServingConfig())
    assert not service.supports_image_search
    assert make_service(index, True, False).supports_image_search
    with pytest.raises(QueryError, match="the server has no ranker and no captioner"):
        service.search_by_image(b"")
    with pytest.raises(QueryError, match="the server has no captioner"):
        make_service(index, False, True).caption(b"")
