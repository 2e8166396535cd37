import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from captionlib.config import load_config
from captionlib.data.images.decoder_pool import DecoderConfig
from captionlib.data.images.loading import LoadingConfig
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import CheckpointError, ConfigError, DatasetError, FailureRatioError
from captionlib.evaluation.perplexity import measure_perplexity
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.captioners.end_to_end import ImageCaptioner
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner, load_captioner, save_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.encoders.encoder import EncoderConfig, load_encoder
from captionlib.models.encoders.network import list_parameters_before
from captionlib.training.caption_objective import CaptioningObjective
from captionlib.training.finetuning import EncoderFinetuningConfig, FinetuningConfig, finetune_captioner
from captionlib.training.loop import TrainingConfig
from tests.pipelines.conftest import COLORS, images, manifest

__all__ = ["images", "manifest"]

ENCODER = EncoderConfig(
    "squeezenet1_1", "features.3.squeeze_activation", "random:0", pooling="mean", stored_dtype="float32"
)
CONFIG = FinetuningConfig(
    encoder=EncoderFinetuningConfig(learning_rate=1e-4, from_node="features.3"),
    training=TrainingConfig(epochs=2, optimizer="adam", learning_rate=0.03, checkpoint_interval_seconds=0, seed=3),
    batch_images=3,
    horizontal_flip=True,
    loading=LoadingConfig(threads=2, decode=DecoderConfig(processes=1)),
    max_failure_ratio=0.3,
)


def write_captioner(folder: Path, encoder: EncoderConfig = ENCODER) -> LoadedCaptioner:
    """Writes an untrained captioner."""
    description = load_encoder(encoder, "cpu").description
    vocabulary = Vocabulary.from_captions([f"a {colour} field all of it is" for colour in COLORS], 1)
    torch.manual_seed(0)
    shape = CaptionerConfig(hidden_size=16, embedding_size=16, dropout=0.1, standardize_features=False)
    model = CaptionerNetwork(shape, description["shape"][-1], len(vocabulary))
    save_captioner(folder, model, vocabulary, description, provenance={}, training={})
    return load_captioner(folder)


@pytest.fixture
def start(tmp_path: Path) -> LoadedCaptioner:
    return write_captioner(tmp_path / "start")


def finetune(
    manifest: ShardedDataset, output: Path, config: FinetuningConfig = CONFIG, **options: Any
) -> list[dict[str, float]]:
    config = replace(config, init_from=config.init_from or str(output.parent / "start"))
    return finetune_captioner(manifest.folder.uri, output, config, device="cpu", progress=False, **options)


def encoder_of(captioner: LoadedCaptioner) -> dict[str, Tensor]:
    config = captioner.find_input_transform(None)
    return load_encoder(config, "cpu").network.export_weights()


def test_trains_captioner_and_unfrozen_encoder_layers(
    manifest: ShardedDataset, start: LoadedCaptioner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = finetune(manifest, tmp_path / "tuned", replace(CONFIG, training=replace(CONFIG.training, epochs=4)))
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    tuned = load_captioner(tmp_path / "tuned")
    before, after = encoder_of(start), encoder_of(tuned)
    changed = {name for name, values in before.items() if not torch.equal(values, after[name])}
    assert changed == {name for name in before if name.startswith("features.3.")}
    assert (tuned.config, tuned.vocabulary) == (start.config, start.vocabulary)
    assert not torch.equal(tuned.model.output.weight, start.model.output.weight)
    assert tuned.provenance["init_from"]["fingerprint"] == start.fingerprint
    failures = pq.read_table(tmp_path / "tuned" / "__failures" / "part-00000.parquet").to_pylist()
    assert {row["image_id"]: row["stage"] for row in failures} == {"broken.png": "decode", "missing.png": "fetch"}
    assert "2 of 10 images are unreadable" in capsys.readouterr().err


def test_validation_perplexity_is_that_of_whole_captions(
    manifest: ShardedDataset, start: LoadedCaptioner, tmp_path: Path
) -> None:
    training = replace(CONFIG.training, unigram_patience=None)
    history = finetune(manifest, tmp_path / "tuned", replace(CONFIG, max_words=1, training=training))
    rows = [row for shard in range(manifest.shards) for row in manifest.read(shard).to_pylist()]
    references = {row["image_id"]: row["captions"] for row in rows if row["split"] == "val" and row["captions"]}
    metric = measure_perplexity(tmp_path / "tuned", manifest.folder.uri, references, "cpu")
    assert min(row["perplexity"] for row in history) == pytest.approx(metric.formula(metric.rows.sum(0))[0], rel=1e-3)


def test_checkpoint_contains_the_finetuned_encoder(
    manifest: ShardedDataset, start: LoadedCaptioner, tmp_path: Path
) -> None:
    finetune(manifest, tmp_path / "tuned", replace(CONFIG, training=replace(CONFIG.training, epochs=1)))
    tuned = load_captioner(tmp_path / "tuned")
    weights = str(tmp_path / "tuned" / "encoder.safetensors")
    assert tuned.find_input_transform(None).weights == weights
    assert {name for name, value in tuned.encoder.items() if value != start.encoder[name]} == {
        "weights",
        "weights_sha256",
    }
    whole = replace(ENCODER, weights=weights, missing_weights="random:5")  # not used
    tuned.require_encoder(load_encoder(whole, "cpu").description)
    with pytest.raises(CheckpointError, match="weights_sha256"):
        tuned.require_encoder(start.encoder)
    config = replace(CONFIG, init_from=str(tmp_path / "tuned"))
    finetune(manifest, tmp_path / "further", config)  # starts from its own encoder
    further = load_captioner(tmp_path / "further")
    assert further.encoder["weights_sha256"] not in {tuned.encoder["weights_sha256"], start.encoder["weights_sha256"]}


def test_encoder_and_captioner_have_their_own_learning_rates(
    manifest: ShardedDataset, start: LoadedCaptioner, tmp_path: Path
) -> None:
    training = replace(CONFIG.training, epochs=1, learning_rate=1e-2, clip_value=None)
    config = replace(CONFIG, training=training, encoder=EncoderFinetuningConfig(1e-5), batch_images=8)
    history = finetune(manifest, tmp_path / "tuned", config)
    assert history[0]["learning_rate"] == 1e-2
    tuned = load_captioner(tmp_path / "tuned")
    before, after = encoder_of(start), encoder_of(tuned)
    # Adam's first step is as long as the learning rate, whatever the gradient.
    steps = [float((after[name] - values).abs().max()) for name, values in before.items()]
    assert max(steps) == pytest.approx(1e-5, rel=0.05)
    assert min(steps) > 0  # all layers are fine-tuned
    step = (tuned.model.output.weight - start.model.output.weight).abs().max().item()
    assert step == pytest.approx(1e-2, rel=0.05)


def test_encoder_stays_in_evaluation_mode() -> None:
    encoder = load_encoder(EncoderConfig("mobilenet_v2", "features.1.conv.2", "random:0", pooling="mean"), "cpu", True)
    model = ImageCaptioner(
        encoder.network, CaptionerNetwork(CaptionerConfig(hidden_size=4, embedding_size=4), 16, 7)
    ).train()
    before = {name: values.clone() for name, values in encoder.network.export_weights().items()}
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    seen = model.encoder(pixels)
    model(pixels, pad_sentences([[4, 5], [5]]), torch.tensor([0, 1])).log_probs.sum().backward()
    assert all(torch.equal(values, encoder.network.export_weights()[name]) for name, values in before.items())
    assert all(parameter.grad is not None for parameter in encoder.network.parameters())
    torch.testing.assert_close(encoder.encode(pixels.numpy()), seen.detach().half().numpy())
    assert model.captioner.training
    assert not any(module.training for module in model.encoder.modules())


def test_validation_rejects_features_beyond_the_stored_dtype() -> None:
    encoder = load_encoder(EncoderConfig("mobilenet_v2", "features.1.conv.2", "random:0", pooling="mean"), "cpu", True)
    model = ImageCaptioner(
        encoder.network, CaptionerNetwork(CaptionerConfig(hidden_size=4, embedding_size=4), 16, 7)
    ).eval()
    with torch.no_grad():
        for parameter in encoder.network.parameters():
            parameter.mul_(1e4)
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    with pytest.raises(DatasetError, match="overflow float16"):
        model(pixels, pad_sentences([[4, 5], [5]]), torch.tensor([0, 1]))


def test_bfloat16_encoder_keeps_float32_weights(manifest: ShardedDataset, tmp_path: Path) -> None:
    start = write_captioner(tmp_path / "start", replace(ENCODER, dtype="bfloat16"))
    finetune(manifest, tmp_path / "tuned", replace(CONFIG, encoder=EncoderFinetuningConfig(1e-6), batch_images=8))
    tuned = load_captioner(tmp_path / "tuned")
    assert tuned.encoder["dtype"] == "bfloat16"
    network = load_encoder(EncoderConfig.from_description(start.encoder), "cpu", trainable=True).network
    pixels = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8)
    exact = load_encoder(ENCODER, "cpu").network(pixels)
    assert 0 < (network(pixels) - exact).abs().max() < 0.05 * exact.abs().max()
    saved = safe_weights(tmp_path / "tuned" / "encoder.safetensors")
    for name, values in network.export_weights().items():
        assert saved[name].dtype == torch.float32
        assert 0 < (saved[name] - values).abs().max() < 1e-5


def safe_weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def crash_at(wanted: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes training crash at a step; returns a list that collects the sizes of the batches before it."""
    loss: Callable[..., Any] = CaptioningObjective.loss
    sizes: list[int] = []

    def crash(self: CaptioningObjective[ImageCaptioner], batch: Any) -> Any:
        if len(sizes) == wanted:
            raise RuntimeError("crash")
        sizes.append(len(batch.features))
        return loss(self, batch)

    monkeypatch.setattr(CaptioningObjective, "loss", crash)
    return sizes


@pytest.mark.parametrize("crash_step", [1])
def test_crashed_run_resumes_bit_for_bit_and_loads_only_the_rest(
    manifest: ShardedDataset, start: LoadedCaptioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_step: int
) -> None:
    uninterrupted = finetune(manifest, tmp_path / "uninterrupted")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        crash_at(crash_step, patch)
        finetune(manifest, tmp_path / "crashed")
    with monkeypatch.context() as patch:
        sizes = crash_at(99, patch)
        config = replace(CONFIG, loading=replace(CONFIG.loading, threads=1), max_failure_ratio=0.4)  # may change
        resumed = finetune(manifest, tmp_path / "crashed", config)
    assert sum(sizes) < 2 * 6  # six of the ten images are readable and in train
    for row, expected in zip(resumed, uninterrupted, strict=True):
        assert all(row[name] == expected[name] for name in ("epoch", "loss", "perplexity"))
    one, two = (load_captioner(tmp_path / name) for name in ("uninterrupted", "crashed"))
    assert one.encoder == two.encoder
    assert all(torch.equal(values, two.model.state_dict()[name]) for name, values in one.model.state_dict().items())
    with pytest.raises(DatasetError, match=r"encoder.learning_rate: was 0.0001, now 0.5"):
        finetune(manifest, tmp_path / "crashed", replace(CONFIG, encoder=EncoderFinetuningConfig(0.5, "features.3")))


def test_too_many_unreadable_images_fail_the_run(
    manifest: ShardedDataset, start: LoadedCaptioner, tmp_path: Path
) -> None:
    with pytest.raises(
        FailureRatioError, match=r"2 of 10 images are unreadable \(.*: 1, .*: 1\); the run allows 10.0%"
    ):
        finetune(manifest, tmp_path / "tuned", replace(CONFIG, max_failure_ratio=0.1))
    assert (tmp_path / "tuned" / "__failures" / "part-00000.parquet").exists()
    assert not (tmp_path / "tuned" / "config.json").exists()


def test_rejects_what_cannot_be_finetuned(manifest: ShardedDataset, start: LoadedCaptioner, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"init_from: expected a captioner to fine-tune .*, got none"):
        finetune_captioner(manifest.folder.uri, tmp_path / "tuned", CONFIG, device="cpu")
    for node, message in (
        (
            "features.9",
            "at or after features.9, got none, because the encoder ends at features.3.squeeze_activation",
        ),
        ("features.99", "squeezenet1_1 has no node 'features.99'; similar nodes"),
    ):
        with pytest.raises(ConfigError, match=message):
            finetune(manifest, tmp_path / "tuned", replace(CONFIG, encoder=EncoderFinetuningConfig(from_node=node)))
    with pytest.raises(ConfigError, match="is also the output of this run"):
        finetune(manifest, tmp_path / "start")
    with pytest.raises(DatasetError, match="expected captions in split other, got none"):
        finetune(manifest, tmp_path / "tuned", replace(CONFIG, validation_splits=("other",)))
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="lack 3 of the 4 tensors"):
        finetune(manifest, tmp_path / "tuned", weights=str(tmp_path / "other.pth"))
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    "values", [{"batch_images": 0}, {"label_smoothing": 1.0}, {"max_failure_ratio": 1.5}, {"max_words": 0}]
)
def test_rejects_values_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))}: Input should be"):
        dataclasses.replace(CONFIG, **values)


def test_recipe_is_valid() -> None:
    config = load_config(
        FinetuningConfig, Path(__file__).parents[2] / "configs" / "train-captioner/finetune-encoder.yaml"
    )
    assert (config.encoder.learning_rate, config.horizontal_flip, config.training.optimizer) == (1e-5, True, "adam")


def test_lists_parameters_before_a_node_or_module() -> None:
    assert list_parameters_before("squeezenet1_1", "features.0") == set()
    assert list_parameters_before("squeezenet1_1", "features.3.squeeze") == {"features.0.weight", "features.0.bias"}
    before = list_parameters_before("resnet18", "layer2")
    assert {name.split(".")[0] for name in before} == {"conv1", "bn1", "layer1"}
    assert "layer1.1.bn2.running_var" in before


@pytest.mark.skipif(shutil.which("java") is None, reason="CIDEr's tokenizer needs Java")
def test_epoch_with_best_cider_is_saved(manifest: ShardedDataset, start: LoadedCaptioner, tmp_path: Path) -> None:
    config = replace(CONFIG, best_by="cider", decoding=DecodingConfig(beam_width=1), validation_splits=("val", "train"))
    history = finetune(manifest, tmp_path / "tuned", config)
    kept = json.loads((tmp_path / "tuned" / "training.json").read_text())["history"]
    assert kept[-1]["CIDEr"] == max(row["CIDEr"] for row in history)
