"""Catches Ctrl-C and SIGTERM, so that training can stop after the current step and save its state."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from captionlib.errors import TrainingInterrupted

__all__ = ["catch_stop_signals"]


@contextmanager
def catch_stop_signals(abort_on_repeat: bool = True) -> Iterator[Callable[[], bool]]:
    """Catches Ctrl-C and SIGTERM within the block. Yields a function that returns whether a signal has arrived.

    With `abort_on_repeat`, the second signal raises KeyboardInterrupt. Turn this off under `torchrun`, which repeats
    signals that the processes have already received from the terminal.
    """
    received: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if received and abort_on_repeat:
            raise KeyboardInterrupt
        received.append(number)

    previous = {}
    with suppress(ValueError):  # only the main thread can handle signals
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    except TrainingInterrupted as interruption:
        interruption.signal_number = received[0] if received else signal.SIGINT
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
