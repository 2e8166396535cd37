import pytest

from captionlib.errors import ConfigError
from captionlib.search.config import IndexConfig, VectorLayout


@pytest.mark.parametrize(
    ("config", "rows", "encoding", "nlist", "nprobe"),
    [
        (IndexConfig(), 0, "Flat", 1, 1),
        (IndexConfig(vectors="sq8"), 0, "Flat", 1, 1),
        (IndexConfig(), 19_999, "Flat", 1, 1),
        (IndexConfig(), 20_000, "SQ8", 256, 24),
        (IndexConfig(), 1_000_000, "SQ8", 2048, 68),
        (IndexConfig(), 19_999_999, "SQ8", 8192, 136),
        (IndexConfig(), 20_000_000, "PQ64", 8192, 136),
        (IndexConfig(), 100_000_000, "PQ64", 16384, 192),
        (IndexConfig(vectors="flat"), 1_000_000, "Flat", 1, 1),
        (IndexConfig(vectors="sq8"), 100, "SQ8", 16, 8),
        (IndexConfig(vectors="sq8"), 1, "SQ8", 1, 1),
        (IndexConfig(vectors="pq", nlist=10, nprobe=3), 100, "PQ64", 10, 3),
        (IndexConfig(vectors="pq", nlist=10, nprobe=20), 100, "PQ64", 10, 10),
    ],
)
def test_layout_is_chosen_by_the_number_of_rows(
    config: IndexConfig, rows: int, encoding: str, nlist: int, nprobe: int
) -> None:
    assert VectorLayout.choose(config, rows, 256) == VectorLayout(256, encoding, nlist, nprobe, rows)


def test_product_quantization_requires_groups_of_four_dimensions() -> None:
    config = IndexConfig(vectors="pq")
    with pytest.raises(ConfigError, match=r"^vectors: pq requires a dimension divisible by 4, got 30; use sq8$"):
        VectorLayout.choose(config, 100, 30)
    assert VectorLayout.choose(config, 100, 4).encoding == "PQ1"
    assert VectorLayout.choose(IndexConfig(vectors="sq8"), 100, 30).encoding == "SQ8"


def test_layout_needs_rebuild_only_for_more_rows() -> None:
    config = IndexConfig()
    flat, sq8 = (VectorLayout.choose(config, rows, 256) for rows in (19_999, 100_000))
    assert flat.needs_rebuild(config, 20_000)
    assert not flat.needs_rebuild(config, 19_999)
    assert not sq8.needs_rebuild(config, 400_000)
    assert sq8.needs_rebuild(config, 400_001)
    assert not sq8.needs_rebuild(config, 10), "an index near the limit would change its layout with every update"
    assert not VectorLayout.choose(config, 0, 256).needs_rebuild(config, 4)


def test_forced_encoding_needs_rebuild_only_for_four_times_the_rows() -> None:
    config = IndexConfig(vectors="sq8")
    assert VectorLayout.choose(config, 0, 256).needs_rebuild(config, 1)
    one = VectorLayout.choose(config, 1, 256)
    assert not one.needs_rebuild(config, 4)
    assert one.needs_rebuild(config, 5)
    assert not VectorLayout.choose(IndexConfig(vectors="flat"), 1, 256).needs_rebuild(
        IndexConfig(vectors="flat"), 10**9
    )


def test_unknown_language_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"^language: expected one of none, arabic, .*, turkish, got 'klingon'$"):
        IndexConfig(language="klingon")
