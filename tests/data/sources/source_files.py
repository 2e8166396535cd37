"""Writes source files for tests, and reads sources."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captionlib.data.sources.formats import detect_common_format, read_source
from captionlib.data.sources.rows import ImageRecord, SkipCounter, SourceOptions


def read(*addresses: Path | str, strict: bool = False, **options: Any) -> tuple[list[ImageRecord], Counter[str]]:
    """Returns the rows of a source, read in its detected format, and the number of skipped items by reason."""
    skips = SkipCounter(strict)
    paths = [str(address) for address in addresses]
    rows = list(read_source(detect_common_format(paths), paths, SourceOptions(**options), skips))
    return rows, skips.counts


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_empty_files(root: Path, names: Sequence[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
