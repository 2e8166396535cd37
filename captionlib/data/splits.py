"""Selects splits by name. `val` and `dev` are names of the same split, because datasets use either."""

from collections.abc import Iterable

__all__ = ["add_split_aliases"]

_VALIDATION_NAMES = frozenset({"val", "dev"})


def add_split_aliases(splits: Iterable[str]) -> frozenset[str]:
    """Returns the splits, with `dev` added to `val` and `val` added to `dev`.

    Example:
        >>> sorted(add_split_aliases(["test", "val"]))
        ['dev', 'test', 'val']
    """
    selected = frozenset(splits)
    return selected | _VALIDATION_NAMES if selected & _VALIDATION_NAMES else selected
