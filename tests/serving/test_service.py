"""Searching by image with a captioner, with a ranker, with both and with neither."""

import math
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from captionlib.errors import QueryError
from captionlib.search.index import Index, open_index
from captionlib.search.models import ImageQueryModels
from captionlib.serving.config import ServingConfig
from captionlib.serving.service import SearchService
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


def test_image_search_needs_models(index: Index) -> None:
    service = SearchService(index, ServingConfig())
    assert not service.supports_image_search
    assert make_service(index, True, False).supports_image_search
    with pytest.raises(QueryError, match="the server has no ranker and no captioner"):
        service.search_by_image(b"")
    with pytest.raises(QueryError, match="the server has no captioner"):
        make_service(index, False, True).caption(b"")
