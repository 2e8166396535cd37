import pytest

from captionlib.data.shards.markers import Marker, ShardProgress, format_time
from captionlib.data.shards.throughput import IDLE_SECONDS, measure_throughput

NOON = 1_780_000_000.0


def make_marker(start: float, end: float, images: int = 100) -> Marker:
    return Marker(0, images - 10, 10, 0, "", end - start, "", finished=format_time(NOON + end))


def test_speed_counts_the_images_of_workers_that_run_at_the_same_time() -> None:
    throughput = measure_throughput([make_marker(0, 50), make_marker(25, 75, 50)], [])
    assert throughput is not None
    assert (throughput.started, throughput.last_activity) == pytest.approx((NOON, NOON + 75))
    assert throughput.images_per_second == pytest.approx(150 / 75)
    assert throughput.curve[:20] == pytest.approx([2.0] * 20)
    assert throughput.curve[20:40] == pytest.approx([3.0] * 20)
    assert throughput.curve[40:] == pytest.approx([1.0] * 20)


def test_speed_counts_images_of_shards_in_progress() -> None:
    progress = ShardProgress(1, 30, format_time(NOON), format_time(NOON + 10))
    throughput = measure_throughput([], [progress])
    assert throughput is not None
    assert throughput.images_per_second == pytest.approx(3)


def test_speed_is_that_of_the_last_run_and_of_its_last_minutes() -> None:
    pause = 100 + IDLE_SECONDS + 1
    slow, fast = make_marker(pause, pause + 1000), make_marker(pause + 1000, pause + 1100, 1000)
    throughput = measure_throughput([make_marker(0, 100, 10**6), slow, fast], [])
    assert throughput is not None
    assert throughput.started == pytest.approx(NOON + pause)
    assert throughput.images_per_second == pytest.approx((1000 + 80) / 900)


def test_speed_is_unknown_without_times() -> None:
    assert measure_throughput([Marker(0, 1, 0, 0, "", 1.0, "")], []) is None


def test_speed_of_a_shard_that_took_no_time_is_finite() -> None:
    throughput = measure_throughput([make_marker(0, 0)], [])
    assert throughput is not None
    assert 0 < throughput.images_per_second < 1e9
