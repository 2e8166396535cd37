import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

import captionlib
from captionlib.data.synthetic_scenes import write_scenes


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


# In the order in which one stage reads the output of another.
EXAMPLES = [
    *("prepare", "extract_features", "train_captioner", "train_ranker", "generate_captions", "embed_images"),
    *("evaluate_captions", "build_index", "open_index", "open_dataset", "load_captioner", "load_ranker"),
    *("caption_images", "query_sql", "import_features", "find_duplicates"),
]


def test_every_function_has_an_example() -> None:
    assert set(EXAMPLES) == {name for name in captionlib.__all__ if inspect.isfunction(getattr(captionlib, name))}


def test_examples_print_the_documented_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_scenes(tmp_path / "scenes", train=20, val=2, test=4)
    savemat(tmp_path / "vgg_feats.mat", {"feats": np.random.default_rng(0).random((8, 26), np.float32)})
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    for name in EXAMPLES:
        documentation = inspect.getdoc(getattr(captionlib, name)) or ""
        example = parser.get_doctest(documentation, {"captionlib": captionlib}, name, None, None)
        assert example.examples, f"{name} has no example"
        report: list[str] = []
        runner.run(example, out=report.append)
        assert not report, "".join(report)
