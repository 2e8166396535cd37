"""Configuration of a search index: the language of the captions and the storage of the image embeddings."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import PositiveInt

from captionlib.config import configclass
from captionlib.errors import ConfigError

__all__ = ["LANGUAGES", "IndexConfig", "VectorLayout"]

# `none`, and the languages that Tantivy, the full-text search engine, can stem.
LANGUAGES = (
    *("none", "arabic", "danish", "dutch", "english", "finnish", "french", "german", "greek", "hungarian"),
    *("italian", "norwegian", "portuguese", "romanian", "russian", "spanish", "swedish", "tamil", "turkish"),
)

# Below this number of rows, exhaustive search is as fast as inverted lists; see benchmarks/README.md.
_MAX_FLAT_ROWS = 20_000
_MAX_SQ8_ROWS = 20_000_000  # with more rows, one byte per dimension exceeds the memory of most machines
_PQ_DIMENSIONS_PER_BYTE = 4


@configclass
class IndexConfig:
    """How an index is built.

    Attributes:
        language: language of the captions, which selects the stemmer and the stop words; `none` disables both.
        vectors: `flat` compares a query with every vector and is exact. `sq8` and `pq` search inverted lists; `sq8`
            stores one byte per dimension, `pq` one byte per four dimensions. `auto` chooses by the number of rows.
        nlist: number of inverted lists. If None, it is about twice the square root of the number of rows.
        nprobe: number of inverted lists to search per query. If None, it is chosen for a recall@10 of about 0.95.
        keep_duplicates: whether to index and mark the images that `captionlib deduplicate` found to be duplicates. If
            False, they are left out.
        references: whether the index contains the reference captions of the images, from the manifest that the captions
            were generated from. They are also left out if the manifest no longer exists.
    """

    language: str = "english"
    vectors: Literal["auto", "flat", "sq8", "pq"] = "auto"
    nlist: PositiveInt | None = None
    nprobe: PositiveInt | None = None
    keep_duplicates: bool = False
    references: bool = True

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise ConfigError(f"language: expected one of {', '.join(LANGUAGES)}, got {self.language!r}")


@dataclass(frozen=True)
class VectorLayout:
    """The Faiss index type and parameters of an index's vectors."""

    dimension: int
    encoding: str  # in the syntax of Faiss's index factory: `Flat`, `SQ8` or `PQn` (n bytes)
    nlist: int  # number of inverted lists; 1 for `Flat`
    nprobe: int  # number of inverted lists to search per query
    rows: int  # number of rows that the layout was chosen for

    @classmethod
    def choose(cls, config: IndexConfig, rows: int, dimension: int) -> "VectorLayout":
        """Chooses the layout for a number of rows.

        Raises:
            ConfigError: `vectors` is `pq`, and the dimension is not a multiple of four.
        """
        kind = config.vectors
        if kind == "auto":
            kind = "flat" if rows < _MAX_FLAT_ROWS else "sq8" if rows < _MAX_SQ8_ROWS else "pq"
        if kind == "flat" or rows == 0:
            return cls(dimension, "Flat", 1, 1, rows)
        if kind == "pq" and dimension % _PQ_DIMENSIONS_PER_BYTE:
            divisor = _PQ_DIMENSIONS_PER_BYTE
            raise ConfigError(f"vectors: pq requires a dimension divisible by {divisor}, got {dimension}; use sq8")
        encoding = "SQ8" if kind == "sq8" else f"PQ{dimension // _PQ_DIMENSIONS_PER_BYTE}"
        nlist = min(config.nlist or 2 ** (1 + round(math.log2(rows) / 2)), rows)
        nprobe = min(config.nprobe or max(8, round(1.5 * nlist**0.5)), nlist)
        return cls(dimension, encoding, nlist, nprobe, rows)

    def needs_rebuild(self, config: IndexConfig, rows: int) -> bool:
        """Returns whether an index with this layout must be built again for `rows` rows.

        This is the case if `rows` requires a different encoding, or if there are inverted lists and `rows` exceeds four
        times the number that the layout was chosen for. If the number of rows decreases, the layout is kept, so that an
        index whose size varies around a limit is not built again at every update.
        """
        if rows <= self.rows:
            return False
        chosen = VectorLayout.choose(config, rows, self.dimension)
        return chosen.encoding != self.encoding or (self.encoding != "Flat" and rows > 4 * max(1, self.rows))
