"""Renders a web page about a dataset (a folder of Parquet shards), with the progress of the job that writes it."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from captionlib.data.shards.inspection import DatasetReport, JobReport, ShardState
from captionlib.data.shards.markers import part_name
from captionlib.evaluation.charts import Sparkline, build_sparkline
from captionlib.evaluation.pages import render_page
from captionlib.storage.folders import write_file

__all__ = ["render_dataset_page", "write_dataset_page"]

_MAX_CELLS = 600  # in the grid of shard states; if there are more shards, a cell represents several


def write_dataset_page(path: str | os.PathLike[str], report: DatasetReport) -> None:
    """Writes a self-contained page to a file."""
    write_file(path, render_dataset_page(report))


def render_dataset_page(report: DatasetReport, *, live: bool = False) -> bytes:
    """Renders the page. It is self-contained unless `live` is true: it then links to a script that updates it."""
    return render_page(
        "dataset.html",
        live=live,
        report=report,
        job=report.job,
        name=report.folder.rstrip("/").rsplit("/", 1)[-1] or report.folder,
        state=_describe_state(report),
        fraction=_compute_fraction(report),
        cells=_group_shards(report.job.shard_states),
        speed=_draw_speed(report.job),
        config=list(_flatten(report.config)),
    )


def _describe_state(report: DatasetReport) -> tuple[str, str]:
    """Returns the CSS class and the label of the state."""
    if report.complete:
        return ("complete", "Complete") if not report.stale else ("stopped", "Out of date")
    if report.job.state == "running":
        return "running", "Running"
    if report.shards_done == report.shards:
        return "failed", "Too many failures" if report.failed else "Not finished"
    return "stopped", "Stopped"


def _compute_fraction(report: DatasetReport) -> float:
    """Returns the processed fraction of the images or, if their number is unknown, of the shards."""
    job = report.job
    if report.complete:
        return 1.0
    if job.images:
        return min(1.0, (job.images_done + job.images_in_progress) / job.images)
    return report.shards_done / max(1, report.shards)


def _group_shards(shard_states: Iterable[tuple[ShardState, int]]) -> list[tuple[str, str]]:
    states: list[ShardState] = [state for state, count in shard_states for _ in range(count)]
    size = -(-len(states) // _MAX_CELLS) or 1
    return [_make_cell(start, states[start : start + size]) for start in range(0, len(states), size)]


def _make_cell(start: int, states: Sequence[ShardState]) -> tuple[str, str]:
    """Returns the CSS class and the title of the cell of one or several neighboring shards."""
    distinct = set(states)
    if "in progress" in distinct:
        state = "in-progress"
    elif len(distinct) == 1:
        (state,) = distinct
    elif distinct == {"done", "failures"}:
        state = "failures"
    else:
        state = "partial"
    last = start + len(states) - 1
    name = part_name(start) if last == start else f"{part_name(start)} to {part_name(last)}"
    counts = ", ".join(f"{states.count(each):,} {each}" for each in sorted(distinct))
    return state, f"{name}: {states[0] if len(states) == 1 else counts}"


def _draw_speed(job: JobReport) -> Sparkline | None:
    throughput = job.throughput
    if throughput is None or throughput.last_activity - throughput.started < 1:
        return None
    return build_sparkline(throughput.curve)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields dotted keys, as `--set` accepts them, and values."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "" if value is None else str(value)
