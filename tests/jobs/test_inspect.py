import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from captionlib.data.shards.removal import plan_removal
from captionlib.errors import CheckpointError, DatasetError
from captionlib.models.checkpoints.folder import write_checkpoint
from jobs.cli import captionlib
from tests.data.shards.test_inspection import write


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(captionlib, ["inspect", *map(str, arguments)], catch_exceptions=False)


def test_inspect_describes_an_incomplete_dataset(tmp_path: Path) -> None:
    dataset = write(tmp_path, done=2)
    lines = inspect(tmp_path).output.splitlines()
    assert lines[0] == (
        f"{tmp_path}: manifest, not complete: expected 3 finished shards, got 2; "
        "rerun the command that writes this dataset"
    )
    assert "  rows         2 in 2 of 3 shards" in lines
    assert f"  fingerprint  {dataset.fingerprint}" in lines
    assert "    image_id     string" in lines
    assert lines[lines.index("    source") + 1] == "      kind: folder"
    assert "  failures     1 of 3 images (33.3%)" in lines
    assert "          1 Truncated, such as bad10 (bad10.jpg): ends early" in lines


def test_inspect_describes_a_complete_dataset(tmp_path: Path) -> None:
    dataset = write(tmp_path, done=3)
    first = inspect(tmp_path).output.splitlines()[0]
    assert "not complete: 3 of 6 images (50.0%) failed (" in first
    assert "with a higher --max-failure-ratio to accept the failures (1 accepts all), or with --retry-failures" in first
    dataset.finish()
    assert inspect(tmp_path).output.splitlines()[0] == f"{tmp_path}: manifest, complete"


def test_inspect_verify_sets_the_exit_code(tmp_path: Path) -> None:
    write(tmp_path)
    assert "  verified     all files match their checksums" in inspect(tmp_path, "--verify").output.splitlines()
    (tmp_path / "part-00000.parquet").unlink()
    result = inspect(tmp_path, "--verify")
    assert result.exit_code == 1
    assert result.output.splitlines()[-2:] == ["  PROBLEMS", "    part-00000.parquet: missing"]


def test_inspect_prints_json(tmp_path: Path) -> None:
    write(tmp_path)
    report = json.loads(inspect(tmp_path, "--json").output)
    assert (report["kind"], report["shards_done"], report["failures"]["Truncated"]["count"]) == ("manifest", 2, 1)


def test_inspect_shows_removed_images(tmp_path: Path) -> None:
    dataset = write(tmp_path, done=3)
    dataset.finish(1.0)
    for reason, image_ids in (("asked\ntwice", ["a", "b"]), ("", ["c"])):
        plan_removal(dataset, image_ids, reason).run()
    lines = inspect(tmp_path).output.splitlines()
    start = lines.index("  removed      3 images; updates skip them; --json lists the hashes of their ids")
    assert sorted(re.sub(r"\d{4}-\d\d-\d\d", "DATE", line) for line in lines[start + 1 : start + 3]) == [
        "          1 on DATE: no reason given",
        "          2 on DATE: asked twice",
    ]
    removed = json.loads(inspect(tmp_path, "--json").output)["removed"]
    assert removed[hashlib.sha256(b"a").hexdigest()][0] == "asked\ntwice"
    (tmp_path / "_removed.json").write_bytes(b"damaged")
    assert "_removed.json is damaged" in inspect(tmp_path).output


def test_inspect_writes_a_page(tmp_path: Path) -> None:
    write(tmp_path / "data")
    assert inspect(tmp_path / "data", "--html", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Truncated" in page
    assert "<script" not in page
    assert "http" not in page


def test_pages_need_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    for option in (["--html", tmp_path / "page.html"], ["--serve"]):
        with pytest.raises(DatasetError, match="need a dataset"):
            inspect(tmp_path, *option)
    assert inspect(tmp_path, "--serve", "--json").exit_code == 2


def test_inspect_describes_a_checkpoint_without_its_vocabulary(tmp_path: Path) -> None:
    identity = {"architecture": {"cell": "lstm"}, "vocabulary": {"words": ["dog", "zebra"]}}
    training = {"history": [{"epoch": 1, "perplexity": 20.5}]}
    fingerprint = write_checkpoint(tmp_path, "captioner", {"w": torch.zeros(2)}, identity, {"by": "me"}, training)
    lines = inspect(tmp_path).output.splitlines()
    assert lines[0] == f"{tmp_path}: checkpoint"
    for line in ["  kind: captioner", f"  fingerprint: {fingerprint}", "    cell: lstm", "  vocabulary: 2 words"]:
        assert line in lines
    assert "    perplexity: 20.5" in lines
    assert "zebra" not in " ".join(lines)
    assert json.loads(inspect(tmp_path, "--json").output)["architecture"] == {"cell": "lstm"}


def test_inspect_rejects_other_folders(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is not an output of captionlib: .* got a missing or empty folder"):
        inspect(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(DatasetError, match=r"got thesis\.txt"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        inspect(tmp_path)


def test_inspect_rejects_a_run_without_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "_training").mkdir()
    with pytest.raises(DatasetError, match="a training run without a checkpoint"):
        inspect(tmp_path)


def test_inspect_does_not_import_torch(tmp_path: Path) -> None:
    write(tmp_path)
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom jobs.cli import captionlib\n"
        f"assert CliRunner().invoke(captionlib, ['inspect', {str(tmp_path)!r}]).exit_code == 0\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
