"""Installs and uses the package that the documentation shows as an example of a new family of captioners."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from captionlib.data.shards.dataset import open_dataset
from captionlib.data.shards.markers import marker_file
from captionlib.errors import CheckpointError, ConfigError, FingerprintError
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.families.captioner import open_captioner
from captionlib.models.inference.captioning import GenerationConfig
from jobs.cli import captionlib
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig
from tests.docs.markdown import DOCS
from tests.pipelines.conftest import images, write_manifest

__all__ = ["images"]

PALETTE = {"a red field": [255, 0, 0], "all green": [0, 128, 0], "a blue field": [0, 0, 255], "it is white": [255] * 3}
CONFIG = GenerationConfig(DecodingConfig(n_best=2), batch_size=3)
RUN = RunConfig(max_failure_ratio=0.5, progress=False)


def read_files() -> dict[str, str]:
    page = (DOCS / "how-to" / "new-families.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Installs the package as an installer does, and yields the address of a model."""
    files = read_files()
    site = tmp_path / "site-packages"
    metadata = site / "captionlib_color-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "captionlib_color.py").write_text(files["captionlib_color.py"])
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: captionlib-color\nVersion: 1.0\n")
    ((group, entry),) = re.findall(r'entry-points\."(.+?)"\]\n(.+)', files["pyproject.toml"])
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(site))
    (tmp_path / "palette").mkdir()
    (tmp_path / "palette" / "palette.json").write_text(json.dumps(PALETTE))
    yield f"color:{tmp_path / 'palette'}"
    sys.modules.pop("captionlib_color", None)
    importlib.invalidate_caches()


def test_the_example_has_at_most_80_lines() -> None:
    files = read_files()
    assert files.keys() == {"pyproject.toml", "captionlib_color.py"}
    assert sum(1 + len(text.splitlines()) for text in files.values()) <= 80


def test_the_example_captions_a_manifest_and_resumes(model: str, images: list[str], tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest", images)
    arguments = (tmp_path / "manifest", model, tmp_path / "captions")
    totals = generate_captions(*arguments, CONFIG, device="cpu", run=RUN)
    assert (totals.rows, totals.failures) == (8, 2)
    dataset = open_dataset(tmp_path / "captions").require_complete()
    rows = [row for shard in range(dataset.shards) for row in dataset.read(shard).to_pylist()]
    best = {row["image_id"]: row["caption"] for row in rows}
    assert [best[f"{name}.png"] for name in ("red", "green", "blue", "white")] == list(PALETTE)
    for row in rows:
        log_probs = [candidate["log_prob"] for candidate in row["candidates"]]
        assert len(log_probs) == 2
        assert row["log_prob"] == log_probs[0] == max(log_probs) < 0
    content = Path(dataset.get_part_path(1)).read_bytes()
    dataset.folder.remove(marker_file(1))
    generate_captions(*arguments, CONFIG, device="cpu", run=RUN)
    assert Path(dataset.get_part_path(1)).read_bytes() == content
    with pytest.raises(FingerprintError, match="n_best: was 2, now 5"):
        generate_captions(*arguments, device="cpu", run=RUN)


def test_the_example_works_on_the_command_line(model: str, images: list[str]) -> None:
    result = CliRunner().invoke(captionlib, ["caption", images[0], "-c", model, "--json"], catch_exceptions=False)
    assert json.loads(result.output)["caption"] == "a red field"


def test_the_example_explains_errors(model: str, tmp_path: Path) -> None:
    captioner = open_captioner(model)
    with pytest.raises(ConfigError, match="color captioners do not sample"):
        captioner.prepare(GenerationConfig(DecodingConfig("sample")))
    with pytest.raises(CheckpointError, match="got features; specify a manifest"):
        captioner.require_encoder({"model": "vgg16"})
    with pytest.raises(CheckpointError, match=r"expected a folder with palette\.json"):
        open_captioner(f"color:{tmp_path / 'nowhere'}")
