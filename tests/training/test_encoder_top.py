from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.errors import ConfigError, TrainingInterrupted
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.encoders.top_layers import EncoderTop
from captionlib.models.inference.captioning import GenerationConfig
from captionlib.models.inference.extraction import ExtractionConfig
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig
from captionlib.training.self_critical import SelfCriticalConfig
from pipelines.extract_features import extract_features
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig
from tests.pipelines.conftest import images, write_manifest

__all__ = ["images"]

NODE = "features.3.squeeze_activation"
RUN = RunConfig(max_failure_ratio=0.5, progress=False)
CONFIG = CaptionerTrainingConfig(
    captioner=CaptionerConfig(hidden_size=16, embedding_size=16, dropout=0.1, encoder_top=NODE),
    training=TrainingConfig(epochs=3, optimizer="adam", learning_rate=0.03, seed=3, unigram_patience=None),
    encoder_top_learning_rate=1e-3,
    random_crop=0.3,
    horizontal_flip=True,
    min_count=1,
    batch_images=3,
)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory, images: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("maps")
    write_manifest(folder / "manifest", images)
    encoder = EncoderConfig("squeezenet1_1", "features.2", "random:0")
    extract_features(folder / "manifest", folder / "features", ExtractionConfig(encoder, batch_size=3), run=RUN)
    return folder / "features"


def train(features: Path, output: Path, config: CaptionerTrainingConfig = CONFIG) -> dict[str, Tensor]:
    train_captioner(features, output, config, device="cpu", progress=False)
    return load_captioner(output).model.state_dict()


def initial_encoder_top(features: Path) -> dict[str, Tensor]:
    encoder_top = EncoderTop(open_dataset(features).config["encoder"], NODE)
    encoder_top.load_weights(None)
    return {f"encoder_top.{name}": tensor for name, tensor in encoder_top.state_dict().items()}


def test_encoder_top_is_trained_unless_its_learning_rate_is_zero(maps: Path, tmp_path: Path) -> None:
    before = initial_encoder_top(maps)
    assert before
    tuned = train(maps, tmp_path / "tuned")
    assert not any(torch.equal(tuned[name], tensor) for name, tensor in before.items() if "weight" in name)
    kept = train(maps, tmp_path / "kept", replace(CONFIG, encoder_top_learning_rate=0))
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("attention_size", [0, 8])
def test_captions_are_the_same_from_images_and_from_stored_maps(
    maps: Path, tmp_path: Path, attention_size: int
) -> None:
    shape = replace(CONFIG.captioner, attention_size=attention_size, image_input="initial_state")
    train(maps, tmp_path / "captioner", replace(CONFIG, captioner=shape))
    config = GenerationConfig(DecodingConfig(min_words=3))
    captions = []
    for number, source in enumerate((maps, maps.parent / "manifest")):
        output = tmp_path / f"captions-{number}"
        generate_captions(source, tmp_path / "captioner", output, config, device="cpu", run=RUN)
        captions.append(rows(open_dataset(output)))
    assert len({log_prob for *_, log_prob in captions[0]}) == len(captions[0])  # each image has a different caption
    assert [row[:2] for row in captions[0]] == [row[:2] for row in captions[1]]
    assert [row[2] for row in captions[0]] == pytest.approx([row[2] for row in captions[1]], abs=1e-3)


def test_captioner_of_bfloat16_features_can_be_loaded(images: list[str], tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest", images)
    config = ExtractionConfig(EncoderConfig("squeezenet1_1", "features.2", "random:0", dtype="bfloat16"), batch_size=3)
    extract_features(tmp_path / "manifest", tmp_path / "features", config, run=RUN)
    weights = train(tmp_path / "features", tmp_path / "captioner")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_attention_maps_have_the_shape_of_the_encoder_top(maps: Path, tmp_path: Path) -> None:
    smaller = "features.5"  # 27 x 27 of 55 x 55
    config = replace(CONFIG, captioner=replace(CONFIG.captioner, attention_size=8, encoder_top=smaller))
    train(maps, tmp_path / "captioner", config)
    output = tmp_path / "captions"
    generate_captions(
        maps, tmp_path / "captioner", output, GenerationConfig(attention_maps=True), device="cpu", run=RUN
    )
    attention_maps = open_dataset(output).read(0).to_pylist()[0]["attention"]
    assert all(len(weights) == 27 * 27 and sum(weights) == pytest.approx(1, abs=0.01) for weights in attention_maps)


def rows(dataset: ShardedDataset) -> list[tuple[str, str, float]]:
    return [
        (row["image_id"], row["caption"], row["log_prob"])
        for shard in range(dataset.shards)
        for row in dataset.read(shard).to_pylist()
    ]


def test_stopped_run_resumes_to_the_same_weights(maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(maps, tmp_path / "whole")
    requests = iter([False, False, False, True])

    @contextmanager
    def catch_stop_signals(abort_on_repeat: bool) -> Iterator[Callable[[], bool]]:
        yield lambda: next(requests)

    with monkeypatch.context() as patched:
        patched.setattr("captionlib.training.loop.catch_stop_signals", catch_stop_signals)
        with pytest.raises(TrainingInterrupted):
            train(maps, tmp_path / "stopped")
    again = train(maps, tmp_path / "stopped")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_self_critical_training_continues_to_train_the_encoder_top(maps: Path, tmp_path: Path) -> None:
    first = train(maps, tmp_path / "first")
    config = replace(
        CONFIG,
        captioner=CaptionerConfig(),
        objective="self_critical",
        self_critical=SelfCriticalConfig(samples=2),
        training=replace(CONFIG.training, epochs=1, learning_rate=1e-3),
        init_from=str(tmp_path / "first"),
    )
    second = train(maps, tmp_path / "second", config)
    changed = {name for name, tensor in first.items() if not torch.equal(second[name], tensor)}
    assert "output.weight" in changed
    assert f"encoder_top.network.{NODE.rsplit('_', 1)[0]}.weight" in changed


def test_weights_option_needs_an_encoder_top(maps: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, captioner=replace(CONFIG.captioner, encoder_top=None))
    with pytest.raises(ConfigError, match=r"--weights: expected only for a new captioner with captioner\.encoder_top"):
        train_captioner(maps, tmp_path / "captioner", config, weights="file.safetensors", device="cpu", progress=False)
    with pytest.raises(
        ConfigError, match="encoder_top_learning_rate: Input should be greater than or equal to 0, got -1"
    ):
        replace(CONFIG, encoder_top_learning_rate=-1)
