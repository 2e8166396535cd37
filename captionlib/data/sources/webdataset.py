"""Reads WebDataset tars: consecutive files with the same name and different extensions form a sample."""

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from captionlib.data.images.formats import IMAGE_EXTENSIONS
from captionlib.data.sources.columns import CAPTION_NAMES, select_caption_columns
from captionlib.data.sources.locations import Location, find_files, open_file
from captionlib.data.sources.rows import ImageRecord, SkipCounter, SourceOptions
from captionlib.data.sources.tables import parse_caption_columns
from captionlib.data.sources.values import parse_captions, parse_cell, parse_id, parse_json
from captionlib.data.sources.versions import version_from_file
from captionlib.errors import ConfigError, DatasetError

__all__ = ["read_webdataset"]

# As in WebDataset, a sample's key ends at the first dot of the file name.
_MEMBER_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)", re.DOTALL)
_TEXT_EXTENSIONS = ("txt", "text", "caption", "captions")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_TEXT_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20


@dataclass
class _Sample:
    """One sample: the files that share a key, by extension."""

    key: str
    origin: str  # tar and key, for error messages
    images: dict[str, tuple[int, int]] = field(default_factory=dict)  # byte range in the tar
    texts: dict[str, str] = field(default_factory=dict)  # content of caption and JSON files


def read_webdataset(addresses: Sequence[str], options: SourceOptions, skips: SkipCounter) -> Iterator[ImageRecord]:
    """Yields the samples that contain an image, in file order. Each uri refers to the image's byte range in the tar.

    Only tar headers and captions are read. Captions are the lines of the sample's `.txt`, `.text`, `.caption` or
    `.captions` file. If there is no such file, or if `options.caption_columns` is set, captions are read from the
    `.json` file. The id is the sample's key, or the value of `options.id_column` in the `.json` file.
    A sample with invalid captions is kept without captions.
    """
    for location in find_files(addresses, frozenset({".tar"})):
        with open_file(location) as file:
            version = version_from_file(location)  # changes when the tar changes
            seen: set[int] = set()  # hashes, because a tar can hold millions of keys
            for sample in _read_samples(file, location, skips):
                if sample.images:
                    seen.add(hash(sample.key))
                    yield from _to_rows(sample, location, version, options, skips)
                elif sample.texts and hash(sample.key) in seen:
                    skips.reject_captions("captions separated from their image in the tar", sample.origin)
                elif sample.texts:
                    skips.reject_captions("sample without an image", sample.origin)
                else:
                    skips.count_ignored("sample without an image")


def _to_rows(
    sample: _Sample, location: Location, tar_version: str, options: SourceOptions, skips: SkipCounter
) -> Iterator[ImageRecord]:
    for _ in range(len(sample.images) - 1):
        skips.count_ignored("additional image in a sample")
    try:
        json_values = _parse_json_file(sample)
    except DatasetError as error:
        json_values = {}
        skips.reject_captions("sample with invalid JSON", str(error))
    image_id = sample.key
    if options.id_column is not None:
        try:
            image_id = parse_id(json_values.get(options.id_column), sample.origin, options.id_column)
        except DatasetError as error:
            skips.reject_image("sample without a valid id in its JSON", str(error))
            return
    start, end = sample.images[_select_extension(sample.images)]
    uri = f"{location.address}#bytes={start}-{end}"
    captions = _parse_captions(sample, json_values, options, skips)
    version = f"{tar_version}-{start:x}-{end - start:x}"
    yield ImageRecord(image_id, uri, options.default_split, captions, sample.origin, version)


def _select_extension(files: Mapping[str, object]) -> str:
    """Returns the first extension without a dot (`jpg` rather than `mask.png`). If all have dots, returns the first."""
    return next((extension for extension in files if "." not in extension), next(iter(files)))


def _parse_json_file(sample: _Sample) -> dict[str, Any]:
    files = {name: text for name, text in sample.texts.items() if _get_suffix(name) == "json" and text.strip()}
    json_values = parse_json(files[_select_extension(files)], f"{sample.origin}.json") if files else {}
    if isinstance(json_values, dict):
        return json_values
    return {CAPTION_NAMES[0]: json_values}  # a caption or a list of captions


def _parse_captions(
    sample: _Sample, json_values: dict[str, Any], options: SourceOptions, skips: SkipCounter
) -> tuple[str, ...]:
    texts = {name: text for name, text in sample.texts.items() if _get_suffix(name) != "json"}
    for _ in range(len(texts) - 1):
        skips.reject_captions("additional captions file in a sample", sample.origin)
    # As in a table, a line may contain a list of captions.
    lines = [parse_cell(line) for line in texts[_select_extension(texts)].splitlines()] if texts else []
    for name in options.caption_columns:
        if name not in json_values:
            skips.reject_captions(f"sample without {name} in its JSON", sample.origin)
    try:
        captions = parse_captions(lines, sample.origin, "captions")
        if captions and not options.caption_columns:
            return captions
        names = options.caption_columns or select_caption_columns(list(json_values), (), sample.origin)
        return parse_caption_columns(json_values, names, sample.origin, options, skips) or captions
    except (ConfigError, DatasetError) as error:
        skips.reject_captions("sample with invalid captions", str(error))
        return ()


def _read_samples(file: BinaryIO, location: Location, skips: SkipCounter) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for tar, member in _read_members(file, location):
        match = _MEMBER_NAME.fullmatch(member.name)
        if match is None or not member.isreg() or member.issparse():
            if not member.isdir():
                skips.count_ignored("tar member that is not a regular NAME.EXTENSION file")
            continue
        key, extension = match["key"], match["extension"].lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield from _split_dotted_keys(sample, location)
            sample = _Sample(key, f"{location.address}, {key}")
        _add_member(sample, extension, member, tar, skips)
    if sample is not None:
        yield from _split_dotted_keys(sample, location)


def _split_dotted_keys(sample: _Sample, location: Location) -> list[_Sample]:
    """Splits a sample if the keys of its files contain a dot: `22.05.jpg` and `22.06.jpg` are two samples.

    The part between the first and the last dot belongs to the key if it is a number in all names, or if an image and a
    text file share it. Otherwise it belongs to the extension: `22.rgb.jpg` and `22.mask.png` are one sample.
    """
    samples: dict[str, _Sample] = {}  # by the part between the dots
    for name in (*sample.images, *sample.texts):
        part, _, extension = name.rpartition(".")
        key = f"{sample.key}.{part}"
        part_sample = samples.setdefault(part, _Sample(key, f"{location.address}, {key}"))
        if name in sample.images:
            part_sample.images[extension] = sample.images[name]
        else:
            part_sample.texts[extension] = sample.texts[name]
    have_pair = any(part_sample.images and part_sample.texts for part_sample in samples.values())
    return list(samples.values()) if "" not in samples and (have_pair or all(map(_is_number, samples))) else [sample]


def _is_number(text: str) -> bool:
    return text.replace(".", "").isdecimal()


def _get_suffix(extension: str) -> str:
    return extension.rpartition(".")[2]


def _add_member(
    sample: _Sample, extension: str, member: tarfile.TarInfo, tar: tarfile.TarFile, skips: SkipCounter
) -> None:
    is_text = _get_suffix(extension) in {*_TEXT_EXTENSIONS, "json"}
    origin = f"{sample.origin}.{extension}"
    if extension in sample.images or extension in sample.texts:
        skip = skips.reject_captions if is_text else skips.reject_image
        skip("second file of the same name in a sample", origin)
    elif f".{_get_suffix(extension)}" in IMAGE_EXTENSIONS:
        sample.images[extension] = (member.offset_data, member.offset_data + member.size)
    elif is_text and member.size > _MAX_TEXT_BYTES:
        skips.reject_captions("captions file larger than 1 MB", origin)
    elif is_text and (content := tar.extractfile(member)) is not None:
        # The caller, `read_source`, skips and counts captions that are not UTF-8.
        sample.texts[extension] = content.read().decode("utf-8-sig", errors="surrogateescape")


def _read_members(file: BinaryIO, location: Location) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yields the members of a file with one or more concatenated tars. Seeks past member data instead of reading it."""
    start = file.read(6)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DatasetError(
                f"{location.address} is compressed with {name}, which prevents access to single images; "
                "convert it to an uncompressed tar (images hardly compress)"
            )
    offset: int | None = 0
    while offset is not None:
        file.seek(offset)
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  # the caller closes the file
        except (tarfile.TarError, EOFError) as error:
            raise DatasetError(f"{location.address} is not a tar, or is damaged at byte {offset}: {error}") from error
        while (member := _read_next_member(tar, location)) is not None:
            yield tar, member
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all members in memory
        offset = _find_next_tar(file, tar.offset, location)


def _read_next_member(tar: tarfile.TarFile, location: Location) -> tarfile.TarInfo | None:
    try:
        member = tar.next()
    except Exception as error:  # tarfile raises various exceptions on damaged headers
        raise DatasetError(f"{location.address} is not a tar, or is damaged: {error or repr(error)}") from error
    if member is not None and member.size < 0:
        raise DatasetError(
            f"{location.address} is damaged: expected a size of 0 or more for {member.name!r}, got {member.size}"
        )
    return member


def _find_next_tar(file: BinaryIO, offset: int, location: Location) -> int | None:
    """Returns the offset of the next concatenated tar, or None if only zeros follow `offset`, where tarfile stopped."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile stops silently at damaged data
        raise DatasetError(
            f"{location.address} is truncated or damaged at byte {offset}: expected a member or the end of the tar"
        )
    offset += tarfile.BLOCKSIZE
    while block := file.read(_CHUNK_BYTES):
        if content := block.lstrip(b"\0"):
            return offset + (len(block) - len(content)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        offset += len(block)
    return None
