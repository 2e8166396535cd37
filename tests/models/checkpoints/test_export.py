import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from click.testing import CliRunner, Result

from captionlib.data.shards.dataset import open_dataset
from captionlib.errors import CheckpointError, ConfigError, DatasetError, StorageError
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.checkpoints.checkpoint import load_captioner, load_ranker
from captionlib.models.checkpoints.encoder_file import require_checkpoint_files
from captionlib.models.checkpoints.export import export_checkpoint
from captionlib.models.encoders.encoder import EncoderConfig, load_encoder
from captionlib.models.inference.captioning import caption_images
from captionlib.models.inference.extraction import ExtractionConfig
from captionlib.models.rankers.ranker import RankerConfig
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig
from captionlib.training.ranking import RankerTrainingConfig, train_ranker
from jobs.cli import captionlib
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig
from tests.pipelines.conftest import images, write_manifest

__all__ = ["images"]

ENCODER = EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", pooling="mean")
TRAINING = TrainingConfig(epochs=2, unigram_patience=None)
CAPTIONER = CaptionerTrainingConfig(CaptionerConfig(hidden_size=8, embedding_size=8), TRAINING, min_count=1)
RANKER = RankerTrainingConfig(
    RankerConfig(hidden_size=8, embedding_size=8, joint_embedding_size=8), TRAINING, min_count=1
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, images: list[str]) -> Path:
    """A captioner and a ranker that were trained on features from a weights file. Tests must not change them."""
    folder = tmp_path_factory.mktemp("trained")
    weights = load_encoder(ENCODER, "cpu").network.network.state_dict()
    halved = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file({**halved, "classifier.1.bias": torch.zeros(1000)}, folder / "own.safetensors")
    write_manifest(folder / "manifest", images)
    config = ExtractionConfig(replace(ENCODER, weights=str(folder / "own.safetensors")))
    run = RunConfig(max_failure_ratio=0.5, progress=False)
    extract_features(folder / "manifest", folder / "features", config, run=run)
    train_captioner(folder / "features", folder / "captioner", CAPTIONER, device="cpu", progress=False)
    train_ranker(folder / "features", folder / "ranker", RANKER, device="cpu", progress=False)
    return folder


@pytest.fixture
def moved(trained: Path, tmp_path: Path) -> Path:
    """A copy of the captioner on a machine without the weights file."""
    folder = shutil.copytree(trained / "captioner", tmp_path / "moved")
    record_weights_path(folder, str(tmp_path / "own.safetensors"))
    return folder


def record_weights_path(folder: Path, path: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["provenance"]["encoder_weights"] = path
    config.pop("crc32", None)
    (folder / "config.json").write_text(json.dumps(config))


def run_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(captionlib, list(map(str, arguments)))


def caption(image: str, folder: Path) -> list[str]:
    rows, failures = caption_images([image], str(folder), device="cpu")
    assert not failures
    return [candidate["caption"] for row in rows for candidate in row["candidates"]]


def test_models_find_the_weights_file_that_their_features_were_extracted_with(trained: Path, images: list[str]) -> None:
    assert open_dataset(trained / "features").encoder_weights == str(trained / "own.safetensors")
    for model in (load_captioner(trained / "captioner"), load_ranker(trained / "ranker")):
        assert model.find_input_transform(None).weights == str(trained / "own.safetensors")
    assert caption(images[0], trained / "captioner")


def test_the_path_of_the_weights_file_does_not_change_the_fingerprint(trained: Path, tmp_path: Path) -> None:
    copy = str(shutil.copy(trained / "own.safetensors", tmp_path / "copy.safetensors"))
    before = open_dataset(trained / "features")
    shutil.copytree(trained / "features", tmp_path / "features")
    config = ExtractionConfig(replace(ENCODER, weights=copy))
    run = RunConfig(max_failure_ratio=0.5, progress=False)
    extract_features(trained / "manifest", tmp_path / "features", config, run=run)
    after = open_dataset(tmp_path / "features").require_complete()
    assert (after.fingerprint, after.encoder_weights) == (before.fingerprint, copy)


def test_a_weights_file_of_the_same_name_in_the_checkpoint_is_found(
    moved: Path, trained: Path, images: list[str]
) -> None:
    shutil.copy(trained / "own.safetensors", moved)
    assert caption(images[0], moved) == caption(images[0], trained / "captioner")


def test_the_weights_of_the_captioner_are_not_those_of_an_encoder_with_the_same_file_name(
    moved: Path, trained: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "encoder" / "model.safetensors"
    record_weights_path(moved, str(weights))
    with pytest.raises(ConfigError, match="which does not exist"):
        load_captioner(moved).find_input_transform(None)
    weights.parent.mkdir()
    shutil.copy(trained / "own.safetensors", weights)
    assert load_captioner(moved).find_input_transform(None).weights == str(weights)


@pytest.mark.parametrize("command", ["caption", "serve"])
def test_a_missing_weights_file_is_reported_before_torch_is_imported(
    command: str, moved: Path, images: list[str], tmp_path: Path
) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "index.json").touch()
    source = images[0] if command == "caption" else str(tmp_path / "index")
    code = "import sys; from jobs.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    arguments = [sys.executable, "-c", code, command, source, "-c", str(moved)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == "False\n"
    expected = f"was loaded from a weights file, {tmp_path}/own.safetensors, which does not exist; specify its path"
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1


def test_update_and_query_report_a_missing_weights_file(moved: Path, images: list[str], tmp_path: Path) -> None:
    assert run_command("init", tmp_path / "new", "--source", images[0], "-c", moved).exit_code == 0
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "index.json").touch()
    for command in (
        ["update", tmp_path / "new"],
        ["query", tmp_path / "index", "--image", images[0], "--captioner", moved],
    ):
        assert "specify its path with --weights" in str(run_command(*command).exception)


def test_a_failure_of_the_storage_is_not_a_missing_weights_file(moved: Path) -> None:
    (weights := moved.parent / "loop.pth").symlink_to("loop.pth")
    message = r"loop\.pth cannot be accessed: Too many levels of symbolic links"
    with pytest.raises(StorageError, match=message):
        require_checkpoint_files(str(moved), str(weights))
    record_weights_path(moved, str(weights))
    captioner = load_captioner(moved)  # does not need the weights file
    with pytest.raises(StorageError, match=message):
        captioner.find_input_transform(None)
    assert captioner.find_input_transform("own.safetensors").weights.endswith("/own.safetensors")


def test_a_wrong_weights_option_and_a_missing_checkpoint_are_reported(moved: Path, images: list[str]) -> None:
    result = run_command("caption", images[0], "-c", moved, "--weights", "nowhere.pth")
    assert isinstance(result.exception, ConfigError)
    assert "--weights nowhere.pth: not found" in str(result.exception)
    result = run_command("caption", images[0], "-c", moved / "nowhere")
    assert isinstance(result.exception, CheckpointError)
    with pytest.raises(ConfigError, match="specify its path with --weights"):
        load_captioner(moved).find_input_transform(None)


def test_an_exported_captioner_works_without_the_weights_file(trained: Path, images: list[str], tmp_path: Path) -> None:
    result = run_command("export-checkpoint", trained / "captioner", "-o", tmp_path / "shared")
    assert result.exit_code == 0, result.output
    assert result.output.endswith("README.md, config.json, encoder.safetensors, model.safetensors, training.json\n")
    text = b"".join(path.read_bytes() for path in (tmp_path / "shared").glob("*.*") if path.suffix != ".safetensors")
    assert str(trained).encode() not in text
    elsewhere = (tmp_path / "shared").rename(tmp_path / "elsewhere")
    assert load_captioner(elsewhere).fingerprint == load_captioner(trained / "captioner").fingerprint
    assert load_captioner(elsewhere).find_input_transform(None).weights == f"{elsewhere}/encoder.safetensors"
    assert caption(images[0], elsewhere) == caption(images[0], trained / "captioner")
    tensors = safetensors.torch.load_file(elsewhere / "encoder.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert "classifier.1.bias" not in tensors
    again = export_checkpoint(elsewhere, tmp_path / "again")
    assert "encoder.safetensors" in again


def test_an_export_without_the_encoder_names_its_hash(trained: Path, tmp_path: Path) -> None:
    names = export_checkpoint(trained / "ranker", tmp_path / "shared", with_encoder=False)
    assert "encoder.safetensors" not in names
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "They come from `own.safetensors`" in card
    assert load_ranker(trained / "ranker").encoder["weights_sha256"] in card
    with pytest.raises(ConfigError, match=r"weights file, own.safetensors, which does not exist"):
        load_ranker(tmp_path / "shared").find_input_transform(None)
    shutil.copy(trained / "own.safetensors", tmp_path / "shared")
    assert load_ranker(tmp_path / "shared").find_input_transform(None).weights == f"{tmp_path}/shared/own.safetensors"


def test_an_export_needs_an_empty_folder_and_the_right_weights(trained: Path, moved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a new or empty folder, got files"):
        export_checkpoint(trained / "captioner", moved)
    other = tmp_path / "other.safetensors"
    tensors = safetensors.torch.load_file(trained / "own.safetensors")
    safetensors.torch.save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, other)
    with pytest.raises(ConfigError, match="are not those of the model's encoder: weights_sha256"):
        export_checkpoint(moved, tmp_path / "shared", weights=str(other))
    with pytest.raises(ConfigError, match="specify its path with --weights"):
        export_checkpoint(moved, tmp_path / "shared")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "shared")
    with pytest.raises(CheckpointError, match="has no datastore"):
        export_checkpoint(trained / "captioner", tmp_path / "shared", with_datastore=True)
    assert not (tmp_path / "shared").exists()


def test_an_interrupted_export_is_repeated(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained / "captioner", tmp_path / "shared")
    (tmp_path / "shared" / "config.json").unlink()  # the file that is written last
    names = export_checkpoint(trained / "captioner", tmp_path / "shared", with_encoder=False)
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == names


def test_a_finished_export_is_repeated_unless_it_was_edited(trained: Path, tmp_path: Path) -> None:
    names = export_checkpoint(trained / "captioner", tmp_path / "shared")
    assert export_checkpoint(trained / "captioner", tmp_path / "shared") == names
    (tmp_path / "shared" / "README.md").write_text("my own words")
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        export_checkpoint(trained / "captioner", tmp_path / "shared")


def read_card(folder: Path) -> tuple[dict[str, str], str]:
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), body


def test_training_writes_a_model_card(trained: Path) -> None:
    header, body = read_card(trained / "captioner")
    assert header == {"license": "unknown", "library_name": "captionlib", "pipeline_tag": "image-to-text"}
    assert body.startswith(
        "\n# Captioner\n\nThis model generates captions of images. It is an LSTM, trained with captionlib"
    )
    titles = [line.removeprefix("## ") for line in body.splitlines() if line.startswith("## ")]
    assert titles == ["Use", "Training data", "Recipe", "Scores", "Intended use", "Limits", "License"]
    assert "| training: train, restval | 5 | 10 |" in body
    assert "| validation: val, dev | 3 | 6 |" in body
    history = load_captioner(trained / "captioner").training["history"]
    assert f"| perplexity | {history[-1]['perplexity']:.4g} |" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe["architecture"]["hidden_size"] == 8
    assert recipe["training"]["epochs"] == 2
    assert str(trained) not in body
    assert "mean_recall" in read_card(trained / "ranker")[1]


def test_an_export_writes_license_data_and_scores_with_intervals(trained: Path, tmp_path: Path) -> None:
    direction = {"recall_at_1": 0.25, "recall_at_5": 0.5, "recall_at_10": 1, "median_rank": 3.0, "mean_rank": 4.0}
    scores = {
        "captions": {"scores": {"CIDEr": 0.5}, "intervals": {"CIDEr": [0.4, 0.6]}},
        "ranker": {"image_to_text": direction, "text_to_image": direction},
        "invalid": {},
    }
    for name, content in scores.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"splits": ["test"], "images": 1000, **content}))
    options = [word for name in ("captions", "ranker") for word in ("--scores", tmp_path / f"{name}.json")]
    arguments = ["export-checkpoint", trained / "captioner", "-o", tmp_path / "shared"]
    assert run_command(*arguments, *options, "--license", "cc-by-4.0", "--data", "Eight colors.").exit_code == 0
    header, body = read_card(tmp_path / "shared")
    assert header["license"] == "cc-by-4.0"
    assert "Eight colors." in body
    assert "On test, 1,000 images:" in body
    assert "| CIDEr | 0.5 | 0.4 to 0.6 |" in body
    assert "| image to text | 25.0% | 50.0% | 100.0% | 3 |" in body
    result = run_command(*arguments, "--scores", tmp_path / "invalid.json")
    assert "expected a scores.json from `captionlib evaluate --output`" in str(result.exception)
    assert isinstance(run_command(*arguments, "--scores", tmp_path / "nowhere.json").exception, DatasetError | OSError)
