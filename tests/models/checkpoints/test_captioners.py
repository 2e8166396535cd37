import json
from pathlib import Path
from typing import Any

import pytest
import torch

from captionlib.data.shards.markers import from_json_with_checksum, to_json_with_checksum
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.checkpoints.checkpoint import load_captioner, save_captioner
from captionlib.models.checkpoints.folder import read_checkpoint, write_checkpoint
from captionlib.storage.folders import Folder

VOCABULARY = Vocabulary.from_captions(["a red dog", "a blue cat"], min_count=1)
ENCODER = {"model": "vgg16", "node": "fc7", "preprocessing": {"crop_size": 224, "mean": (0.5, 0.25, 0.125)}}
CONFIG = CaptionerConfig(hidden_size=4, embedding_size=4, layers=2)
FEATURES = torch.linspace(-1, 1, 6).view(2, 3)
CAPTIONS = torch.tensor([[2, 3], [4, 5]])


def build(config: CaptionerConfig = CONFIG, seed: int = 0) -> CaptionerNetwork:
    torch.manual_seed(seed)
    model = CaptionerNetwork(config, feature_size=3, vocabulary_size=len(VOCABULARY)).eval()
    model.standardization.set_statistics(FEATURES.mean(0), FEATURES.std(0))
    return model


def save(folder: Any, model: CaptionerNetwork, **changes: Any) -> str:
    options: dict[str, Any] = {"provenance": {"dataset": "abc"}, "training": {"perplexity": 17.3}}
    options |= {"vocabulary": VOCABULARY, "encoder": ENCODER} | changes
    return save_captioner(folder, model, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "model", build())
    return tmp_path / "model"


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("address", ["{tmp_path}/model", "memory://{tmp_path}/model"])
def test_save_and_load_round_trip(cell: Any, tie_embeddings: bool, address: str, tmp_path: Path) -> None:
    model = build(CaptionerConfig(cell, hidden_size=4, embedding_size=4, tie_embeddings=tie_embeddings))
    address = address.format(tmp_path=tmp_path)
    fingerprint = save(address, model)
    loaded = load_captioner(address)
    rows = torch.tensor([0, 1])
    expected = model(FEATURES, CAPTIONS, rows).log_probs
    assert torch.equal(loaded.model(FEATURES, CAPTIONS, rows).log_probs, expected)
    assert (loaded.model.output.weight is loaded.model.word_vectors.weight) == tie_embeddings
    assert not loaded.model.training
    assert (loaded.vocabulary, loaded.config, loaded.fingerprint) == (VOCABULARY, model.config, fingerprint)
    assert (loaded.provenance, loaded.training) == ({"dataset": "abc"}, {"perplexity": 17.3})
    assert loaded.encoder["preprocessing"]["mean"] == [0.5, 0.25, 0.125]


def test_loading_keeps_callers_random_state(folder: Path) -> None:
    before = torch.get_rng_state()
    load_captioner(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_fingerprint_covers_everything_that_determines_output(tmp_path: Path) -> None:
    original = save(tmp_path / "1", build())
    assert save(tmp_path / "2", build(), training={"perplexity": 1}, provenance={}) == original
    others = [
        save(tmp_path / "3", build(seed=1)),
        save(tmp_path / "4", build(), encoder={**ENCODER, "node": "fc6"}),
        save(tmp_path / "5", build(), vocabulary=Vocabulary.from_captions(["a red dog", "a blue cow"], min_count=1)),
    ]
    assert len({original, *others}) == 4


def test_saving_replaces_previous_checkpoint(folder: Path) -> None:
    fingerprint = save(folder, build(seed=1))
    assert load_captioner(folder).fingerprint == fingerprint


def test_failed_save_keeps_previous_checkpoint(folder: Path) -> None:
    before = load_captioner(folder).fingerprint
    with pytest.raises(TypeError):
        save(folder, build(seed=1), training={"perplexity": object()})
    assert load_captioner(folder).fingerprint == before


def test_require_encoder_accepts_own_encoder(folder: Path) -> None:
    load_captioner(folder).require_encoder(ENCODER)


def test_require_encoder_names_differing_fields(folder: Path) -> None:
    other = {"model": "vgg16", "node": "fc6", "preprocessing": {"crop_size": 224, "mean": (0.5, 0.25, 0.5)}}
    with pytest.raises(CheckpointError) as caught:
        load_captioner(folder).require_encoder(other)
    assert "node: expected 'fc7', got 'fc6'" in str(caught.value)
    assert "preprocessing.mean: expected [0.5, 0.25, 0.125], got [0.5, 0.25, 0.5]" in str(caught.value)
    assert "crop_size" not in str(caught.value)


def test_save_rejects_vocabulary_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vocabulary of 7 tokens, got one of 4"):
        save(tmp_path, build(), vocabulary=Vocabulary.from_captions(["a dog"], min_count=1))


def test_load_rejects_missing_device(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cuda:99"):
        load_captioner(folder, device="cuda:99")


def edit_config(folder: Path, **changes: Any) -> None:
    config = from_json_with_checksum((folder / "config.json").read_bytes())
    (folder / "config.json").write_bytes(to_json_with_checksum(config | changes))


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])


def mix_with_another(folder: Path) -> None:
    save(folder.parent / "other", build(seed=1))
    (folder.parent / "other" / "model.safetensors").replace(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "config.json").unlink(),
            "is not a checkpoint: expected a folder with config.json",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: Expecting property name"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json: nested too deeply"),
        (lambda folder: (folder / "config.json").write_text('{"a": ' * 500 + "1" + "}" * 500), "nested too deeply"),
        (lambda folder: (folder / "config.json").write_text("9" * 5000), "config.json: Exceeds the limit"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: expected an object, got list"),
        (lambda folder: (folder / "config.json").write_text('{"a": 1}'), "kind captioner, got one of unknown kind"),
        (damage_weights, "expected model.safetensors with SHA-256"),
        (mix_with_another, "expected model.safetensors with SHA-256"),
        (lambda folder: edit_config(folder, encoder={"model": "vgg19"}), "does not match its fingerprint"),
        (lambda folder: edit_config(folder, kind="ranker"), "kind captioner, got ranker"),
        (lambda folder: edit_config(folder, format_version=99), r"expected format version \d+, got 99"),
    ],
)
def test_load_rejects_damaged_checkpoint(spoil: Any, message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_captioner(folder)


def test_load_rejects_missing_folder_and_plain_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("nowhere", "file"):
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            load_captioner(tmp_path / name)


def test_load_rejects_weights_of_another_shape(tmp_path: Path) -> None:
    save(tmp_path, build())
    whole = read_checkpoint(tmp_path, "captioner")
    tensors = {**whole.tensors, "output.bias": torch.zeros(3)}
    write_checkpoint(tmp_path, "captioner", tensors, whole.identity, {}, {})
    with pytest.raises(CheckpointError, match=r"ValueError: output.bias: expected shape \[7\], got \[3\]; copy"):
        load_captioner(tmp_path)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 10**6},
        {"embedding_size": 10**12},
        {"feature_size": 10**12},
        {"feature_size": 10**30},
        {"layers": 10**9},
        {"layers": 100, "hidden_size": 10**5},
        {"feature_size": -1},
        {"feature_size": None},
        {"principal_components": 10**9},
    ],
)
def test_load_rejects_sizes_that_the_weights_do_not_have(folder: Path, sizes: dict[str, Any]) -> None:
    """Building the network that config.json describes would take terabytes."""
    whole = read_checkpoint(folder, "captioner")
    identity = {**whole.identity, "architecture": {**whole.identity["architecture"], **sizes}}
    write_checkpoint(folder, "captioner", whole.tensors, identity, {}, {})
    with pytest.raises(CheckpointError, match=r"is damaged: .*; copy it again, or train again$") as raised:
        load_captioner(folder)
    assert "\n" not in str(raised.value)


def test_save_and_load_accept_folder_objects(tmp_path: Path) -> None:
    fingerprint = save(Folder(tmp_path), build())
    assert load_captioner(Folder(tmp_path)).fingerprint == fingerprint


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_load_notices_flipped_bits(name: str, folder: Path) -> None:
    content = (folder / name).read_bytes()
    expected = json.loads((folder / "config.json").read_text())
    for bit in range(0, len(content) * 8, len(content) * 8 // 100):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(changed)
        try:
            load_captioner(folder)
        except CheckpointError:
            continue
        assert name == "config.json", bit
        assert {**expected, "crc32": ""} == {**json.loads(bytes(changed)), "crc32": ""}, bit  # white space, or its name
