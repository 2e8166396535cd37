"""Selects splits by name. `val` and `dev` are names of the same split, because datasets use either."""

from collections.abc import Iterable

__all__ = ["expand_splits"]

_VALIDATION_NAMES = frozenset({"val", "dev"})


def expand_splits(splits: Iterable[str]) -> frozenset[str]:
    """Returns the splits to select. If `val` or `dev` is among them, both are included.

    Example:
        >>> sorted(expand_splits(["test", "val"]))
        ['dev', 'test', 'val']
    """
    selected = frozenset(splits)
    return selected | _VALIDATION_NAMES if selected & _VALIDATION_NAMES else selected
