"""What every family of encoders has to do: one suite for those of torchvision, Hugging Face Transformers and timm."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from captionlib.data.images.decoding import decode_image
from captionlib.data.shards.dataset import open_dataset
from captionlib.errors import CheckpointError, ConfigError, FingerprintError
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.encoders.top_layers import EncoderTop
from captionlib.models.families.encoder import ImageEncoder, open_encoder
from captionlib.models.inference.captioning import GenerationConfig, caption_images
from captionlib.models.inference.extraction import ExtractionConfig
from captionlib.models.rankers.ranker import RankerConfig
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig
from captionlib.training.ranking import RankerTrainingConfig, train_ranker
from pipelines.embed_images import embed_images
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig
from tests.models.families import tiny_models
from tests.models.families.conformance import (
    assert_pixels_equal_those_of_the_processor,
    assert_unsafe_files_are_refused,
    draw_pixels,
    remove_tensors,
)
from tests.pipelines.conftest import write_images, write_manifest

WRITERS: dict[str, Callable[[Path], Path]] = {
    "clip": tiny_models.write_clip,
    "siglip": tiny_models.write_siglip,
    "dinov2": tiny_models.write_dinov2,
    "vit": tiny_models.write_vit,
}
SHAPES = {"pooled": [32], "class_token": [32], "feature_map": [16, 32]}
OTHERS = {
    "own": EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", pooling="mean"),
    "own map": EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", resize_size=64),
    "timm vit": EncoderConfig("timm:test_vit", "feature_map", "random:0"),
    "timm efficientnet": EncoderConfig("timm:test_efficientnet", "feature_map", "random:0"),
}
FLOAT32 = {"stored_dtype": "float32"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models. Tests must not change them."""
    folder = tmp_path_factory.mktemp("encoders")
    return {name: write(folder / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module", params=WRITERS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module", params=[*OTHERS, *WRITERS])
def config(request: pytest.FixtureRequest, folders: dict[str, Path]) -> EncoderConfig:
    return OTHERS.get(request.param) or EncoderConfig(f"hf:{folders[request.param]}", "feature_map")


def encode(encoder: ImageEncoder, images: Any) -> np.ndarray:
    return np.asarray(encoder.encode_async(images)())


def test_features_do_not_depend_on_the_batch(config: EncoderConfig) -> None:
    encoder = open_encoder(dataclasses.replace(config, stored_dtype="float32"), "cpu")
    images = np.stack(draw_pixels(encoder.preprocessing.crop_size))
    together = encode(encoder, images)
    assert together.shape == (5, *encoder.shape)
    assert together.dtype == np.float32
    assert np.array_equal(encode(encoder, images), together)
    scale = np.abs(together).max()
    np.testing.assert_allclose(encode(encoder, images[::-1].copy())[::-1], together, atol=1e-5 * scale)
    np.testing.assert_allclose(
        np.concatenate([encode(encoder, images[i : i + 1]) for i in range(5)]), together, atol=1e-5 * scale
    )
    assert np.abs(together[0] - together[1]).max() > 0.01 * scale


def test_bfloat16_and_pooling_compute_about_the_same_features(config: EncoderConfig) -> None:
    exact = open_encoder(dataclasses.replace(config, stored_dtype="float32"), "cpu")
    images = np.stack(draw_pixels(exact.preprocessing.crop_size))
    expected = encode(exact, images)
    rounded = encode(open_encoder(dataclasses.replace(config, dtype="bfloat16"), "cpu"), images)
    assert rounded.dtype == np.float16
    assert 0 < np.abs(rounded - expected).mean() < 0.1 * np.abs(expected).mean()
    if expected.ndim == 3:
        pooled = encode(open_encoder(dataclasses.replace(config, pooling="max", stored_dtype="float32"), "cpu"), images)
        np.testing.assert_allclose(pooled, expected.max(1), rtol=1e-5)


def test_a_description_reconstructs_the_encoder(config: EncoderConfig) -> None:
    description = open_encoder(config, "cpu").description
    assert json.loads(json.dumps(description)) == description
    assert description["shape"] == open_encoder(config, "cpu").shape
    location = config.model.removeprefix("hf:") if config.model.startswith("hf:") else None
    again = EncoderConfig.from_description(description, location)
    assert open_encoder(again, "cpu").description == description


@pytest.mark.parametrize("name", OTHERS)
def test_other_weights_change_the_description(name: str) -> None:
    description, other = (
        dict(open_encoder(dataclasses.replace(OTHERS[name], weights=weights), "cpu").description)
        for weights in ("random:0", "random:1")
    )
    assert {key for key, value in other.items() if value != description[key]} == {"weights", "weights_sha256"}


@pytest.mark.parametrize("name", ["timm vit", "vit"])
def test_a_run_resumes(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest", write_images(tmp_path / "images"))
    config = OTHERS.get(name) or EncoderConfig(f"hf:{folders[name]}", "pooled")
    arguments = (tmp_path / "manifest", tmp_path / "features", ExtractionConfig(config, batch_size=3))
    run = RunConfig(max_failure_ratio=0.5, progress=False)
    assert extract_features(*arguments, device="cpu", run=run).failures == 2
    dataset = open_dataset(tmp_path / "features").require_complete()
    content = Path(dataset.get_part_path(1)).read_bytes()
    dataset.remove_marker(1)
    extract_features(*arguments, device="cpu", run=run)
    assert Path(dataset.get_part_path(1)).read_bytes() == content


def test_a_folder_is_identified_by_the_hash_of_its_files(folder: Path, tmp_path: Path) -> None:
    def describe(location: Path) -> Any:
        return open_encoder(EncoderConfig(f"hf:{location}", "feature_map"), "cpu").description

    copy = shutil.copytree(folder, tmp_path / "copy")
    assert describe(copy) == describe(folder)
    with pytest.raises(ConfigError, match="was loaded from a model folder; specify its path with --weights"):
        EncoderConfig.from_description(describe(folder))
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    name = next(name for name in tensors if "patch_embed" in name)
    tensors[name] += 1
    safetensors.torch.save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    changed = {name for name, value in describe(copy).items() if value != describe(folder)[name]}
    assert changed == {"weights_sha256"}


@pytest.mark.parametrize("node", SHAPES)
def test_features_equal_those_of_transformers(folder: Path, node: str) -> None:
    from transformers import AutoImageProcessor, AutoModel

    config = EncoderConfig(f"hf:{folder}", node, stored_dtype="float32")
    if (folder.name, node) == ("siglip", "class_token"):
        with pytest.raises(ConfigError, match="siglip has no class token; use pooled or feature_map"):
            open_encoder(config, "cpu")
        return
    encoder = open_encoder(config, "cpu")
    assert encoder.shape == SHAPES[node]
    images = draw_pixels(32)
    pixels = AutoImageProcessor.from_pretrained(folder)(images=images, do_resize=False, return_tensors="pt")
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        output = getattr(model, "vision_model", model)(pixel_values=pixels["pixel_values"])
    expected = {
        "pooled": output.pooler_output,
        "class_token": output.last_hidden_state[:, 0],
        "feature_map": output.last_hidden_state[:, -16:],
    }[node]
    np.testing.assert_allclose(encode(encoder, images), expected.numpy(), atol=1e-4)


def test_pixels_equal_those_of_the_processor(folder: Path) -> None:
    encoder = open_encoder(EncoderConfig(f"hf:{folder}", "feature_map"), "cpu")
    assert_pixels_equal_those_of_the_processor(folder, encoder.preprocessing)


def test_files_that_can_run_code_are_refused(folder: Path, tmp_path: Path) -> None:
    assert_unsafe_files_are_refused(
        f"hf:{folder}", tmp_path, lambda address: open_encoder(EncoderConfig(address, "pooled"))
    )


def test_random_weights_do_not_pass_for_trained_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    address = remove_tensors(folders["vit"], tmp_path / "without pooler", "pooler")
    with pytest.raises(ConfigError, match=r"no trained weights for pooled .* use class_token or feature_map"):
        open_encoder(EncoderConfig(address, "pooled"), "cpu")
    assert open_encoder(EncoderConfig(address, "class_token"), "cpu").shape == [32]
    address = remove_tensors(folders["vit"], tmp_path / "without token", "pooler", "embeddings.cls_token")
    with pytest.raises(CheckpointError, match=r"the weights lack 1 tensors, among them embeddings.cls_token"):
        open_encoder(EncoderConfig(address, "class_token"), "cpu")


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_features_and_pixels_equal_those_of_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=7).eval()
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), weights)
    config = EncoderConfig(f"timm:{name}", "feature_map", str(weights), stored_dtype="float32")
    encoder = open_encoder(config, "cpu")
    noise = np.random.default_rng(0).integers(0, 256, (15, 20, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    Image.fromarray(noise).save(tmp_path / "image.png")
    got = decode_image((tmp_path / "image.png").read_bytes(), encoder.preprocessing).pixels
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    expected_pixels = transform(Image.fromarray(noise))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (encoder.preprocessing.mean, encoder.preprocessing.std))
    pixels = (torch.tensor(got).permute(2, 0, 1) / 255 - mean) / std
    assert ((pixels - expected_pixels) * std).abs().max() <= 1.001 / 255
    with torch.inference_mode():
        output = model.forward_features(pixels[None])
        pooled = model.forward_head(output, pre_logits=True)
    maps = output[:, 1:] if name == "test_vit" else output.flatten(2).transpose(1, 2)
    scale = float(maps.abs().max())
    np.testing.assert_allclose(encode(encoder, [got]), maps.numpy(), atol=1e-4 * scale)
    vectors = encode(open_encoder(dataclasses.replace(config, node="pooled"), "cpu"), [got])
    np.testing.assert_allclose(vectors, pooled.numpy(), atol=1e-4 * float(pooled.abs().max()))
    assert encoder.description["weights"] == "file"
    assert encoder.description["model"] == f"timm:{name}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EncoderConfig("timm:test_vit", "pooled"), "needs the path of a .safetensors file, or random:SEED, got IMAGE"),
        (EncoderConfig("timm:test_vit", "pooled", "weights.pth"), "needs the path of a .safetensors file"),
        (EncoderConfig("timm:tset_vit", "pooled", "random:0"), "unknown model timm:tset_vit; .* among them test_vit"),
        (EncoderConfig("timm:test_vit.none", "pooled", "random:0"), "unknown model timm:test_vit.none"),
        (EncoderConfig("timm:test_vit", "fc7", "random:0"), "has the nodes pooled, class_token, feature_map, got fc7"),
        (EncoderConfig("timm:test_resnet", "class_token", "random:0"), "timm:test_resnet has no class token"),
        (EncoderConfig("hf:missing", "pooled"), "expected an existing folder, or ORGANIZATION/NAME@REVISION"),
        (EncoderConfig("hf:missing"), "hf:missing has the nodes pooled, class_token, feature_map, got fc7"),
        (EncoderConfig("hf:missing", "pooled", "random:0"), "the folder of hf:missing contains the weights"),
        (
            EncoderConfig("hff:missing"),
            r"hff: expected the prefix of an installed family of encoders \(hf, timm\)",
        ),
    ],
)
def test_invalid_configurations_are_explained(config: EncoderConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_encoder(config, "cpu")


def test_layers_of_other_families_cannot_be_fine_tuned(folders: dict[str, Path]) -> None:
    description = open_encoder(EncoderConfig(f"hf:{folders['clip']}", "feature_map"), "cpu").description
    with pytest.raises(ConfigError, match="expected a torchvision model, got hf:clip_vision_model"):
        EncoderTop(description, "features.29")


def test_features_train_captioners_and_rankers_that_then_take_images(folders: dict[str, Path], tmp_path: Path) -> None:
    uris = write_images(tmp_path / "images")
    write_manifest(tmp_path / "manifest", uris)
    run = RunConfig(max_failure_ratio=0.5, progress=False)
    clip = shutil.copytree(folders["clip"], tmp_path / "clip")
    config = ExtractionConfig(EncoderConfig(f"hf:{clip}", "feature_map"), batch_size=3)
    features = tmp_path / "features"
    assert extract_features(tmp_path / "manifest", features, config, device="cpu", run=run).failures == 2
    other = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, model=f"hf:{folders['siglip']}"))
    with pytest.raises(FingerprintError, match=re.escape("hf:siglip_vision_model")):
        extract_features(tmp_path / "manifest", features, other, device="cpu", run=run)

    training = TrainingConfig(epochs=1)
    captioner = CaptionerConfig(hidden_size=8, embedding_size=8)
    train_captioner(
        features,
        tmp_path / "captioner",
        CaptionerTrainingConfig(captioner=captioner, training=training, min_count=1),
        device="cpu",
        progress=False,
    )
    generation = GenerationConfig(DecodingConfig(beam_width=2, max_tokens=4))
    address = str(tmp_path / "captioner")
    rows, _ = caption_images(uris[:2], address, generation, device="cpu")  # the checkpoint remembers the folder
    assert [row["image_id"] for row in rows] == uris[:2]
    moved = clip.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="specify its path with --weights"):
        caption_images(uris[:2], address, generation, device="cpu")
    weights = str(moved)
    assert caption_images(uris[:2], address, generation, weights=weights, device="cpu")[0] == rows
    with pytest.raises(CheckpointError, match="come from a different encoder"):
        embed_images(
            tmp_path / "manifest", _train_ranker(features, tmp_path), tmp_path / "other", weights=str(folders["siglip"])
        )
    embed_images(tmp_path / "manifest", tmp_path / "ranker", tmp_path / "embeddings", weights=weights, run=run)
    assert open_dataset(tmp_path / "embeddings").require_complete().read(0).num_rows == 3


def _train_ranker(features: Path, folder: Path) -> Path:
    config = RankerTrainingConfig(
        ranker=RankerConfig(hidden_size=8, embedding_size=8, joint_embedding_size=6),
        training=TrainingConfig(epochs=1),
        min_count=1,
        batch_images=4,
    )
    train_ranker(features, folder / "ranker", config, device="cpu", progress=False)
    return folder / "ranker"


def test_a_package_adds_a_family_with_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "colors-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: colors\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[captionlib.encoders]\ncolors = encoder_of_colors:load\n")
    (tmp_path / "encoder_of_colors.py").write_text(
        """
import torch
from captionlib.data.images.decoding import Preprocessing
from captionlib.models.encoders.encoder import Encoder


class Colors(torch.nn.Module):
    def forward(self, pixels):
        return {"features": torch.nn.functional.adaptive_avg_pool2d(pixels, self.side)}


def load(location, config, device):
    network = Colors()
    network.side = int(location)
    preprocessing = Preprocessing(8, 8, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return Encoder(network, config, preprocessing, device, "version 1")
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = EncoderConfig("colors:2", stored_dtype="float32", decode_scale="fast")
    encoder = open_encoder(config, "cpu")
    assert encoder.preprocessing.decode_scale == "fast"
    image = draw_pixels(8, 1)[0]
    assert encoder.shape == [4, 3]
    expected = image.reshape(2, 4, 2, 4, 3).mean((1, 3)).reshape(1, 4, 3) / 255
    np.testing.assert_allclose(encode(encoder, [image]), expected, atol=1e-5)
    again = EncoderConfig.from_description(encoder.description)
    assert open_encoder(again, "cpu").description == encoder.description
