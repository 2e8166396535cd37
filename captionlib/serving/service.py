"""What the application answers, whoever asks: the same for pages and for programs."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlencode

import pyarrow as pa
from pydantic import BaseModel, Field

from captionlib.errors import BusyError, CaptionlibError, ConfigError, QueryError
from captionlib.search.index import Filter, Index
from captionlib.search.sql.queries import find_image
from captionlib.search.sql.session import SqlLimits, open_sql
from captionlib.serving.config import ServingConfig

if TYPE_CHECKING:  # it loads torch, which takes seconds, and is needed for photographs alone
    from captionlib.search.models import ImageQueryModels, QueryEncoder

__all__ = ["Answer", "Candidate", "Hit", "ImageAnswer", "Library", "Mode", "PhotoAnswer", "Sentence"]

Mode = Literal["text", "sentence", "hybrid"]

_NEAREST = 24


class Hit(BaseModel):
    """An image that was found."""

    image_id: str
    caption: str
    log_prob: float = Field(description="Natural logarithm of the caption's probability.")
    split: str
    score: float = Field(description="The higher the better; comparable within one answer alone.")
    thumbnail: str = Field(description="Where a small picture of it is.")


class Answer(BaseModel):
    """Images in order, the best first."""

    question: str
    mode: Mode
    offset: int
    limit: int
    total: int | None = Field(description="How many captions match; null where all images do, more or less.")
    more: bool = Field(description="Whether there are further ones.")
    note: str | None = Field(description="Why there is no answer.")
    rows: list[Hit]


class Candidate(BaseModel):
    """A caption of an image."""

    caption: str
    log_prob: float


class ImageAnswer(BaseModel):
    """One image of the index."""

    image_id: str
    caption: str
    log_prob: float
    split: str
    thumbnail: str
    picture: str = Field(description="Where a larger picture of it is.")
    candidates: list[Candidate] = Field(description="All its captions; empty where the dataset is out of reach.")
    similar: list[Hit] = Field(description="The images nearest to it; empty where the index has no vectors.")


class Sentence(BaseModel):
    """A sentence that fits a photograph."""

    sentence: str
    score: float


class PhotoAnswer(BaseModel):
    """What is found for a photograph."""

    captions: list[Candidate]
    sentences: list[Sentence]
    images: list[Hit]


class Library:
    """An index, the models that go with it, and the dataset of its captions.

    A context manager that closes what looks at photographs; safe to use from many threads.

    Args:
        index: to be asked.
        config: its limits.
        ranker: the ranker that it was opened with, for the sentences that fit a photograph.
        photos: for uploaded photographs; None takes none.
        sentences: that photographs are compared with; without, the captions of the images nearest to them.
    """

    def __init__(
        self,
        index: Index,
        config: ServingConfig,
        ranker: "QueryEncoder | None" = None,
        photos: "ImageQueryModels | None" = None,
        sentences: Sequence[str] = (),
    ) -> None:
        self.index = index
        self.config = config
        self._ranker = ranker
        self._photos = photos
        self._sentences = list(sentences)
        self._slots = threading.BoundedSemaphore(config.max_photos)
        self.splits = index.list_splits()

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_: object) -> None:
        if self._photos is not None:
            self._photos.close()

    @property
    def modes(self) -> list[Mode]:
        return ["text", "sentence", "hybrid"] if self.index.supports_sentences else ["text"]

    @property
    def takes_photos(self) -> bool:
        return self._photos is not None

    def search(
        self, question: str, mode: Mode, offset: int, limit: int, split: str | None, min_log_prob: float | None
    ) -> Answer:
        """Images by words, by a sentence, or by both."""
        chosen = Filter(split=split or None, min_log_prob=min_log_prob)
        answer = Answer(
            question=question, mode=mode, offset=offset, limit=limit, total=None, more=False, note=None, rows=[]
        )
        if not question.strip():
            return answer
        try:
            if mode == "text":
                table, answer.total = self.index.search_text_and_count(question, limit + 1, offset, chosen)
            elif mode == "sentence":
                table = self.index.search_sentence(question, limit + 1, offset, chosen)
            else:
                table = self.index.search_hybrid(question, limit + 1, offset, chosen)
        except QueryError as error:
            answer.note = str(error).split(": ", 1)[-1]
            return answer
        answer.rows = hits_of(table.slice(0, limit))
        answer.more = table.num_rows > limit and offset + limit <= self.config.max_offset
        return answer

    def sample(self, limit: int) -> list[Hit]:
        """Some images, for whoever does not know yet what to ask."""
        return hits_of(self.index.sample(limit))

    def image(self, image_id: str) -> ImageAnswer:
        """One image.

        Raises:
            QueryError: there is no such image.
        """
        row = self.index.get_image(image_id)
        return ImageAnswer(
            image_id=image_id,
            caption=row["caption"],
            log_prob=row["log_prob"],
            split=row["split"],
            thumbnail=picture_url(image_id, "small"),
            picture=picture_url(image_id, "large"),
            candidates=self._candidates(image_id),
            similar=self._similar(image_id),
        )

    def uri(self, image_id: str) -> str:
        """Where an image of the index lies.

        Raises:
            QueryError: there is no such image.
        """
        return str(self.index.get_image(image_id)["uri"])

    def photo(self, content: bytes) -> PhotoAnswer:
        """What is found for a photograph.

        Raises:
            ImageError: it is no image, or one that is not allowed.
            BusyError: too many are looked at.
            QueryError: photographs are not taken here.
        """
        if self._photos is None:
            raise QueryError("photographs are not taken here: no ranker and no captioner was given")
        if not self._slots.acquire(timeout=5.0):
            raise BusyError("too many photographs at once; try again")
        try:
            captions = self._photos.caption(content).to_pylist() if self._photos.can_caption else []
            vector = self._photos.embed(content) if self._photos.can_embed and self.index.has_vectors else None
            near = self.index.search_vector(vector, _NEAREST) if vector is not None else None
            sentences: list[dict[str, Any]] = []
            if near is not None and vector is not None and self._ranker is not None and near.num_rows:
                known = self._sentences or list(dict.fromkeys(near["caption"].to_pylist()))
                sentences = self._photos.rank_sentences(vector, known).slice(0, 10).to_pylist()
        finally:
            self._slots.release()
        return PhotoAnswer(
            captions=[Candidate(**row) for row in captions],
            sentences=[Sentence(**row) for row in sentences],
            images=hits_of(near) if near is not None else [],
        )

    def _candidates(self, image_id: str) -> list[Candidate]:
        """All captions of an image, from the dataset."""
        try:
            with open_sql(self.index.description.captions.folder, "captions", SqlLimits("500MB", 1)) as session:
                (row,) = find_image(session, image_id).to_pylist()
        except (CaptionlibError, OSError, ConfigError):
            return []
        return [Candidate(**candidate) for candidate in row["candidates"]]

    def _similar(self, image_id: str) -> list[Hit]:
        if not self.index.has_vectors:
            return []
        try:
            return hits_of(self.index.search_similar(image_id, _NEAREST))
        except QueryError:  # it failed where the embeddings were made
            return []


def hits_of(table: pa.Table) -> list[Hit]:
    """Rows of an index as they are answered: without the places where the images lie."""
    rows = table.select(["image_id", "caption", "log_prob", "split", "score"]).to_pylist()
    return [Hit(**row, thumbnail=picture_url(row["image_id"], "small")) for row in rows]


def picture_url(image_id: str, size: str) -> str:
    """Where a picture of an image is."""
    return f"/picture/{size}?{urlencode({'id': image_id})}"
