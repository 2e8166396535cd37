"""Progress bars on standard error."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

__all__ = ["ProgressBar", "hide_progress", "progress_bar"]

Item = TypeVar("Item")

_DRAW_SECONDS = 0.1  # interval between updates of the bar on a terminal
_LOG_SECONDS = 30.0  # interval between lines in a log

_hidden = False


def hide_progress(hidden: bool) -> None:
    """Hides all progress bars of this process, or shows them again."""
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
        """Adds `count` finished items. `status` is shown after the counts; if None, the current text is kept."""
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

    def describe(self) -> str:
        """Returns the counts, the rate, the time left and the status as one line."""
        rate = (self.count - self._skipped) / max(time.monotonic() - self._started_at, 1e-9)
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

    `unit` names the items, such as `images`. A terminal shows a bar. Elsewhere, a line is printed every 30 seconds.
    """
    bar = ProgressBar(total, unit)
    if _hidden or not enabled:
        yield bar
    elif sys.stderr.isatty():
        with _draw(bar, label, total):
            yield bar
    else:
        with bar.shown_every(_LOG_SECONDS, lambda: print(f"{label}: {bar.describe()}", file=sys.stderr, flush=True)):
            yield bar


@contextmanager
def _draw(bar: ProgressBar, label: str, total: int | None) -> Iterator[None]:
    """Draws the bar on a terminal during the block."""
    from rich.console import Console  # takes 0.2 s, and most commands draw no bar
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
