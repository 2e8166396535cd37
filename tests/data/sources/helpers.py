import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captionlib.data.sources.formats import SOURCE_FORMATS, detect_common_format
from captionlib.data.sources.rows import ManifestRow, SourceOptions


def read(*addresses: Path | str, **options: Any) -> tuple[list[ManifestRow], Counter[str]]:
    """Returns the rows of a source, read in its detected format, and the number of skipped items by reason."""
    skipped: Counter[str] = Counter()

    def report_skip(reason: str) -> None:
        skipped[reason] += 1

    paths = [str(address) for address in addresses]
    rows = SOURCE_FORMATS[detect_common_format(paths)].read(paths, SourceOptions(**options), report_skip)
    return list(rows), skipped


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def touch(root: Path, names: Sequence[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
