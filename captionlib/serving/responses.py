"""The responses of the JSON API, which the HTML pages show too."""

from typing import Literal

from pydantic import BaseModel, Field

__all__ = [
    "CaptionCandidate",
    "ErrorResponse",
    "HealthResponse",
    "ImageResponse",
    "ImageSearchResponse",
    "ScoredSentence",
    "SearchMode",
    "SearchResponse",
    "SearchResult",
]

SearchMode = Literal["text", "sentence", "hybrid"]


class CaptionCandidate(BaseModel):
    """A caption that the model wrote."""

    caption: str
    log_prob: float = Field(description="Natural logarithm of the caption's probability.")


class SearchResult(CaptionCandidate):
    """An image that matches a query, with its caption."""

    image_id: str
    split: str
    score: float = Field(description="Relevance; higher is better. Comparable within one response only.")
    thumbnail_url: str = Field(description="URL of a small JPEG of the image.")


class SearchResponse(BaseModel):
    """A page of search results, best first."""

    query: str
    mode: SearchMode
    offset: int
    limit: int
    total: int | None = Field(description="Number of matching captions; null if the mode ranks all images.")
    has_more: bool = Field(description="Whether there are further results.")
    message: str | None = Field(description="Why the query cannot be executed; null if it can.")
    results: list[SearchResult]


class ImageResponse(CaptionCandidate):
    """An image of the index."""

    image_id: str
    split: str
    thumbnail_url: str = Field(description="URL of a small JPEG of the image.")
    preview_url: str = Field(description="URL of a larger JPEG of the image.")
    candidates: list[CaptionCandidate] = Field(
        description="All caption candidates, most probable first; empty if the captions dataset is not available."
    )
    similar: list[SearchResult] = Field(description="The most similar images; empty if the index has no vectors.")


class ScoredSentence(BaseModel):
    """A sentence and its similarity to an image."""

    sentence: str
    score: float = Field(description="Cosine similarity.")


class ImageSearchResponse(BaseModel):
    """Captions, sentences and images that match an uploaded image."""

    captions: list[CaptionCandidate] = Field(description="Captions of the image; empty without a captioner.")
    sentences: list[ScoredSentence] = Field(description="The most similar sentences; empty without a ranker.")
    images: list[SearchResult] = Field(description="The most similar images; empty without a ranker.")


class ErrorResponse(BaseModel):
    """Why a request failed."""

    detail: str


class HealthResponse(BaseModel):
    """The state of the application."""

    status: Literal["ok"] = "ok"
    version: str = Field(description="Version of captionlib.")
    index: str = Field(description="Fingerprint of the index.")
    captions: int = Field(description="Number of searchable captions.")
    vectors: int = Field(description="Number of searchable image vectors.")
