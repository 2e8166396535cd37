"""What models of every kind and family have to do; parts of the suite that captioners, encoders and rankers share."""

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from PIL import Image

from captionlib.data.images.decoding import Preprocessing, decode_image
from captionlib.data.shards.markers import compute_fingerprint, from_json_with_checksum, to_json_with_checksum
from captionlib.errors import CheckpointError
from captionlib.models.checkpoints.folder import read_checkpoint, write_checkpoint
from captionlib.models.families.huggingface import prepare_pixels
from captionlib.models.families.registry import split_address


def draw_pixels(side: int, count: int = 5) -> list[npt.NDArray[np.uint8]]:
    """Returns random images of large blocks."""
    blocks = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return [block.repeat(side // 4, 0).repeat(side // 4, 1) for block in blocks]


def draw_inputs(encoder: Mapping[str, Any]) -> list[npt.NDArray[Any]]:
    """Returns random features or pixels of five images for a model with this `encoder`."""
    if "shape" in encoder:
        return list(np.random.default_rng(0).random((5, *encoder["shape"]), np.float32))
    return list(draw_pixels(encoder["preprocessing"]["crop_size"]))


def assert_pixels_equal_those_of_the_processor(folder: Path, preprocessing: Preprocessing) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    generator = np.random.default_rng(0)
    for width, height in ((97, 64), (33, 120)):
        noise = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        image = Image.fromarray(noise[:height, :width])
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        got = prepare_pixels([decode_image(buffer.getvalue(), preprocessing).pixels], preprocessing, processor)
        expected = processor(images=image, return_tensors="pt")["pixel_values"]
        std = torch.tensor(processor.image_std).view(1, 3, 1, 1)
        assert ((got - expected) * std).abs().max() <= 1.001 / 255


def remove_tensors(folder: Path, copy: Path, *names: str) -> str:
    """Copies a model without the tensors whose names contain one of `names`; returns the address of the copy."""
    shutil.copytree(folder, copy)
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in names)}
    assert len(kept) < len(tensors)
    safetensors.torch.save_file(kept, copy / "model.safetensors", {"format": "pt"})
    return f"hf:{copy}"


def change_model(address: str, copy: Path) -> str:
    """Copies a model and changes a file of it that determines its output; returns the address of the copy."""
    prefix, folder = split_address(address)
    shutil.copytree(folder, copy)
    if prefix:
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 99}))
        return f"{prefix}:{copy}"
    kind = from_json_with_checksum((copy / "config.json").read_bytes())["kind"]
    whole = read_checkpoint(copy, kind)
    name = max(name for name in whole.tensors if "weight" in name)
    write_checkpoint(copy, kind, {**whole.tensors, name: whole.tensors[name] + 1}, whole.identity, {}, {})
    return str(copy)


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("exploded"),)


def assert_a_pickled_checkpoint_is_refused(folder: Path, tmp_path: Path, load: Callable[[str], object]) -> None:
    """Checks that weights that are a pickle are not loaded, although all hashes of the checkpoint match."""
    copy = shutil.copytree(folder, tmp_path / "pickled")
    config = from_json_with_checksum((copy / "config.json").read_bytes())
    whole = read_checkpoint(copy, config["kind"])
    pickled = pickle.dumps(_Bomb())
    (copy / "model.safetensors").write_bytes(pickled)
    digest = hashlib.sha256(pickled).hexdigest()
    fingerprint = compute_fingerprint(config["kind"], {**whole.identity, "weights_sha256": digest})
    record = {**config, "weights_sha256": digest, "fingerprint": fingerprint}
    (copy / "config.json").write_bytes(to_json_with_checksum(record))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load(str(copy))
    assert not (tmp_path / "exploded").exists()


def assert_unsafe_files_are_refused(address: str, tmp_path: Path, load: Callable[[str], object]) -> None:
    """Checks that neither pickled weights nor the code of a model is loaded; `load` loads an address."""
    prefix, location = split_address(address)
    folder = Path(location)
    if not prefix:
        assert_a_pickled_checkpoint_is_refused(folder, tmp_path, load)
        return
    copy = shutil.copytree(folder, tmp_path / "pickled")
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected weights in safetensors files, got none"):
        load(f"hf:{copy}")
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"got pytorch_model.bin, which could run code"):
        load(f"hf:{copy}")

    copy = shutil.copytree(folder, tmp_path / "with-code")
    config = json.loads((copy / "config.json").read_text())
    code = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForImageTextToText": "code.Model"}
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "unknown-to-transformers", "auto_map": code}))
    (copy / "code.py").write_text("import pathlib; pathlib.Path(__file__ + '.ran').touch()")
    with pytest.raises(CheckpointError, match="cannot be loaded by transformers") as caught:
        load(f"hf:{copy}")
    assert "\n" not in str(caught.value)
    assert not list(copy.glob("*.ran"))
