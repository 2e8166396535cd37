import json
from pathlib import Path

from click.testing import CliRunner

from jobs.cli import captionlib
from tests.search.example_index import make_rows, write_captions_dataset, write_embeddings_dataset


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(captionlib, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands_treat_several_datasets_as_one(tmp_path: Path) -> None:
    for name, start in (("2025", 0), ("2026", 30)):
        write_captions_dataset(str(tmp_path / f"captions-{name}"), {0: make_rows(20, start)}, 1).finish()
        write_embeddings_dataset(str(tmp_path / f"embeddings-{name}"), {0: make_rows(20, start)}, 1).finish()
    captions = [tmp_path / "captions-2025", tmp_path / "captions-2026"]
    count = run("query", *captions, "--sql", "SELECT count(*) AS n FROM captions", "--format", "jsonl")
    assert json.loads(count) == {"n": 40}
    assert json.loads(run("query", *captions, "--image-id", "im49", "--format", "jsonl"))["image_id"] == "im49"
    embeddings = [f"--embeddings={tmp_path}/embeddings-{name}" for name in ("2025", "2026")]
    output = run("build-index", *captions, *embeddings, "-o", tmp_path / "index")
    assert output.startswith(f"{tmp_path}/index: 40 captions, 40 vectors")
    similar = run("query", tmp_path / "index", "--similar", "im0", "--limit", "40", "--format", "jsonl").splitlines()
    assert {json.loads(line)["image_id"] for line in similar} == {
        f"im{number}" for number in (*range(1, 20), *range(30, 50))
    }


def test_files_of_beam_options_are_not_captions(tmp_path: Path) -> None:
    write_captions_dataset(str(tmp_path / "captions"), {0: make_rows(20)}, 1).finish()
    (tmp_path / "runner.yaml").write_text("runner: DirectRunner\n")
    output = run("build-index", tmp_path / "captions", "-o", tmp_path / "index", "--", f"@{tmp_path}/runner.yaml")
    assert output.startswith(f"{tmp_path}/index: 20 captions")
