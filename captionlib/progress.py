"""Progress bars and messages on standard error."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any, Literal, TypeVar

__all__ = ["LogFormat", "ProgressBar", "format_message", "hide_progress", "progress_bar", "set_log_format"]

LogFormat = Literal["text", "json"]

Item = TypeVar("Item")

_DRAW_SECONDS = 0.1  # interval between updates of the bar on a terminal
_LOG_SECONDS = 30.0  # interval between lines in a log

_hidden = False
_log_format: LogFormat = "text"


def set_log_format(log_format: LogFormat) -> None:
    """Sets the format of progress and messages. With `json`, each line is a JSON object."""
    global _log_format  # noqa: PLW0603 - set once, by the command line
    _log_format = log_format


def format_message(level: str, message: str, **fields: Any) -> str:
    """Returns a message in the format of `set_log_format`. Only `json` includes `level` and `fields`."""
    if _log_format == "text":
        return message
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "level": level, "message": message, **fields}, ensure_ascii=False)


def hide_progress(hidden: bool) -> None:
    global _hidden  # noqa: PLW0603 - set once, by the command line
    _hidden = hidden


class ProgressBar:
    """Counts finished items. Created by `progress_bar`."""

    def __init__(self, total: int | None, unit: str) -> None:
        self.count = self._skipped = 0
        self._total, self._unit, self._status = total, unit, ""
        self._started_at = self._shown_at = time.monotonic()
        self._show: Callable[[], None] | None = None
        self._interval_seconds = 0.0

    def update(self, count: int, status: str | None = None) -> None:
        """Adds `count` finished items. `status` is shown after the counts; if None, the current status is kept."""
        self.count += count
        if status is not None:
            self._status = status
        if self._show is not None and time.monotonic() - self._shown_at > self._interval_seconds:
            self._shown_at = time.monotonic()
            self._show()

    def skip(self, count: int, status: str | None = None) -> None:
        """Adds `count` items that an earlier run finished. They do not count towards the rate."""
        self._skipped += count
        self.update(count, status)

    def track(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items and counts each item as finished when the caller requests the next one."""
        for item in items:
            yield item
            self.update(1)

    @property
    def rate(self) -> float:
        return (self.count - self._skipped) / max(time.monotonic() - self._started_at, 1e-9)

    def describe(self) -> str:
        """Returns the counts, the rate, the time left and the status as one line."""
        rate = self.rate
        total = "" if self._total is None else f"/{self._total:,}"
        parts = [f"{self.count:,}{total} {self._unit}", f"{rate:,.1f} {self._unit}/s"]
        if self._total is not None and rate > 0:
            parts.append(f"{timedelta(seconds=round(max(0, self._total - self.count) / rate))} left")
        return ", ".join([*parts, self._status] if self._status else parts)

    @contextmanager
    def shown_every(self, seconds: float, show: Callable[[], None]) -> Iterator[None]:
        """Calls `show` at most once every `seconds` while the bar is updated, and once when the block ends."""
        self._interval_seconds, self._show = seconds, show
        try:
            yield
        finally:
            show()


@contextmanager
def progress_bar(label: str, total: int | None, unit: str, enabled: bool = True) -> Iterator[ProgressBar]:
    """Shows the progress of the block: finished items, items per second and, if `total` is known, the time left.

    `unit` names the items, such as `images`. A terminal shows a bar. Elsewhere, and in the log format `json`, a line is
    printed every 30 seconds.
    """
    bar = ProgressBar(total, unit)
    if _hidden or not enabled:
        yield bar
    elif sys.stderr.isatty() and _log_format == "text":
        with _draw(bar, label, total):
            yield bar
    else:
        counts = {"step": label, "unit": unit, "total": total}

        def print_line() -> None:
            message = f"{label}: {bar.describe()}"
            fields = {**counts, "count": bar.count, "per_second": round(bar.rate, 3)}
            print(format_message("info", message, **fields), file=sys.stderr, flush=True)

        with bar.shown_every(_LOG_SECONDS, print_line):
            yield bar


@contextmanager
def _draw(bar: ProgressBar, label: str, total: int | None) -> Iterator[None]:
    from rich.console import Console  # the import takes 0.2 s, and most commands draw no bar
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task(label, total=total, text="")

        def show() -> None:
            display.update(task, completed=bar.count, text=bar.describe())

        with bar.shown_every(_DRAW_SECONDS, show):
            yield
