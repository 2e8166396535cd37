"""Models that threads share: loaded once a process, however many shards are worked on in it at a time."""

from collections.abc import Callable
from functools import lru_cache, wraps
from threading import Lock
from typing import ParamSpec, TypeVar

__all__ = ["cached_per_process"]

Arguments = ParamSpec("Arguments")
Model = TypeVar("Model")


def cached_per_process(load: Callable[Arguments, Model]) -> Callable[Arguments, Model]:
    """Wraps a loader: who asks for the same gets the same, and who asks for another replaces it.

    Args:
        load: takes what tells one model from another, all of it hashable; what it returns is not changed by its users.
    """
    lock = Lock()
    kept = lru_cache(maxsize=1)(load)

    @wraps(load)
    def shared(*arguments: Arguments.args, **named: Arguments.kwargs) -> Model:
        with lock:  # those who ask while it is loaded wait for it
            model: Model = kept(*arguments, **named)  # type: ignore[arg-type]
            return model

    return shared
