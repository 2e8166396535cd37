"""Defines aliases of split names: datasets call the validation split `val` or `dev`."""

from collections.abc import Iterable

__all__ = ["add_split_aliases"]

_VALIDATION_NAMES = frozenset({"val", "dev"})


def add_split_aliases(splits: Iterable[str]) -> frozenset[str]:
    """Returns the splits and, if they contain `val` or `dev`, both of these names.

    Example:
        >>> sorted(add_split_aliases(["test", "val"]))
        ['dev', 'test', 'val']
    """
    selected = frozenset(splits)
    return selected | _VALIDATION_NAMES if selected & _VALIDATION_NAMES else selected
