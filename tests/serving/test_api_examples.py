import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.markdown import DOCS

from .example_site import make_site, serve_site

PAGE = (DOCS / "how-to/api.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CURL_LINES = re.findall(r"^curl .*$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve_site(make_site(tmp_path_factory.mktemp("site"), with_captioner=True)) as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Image.new("RGB", (90, 70), "teal").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("program", "output"), [*zip(PROGRAMS, ["im", "image.jpg a teal square"], strict=True)])
def test_python_example_runs(
    url: str, folder: Path, program: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(program.replace("http://localhost:8000", url), "example", "exec"), {})
    assert output in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("line", CURL_LINES)
def test_curl_example_runs(url: str, folder: Path, line: str) -> None:
    command = line.replace("http://localhost:8000", url).replace("curl", "curl --fail --silent", 1)
    output = subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
    assert "caption" in output
