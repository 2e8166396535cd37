"""Reads WebDataset tars: files with one name and several extensions make a sample."""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from captionlib.data.sources.columns import CAPTION_NAMES, ID_NAMES, choose_captions, choose_column, to_text
from captionlib.data.sources.locations import IMAGE_EXTENSIONS, Location, find_files
from captionlib.data.sources.rows import ManifestRow, ReportSkip, SourceOptions, clean_captions
from captionlib.errors import DatasetError

__all__ = ["read_webdataset"]

# The sample's name ends at the first dot of the file's name, as in WebDataset itself.
_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_TEXT_BYTES = 1 << 20


@dataclass
class _Sample:
    """The files of one name, as far as they were read."""

    key: str
    origin: str
    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


def read_webdataset(addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip) -> Iterator[ManifestRow]:
    """The samples of uncompressed tars that have an image, in their order; the uri is the image's range of bytes.

    Of the tar only the headers are read, and the captions: each line of the sample's `.txt`, or the captions in its
    `.json`. The id is the sample's name, or the JSON's value that `options.id_column` names.

    Raises:
        DatasetError: a tar is compressed or damaged, or a sample is.
    """
    for location in find_files(addresses, frozenset({".tar"})):
        with location.fs.open(location.path, "rb") as file:
            for sample in _read_samples(file, location, report_skip):
                if sample.images:
                    yield _to_row(sample, location, options, report_skip)
                else:
                    report_skip("sample without an image")


def _to_row(sample: _Sample, location: Location, options: SourceOptions, report_skip: ReportSkip) -> ManifestRow:
    for _ in range(len(sample.images) - 1):
        report_skip("another image of a sample")
    # `a.jpg` before `a.mask.png`, else the first in the tar.
    chosen = next((name for name in sample.images if "." not in name), next(iter(sample.images)))
    start, end = sample.images[chosen]
    record = _load_record(sample)
    captions = clean_captions(_decode(sample, "txt").splitlines(), sample.origin)
    if not captions or options.caption_columns:
        names = choose_captions(list(record), options.caption_columns, sample.origin)
        captions = clean_captions([record[name] for name in names], sample.origin) or captions
    image_id = sample.key
    if options.id_column is not None:
        column = choose_column(list(record), options.id_column, ID_NAMES, sample.origin)
        image_id = to_text(record[column], sample.origin, column) if column is not None else sample.key
    uri = f"{location.address}#bytes={start}-{end}"
    return ManifestRow(image_id, uri, options.default_split, captions, sample.origin)


def _load_record(sample: _Sample) -> dict[str, Any]:
    text = _decode(sample, "json")
    if not text:
        return {}
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{sample.origin}.json, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from error
    return record if isinstance(record, dict) else {CAPTION_NAMES[0]: record}


def _decode(sample: _Sample, extension: str) -> str:
    try:
        return sample.texts.get(extension, b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{sample.origin}.{extension}: not UTF-8 ({error.reason})") from error


def _read_samples(file: BinaryIO, location: Location, report_skip: ReportSkip) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for tar, member in _read_members(file, location):
        found = _MEMBER.fullmatch(member.name)
        if found is None or not member.isreg() or member.issparse():
            if not member.isdir():
                report_skip("member of a tar without NAME.EXTENSION, or no regular file")
            continue
        key, extension = found["key"], found["extension"].lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key, f"{location.address}, {key}")
        _add(sample, extension, member, tar)
    if sample is not None:
        yield sample


def _add(sample: _Sample, extension: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    if extension in sample.images or extension in sample.texts:
        raise DatasetError(f"{sample.origin}: its .{extension} is there twice; expected each name once in a tar")
    if f".{extension.rpartition('.')[2]}" in IMAGE_EXTENSIONS:
        sample.images[extension] = (member.offset_data, member.offset_data + member.size)
    elif extension in {"txt", "json"}:
        if member.size > _MAX_TEXT_BYTES:
            raise DatasetError(
                f"{sample.origin}.{extension}: expected captions of at most {_MAX_TEXT_BYTES} bytes, got {member.size}"
            )
        content = tar.extractfile(member)
        sample.texts[extension] = content.read() if content is not None else b""


def _read_members(file: BinaryIO, location: Location) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of a tar, by their headers; their data is sought over, as far as the file system can."""
    start = file.read(6)
    file.seek(0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DatasetError(
                f"{location.address} is compressed by {name}: its images cannot be reached one by one; unpack it to an "
                "uncompressed tar (images hardly shrink)"
            )
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                yield tar, member
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            _check_end(file, tar.offset, location)
    except (tarfile.TarError, EOFError) as error:
        raise DatasetError(f"{location.address} is no tar, or is damaged: {error}") from error


def _check_end(file: BinaryIO, offset: int, location: Location) -> None:
    """A tar ends with a block of zeros; at anything else tarfile just stops, and the rest would be lost unseen."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DatasetError(f"{location.address} is truncated or damaged at byte {offset}: no member, and not its end")
