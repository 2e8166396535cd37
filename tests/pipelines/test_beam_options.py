from pathlib import Path

import pytest

from captionlib.errors import ConfigError
from pipelines.beam_options import expand_option_files
from pipelines.run import RunConfig, choose_runner

RUNNERS = Path(__file__).parents[2] / "configs" / "runners"


def test_option_file_is_replaced_by_its_options(tmp_path: Path) -> None:
    file = tmp_path / "flink.yaml"
    file.write_text(
        "runner: PortableRunner\n"
        "environment_config: {command: /opt/boot}\n"
        "experiments: [one, two]\n"
        "save_main_session: true\n"
        "parallelism: 2\n",
        encoding="utf-8",
    )
    assert expand_option_files(["--a=1", f"@{file}", "--parallelism=4"]) == [
        "--a=1",
        "--runner=PortableRunner",
        '--environment_config={"command": "/opt/boot"}',
        "--experiments=one",
        "--experiments=two",
        "--save_main_session",
        "--parallelism=2",
        "--parallelism=4",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runner: false\n", "runner is False, which has no flag in Beam; set it to true, a number or text, or remove"),
        ("runner:\n", "runner is None"),
        ("- --runner=x\n", "expected `option: value` lines, got list"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_invalid_option_file_is_rejected(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        expand_option_files([f"@{file}"])


def test_missing_option_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml is neither a file nor a recipe of runners"):
        choose_runner(RunConfig(beam_options=(f"@{tmp_path}/none.yaml",)))


@pytest.mark.parametrize("file", sorted(RUNNERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_runner_recipes_name_a_known_runner(file: Path) -> None:
    runner, options = choose_runner(RunConfig(beam_options=(f"@{file}",)))
    assert type(runner).__name__ in {"PortableRunner", "FlinkRunner", "SparkRunner", "DataflowRunner"}
    assert options.get_all_options()["runner"]
