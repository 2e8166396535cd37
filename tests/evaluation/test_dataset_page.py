import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from captionlib.data.shards import inspection
from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.inspection import inspect_dataset
from captionlib.data.shards.markers import ShardProgress, encode_progress, format_time, progress_file, write_marker
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.errors import FetchError
from captionlib.evaluation.dataset_page import render_dataset_page
from tests.evaluation.test_report import Page

NOW = 1_780_000_000.0
EVIL = "</p><script>alert(1)</script>\"'&"


def write_job(
    folder: Path, done: int, *, failures: int = 0, shards: int = 6, created: float = NOW - 60
) -> ShardedDataset:
    """Writes shards of 10 images that were finished every 10 seconds, the last one a second before `NOW`."""
    source = create_dataset(folder / "manifest", "manifest", MANIFEST_SCHEMA, config={"shard_size": 10}, shards=shards)
    config = {"encoder": {"model": "vgg16", "node": "fc7"}, "note": EVIL}
    output = create_dataset(folder / "output", "manifest", MANIFEST_SCHEMA, config=config, source=source)
    for shard in range(shards):
        rows = [{"image_id": f"{shard}-{n}", "uri": "", "split": "", "captions": []} for n in range(10)]
        with write_shard(source, shard, 10) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
        if shard < done:
            with write_shard(output, shard, 10, writer.marker.checksum) as writer:
                for row in rows[:failures]:
                    writer.write_failure({**row, "uri": f"{EVIL}{row['image_id']}"}, FetchError("NotFound", EVIL))
                writer.write(pa.RecordBatch.from_pylist(rows[failures:], schema=MANIFEST_SCHEMA))
            finished = format_time(NOW - 1 - 10 * (done - 1 - shard))
            write_marker(output.folder, replace(writer.marker, seconds=10.0, finished=finished))
    source.finish()
    description = folder / "output" / "_dataset.json"
    text = re.sub(r'"created": "[^"]*"', f'"created": "{format_time(created)}"', description.read_text())
    description.write_text(re.sub(r',\s*"crc32": "[^"]*"', "", text))
    return output


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection.time, "time", lambda: NOW)


def read_page(folder: Path) -> Page:
    return Page(render_dataset_page(inspect_dataset(folder / "output")).decode())


def read_text(folder: Path) -> str:
    return " ".join(read_page(folder).text.split())


def test_page_of_a_running_job_shows_progress_speed_and_time_left(tmp_path: Path) -> None:
    output = write_job(tmp_path, done=3)
    progress = ShardProgress(4, 5, format_time(NOW - 6), format_time(NOW - 1))
    output.folder.write(progress_file(4), encode_progress(progress))
    report = inspect_dataset(tmp_path / "output")
    assert report.job.state == "running"
    assert report.job.shard_states == [("done", 3), ("open", 1), ("in progress", 1), ("open", 1)]
    assert report.job.seconds_left == pytest.approx(25 / (35 / 30), rel=0.01)
    text = read_text(tmp_path)
    assert "Running 35 of 60 images 58.3% about 21 s left" in text
    assert "3 done 1 in progress 2 open" in text
    assert "No failures so far." in text


def test_job_without_activity_counts_as_stopped(tmp_path: Path) -> None:
    output = write_job(tmp_path, done=2, created=NOW - 2000)
    progress = ShardProgress(3, 5, format_time(NOW - 1000), format_time(NOW - 900))
    output.folder.write(progress_file(3), encode_progress(progress))
    for shard, marker in output.read_markers().items():
        write_marker(output.folder, replace(marker, finished=format_time(NOW - 1000 + 10 * shard)))
    report = inspect_dataset(tmp_path / "output")
    assert (report.job.state, report.job.seconds_left) == ("stopped", None)
    assert report.job.count_shards("in progress") == 0
    assert "No worker has written anything since 28 May 2026, 20:10 UTC." in read_text(tmp_path)


def test_job_that_has_not_finished_a_shard_is_running(tmp_path: Path) -> None:
    write_job(tmp_path, done=0)
    report = inspect_dataset(tmp_path / "output")
    assert (report.job.state, report.job.throughput, report.job.seconds_left) == ("running", None, None)
    assert "Running 0 of 60 images 0.0%" in read_text(tmp_path)


def test_job_that_never_wrote_anything_is_stopped(tmp_path: Path) -> None:
    write_job(tmp_path, done=0, created=NOW - 3600)
    assert "since the dataset was created on 28 May 2026, 19:26 UTC" in read_text(tmp_path)


def test_damaged_markers_and_progress_do_not_count(tmp_path: Path) -> None:
    output = write_job(tmp_path, done=3)
    (tmp_path / "output" / "__shards" / "part-00001.json").write_text('{"shard": 1')
    output.folder.write(progress_file(4), b"5")
    marker = output.read_markers()[2]
    write_marker(output.folder, replace(marker, finished="yesterday"))
    assert inspect_dataset(tmp_path / "output").job.shard_states == [("done", 1), ("open", 5)]


def test_page_of_a_complete_dataset_groups_failures_and_escapes_all_text(tmp_path: Path) -> None:
    write_job(tmp_path, done=6, failures=2).finish()
    page = read_page(tmp_path)
    text = " ".join(page.text.split())
    assert "Complete 60 images" in text
    assert "Not found 12 images, 20.00%" in text
    assert f"{EVIL}0-0" in text
    assert "and 7 more" in text
    assert not page.all("script")
    assert [cell["class"] for cell in page.all("i")][:6] == ["failures"] * 6


def test_lineage_names_the_datasets_before_this_one(tmp_path: Path) -> None:
    write_job(tmp_path, done=6).finish()
    (step,) = inspect_dataset(tmp_path / "output").lineage
    assert (step.kind, step.rows, step.problem) == ("manifest", 60, "")
    (tmp_path / "manifest" / "_dataset.json").unlink()
    (step,) = inspect_dataset(tmp_path / "output").lineage
    assert "is not a captionlib dataset" in step.problem
    assert "The dataset cannot be read" in read_text(tmp_path)


def test_map_of_a_large_dataset_groups_shards(tmp_path: Path) -> None:
    write_job(tmp_path, done=6)
    report = inspect_dataset(tmp_path / "output")
    states = [("done", 999), ("failures", 1), ("in progress", 2), ("open", 398)]
    report = replace(report, job=replace(report.job, shard_states=states))
    cells = [cell for cell in Page(render_dataset_page(report).decode()).all("i") if "title" in cell]
    assert len(cells) == 467
    assert [cell["class"] for cell in cells[332:336]] == ["done", "in-progress", "open", "open"]
    assert cells[333]["title"] == "part-00999 to part-01001: 1 failures, 2 in progress"


def test_inspecting_a_dataset_writes_nothing(tmp_path: Path) -> None:
    write_job(tmp_path, done=3, failures=1)
    (tmp_path / "output" / "_update.json").write_text("damaged")  # reading it is enough to fail

    def list_files() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))

    before = list_files()
    assert inspect_dataset(tmp_path / "output").interrupted_update
    assert list_files() == before
