"""What models of every kind and family have to do; parts of the suite that captioners, encoders and rankers share."""

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
from captionlib.errors import CheckpointError
from captionlib.models.families.huggingface import prepare_pixels


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


def assert_unsafe_files_are_refused(folder: Path, tmp_path: Path, load: Callable[[str], object]) -> None:
    """Checks that neither pickled weights nor the code of a model is loaded; `load` loads an address."""
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
