"""Someone wants a run to stop: the loop is told between two steps, and saves first."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["stop_requests"]


@contextmanager
def stop_requests(insistent: bool = True) -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a question that the loop asks between two steps.

    Args:
        insistent: a second signal stops at once. `torchrun` passes on what its processes have had from the terminal
            already, and kills them itself when it has waited for long.
    """
    requests: list[int] = []

    def note(number: int, _frame: object) -> None:
        if requests and insistent:
            raise KeyboardInterrupt
        requests.append(number)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: nobody sends signals here
        previous = {}
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
