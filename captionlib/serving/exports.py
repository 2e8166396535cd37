"""Streams a selection of images with their captions as a WebDataset tar, in the format of `captionlib export`."""

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from captionlib.data.exports import EXPORT_COLUMNS, add_sample, find_problem
from captionlib.errors import BusyError, ImageError
from captionlib.serving.config import ServingConfig

__all__ = ["Exports"]

_BATCH = 8  # images of an export that are fetched at once
_MAX_TRIES = 6
_PART_BYTES = 2**16
_FAILURES = "__failures__"  # WebDataset ignores members with such names


class Exports:
    """Streams exports, at most `max_concurrent_exports` at a time."""

    def __init__(self, config: ServingConfig) -> None:
        self._max_bytes = config.max_export_bytes
        self._slots = asyncio.Semaphore(config.max_concurrent_exports)

    def start(
        self, rows: Sequence[Mapping[str, Any]], fetch: Callable[[str], Awaitable[bytes]]
    ) -> AsyncIterator[bytes]:
        """Returns the parts of a tar. Images that cannot be exported are listed in its last member, `__failures__`.

        `fetch` returns the bytes of the image at an address. The addresses are not exported.

        Raises:
            BusyError: too many exports are running.
        """
        if self._slots.locked():
            raise BusyError("other selections are being saved; try again in a minute")
        return self._stream(rows, fetch)

    async def _stream(
        self, rows: Sequence[Mapping[str, Any]], fetch: Callable[[str], Awaitable[bytes]]
    ) -> AsyncIterator[bytes]:
        async with self._slots:  # requests that arrive at the same moment wait here
            written = io.BytesIO()
            failures: list[dict[str, str]] = []
            with tarfile.open(fileobj=written, mode="w|") as tar:
                async for number, row, content in self._fetch_images(rows, fetch, failures):
                    columns = {name: row[name] for name in EXPORT_COLUMNS if name in row and name != "uri"}
                    add_sample(tar, f"selection-{number:06}", columns, content)
                    for part in _take(written):
                        yield part
                _add_failures(tar, failures)
            for part in _take(written):
                yield part

    async def _fetch_images(
        self,
        rows: Sequence[Mapping[str, Any]],
        fetch: Callable[[str], Awaitable[bytes]],
        failures: list[dict[str, str]],
    ) -> AsyncIterator[tuple[int, Mapping[str, Any], bytes]]:
        """Yields the position, row and bytes of each image that can be exported, and adds the others to `failures`."""
        size = 0
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            contents = await asyncio.gather(*(_fetch(row["uri"], fetch) for row in batch))
            for number, (row, content) in enumerate(zip(batch, contents, strict=True), start):
                problem = content if isinstance(content, str) else find_problem(content)
                if problem is None and size + len(content) > self._max_bytes:
                    problem = "TooLarge"
                if problem is not None:
                    failures.append({"image_id": row["image_id"], "reason": problem})
                elif isinstance(content, bytes):
                    size += len(content)
                    yield number, row, content


def _take(buffer: io.BytesIO) -> list[bytes]:
    """Empties a buffer and returns its content in small parts, because the server limits the time to send a part."""
    buffer.seek(0)
    parts = list(iter(lambda: buffer.read(_PART_BYTES), b""))
    buffer.seek(0)
    buffer.truncate()
    return parts


async def _fetch(uri: str, fetch: Callable[[str], Awaitable[bytes]]) -> bytes | str:
    """Returns the bytes of an image, or the reason why they cannot be fetched."""
    for tries in range(_MAX_TRIES):
        try:
            return await fetch(uri)
        except BusyError:
            await asyncio.sleep(tries)
        except ImageError as error:
            return error.reason
    return "Busy"


def _add_failures(tar: tarfile.TarFile, failures: Sequence[Mapping[str, str]]) -> None:
    if failures:
        content = "".join(f"{json.dumps(failure)}\n" for failure in failures).encode()
        member = tarfile.TarInfo(_FAILURES)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
