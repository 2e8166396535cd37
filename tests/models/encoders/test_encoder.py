import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from zipfile import ZIP_DEFLATED, ZipFile

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from fsspec.implementations.memory import MemoryFileSystem
from torchvision.models.feature_extraction import create_feature_extractor

from captionlib.errors import CaptionlibError, ConfigError, DatasetError, StorageError
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.encoder import EncoderConfig, PendingFeatures, load_encoder
from captionlib.models.encoders.weights import (
    _copy_to_temporary_folder,
    _read_file,
    hash_weights,
    sample_weights,
    serialize_weights,
)
from captionlib.models.inference.extraction import load_shared_encoder

SMALL = EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", stored_dtype="float32")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)


def small_state(seed: int = 0) -> dict[str, torch.Tensor]:
    return sample_weights(torchvision.models.squeezenet1_1(weights=None), f"random:{seed}")


def test_features_equal_those_of_torchvision(tmp_path: Path, pixels: np.ndarray) -> None:
    model = torchvision.models.squeezenet1_1(weights=None).eval()
    model.load_state_dict(small_state())
    safetensors.torch.save_file(small_state(), tmp_path / "w.safetensors")
    encoder = load_encoder(dataclasses.replace(SMALL, weights=str(tmp_path / "w.safetensors")))
    network = create_feature_extractor(model, ["features.4.cat"])
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        expected = network(normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255))["features.4.cat"]
    assert encoder.shape == [55 * 55, 128]
    np.testing.assert_allclose(
        encoder.encode(pixels), expected.flatten(2).transpose(1, 2).numpy(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small"])
def test_fused_batch_normalizations_do_not_change_features(model: str, pixels: np.ndarray) -> None:
    config = EncoderConfig(model, "avgpool", "random:0", stored_dtype="float32")
    fused, separate = (load_encoder(config, "cpu", trainable) for trainable in (False, True))
    norms = [
        sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in each.network.modules()) for each in (fused, separate)
    ]
    assert norms[0] == 0 < norms[1]
    expected = separate.encode(pixels)
    np.testing.assert_allclose(fused.encode(pixels), expected, atol=1e-5 * expected.max())


def test_pooling_reduces_over_positions(pixels: np.ndarray) -> None:
    whole = load_encoder(SMALL).encode(pixels)
    for pooling, expected in (("mean", whole.mean(1)), ("max", whole.max(1))):
        encoder = load_encoder(dataclasses.replace(SMALL, pooling=pooling))
        assert encoder.shape == [128]
        np.testing.assert_allclose(encoder.encode(pixels), expected, rtol=1e-4, atol=1e-5)


def test_fc7_of_a_vgg_has_4096_values_after_relu() -> None:
    encoder = load_encoder(EncoderConfig("vgg11", "fc7", "random:0"))
    features = encoder.encode(np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8))
    assert features.shape == (1, 4096)
    assert features.dtype == np.float16
    assert features.min() == 0
    assert 0.2 < (features > 0).mean() < 0.8


def test_bfloat16_features_are_close_to_float32(pixels: np.ndarray) -> None:
    exact = load_encoder(dataclasses.replace(SMALL, pooling="mean")).encode(pixels)
    rounded = load_encoder(dataclasses.replace(SMALL, pooling="mean", dtype="bfloat16")).encode(pixels)
    cosine = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_description_depends_on_the_content_of_a_weights_file_not_its_path(tmp_path: Path, suffix: str) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "pth":
            torch.save(small_state(seed), path)
        else:
            safetensors.torch.save_file(small_state(seed), path)
    same, moved, other = (
        load_encoder(dataclasses.replace(SMALL, weights=str(tmp_path / f"{name}.{suffix}"))).description
        for name in "abc"
    )
    assert same == moved
    assert same["weights_sha256"] != other["weights_sha256"]
    assert str(tmp_path) not in str(same)


def test_a_seed_always_samples_the_same_weights() -> None:
    assert load_encoder(SMALL).description == load_encoder(SMALL).description
    assert hash_weights(small_state(0)) != hash_weights(small_state(1))


def test_missing_layers_are_reported_or_sampled(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in small_state().items() if not name.startswith("features.3")}
    path = tmp_path / "trunk.safetensors"
    safetensors.torch.save_file(state, path)
    config = dataclasses.replace(SMALL, weights=str(path))
    with pytest.raises(ConfigError, match=r"lack 6 of the 14 tensors .* features.3.expand1x1.bias"):
        load_encoder(config)
    sampled = load_encoder(dataclasses.replace(config, missing_weights="random:3"))
    assert sampled.description["missing_weights"] == "random:3"
    assert load_encoder(dataclasses.replace(config, node="features.2")).shape == [55 * 55, 64]


def test_weights_of_another_network_are_rejected(tmp_path: Path) -> None:
    state = {**small_state(), "features.0.weight": torch.zeros(64, 3, 5, 5)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        ConfigError, match=r"features.0.weight has shape \[64, 3, 5, 5\], but squeezenet1_1 expects \[64, 3, 3, 3\]"
    ):
        load_encoder(dataclasses.replace(SMALL, weights=str(tmp_path / "w.safetensors")))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_files_that_are_not_weights_are_rejected(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_encoder(dataclasses.replace(SMALL, weights=str(tmp_path / name)))


def test_weights_are_read_from_any_file_system_but_not_from_a_chain(tmp_path: Path) -> None:
    safetensors.torch.save_file(small_state(5), tmp_path / "w.safetensors")
    address = f"memory://{tmp_path.name}/w.safetensors"
    fsspec.filesystem("memory").pipe(address, (tmp_path / "w.safetensors").read_bytes())
    expected = load_encoder(dataclasses.replace(SMALL, weights="random:5")).description["weights_sha256"]
    for weights in (address, f"file://{tmp_path}/w.safetensors", str(tmp_path / "w.safetensors")):
        assert load_encoder(dataclasses.replace(SMALL, weights=weights)).description["weights_sha256"] == expected
    with pytest.raises(ConfigError, match="chains file systems"):
        load_encoder(dataclasses.replace(SMALL, weights=f"reference::{address}"))


def test_errors_distinguish_missing_weights_from_a_failing_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, weights="memory://missing/w.safetensors")
    with pytest.raises(ConfigError, match=r"missing/w.safetensors: file not found"):
        load_encoder(config)
    monkeypatch.setattr(MemoryFileSystem, "get_file", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(StorageError, match="cannot be accessed: Permission denied"):
        load_encoder(config)


def test_threads_share_the_copy_of_a_remote_weights_file(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/shared.pth", b"content")
    copy_file = MemoryFileSystem.get_file

    def copy_slowly(*arguments: Any) -> None:
        time.sleep(0.2)
        copy_file(*arguments)

    monkeypatch.setattr(MemoryFileSystem, "get_file", copy_slowly)
    with ThreadPoolExecutor() as threads:
        folders = set(threads.map(lambda _: _copy_to_temporary_folder("memory://shared.pth").name, range(2)))
    assert len(folders) == 1


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_errors_do_not_quote_the_content_of_a_weights_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"~root:x:0:0")
    with pytest.raises(ConfigError) as caught:
        load_encoder(dataclasses.replace(SMALL, weights=str(tmp_path / name)))
    assert "~" not in str(caught.value).replace(str(tmp_path), "")


def test_a_pickle_that_runs_code_is_rejected(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "executed",)  # type: ignore[return-value]

    torch.save(Trap(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_encoder(dataclasses.replace(SMALL, weights=str(tmp_path / "w.pth")))
    assert not (tmp_path / "executed").exists()


def test_preprocessing_comes_from_the_weights() -> None:
    assert load_encoder(SMALL).preprocessing.resize_size == 256
    assert load_encoder(dataclasses.replace(SMALL, resize_size=224)).preprocessing.resize_size == 224
    assert (
        load_encoder(EncoderConfig("efficientnet_b0", "flatten", "random:0")).preprocessing.interpolation == "bicubic"
    )


def test_decode_scale_is_part_of_the_description_and_the_weights_file(tmp_path: Path) -> None:
    exact, fast = (load_encoder(dataclasses.replace(SMALL, decode_scale=scale)) for scale in ("exact", "fast"))
    assert exact.description == load_encoder(SMALL).description
    assert "decode_scale" not in exact.description["preprocessing"]  # as in datasets that are older than the setting
    assert fast.description["preprocessing"]["decode_scale"] == "fast"
    assert EncoderConfig.from_description(fast.description).decode_scale == "fast"
    assert EncoderConfig.from_description(exact.description).decode_scale == "exact"
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(serialize_weights(fast.network.export_weights(), fast.preprocessing))
    assert load_encoder(dataclasses.replace(SMALL, weights=str(weights))).preprocessing.decode_scale == "fast"


def test_a_batch_that_exceeds_the_memory_is_halved(pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(dataclasses.replace(SMALL, pooling="mean"))
    batch = np.concatenate([pixels, pixels, pixels[:1]])
    expected = encoder.encode(batch)
    start_batch, sizes = encoder._start_batch, []

    def run_out_of_memory(images: np.ndarray) -> PendingFeatures:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("too much")
        return start_batch(images)

    monkeypatch.setattr(encoder, "_start_batch", run_out_of_memory)
    np.testing.assert_allclose(encoder.encode(batch), expected, rtol=1e-5)
    assert sizes == [5, 2, 3, 1, 2]

    monkeypatch.setattr(encoder, "_start_batch", lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("too much")))
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode(batch)


def test_features_that_overflow_the_stored_dtype_are_an_error(pixels: np.ndarray, tmp_path: Path) -> None:
    state = {name: 40 * tensor for name, tensor in small_state().items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(DatasetError, match="overflow float16"):
        load_encoder(EncoderConfig("squeezenet1_1", "features.4.cat", str(tmp_path / "w.safetensors"))).encode(pixels)


def test_config_round_trips_through_the_description(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, pooling="max", resize_size=230, decode_scale="fast")
    assert EncoderConfig.from_description(load_encoder(config).description) == config
    path = str(tmp_path / "w.safetensors")
    safetensors.torch.save_file(small_state(), path)
    description = load_encoder(dataclasses.replace(SMALL, weights=path)).description
    with pytest.raises(ConfigError, match="specify its path with --weights"):
        EncoderConfig.from_description(description)
    assert EncoderConfig.from_description(description, path).weights == path


def test_resolve_paths_resolves_only_weights_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(SMALL, weights="w.safetensors")
    assert config.resolve_paths().weights == str(tmp_path / "w.safetensors")
    assert SMALL.resolve_paths() == SMALL


def test_a_worker_with_different_weights_is_rejected() -> None:
    description = {**load_encoder(SMALL).description, "weights_sha256": "other"}
    with pytest.raises(DatasetError, match="weights_sha256: was 'other'"):
        load_shared_encoder(SMALL, "cpu", None, description)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_missing_gpu_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="PyTorch found 0 GPUs"):
        resolve_device(name)


@pytest.mark.parametrize("weights", ["random:", "random:-1", "random:²", f"random:{2**64}", f"random:{'9' * 5000}"])
def test_seeds_of_random_weights_are_whole_numbers(weights: str) -> None:
    with pytest.raises(ConfigError, match="expected random:SEED with a whole number"):
        sample_weights(torch.nn.Identity(), weights)


def test_a_second_gpu_is_missing_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="device 'cuda:1': PyTorch found 1 GPU; use"):
        resolve_device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "tpu:0", "meta", ""])
def test_unknown_devices_are_rejected(name: str) -> None:
    with pytest.raises(CaptionlibError, match="expected auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_compressed_pth_is_rejected(tmp_path: Path) -> None:
    """PyTorch stores entries as they are; a compressed entry of 1 MB may hold 1 GB."""
    torch.save({"x": torch.zeros(3)}, tmp_path / "stored.pth")
    with ZipFile(tmp_path / "stored.pth") as stored, ZipFile(tmp_path / "w.pth", "w", ZIP_DEFLATED) as compressed:
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))
    with pytest.raises(ConfigError, match=r"w.pth: expected a file from torch.save, got one with compressed entries"):
        load_encoder(dataclasses.replace(SMALL, weights=str(tmp_path / "w.pth")))


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_pth_is_one_error(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=not legacy)
    content, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(content[: random.integers(len(content))] if random.random() < 0.3 else content)
        for position in random.integers(max(1, len(damaged)), size=random.integers(1, 20)):
            damaged[position : position + 1] = [random.integers(256)]
        path.write_bytes(damaged)
        try:
            _read_file(str(path), {"x"})
        except ConfigError as error:
            assert "\n" not in str(error)  # noqa: PT017 - most files are damaged, some are not
