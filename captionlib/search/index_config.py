"""What an index is like: the language of its captions, and how exactly it keeps its vectors."""

import math
from dataclasses import dataclass
from typing import Literal

from captionlib.errors import ConfigError

__all__ = ["LANGUAGES", "IndexConfig", "VectorLayout"]

LANGUAGES = (
    "none",
    "arabic",
    "danish",
    "dutch",
    "english",
    "finnish",
    "french",
    "german",
    "greek",
    "hungarian",
    "italian",
    "norwegian",
    "portuguese",
    "romanian",
    "russian",
    "spanish",
    "swedish",
    "tamil",
    "turkish",
)

# Measured, see benchmarks/README.md: below this, comparing with every vector takes no longer than looking lists up.
_FLAT_ROWS = 20_000
_SQ8_ROWS = 20_000_000  # above it a byte a number is more than most machines hold in memory
_NUMBERS_PER_CODE = 4  # of a product quantizer: 4 numbers in one byte


@dataclass(frozen=True)
class IndexConfig:
    """How an index is built.

    Attributes:
        language: whose endings are cut off and whose stop words are left out; `none` does neither.
        vectors: `flat` compares with every vector and is exact; `sq8` keeps a byte a number in inverted lists, `pq` a
            byte for four numbers; `auto` chooses by the number of rows.
        lists: inverted lists; None is about twice the square root of the rows.
        probes: lists that a question looks into; None is what reaches a recall@10 of 0.95, see benchmarks/README.md.
        sample: vectors a list that its centroid is learned from.
        seed: of that sample.
    """

    language: str = "english"
    vectors: Literal["auto", "flat", "sq8", "pq"] = "auto"
    lists: int | None = None
    probes: int | None = None
    sample: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise ConfigError(f"language: expected one of {', '.join(LANGUAGES)}, got {self.language!r}")
        for name in ("lists", "probes", "sample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")


@dataclass(frozen=True)
class VectorLayout:
    """How the vectors of one index are kept.

    Attributes:
        size: numbers in a vector.
        code: `Flat`, `SQ8` or `PQ...`, as Faiss spells it.
        lists: inverted lists; one for Flat.
        probes: lists that a question looks into.
        rows: there were when this was chosen.
    """

    size: int
    code: str
    lists: int
    probes: int
    rows: int

    @classmethod
    def choose(cls, config: IndexConfig, rows: int, size: int) -> "VectorLayout":
        """What fits so many rows."""
        kind = config.vectors
        if kind == "auto":
            kind = "flat" if rows < _FLAT_ROWS else "sq8" if rows < _SQ8_ROWS else "pq"
        if kind == "flat" or rows == 0:
            return cls(size, "Flat", 1, 1, rows)
        codes = {"sq8": "SQ8", "pq": f"PQ{max(1, size // _NUMBERS_PER_CODE)}"}
        if kind == "pq" and size % _NUMBERS_PER_CODE:
            raise ConfigError(f"vectors: pq needs vectors of a multiple of {_NUMBERS_PER_CODE} numbers, got {size}")
        lists = min(config.lists or 2 ** (1 + round(math.log2(rows) / 2)), rows)
        probes = min(config.probes or max(8, round(1.5 * lists**0.5)), lists)
        return cls(size, codes[kind], lists, probes, rows)

    def outgrown(self, config: IndexConfig, rows: int) -> bool:
        """Whether so many rows ask for another code, or for more lists than rows that are merely added get."""
        fitting = VectorLayout.choose(config, rows, self.size)
        return fitting.code != self.code or (self.code != "Flat" and rows > 4 * max(1, self.rows))
