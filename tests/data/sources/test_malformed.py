"""Values of types that a format does not promise, damage to single entries, and captions that would be lost."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captionlib.data.ingestion.prepare import PrepareConfig, prepare
from captionlib.errors import CaptionlibError, ConfigError, DatasetError
from tests.data.sources.source_files import read, write_json
from tests.data.sources.test_containers import fetch_images, write_tar

DEEP = "[" * 3000 + "]" * 3000
LONG_INTEGER = "1" * 5000


def make_coco(image: Any = None, annotation: Any = None, **fields: Any) -> dict[str, Any]:
    images = [{"id": 1, "file_name": "1.jpg", **(image or {})}]
    return {"images": images, "annotations": [{"image_id": 1, "caption": "a dog", **(annotation or {})}], **fields}


def make_karpathy(**fields: Any) -> dict[str, Any]:
    sentences = [{"raw": "a dog", "tokens": ["a", "dog"]}]
    return {"images": [{"imgid": 0, "filename": "a.jpg", "split": "train", "sentences": sentences, **fields}]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (make_coco({"file_name": None}), r"images\[0\]: expected file_name as text, got no value"),
        (make_coco({"id": None}), r"images\[0\]: expected id as text or an integer, got no value"),
        (make_coco({"id": float("nan")}), r"images\[0\]: expected id as text or an integer, got number nan"),
        (make_coco({"id": 1.5}), r"images\[0\]: expected id as text or an integer, got number 1\.5"),
        (make_coco({"id": True}), r"images\[0\]: expected id as text or an integer, got boolean True"),
        (make_coco(annotation={"image_id": [1]}), r"annotations\[0\]: expected image_id as .*, got list \[1\]"),
        (make_coco(annotation={"caption": 7}), r"annotations\[0\]: expected caption as text or a list"),
        (make_coco(annotations=[None]), r"annotations\[0\]: expected an object, got no value"),
        (make_coco(annotations={"1": "x"}), r"expected annotations as a list, got object \{'1': 'x'\}"),
        (make_karpathy(sentences=None), r"images\[0\]: expected sentences as a list, got no value"),
        (
            make_karpathy(sentences=[{"tokens": [1, 2]}]),
            r"images\[0\]: expected sentences\.tokens as text, got number 1",
        ),
        (make_karpathy(sentences=[3]), r"images\[0\]: expected sentences as text or a list of texts, got number 3"),
        (make_karpathy(cocoid=None), r"images\[0\]: expected cocoid as text or an integer, got no value"),
        (make_karpathy(filename=3), r"images\[0\]: expected filename as text, got number 3"),
        (make_karpathy(split=["train"]), r"images\[0\]: expected split as text or an integer, got list"),
    ],
)
def test_wrong_type_in_json_is_an_error_naming_the_field(tmp_path: Path, document: Any, message: str) -> None:
    path = write_json(tmp_path / "d.json", document)
    for strict in (True, False):  # if the only entry is skipped, the error about a source without entries quotes it
        with pytest.raises(DatasetError, match=rf"d\.json[:,] ?{message}.*; (correct|check)"):
            read(path, strict=strict)


@pytest.mark.parametrize("missing", [None, float("nan"), " "])
def test_tokens_replace_a_missing_sentence(tmp_path: Path, missing: Any) -> None:
    document = make_karpathy(sentences=[{"raw": missing, "tokens": ["a", "dog"]}, {"raw": missing}])
    rows, _ = read(write_json(tmp_path / "dataset.json", document))
    assert rows[0].captions == ("a dog",)


def test_null_split_is_the_default_split(tmp_path: Path) -> None:
    rows, _ = read(write_json(tmp_path / "dataset.json", make_karpathy(split=None)), default_split="x")
    assert rows[0].split == "x"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'{{"id": 1, "url": "a.jpg", "caption": {DEEP}}}', "levels of nesting, got hundreds"),
        (f'{{"id": {LONG_INTEGER}, "url": "a.jpg"}}', "got one with thousands of digits; write it as text"),
        ('{"url": "a.jpg", "caption": "x", "caption": "y"}', "expected each key once per object, got text 'caption'"),
        ('{"url": "a.jpg", "caption": [[[[[["x"]]]]]]}', "expected caption as text or a list of texts"),
        ('{"url": "a.jpg", "caption": {"en": "x"}}', "expected caption as text or a list of texts, got object"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_extreme_json_is_an_error_naming_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(
        f'{{"id": 0, "url": "0.jpg"}}\n{content}\n'.replace('"id": 0, ', "" if "id" not in content else '"id": 0, ')
    )
    with pytest.raises(DatasetError, match=f"line 2.*{message}"):
        read(tmp_path / name, strict=True)
    rows, skipped = read(tmp_path / name, captions=False)
    assert rows[0].uri == str(tmp_path / "0.jpg")
    assert skipped.total() == 1


@pytest.mark.parametrize(
    "document", [f'{{"images": [{{"file_name": {DEEP}}}]}}', f'{{"images": [{{"sentids": {LONG_INTEGER}}}]}}']
)
def test_extreme_json_documents_are_errors(tmp_path: Path, document: str) -> None:
    (tmp_path / "a.json").write_text(document)
    with pytest.raises(DatasetError, match=r"a\.json: expected"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        (7, "7"),
        (391895.0, "391895"),
        ("007", "007"),
        (Decimal("5.00"), "5"),
        (1.5, None),
        (2.0**60, None),
        (Decimal("0.5"), None),
        (b"x", None),
    ],
)
def test_whole_numbers_are_ids_in_parquet(tmp_path: Path, spelled: Any, expected: str | None) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [spelled], "url": ["a.jpg"]}), path)
    if expected is None:
        with pytest.raises(DatasetError, match="row 1: expected id as text or an integer, got"):
            read(path)
    else:
        assert read(path)[0][0].image_id == expected


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        *(("391895.0", "391895"), ("4e5", "4e5"), ("4e+05", "400000"), ("007", "007"), ("1.5", None)),
        *((null, None) for null in ("nan", "NaN", "None", "null", "<NA>", "")),
    ],
)
def test_whole_numbers_are_ids_in_csv(tmp_path: Path, cell: str, expected: str | None) -> None:
    (tmp_path / "a.csv").write_text(f"id,url\n{cell},a.jpg\n")
    if expected is None:
        with pytest.raises(DatasetError, match="line 2: expected id as text or an integer, got"):
            read(tmp_path / "a.csv")
    else:
        assert read(tmp_path / "a.csv")[0][0].image_id == expected


def test_printed_nulls_are_not_captions(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,caption,split\na.jpg,nan,None\nb.jpg,none of them,train\n")
    rows, _ = read(tmp_path / "a.csv", default_split="x")
    assert [(row.captions, row.split) for row in rows] == [((), "x"), (("none of them",), "train")]


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ('[ "a dog", "two" ]', ("a dog", "two")),
        ("['a dog', 'it\\'s two']", ("a dog", "it's two")),
        ("""["it's one", 'two',]""", ("it's one", "two")),
        ("[]", ()),
        ("[a dog barks]", ("[a dog barks]",)),
        ('["a dog"] and more', ('["a dog"] and more',)),
        ("['a dog' 'two dogs']", None),  # as NumPy prints lists
        ('["a dog", 3]', None),
        ("[{'raw': 'a dog'}]", None),
    ],
)
def test_printed_lists_are_lists_or_refused(tmp_path: Path, cell: str, captions: tuple[str, ...] | None) -> None:
    quoted = cell.replace('"', '""')
    (tmp_path / "a.csv").write_text(f'url,captions\na.jpg,"{quoted}"\n')
    if captions is None:
        with pytest.raises(DatasetError, match="line 2: expected captions as"):
            read(tmp_path / "a.csv")
    else:
        assert read(tmp_path / "a.csv")[0][0].captions == captions


def test_coco_compares_ids_as_text(tmp_path: Path) -> None:
    document = make_coco({"id": 1.0}, {"image_id": "1"})
    assert read(write_json(tmp_path / "captions.json", document))[0][0].captions == ("a dog",)


def test_coco_without_any_matching_caption_is_an_error(tmp_path: Path) -> None:
    path = write_json(tmp_path / "captions.json", make_coco(annotation={"image_id": "1.jpg"}))
    with pytest.raises(DatasetError, match=r"image_id from `images`, such as '1', got none \(the first is '1\.jpg'\)"):
        read(path)


def test_captions_with_lone_surrogates_are_counted(tmp_path: Path) -> None:
    document = make_coco()
    document["annotations"].append({"image_id": 1, "caption": "a \ud83d dog"})
    rows, skipped = read(write_json(tmp_path / "captions.json", document))
    assert rows[0].captions == ("a dog",)
    assert skipped == {"caption is not UTF-8": 1}
    document["images"].append({"id": 2, "file_name": "\udcff.jpg"})
    rows, skipped = read(write_json(tmp_path / "captions.json", document))
    assert [row.image_id for row in rows] == ["1"]
    assert skipped == {"caption is not UTF-8": 1, "name is not UTF-8": 1}


def test_every_json_line_has_its_own_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"id":1,"url":"a.jpg"}\n{"id":2,"url":"b.jpg","caption":"y"}\n{"split":"val","id":3,"path":"c.jpg","text":"z"}\n'
    )
    rows, _ = read(tmp_path / "a.jsonl")
    assert [(row.image_id, row.split, row.captions) for row in rows] == [
        ("1", "", ()),
        ("2", "", ("y",)),
        ("3", "val", ("z",)),
    ]
    rows, _ = read(tmp_path / "a.jsonl", caption_columns=("text",))
    assert [row.captions for row in rows] == [(), (), ("z",)]
    with pytest.raises(ConfigError, match="column 'alt' not found"):
        read(tmp_path / "a.jsonl", caption_columns=("alt",))


def test_json_line_that_lacks_the_id_of_others_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"url":"a.jpg"}\n{"id":2,"url":"b.jpg"}\n')
    with pytest.raises(DatasetError, match=r"line 1: expected an image id at key 'id' as in .*line 2, got none"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("header", ["url,caption,caption", "url,Caption,caption", "url,path,caption_1,caption_1"])
def test_equally_named_columns_are_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n{header}\n")
    with pytest.raises(ConfigError, match=r"expected one column of each name, got 2: [cC]aption.*; rename or remove"):
        read(tmp_path / "a.csv")
    table = pa.Table.from_arrays([pa.array(["x"])] * len(header.split(",")), names=header.split(","))
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="expected one column of each name"):
        read(tmp_path / "a.parquet")


def test_map_of_captions_yields_its_values(tmp_path: Path) -> None:
    captions = pa.array([[("en", "a dog"), ("de", "ein Hund")], [], None], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"url": ["a.jpg", "b.jpg", "c.jpg"], "caption": captions}), tmp_path / "a.parquet")
    assert [row.captions for row in read(tmp_path / "a.parquet")[0]] == [("a dog", "ein Hund"), (), ()]


def test_parquet_text_that_is_not_utf8_is_counted(tmp_path: Path) -> None:
    def to_text(values: list[bytes]) -> pa.Array:
        return pa.array(values, pa.binary()).view(pa.string())

    captions = pa.ListArray.from_arrays([0, 2, 3], to_text([b"a dog", b"caf\xe9", b"a cat"]))
    table = pa.table({"url": to_text([b"a.jpg", b"\xe9.jpg"]), "captions": captions})
    pq.write_table(table, tmp_path / "a.parquet")
    rows, skipped = read(tmp_path / "a.parquet")
    assert [(row.image_id, row.captions) for row in rows] == [("a.jpg", ("a dog",))]
    assert skipped == {"caption is not UTF-8": 1, "name is not UTF-8": 1}


TAR = [("1.jpg", b"one"), ("1.txt", b"x"), ("2.jpg", b"two"), ("2.txt", b"y")]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("1.txt", b"caf\xe9", "caption is not UTF-8"),
        ("1.json", b'{"caption": "a', "sample with invalid JSON"),
        ("1.json", b'{"caption": 3}', "invalid caption"),
        ("1.json", f'{{"caption": {DEEP}}}'.encode(), "sample with invalid JSON"),
        ("1.txt", b"x" * (1 << 20) + b"x", "captions file larger than 1 MB"),
    ],
)
def test_tar_keeps_a_sample_with_invalid_captions(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = write_tar(tmp_path / "a.tar", [TAR[0], (name, content), *TAR[2:]])
    summary = prepare(path, tmp_path / "manifest")
    assert (summary.images, summary.captions, summary.skipped) == (2, 1, {reason: 1})
    assert "a.tar, 1" in summary.examples[reason]
    with pytest.raises(DatasetError, match=r"a\.tar, 1.*; correct it, or omit --strict to skip it"):
        prepare(path, tmp_path / "strict", PrepareConfig(strict=True))


def test_tar_skips_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("\udce9.jpg", b"x"), *TAR])
    rows, skipped = read(path)
    assert [row.image_id for row in rows] == ["1", "2"]
    assert skipped == {"name is not UTF-8": 1}


def test_tar_skips_samples_without_the_id_that_others_have(tmp_path: Path) -> None:
    rows, skipped = read(write_tar(tmp_path / "a.tar", [*TAR, ("2.json", b'{"key": 7.0}')]), id_column="key")
    assert [row.image_id for row in rows] == ["7"]
    assert skipped == {"sample without a valid id in its JSON": 1}


def test_tar_counts_captions_that_are_separated_from_their_image(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [TAR[0], TAR[2], TAR[1], ("3.jpg", b"x"), ("3.txt", b"z")])
    rows, skipped = read(path)
    assert [row.captions for row in rows] == [(), (), ("z",)]
    assert skipped == {"captions separated from their image in the tar": 1}
    write_tar(path, [TAR[0], TAR[2], TAR[1], TAR[3]])
    assert [row.captions for row in read(path, captions=False)[0]] == [(), ()]
    with pytest.raises(DatasetError, match=r"expected captions, got no valid ones; .* \(2, such as .*a\.tar, 1\)"):
        read(path)


def test_concatenated_tars_are_read_to_the_end(tmp_path: Path) -> None:
    first, second = write_tar(tmp_path / "1.tar", TAR[:2]), write_tar(tmp_path / "2.tar", TAR[2:])
    path = tmp_path / "both.tar"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    rows, _ = read(path)
    assert [(row.image_id, row.captions) for row in rows] == [("1", ("x",)), ("2", ("y",))]
    assert fetch_images(rows) == [b"one", b"two"]
    path.write_bytes(first.read_bytes() + b"no tar" * 1000)
    with pytest.raises(DatasetError, match="damaged at byte 10240"):
        read(path)


def test_quote_in_a_tsv_does_not_swallow_rows(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(
        'url\tcaption\na.jpg\t"Great movie\nb.jpg\ta dog\nc.jpg\ta TV of 42"\nd.jpg\t"x" y\n'
    )
    rows, _ = read(tmp_path / "a.tsv")
    assert [row.captions for row in rows] == [('"Great movie',), ("a dog",), ('a TV of 42"',), ('"x" y',)]
    with pytest.raises(DatasetError, match=r"line \d: "):
        read(tmp_path / "a.tsv", tsv_quotes=True)
    (tmp_path / "a.tsv").write_text('url\tcaption\na.jpg\t"Great\nb.jpg\ta dog"\n')
    with pytest.raises(DatasetError, match="expected no cell with both a tab and a line break"):
        read(tmp_path / "a.tsv", tsv_quotes=True)
    (tmp_path / "a.tsv").write_text('url\tcaption\na.jpg\t"a\tdog"\n')
    assert read(tmp_path / "a.tsv", tsv_quotes=True)[0][0].captions == ("a\tdog",)
    with pytest.raises(DatasetError, match=r"line 2: expected 2 cells, got 3; .*--tsv-quotes"):
        read(tmp_path / "a.tsv")


def test_errors_quote_values_briefly(tmp_path: Path) -> None:
    record = {"url": "a.jpg", "caption": {str(number): list(range(1000)) for number in range(1000)}}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(CaptionlibError) as caught:
        read(tmp_path / "a.jsonl")
    assert len(str(caught.value).replace(str(tmp_path), "")) < 400


def test_numpy_list_of_captions_in_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["a.jpg"], "captions": [np.array(["x", "y"])]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0][0].captions == ("x", "y")


@pytest.mark.parametrize("name", ["a.json.gz", "a.txt.gz", "a.csv.bz2", "a.jsonl.xz", "a.parquet", "a.tar"])
def test_damaged_file_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b\x08\x00broken")
    with pytest.raises(DatasetError, match=rf"{name}.*(cannot be read|is not Parquet|is compressed with gzip)"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "a.tar", "a.token"])
def test_file_that_cannot_be_opened_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / name).touch()
    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.open", refuse)
    with pytest.raises(DatasetError, match=rf"{name}.* cannot be read: .*Permission denied"):
        read(tmp_path / name)


KARPATHY_IMAGE = make_karpathy()["images"][0]


@pytest.mark.parametrize(
    ("name", "content", "images", "captions", "skipped"),
    [
        ("a.csv", "url,caption\n,x\nb.jpg,y\n", 1, 1, {"invalid url": 1}),
        (
            "a.csv",
            "id,url,caption\n1.5,a.jpg,x\n2,b.jpg,['p' 'q']\n3,c.jpg,y\n",
            2,
            1,
            {"invalid id": 1, "invalid caption": 1},
        ),
        (
            "a.csv",
            "caption,url\nx,a.jpg\ny\nz,b.jpg,c\n",
            1,
            1,
            {"row with missing cells": 1, "row with additional cells": 1},
        ),
        ("a.tsv", "url\tcaption\na.jpg\tx\nb.jpg\ty\tz\n", 1, 1, {"row with additional cells": 1}),
        (
            "a.jsonl",
            '{"url":"a.jpg","caption":"x"}\n{"url":3}\n{"url":\n[]\n',
            1,
            1,
            {"invalid url": 1, "line that is not a JSON object": 1, "entry that is not an object": 1},
        ),
        (
            "a.jsonl",
            '{"id":1,"url":"a.jpg"}\n{"url":"b.jpg"}\n{"id":null,"url":"c.jpg"}\n',
            1,
            0,
            {"object without an image id": 1, "invalid id": 1},
        ),
        (
            "a.json",
            json.dumps([{"url": "a.jpg", "caption": 3}, {"url": "b.jpg", "caption": "x"}, 7]),
            2,
            1,
            {"invalid caption": 1, "entry that is not an object": 1},
        ),
        (
            "captions.json",
            json.dumps(make_coco() | {"images": [{"id": 1, "file_name": "1.jpg"}, {"id": None}, 3]}),
            1,
            1,
            {"invalid id": 1, "entry that is not an object": 1},
        ),
        (
            "captions.json",
            json.dumps(
                make_coco() | {"annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 1, "caption": 7}, None]}
            ),
            1,
            1,
            {"invalid caption": 1, "entry that is not an object": 1},
        ),
        (
            "dataset.json",
            json.dumps(
                {
                    "images": [
                        KARPATHY_IMAGE,
                        {**KARPATHY_IMAGE, "imgid": 1, "sentences": ["x", 3]},
                        {**KARPATHY_IMAGE, "filename": 2},
                    ]
                }
            ),
            2,
            2,
            {"invalid sentences": 1, "invalid filename": 1},
        ),
        (
            "a.token",
            "a.jpg#0\tone\nbroken\na.jpg#1\t['p' 'q']\n",
            1,
            1,
            {"line in a different format": 1, "invalid caption": 1},
        ),
    ],
)
def test_invalid_entries_are_skipped_with_their_reason(
    tmp_path: Path, name: str, content: str, images: int, captions: int, skipped: dict[str, int]
) -> None:
    (tmp_path / name).write_text(content)
    rows, counts = read(tmp_path / name)
    assert (len(rows), sum(len(row.captions) for row in rows)) == (images, captions)
    assert counts == skipped
    with pytest.raises(DatasetError, match=rf"{name}.*; correct it, or omit --strict"):
        read(tmp_path / name, strict=True)


def test_parquet_rows_with_invalid_values_are_skipped(tmp_path: Path) -> None:
    table = pa.table({"id": [1.0, None, 2.5], "url": ["a.jpg", "b.jpg", "c.jpg"], "caption": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows, skipped = read(tmp_path / "a.parquet")
    assert ([row.image_id for row in rows], skipped) == (["1"], {"invalid id": 2})
    table = pa.table({"id": [1.0, None], "image": [b"one", b"two"], "caption": ["x", "y"]})
    pq.write_table(table, tmp_path / "b.parquet")
    rows, skipped = read(tmp_path / "b.parquet")
    assert ([row.image_id for row in rows], skipped) == (["1"], {"invalid id": 1})


@pytest.mark.parametrize(("language", "expected"), [(None, ("a dog", "ein Hund")), ("de", ("ein Hund",)), ("fr", ())])
def test_language_selects_captions_from_a_map(tmp_path: Path, language: str | None, expected: tuple[str, ...]) -> None:
    captions = pa.array([[("en", "a dog"), ("de", "ein Hund")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"url": ["a.jpg"], "caption": captions}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", caption_language=language)[0][0].captions == expected
    if language is not None:
        (tmp_path / "a.jsonl").write_text('{"url": "a.jpg", "caption": {"en": "a dog", "de": "ein Hund"}}')
        assert read(tmp_path / "a.jsonl", caption_language=language)[0][0].captions == expected


@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_unquoted_commas_in_the_last_column_belong_to_the_caption(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('id,url,caption\n1,a.jpg,One, two, and three .\n2,b.jpg,"A dog, a cat .",\n')
    assert [row.captions for row in read(tmp_path / name)[0]] == [("One, two, and three .",), ("A dog, a cat .",)]
