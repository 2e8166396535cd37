import inspect
import subprocess
import sys

import pytest

import captionlib


def test_all_is_sorted_and_every_name_exists() -> None:
    assert captionlib.__all__ == sorted(captionlib.__all__)
    for name in captionlib.__all__:
        assert getattr(captionlib, name) is not None
    assert set(captionlib.__all__) <= set(dir(captionlib))


def test_unknown_names_raise_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'captionlib' has no attribute 'nothing'"):
        captionlib.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_importing_captionlib_imports_nothing_heavy() -> None:
    script = "import sys, captionlib; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "torchvision", "apache_beam", "duckdb", "pyarrow", "faiss", "numpy", "click"):
        assert f"'{heavy}'" not in modules


@pytest.mark.parametrize("name", [name for name in captionlib.__all__ if not name.startswith("_")])
def test_every_public_function_and_class_is_documented(name: str) -> None:
    target = getattr(captionlib, name)
    documentation = inspect.getdoc(target) or ""
    assert documentation, name
    if inspect.isfunction(target):
        for section in ("Args:", "Example:"):
            assert section in documentation, f"{name} has no {section}"
        for parameter in inspect.signature(target).parameters:
            assert f"    {parameter}: " in documentation, f"{name} does not document {parameter}"
