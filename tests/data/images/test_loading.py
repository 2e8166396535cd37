import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captionlib.config import build_config
from captionlib.data.images.decoder_pool import DecoderConfig
from captionlib.data.images.decoding import decode_image
from captionlib.data.images.fetching import FetchConfig
from captionlib.data.images.loading import LoadedImage, LoadingConfig, load_images, open_loader
from captionlib.errors import CaptionlibError, ConfigError, DecodeError, FetchError, ImageError
from tests.data.images.sample_images import PREPROCESSING, encode_image, make_image, slow_jpeg

CONFIG = LoadingConfig(threads=4, prefetch=6, decode=DecoderConfig(processes=2))


def loading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("load-images")]


def children() -> set[str]:
    """Returns the ids of the decoder processes that this process runs."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the process ended meanwhile
            ours = f"PPid:\t{os.getpid()}\n" in (process / "status").read_text()
            if ours and "decoder_process" in (process / "cmdline").read_text():
                found.add(process.name)
    return found


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Rows whose images are missing (every fifth) or damaged (every seventh)."""
    rows = []
    for number in range(40):
        path = tmp_path / f"{number}.jpg"
        content = encode_image(make_image(seed=number), "JPEG")
        if number % 5:
            path.write_bytes(content if number % 7 else content[:500])
        rows.append({"image_id": str(number), "uri": str(path)})
    return rows


def test_rows_are_loaded_in_order_with_images_or_errors(rows: list[dict[str, Any]]) -> None:
    with open_loader(CONFIG, PREPROCESSING) as load:
        loaded = list(load(rows))
    assert [row for row, _ in loaded] == rows
    for number, (row, image) in enumerate(loaded):
        if number % 5 == 0:
            assert isinstance(image, FetchError)
            assert image.reason == "NotFound"
        elif number % 7 == 0:
            assert isinstance(image, DecodeError)
            assert image.reason == "Truncated"
        else:
            expected = decode_image(Path(row["uri"]).read_bytes(), PREPROCESSING)
            assert isinstance(image, LoadedImage)
            np.testing.assert_array_equal(image.pixels, expected.pixels)
            assert (image.width, image.height) == (90, 60)


def test_content_hash_depends_on_the_bytes_of_the_file_only(tmp_path: Path) -> None:
    contents = {"a.jpg": b"", "b.jpg": b"", "c.jpg": b"another comment"}
    for name, comment in contents.items():
        (tmp_path / name).write_bytes(encode_image(make_image(), "JPEG", comment=comment))
    with open_loader(CONFIG, PREPROCESSING) as load:
        images = [image for _, image in load({"uri": str(tmp_path / name)} for name in contents)]
    first, same, other = (image.content_hash for image in images if isinstance(image, LoadedImage))
    assert first == same != other
    assert 0 <= min(first, other) <= max(first, other) < 2**64


def test_rejected_address_fails_its_row_only(rows: list[dict[str, Any]]) -> None:
    evil = {"image_id": "evil", "uri": "reference://x::http://127.0.0.1:9/refs.json"}
    with open_loader(CONFIG, PREPROCESSING) as load:
        (_, image), (_, refused) = load([rows[1], evil])
    assert isinstance(image, LoadedImage)
    assert isinstance(refused, FetchError)
    assert refused.reason == "BadAddress"


def test_loader_is_reusable_and_cleans_up(rows: list[dict[str, Any]]) -> None:
    with open_loader(CONFIG, PREPROCESSING) as load:
        assert list(load([])) == []
        first = [image for _, image in load(rows[1:5])]
        again = [image for _, image in load(iter(rows[1:5]))]
        assert children()
    np.testing.assert_array_equal([image.pixels for image in first], [image.pixels for image in again])
    assert loading_threads() == []
    assert children() == set()


def test_prefetch_bounds_images_in_flight(rows: list[dict[str, Any]]) -> None:
    requested, taken = 0, 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal requested
        for row in rows:
            requested += 1
            assert requested - taken <= CONFIG.prefetch + 1  # one row replaces the image that is yielded next
            yield row

    with open_loader(CONFIG, PREPROCESSING) as load:
        for _ in load(counted()):
            taken += 1
    assert taken == len(rows)


def test_images_load_while_the_consumer_works() -> None:
    """The consumer keeps the first image until five others are loaded."""
    loaded: list[str] = []
    all_loaded = threading.Event()

    def load(uri: str) -> LoadedImage:
        loaded.append(uri)
        if len(loaded) == 6:
            all_loaded.set()
        return LoadedImage(np.zeros((1, 1, 3), np.uint8), 1, 1, 0)

    with ThreadPoolExecutor(2) as threads:
        images = load_images(({"uri": str(number)} for number in range(100)), load, threads, prefetch=6)
        next(images)
        assert all_loaded.wait(60)
        images.close()
    assert len(loaded) <= 7


@pytest.mark.parametrize("leave", ["break", "raise"])
@pytest.mark.timeout(60)
def test_stopping_early_cleans_up(rows: list[dict[str, Any]], tmp_path: Path, leave: str) -> None:
    """Decoding the images in flight would take minutes."""
    slow = tmp_path / "slow.jpg"
    slow.write_bytes(slow_jpeg(200_000))
    endless = [rows[1], *({"uri": str(slow)} for _ in range(50))]
    config = LoadingConfig(threads=3, prefetch=20, decode=DecoderConfig(3, 1000.0, max_jpeg_scans=10**6))
    if leave == "break":
        with open_loader(config, PREPROCESSING) as load:
            for _, image in load(endless):
                assert isinstance(image, LoadedImage)
                break
    else:
        with pytest.raises(RuntimeError, match="model"), open_loader(config, PREPROCESSING) as load:
            next(load(endless))
            raise RuntimeError("the model broke")
    assert loading_threads() == []
    assert children() == set()


def test_errors_of_the_row_iterator_propagate(rows: list[dict[str, Any]]) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield from rows[:10]
        raise RuntimeError("no more rows")

    with pytest.raises(RuntimeError, match="no more rows"), open_loader(CONFIG, PREPROCESSING) as load:
        list(load(broken()))
    assert loading_threads() == []


def test_decoder_start_failure_stops_the_run(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with open_loader(CONFIG, PREPROCESSING) as load, pytest.raises(CaptionlibError, match="did not start") as caught:
        list(load(rows))
    assert not isinstance(caught.value, ImageError)


def test_no_image_is_lost_when_decoders_are_killed(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encode_image(make_image(600, 600), "PNG"))
    images = []
    killed = 0
    with open_loader(CONFIG, PREPROCESSING) as load:
        for _, image in load({"uri": str(path)} for _ in range(60)):
            images.append(image)
            if len(images) in {20, 40}:
                for pid in children():
                    os.kill(int(pid), signal.SIGKILL)
                    killed += 1
    assert killed >= 2
    expected = decode_image(path.read_bytes(), PREPROCESSING)
    assert all(np.array_equal(image.pixels, expected.pixels) for image in images)


def test_config_is_built_from_nested_values() -> None:
    values = {
        "threads": 3,
        "fetch": {"max_image_bytes": 1000, "attempts": 1},
        "decode": {"processes": 1, "max_image_pixels": 10},
    }
    assert build_config(LoadingConfig, values) == LoadingConfig(
        3, fetch=FetchConfig(1000, attempts=1), decode=DecoderConfig(1, max_image_pixels=10)
    )
    with pytest.raises(ConfigError, match=r"known keys: fetch\.max_image_bytes"):
        build_config(LoadingConfig, {"fetch": {"bytes": 1}})
    for name in ("threads", "prefetch"):
        with pytest.raises(ConfigError, match=name):
            LoadingConfig(**{name: 0})
