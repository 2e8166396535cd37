from itertools import product
from pathlib import Path

import pyarrow as pa
import pytest

from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import DUPLICATES_SCHEMA, captions_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import QueryError
from captionlib.search import filters
from captionlib.search.build import plan_build
from captionlib.search.config import IndexConfig
from captionlib.search.filters import FacetGroup, FacetGrouper, Facets, Filter, name_sources
from captionlib.search.index import Index, open_index
from captionlib.search.rows import ROW_SCHEMA

NOON_NS = 1_772_366_400_000_000_000  # 1 March 2026
MONTH_NS = 31 * 86_400 * 10**9
MONTHS = ("2026-03", "2026-04", None)
SPLITS = ("train", "val", "dev")


def write_captions(folder: Path, name: str, count: int) -> ShardedDataset:
    values = [
        {
            "image_id": f"{name}{number}",
            "uri": "u",
            "version": f"400-{NOON_NS + number % 3 * MONTH_NS:x}" if number % 3 < 2 else "etag",
            "split": SPLITS[number % 5 % 3],
            "caption": "a dog" if number % 2 else "a cat",
            "log_prob": -1.0 - number,
            "tokens": 3,
            "candidates": [],
        }
        for number in range(count)
    ]
    dataset = create_dataset(folder / name / "captions", "captions", captions_schema(), config={"name": name}, shards=2)
    for shard in range(2):
        with write_shard(dataset, shard, count // 2) as writer:
            writer.write(pa.RecordBatch.from_pylist(values[shard::2], captions_schema()))
    dataset.finish()
    return dataset


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """An index of two sources, in which every fourth image of the second is marked as a duplicate."""
    folder: Path = tmp_path_factory.mktemp("facets")
    captions = [write_captions(folder, name, count).folder.uri for name, count in (("phone", 40), ("camera", 24))]
    duplicates = create_dataset(folder / "duplicates", "duplicates", DUPLICATES_SCHEMA, config={}, shards=1)
    groups = [{"image_id": "phone0", "group": "phone0", "kept": True, "similarity": 1.0}]
    groups += [
        {"image_id": f"camera{number}", "group": "phone0", "kept": False, "similarity": 1.0}
        for number in range(0, 24, 4)
    ]
    with write_shard(duplicates, 0, len(groups)) as writer:
        writer.write(pa.RecordBatch.from_pylist(groups, DUPLICATES_SCHEMA))
    duplicates.finish()
    config = IndexConfig(keep_duplicates=True)
    build = plan_build(captions, None, folder / "index", config, duplicates=folder / "duplicates")
    for position in build.added:
        build.add_shard(position)
    build.finish()
    return open_index(folder / "index")


def matches(index: Index, where: Filter) -> set[str]:
    """Returns the ids of the images with a dog that match a filter, without using the filter."""
    found = set()
    for name, count in (("phone", 40), ("camera", 24)):
        for number in range(1, count, 2):
            split, month = SPLITS[number % 5 % 3], MONTHS[number % 3]
            tests = [
                where.split is None or split == where.split or {split, where.split} == {"val", "dev"},
                where.source is None or name == where.source,
                where.date is None or (month is not None and month.startswith(where.date)),
                not (where.exclude_duplicates and name == "camera" and number % 4 == 0),
                where.min_log_prob is None or -1.0 - number >= where.min_log_prob,
            ]
            if all(tests):
                found.add(f"{name}{number}")
    return found


FILTERS = [
    Filter(None, *values)
    for values in product(
        (None, "val", "test"), (None, -20.0), (None, "phone", "nowhere"), (None, "2026", "2026-04"), (False, True)
    )
]


def test_filters_select_the_same_rows_in_every_search(index: Index) -> None:
    for where in FILTERS:
        expected = matches(index, where)
        table, counts = index.search_text_and_count("dog", 100, where=where)
        assert set(table["image_id"].to_pylist()) == expected
        assert counts.total == len(expected)
        assert {
            row["image_id"] for row in index.sample(100, where).to_pylist() if row["caption"] == "a dog"
        } == expected


def test_each_facet_counts_the_matches_of_the_other_conditions(index: Index) -> None:
    for where in FILTERS:
        counts = index.search_text_and_count("dog", 1, where=where)[1]
        rest = (where.split, where.min_log_prob, where.source, where.date, where.exclude_duplicates)
        assert counts.months.get("2026-04", 0) == len(matches(index, Filter(None, *rest[:3], "2026-04", rest[4])))
        assert counts.sources["camera"] == len(matches(index, Filter(None, *rest[:2], "camera", *rest[3:])))
        assert counts.non_duplicates == len(matches(index, Filter(None, *rest[:4], True)))
        assert counts.non_duplicates + counts.duplicates == len(matches(index, Filter(None, *rest[:4], False)))


def test_duplicates_are_marked_with_the_kept_image(index: Index) -> None:
    assert index.count_facets().duplicates == 6
    assert index.get_image("camera4")["duplicate_of"] == "phone0"
    assert index.get_image("phone0")["duplicate_of"] is None
    marked = index.search_text("cat", 100, where="duplicate_of = 'phone0'")["image_id"].to_pylist()
    assert set(marked) == {f"camera{number}" for number in range(0, 24, 4)}


def test_many_groups_are_merged_by_year(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_MAX_GROUPS", 2)
    months = [f"{2020 + number // 12}-{1 + number % 12:02d}-15" for number in range(48)]
    table = pa.table({"split": [""] * 48, "modified": pa.array(months).cast(pa.timestamp("s"))})
    rows = [
        {**row, "image_id": "i", "uri": "u", "caption": "c", "log_prob": 0, "tokens": 1} for row in table.to_pylist()
    ]
    grouper = FacetGrouper()
    (batch,) = grouper.add_group_numbers(0, [pa.RecordBatch.from_pylist(rows, ROW_SCHEMA)])
    assert [(group.month, group.rows) for group in grouper.groups] == [
        *(("2020-01", 1), ("2020-02", 1), ("2020", 10)),
        *((str(year), 12) for year in (2021, 2022, 2023)),
    ]
    assert batch["group"].to_pylist() == [0, 1, *[2] * 10, *[3] * 12, *[4] * 12, *[5] * 12]


def test_month_that_is_merged_into_its_year_can_be_searched_but_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = write_captions(tmp_path, "phone", 40).folder.uri
    monkeypatch.setattr(filters, "_MAX_GROUPS", 1)
    build = plan_build(captions, None, tmp_path / "index", IndexConfig())
    for position in build.added:
        build.add_shard(position)
    build.finish()
    index = open_index(tmp_path / "index")
    assert index.search_text("dog", 100, where=Filter(date="2026")).num_rows == 14
    assert index.search_text("dog", 100, where=Filter(date="2025-03")).num_rows == 0
    for date in ("2026-03", "2026-04"):
        expected = matches(index, Filter(date=date, source="phone", min_log_prob=-20.0))
        found = index.search_text("dog", 100, where=Filter(date=date, min_log_prob=-20.0))
        assert set(found["image_id"].to_pylist()) == expected != set()
    for search in (lambda where: index.search_text_and_count("dog", where=where), index.count_facets):
        with pytest.raises(QueryError, match=r"date: expected a year, got 2026-03; .*; use 2026"):
            search(Filter(date="2026-03"))


def test_every_listed_date_can_be_selected() -> None:
    values = [("a", "2025-12", 8), ("a", "2026-01", 4), ("b", "2026", 2), ("b", "2027", 1)]
    facets = Facets([FacetGroup(split, 0, month, False, rows) for split, month, rows in values], ["captions"])
    counts = facets.count(Filter()).months
    assert counts == {"2025-12": 8, "2026": 6, "2027": 1}
    for date, count in counts.items():
        assert facets.count(Filter(date=date)).total == count
        assert facets.count(Filter(date=date)).months == counts
    with pytest.raises(QueryError, match="use 2026"):
        facets.select(Filter(date="2026-01"))


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/data/captions"], ["captions"]),
        (["/d/c-2025", "/d/c-2026/"], ["c-2025", "c-2026"]),
        (["/h/phone/captions", "/h/camera/captions"], ["phone", "camera"]),
        (["/a/x", "/b/x", "/c/y"], ["a/x", "b/x", "c/y"]),
        ([], []),
    ],
)
def test_sources_have_the_shortest_names_that_differ(folders: list[str], names: list[str]) -> None:
    assert name_sources(folders) == names
