from pathlib import Path

from click.testing import CliRunner

from jobs.cli import captionlib
from tests.data.ingestion.test_neuraltalk import IMGIDS, write_json, write_mat


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(captionlib, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_import_features_prints_a_summary(tmp_path: Path) -> None:
    files = write_json(tmp_path, IMGIDS), write_mat(tmp_path, "5")
    output = run("import-features", *files, "-o", tmp_path / "features", "--set", "shard_size=2", "--no-progress")
    assert output.startswith(f"{tmp_path}/features: 3 rows in 2 shards")
