"""The configuration of an index: the language of its captions and the precision of its vectors."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import PositiveInt

from captionlib.config import configclass
from captionlib.errors import ConfigError

__all__ = ["LANGUAGES", "IndexConfig", "VectorLayout"]

# Tantivy's stemmers.
LANGUAGES = (
    *("none", "arabic", "danish", "dutch", "english", "finnish", "french", "german", "greek", "hungarian"),
    *("italian", "norwegian", "portuguese", "romanian", "russian", "spanish", "swedish", "tamil", "turkish"),
)

# Measured, see benchmarks/README.md: below this many rows, exhaustive search is as fast as inverted lists.
_FLAT_ROWS = 20_000
_SQ8_ROWS = 20_000_000  # above this, one byte per dimension exceeds the memory of most machines
_PQ_DIMENSIONS_PER_BYTE = 4


@configclass
class IndexConfig:
    """How an index is built.

    Attributes:
        language: the language whose stemmer and stop words are used; `none` uses neither.
        vectors: `flat` searches all vectors exhaustively and is exact; `sq8` stores one byte per dimension in inverted
            lists, `pq` one byte per four dimensions; `auto` chooses by the number of rows.
        nlist: the number of inverted lists; None is about twice the square root of the number of rows.
        nprobe: the number of inverted lists to visit per query; None aims at a recall@10 of 0.95, see
            benchmarks/README.md.
    """

    language: str = "english"
    vectors: Literal["auto", "flat", "sq8", "pq"] = "auto"
    nlist: PositiveInt | None = None
    nprobe: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise ConfigError(f"language: expected one of {', '.join(LANGUAGES)}, got {self.language!r}")


@dataclass(frozen=True)
class VectorLayout:
    """The Faiss index type and parameters of an index's vectors.

    Attributes:
        encoding: the encoding of the vectors in the syntax of Faiss's index factory: `Flat`, `SQ8` or `PQn`.
        nlist: the number of inverted lists; 1 for `Flat`.
        nprobe: the number of inverted lists to visit per query.
        rows: the number of rows that the layout was chosen for.
    """

    dimension: int
    encoding: str
    nlist: int
    nprobe: int
    rows: int

    @classmethod
    def choose(cls, config: IndexConfig, rows: int, dimension: int) -> "VectorLayout":
        """Chooses the layout for a number of rows.

        Raises:
            ConfigError: product quantization does not divide the dimension.
        """
        kind = config.vectors
        if kind == "auto":
            kind = "flat" if rows < _FLAT_ROWS else "sq8" if rows < _SQ8_ROWS else "pq"
        if kind == "flat" or rows == 0:
            return cls(dimension, "Flat", 1, 1, rows)
        if kind == "pq" and dimension % _PQ_DIMENSIONS_PER_BYTE:
            raise ConfigError(
                f"vectors: pq expects a dimension that is a multiple of {_PQ_DIMENSIONS_PER_BYTE}, got {dimension}; "
                "use sq8"
            )
        encoding = "SQ8" if kind == "sq8" else f"PQ{dimension // _PQ_DIMENSIONS_PER_BYTE}"
        nlist = min(config.nlist or 2 ** (1 + round(math.log2(rows) / 2)), rows)
        nprobe = min(config.nprobe or max(8, round(1.5 * nlist**0.5)), nlist)
        return cls(dimension, encoding, nlist, nprobe, rows)

    def is_outgrown(self, config: IndexConfig, rows: int) -> bool:
        """Tells whether `rows` rows need another encoding, or more lists than adding rows to the index provides."""
        chosen = VectorLayout.choose(config, rows, self.dimension)
        return chosen.encoding != self.encoding or (self.encoding != "Flat" and rows > 4 * max(1, self.rows))
