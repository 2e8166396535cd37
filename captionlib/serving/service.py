"""Search operations of the web application, independent of HTTP and shared by the pages and the JSON API."""

import copy
import math
import re
import threading
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pyarrow as pa

from captionlib.errors import QueryError
from captionlib.search.filters import Filter
from captionlib.search.index import Index
from captionlib.search.rows import RESULT_COLUMNS, ROW_SCHEMA
from captionlib.search.text_index import Sort
from captionlib.serving.config import ServingConfig
from captionlib.serving.monitoring import MODEL_SECONDS
from captionlib.serving.provenance import describe_provenance, make_attention
from captionlib.serving.responses import (
    CaptionCandidate,
    FacetsResponse,
    FailedImage,
    FailuresResponse,
    ImageResponse,
    ImageSearchResponse,
    ScoredSentence,
    SearchMode,
    SearchResponse,
    SearchResult,
)

if TYPE_CHECKING:  # imports torch, which takes seconds and is needed only for image search
    from captionlib.search.models import ImageQueryModels

__all__ = [
    "MAX_OFFSET",
    "MAX_QUERY_CHARACTERS",
    "MAX_RESULTS",
    "CursorError",
    "Search",
    "SearchService",
    "read_cursor",
]

MAX_QUERY_CHARACTERS = 500
MAX_RESULTS = 100
MAX_OFFSET = 10_000

_SHARED_COLUMNS = ("image_id", "caption", "log_prob", "image_text_score", "split", "width", "height")
_SIMILAR_IMAGES = 24
_SIMILAR_SENTENCES = 10
_REFRESH_SECONDS = 1.0


class CursorError(QueryError):
    """A cursor is damaged, or belongs to a different search."""


@dataclass(frozen=True)
class Search:
    """What a visitor searches for."""

    query: str = ""
    mode: SearchMode = "text"
    where: Filter = field(default_factory=Filter)
    sort: Sort = "relevance"  # only in mode `text`
    similar_to: str | None = None  # id of an image; only without a query

    @property
    def is_empty(self) -> bool:
        """Whether the search has no query and no image. It may have a filter."""
        return not self.query.strip() and self.similar_to is None


class SearchService:
    """Searches an index by text and, with models, by image. This class is thread-safe.

    Within the context, the service switches to a new version of the index within seconds after it is published. Exiting
    the context closes the models.

    Searching by image needs `models`: a captioner, a ranker, or both. Uploaded images are compared with `sentences` or,
    by default, with the captions of similar images.
    """

    def __init__(
        self,
        index: Index,
        config: ServingConfig,
        models: "ImageQueryModels | None" = None,
        sentences: Sequence[str] = (),
    ) -> None:
        self.index = index
        self.config = config
        self._models = models
        self._sentences = list(sentences)
        self._stopped = threading.Event()

    def __enter__(self) -> "SearchService":
        threading.Thread(target=self._refresh_index, name="refresh index", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._models is not None:
            self._models.close()

    def snapshot(self) -> "SearchService":
        """Returns a service that never switches to a newer version of the index, for use by one request."""
        snapshot = copy.copy(self)
        snapshot.index = self.index.snapshot()
        return snapshot

    def _refresh_index(self) -> None:
        """Opens new versions of the index in the background, so no request waits for this."""
        while not self._stopped.wait(_REFRESH_SECONDS):
            self.index.try_refresh()

    @property
    def modes(self) -> list[SearchMode]:
        return ["text", "sentence", "hybrid"] if self.index.supports_sentences else ["text"]

    @property
    def supports_image_search(self) -> bool:
        return self._models is not None

    def search(self, search: Search, offset: int, limit: int) -> SearchResponse:
        """Searches the index. `offset` is the number of results to skip."""
        query, where = search.query, search.where
        response = SearchResponse(
            query=query,
            mode=search.mode,
            total=None,
            next_cursor=None,
            message=None,
            suggestion=None,
            facets=None,
            results=[],
        )
        page = limit + 1, offset, where  # one more row shows whether there is a next page
        counts = None
        try:
            if search.is_empty:
                table = self.index.sample(0)
            elif not query.strip() and search.similar_to is not None:
                table = self.index.search_similar(search.similar_to, *page)
            elif search.mode == "text":
                table, counts = self.index.search_text_and_count(query, *page, search.sort)
                response.total = counts.total
            elif search.mode == "sentence":
                table = self.index.search_sentence(query, *page)
            else:
                table = self.index.search_hybrid(query, *page)
        except QueryError as error:
            response.message = str(error).split(": ", 1)[-1]
            return response
        if counts is None:
            with suppress(QueryError):  # the index cannot count the images of the month
                counts = self.index.count_facets(where)
        if counts is not None:
            response.facets = FacetsResponse(
                splits=counts.splits,
                sources=counts.sources,
                dates=counts.months,
                non_duplicates=counts.non_duplicates,
                duplicates=counts.duplicates,
            )
        if response.total == 0:
            response.suggestion = self.index.suggest_query(query)
        response.results = _to_results(table.slice(0, limit))
        if table.num_rows > limit and offset + limit <= MAX_OFFSET:
            response.next_cursor = _make_cursor(offset + limit, search)
        return response

    def find_adjacent(self, search: Search, position: int, image_id: str) -> tuple[str | None, str | None]:
        """Returns the ids of the results before and after the image at `position`, or None where there is no result."""
        first = max(0, position - 1)
        ids = [result.image_id for result in self.search(search, first, 3).results]
        index = position - first
        if len(ids) <= index or ids[index] != image_id:  # the search index has changed
            return None, None
        return (ids[index - 1] if index else None), (ids[index + 1] if index + 1 < len(ids) else None)

    def sample(self, limit: int, where: Filter) -> list[SearchResult]:
        """Returns evenly spaced images of the index as examples."""
        return _to_results(self.index.sample(limit, where))

    def find_failures(self, reason: str | None, source: str | None, offset: int, limit: int) -> FailuresResponse:
        """Returns images without a caption. `offset` is the number of images to skip."""
        failures = self.index.failures
        found = failures.find(reason, source)
        has_next = len(found) > offset + limit and offset + limit <= MAX_OFFSET
        return FailuresResponse(
            total=len(found),
            reasons=failures.count("error"),
            sources=failures.count("source"),
            next_cursor=_make_cursor(offset + limit, (reason, source)) if has_next else None,
            images=[
                FailedImage(image_id=row["image_id"], source=row["source"], stage=row["stage"], reason=row["error"])
                for row in found.slice(offset, limit).to_pylist()
            ],
        )

    def get_image(self, image_id: str) -> ImageResponse:
        """Returns one image with its caption candidates and similar images, or raises a QueryError."""
        row = self.index.get_image(image_id)
        details = self.index.get_details(image_id)
        config = self.index.find_dataset(image_id).config
        return ImageResponse(
            **{name: row[name] for name in (*_SHARED_COLUMNS, "modified", "version", "duplicate_of")},
            word_probability=_compute_word_probability(row["log_prob"], row["tokens"]),
            source=self.index.find_source(image_id),
            provenance=describe_provenance(config),
            references=details["references"],
            attention=make_attention(details["attention"], config, row),
            thumbnail_url=_thumbnail_url(image_id, "small"),
            preview_url=_thumbnail_url(image_id, "large"),
            candidates=_to_candidates(details["candidates"], row),
            similar=self._find_similar(image_id),
        )

    def get_rows(self, image_ids: Sequence[str]) -> pa.Table:
        """Returns the rows of images. Ids that are not in the index are ignored."""
        rows = []
        for image_id in dict.fromkeys(image_ids):
            with suppress(QueryError):
                rows.append(self.index.get_image(image_id))
        return pa.Table.from_pylist(rows, ROW_SCHEMA).select(RESULT_COLUMNS)

    def get_image_uri(self, image_id: str) -> str:
        """Returns the URI of an image, which must not be shown to visitors."""
        return str(self.index.get_image(image_id)["uri"])

    def caption(self, content: bytes) -> list[CaptionCandidate]:
        """Returns the captions of an image file, most probable first.

        Raises:
            DecodeError: the file is not an image, or exceeds the limits.
            QueryError: there is no captioner.
        """
        if self._models is None or not self._models.can_caption:
            raise QueryError("captioning is not available: the server has no captioner; start it with --captioner")
        with MODEL_SECONDS.labels("caption").time():
            table = self._models.caption(content)
        rows = zip(table.drop_columns(["tokens"]).to_pylist(), table["tokens"].to_pylist(), strict=True)
        return [
            CaptionCandidate(**row, word_probability=_compute_word_probability(row["log_prob"], tokens))
            for row, tokens in rows
        ]

    def search_by_image(self, content: bytes) -> ImageSearchResponse:
        """Finds captions, sentences and images that match an image file.

        Raises:
            DecodeError: the file is not an image, or exceeds the limits.
            QueryError: searching by image is disabled.
        """
        if self._models is None:
            raise QueryError("searching by image is not available: the server has no ranker and no captioner")
        captions = self.caption(content) if self._models.can_caption else []
        sentences: list[ScoredSentence] = []
        images: list[SearchResult] = []
        if self._models.can_embed and self.index.has_vectors:
            with MODEL_SECONDS.labels("embed").time():
                vector = self._models.embed(content)
            images = _to_results(self.index.search_vector(vector, _SIMILAR_IMAGES))
            candidates = self._sentences or list(dict.fromkeys(image.caption for image in images))
            if candidates:
                ranked = self._models.rank_sentences(vector, candidates)
                sentences = [ScoredSentence(**row) for row in ranked.slice(0, _SIMILAR_SENTENCES).to_pylist()]
        return ImageSearchResponse(captions=captions, sentences=sentences, images=images)

    def _find_similar(self, image_id: str) -> list[SearchResult]:
        try:
            return _to_results(self.index.search_similar(image_id, _SIMILAR_IMAGES))
        except QueryError:  # the index has no vectors, or computing the embedding of the image failed
            return []


def _make_cursor(offset: int, search: object) -> str:
    """Returns an offset with a checksum of the search, so that the cursor is rejected for other searches."""
    return f"{offset}-{zlib.crc32(repr(search).encode('utf-8', 'surrogatepass')):08x}"


def read_cursor(cursor: str | None, search: object) -> int:
    """Returns the offset in a cursor, or 0 if there is no cursor. `search` identifies the search or list.

    Raises:
        CursorError: the cursor is damaged, or belongs to a different search.
    """
    if not cursor:
        return 0
    found = re.fullmatch("([0-9]{1,5})-[0-9a-f]{8}", cursor)
    offset = int(found[1]) if found else -1
    if cursor != _make_cursor(offset, search) or offset > MAX_OFFSET + MAX_RESULTS:
        raise CursorError(
            "cursor: expected the next_cursor of a previous page of the same search; leave it out for the first page"
        )
    return offset


def _to_results(table: pa.Table) -> list[SearchResult]:
    """Converts rows of the index, omitting the URIs of the images."""
    return [
        SearchResult(
            **{name: row[name] for name in (*_SHARED_COLUMNS, "score")},
            word_probability=_compute_word_probability(row["log_prob"], row["tokens"]),
            thumbnail_url=_thumbnail_url(row["image_id"], "small"),
        )
        for row in table.to_pylist()
    ]


def _to_candidates(candidates: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[CaptionCandidate]:
    """Converts the candidate captions of a row.

    The index stores the number of tokens only for the best candidate. If that is the number of its words and the END
    token, tokens are words, and those of the other candidates are counted. Otherwise, `word_probability` is None.
    """
    tokens_are_words = row["tokens"] == len(row["caption"].split()) + 1
    return [
        CaptionCandidate(
            **each,
            word_probability=_compute_word_probability(each["log_prob"], len(each["caption"].split()) + 1)
            if tokens_are_words
            else None,
        )
        for each in candidates
    ]


def _compute_word_probability(log_prob: float, token_count: int) -> float:
    """Returns the geometric mean of the probabilities of the tokens."""
    return math.exp(min(0.0, log_prob) / max(1, token_count))


def _thumbnail_url(image_id: str, size: str) -> str:
    return f"/thumbnail/{size}?{urlencode({'id': image_id})}"
