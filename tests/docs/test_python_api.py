import inspect

import pytest

import captionlib


@pytest.mark.parametrize("name", captionlib.__all__)
def test_public_names_and_methods_are_documented(name: str) -> None:
    """The reference omits members without a docstring."""
    target = getattr(captionlib, name)
    assert inspect.getdoc(target)
    members = vars(target).items() if inspect.isclass(target) else ()
    methods = {key: value for key, value in members if inspect.isroutine(value) or isinstance(value, property)}
    assert [key for key, method in methods.items() if not key.startswith("_") and not inspect.getdoc(method)] == []
