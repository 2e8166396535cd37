"""Reads WebDataset tars, in which consecutive files with the same name and different extensions form a sample."""

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from captionlib.data.sources.columns import CAPTION_NAMES, ID_NAMES, select_caption_columns, select_column, to_text
from captionlib.data.sources.locations import IMAGE_EXTENSIONS, Location, find_files, parse_json
from captionlib.data.sources.rows import ManifestRow, ReportSkip, SourceOptions, parse_captions
from captionlib.errors import DatasetError

__all__ = ["read_webdataset"]

# As in WebDataset, a sample's key ends at the first dot of the file name.
_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_TEXT_BYTES = 1 << 20


@dataclass
class _Sample:
    """The files of one sample: the byte ranges of its images, and the content of its texts, by extension."""

    key: str
    origin: str
    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def read_webdataset(addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip) -> Iterator[ManifestRow]:
    """Yields the samples that contain an image, in their order. The uri is the image's byte range in the tar.

    Only tar headers and captions are read. Captions are the lines of the sample's `.txt`, or else the captions in its
    `.json`. The id is the sample's key, or the JSON value that `options.id_column` names.

    Raises:
        DatasetError: a tar is compressed or damaged, or a sample is damaged.
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
        report_skip("additional image in a sample")
    # Prefers `a.jpg` over `a.mask.png`.
    extension = next((name for name in sample.images if "." not in name), next(iter(sample.images)))
    start, end = sample.images[extension]
    record = _load_record(sample)
    captions = parse_captions(sample.texts.get("txt", "").splitlines(), sample.origin)
    if not captions or options.caption_columns:
        names = select_caption_columns(list(record), options.caption_columns, sample.origin)
        captions = parse_captions([record[name] for name in names], sample.origin) or captions
    image_id = sample.key
    if options.id_column is not None:
        column = select_column(list(record), options.id_column, ID_NAMES, sample.origin)
        image_id = to_text(record[column], sample.origin, column) if column is not None else sample.key
    uri = f"{location.address}#bytes={start}-{end}"
    return ManifestRow(image_id, uri, options.default_split, captions, sample.origin)


def _load_record(sample: _Sample) -> dict[str, Any]:
    text = sample.texts.get("json")
    record = parse_json(text, f"{sample.origin}.json") if text else {}
    return record if isinstance(record, dict) else {CAPTION_NAMES[0]: record}


def _read_samples(file: BinaryIO, location: Location, report_skip: ReportSkip) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for tar, member in _read_members(file, location):
        match = _MEMBER.fullmatch(member.name)
        if match is None or not member.isreg() or member.issparse():
            if not member.isdir():
                report_skip("tar member that is not a regular NAME.EXTENSION file")
            continue
        key, extension = match["key"], match["extension"].lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key, f"{location.address}, {key}")
        _add_member(sample, extension, member, tar)
    if sample is not None:
        yield sample


def _add_member(sample: _Sample, extension: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    if extension in sample.images or extension in sample.texts:
        raise DatasetError(f"{sample.origin}: expected one .{extension} per sample, got two")
    if f".{extension.rpartition('.')[2]}" in IMAGE_EXTENSIONS:
        sample.images[extension] = (member.offset_data, member.offset_data + member.size)
    elif extension in {"txt", "json"}:
        if member.size > _MAX_TEXT_BYTES:
            raise DatasetError(
                f"{sample.origin}.{extension}: expected captions of at most {_MAX_TEXT_BYTES} bytes, got {member.size}"
            )
        content = tar.extractfile(member)
        try:
            sample.texts[extension] = content.read().decode("utf-8-sig") if content is not None else ""
        except UnicodeDecodeError as error:
            raise DatasetError(f"{sample.origin}.{extension}: not UTF-8 ({error.reason})") from error


def _read_members(file: BinaryIO, location: Location) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yields the members of a tar. Their data is skipped by seeking where the file system supports it."""
    start = file.read(6)
    file.seek(0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DatasetError(
                f"{location.address} is compressed with {name}, which prevents access to single images; "
                "convert it to an uncompressed tar (images hardly compress)"
            )
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                yield tar, member
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            _check_end(file, tar.offset, location)
    except (tarfile.TarError, EOFError) as error:
        raise DatasetError(f"{location.address} is not a tar, or is damaged: {error}") from error


def _check_end(file: BinaryIO, offset: int, location: Location) -> None:
    """Refuses a tar without the final block of zeros: tarfile stops silently at damage, and the rest would be lost."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DatasetError(
            f"{location.address} is truncated or damaged at byte {offset}: expected a member or the end of the tar"
        )
