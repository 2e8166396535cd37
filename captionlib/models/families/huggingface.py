"""Opens models in the format of Hugging Face Transformers, without running code that comes with a model."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend

from captionlib.data.images.decoding import Preprocessing, SizeLimit
from captionlib.data.shards.markers import compute_checksum, compute_fingerprint
from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.families.model import Arrays
from captionlib.storage.retries import convert_os_errors, find_file_type

__all__ = ["WHOLE_IMAGE", "ModelFolder", "find_preprocessing", "prepare_pixels", "require_pixels"]

WHOLE_IMAGE = SizeLimit(2**31 - 1)
"""Preprocessing of images that the model's own processor resizes."""

# The files that loading a model may read.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")

transformers.logging.set_verbosity_error()  # the warnings are for developers
transformers.logging.disable_progress_bar()


class ModelFolder:
    """The local folder of a model, which is downloaded if `location` is `ORGANIZATION/NAME@REVISION`.

    Raises:
        CheckpointError: the folder has no weights in safetensors format.
        ConfigError: the folder does not exist, or the model cannot be downloaded.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.is_local = find_file_type(LocalFileSystem(), str(Path(location).absolute())) == "directory"
        self.path = Path(location) if self.is_local else _download(location)
        with convert_os_errors(str(self.path)):
            names = sorted(path.name for path in self.path.iterdir())
        if not any(name.endswith(".safetensors") for name in names):
            others = [name for name in names if name.endswith(_OTHER_WEIGHTS)]
            got = f"{others[0]}, which could run code" if others else "none"
            raise CheckpointError(
                f"hf:{location}: expected weights in safetensors files, got {got}; convert the weights"
            )

    def load(self, auto_class: Any, **options: Any) -> Any:
        """Loads a model, tokenizer or processor without running code that comes with the model.

        Raises:
            CheckpointError: the files are missing, damaged, or need code that comes with the model.
        """
        try:
            return auto_class.from_pretrained(str(self.path), trust_remote_code=False, local_files_only=True, **options)
        except Exception as error:  # Transformers raises many types of exceptions on damaged files
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[0][:300] if lines else type(error).__name__
            raise CheckpointError(
                f"hf:{self.location} cannot be loaded by transformers {transformers.__version__}: {reason}"
            ) from error

    def load_model(self, auto_class: Any) -> tuple[Any, list[str]]:
        """Loads a model in evaluation mode, with float32 weights from safetensors files.

        Returns:
            The model, and the names of its tensors that the files lack. Transformers initializes them randomly.
        """
        options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        model, report = self.load(auto_class, **options)
        return model.eval(), sorted(report["missing_keys"])

    def require_weights(self, missing: Collection[str]) -> None:
        """Raises CheckpointError if `missing`, the names of tensors that the files lack, is not empty."""
        if missing:
            raise CheckpointError(
                f"hf:{self.location}: the weights lack {len(missing)} tensors, among them {min(missing)}"
            )

    def compute_fingerprint(self) -> str:
        """Returns a hash of the names and contents of the model's files."""
        hashes = {}
        for path in sorted({path for pattern in _FILES for path in self.path.glob(pattern)}):
            with path.open("rb") as file:
                hashes[path.name] = compute_checksum(file).removeprefix("sha256:")
        return compute_fingerprint("hf", hashes)


def _download(location: str) -> Path:
    name, at, revision = location.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/")) or not (at and revision):
        raise ConfigError(
            f"hf:{location}: expected an existing folder, or ORGANIZATION/NAME@REVISION, where the revision is a "
            "commit, tag or branch on huggingface.co"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except Exception as error:  # the library raises many types of exceptions
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"hf:{location} cannot be downloaded ({reason}); check name, revision and network, or download the files "
            "elsewhere and specify their folder as hf:FOLDER"
        ) from error


def require_pixels(address: str, expected: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Raises CheckpointError if `description` is that of an encoder; `expected` is that of the model's pixel input."""
    if description != expected:
        raise CheckpointError(
            f"{address}: expected images, the input of this model, got features; specify the manifest that the "
            "features were extracted from"
        )


def prepare_pixels(images: Arrays, preprocessing: Preprocessing | SizeLimit, processor: Any) -> Tensor:
    """Normalizes images that were decoded with `preprocessing`; returns `[images, 3, height, width] float32`.

    The model's image processor resizes them if `preprocessing` is `WHOLE_IMAGE`.
    """
    if isinstance(preprocessing, SizeLimit):
        pixels: Tensor = processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    return (torch.from_numpy(np.array(images, np.uint8)).permute(0, 3, 1, 2).float() / 255 - mean) / std


def find_preprocessing(processor: Any) -> Preprocessing | SizeLimit:
    """Returns the preprocessing of an image processor, or `WHOLE_IMAGE` if captionlib's decoder cannot replace it."""
    size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    is_standard = isinstance(processor, TorchvisionBackend) and (
        type(processor)._preprocess is TorchvisionBackend._preprocess
        and type(processor).resize is TorchvisionBackend.resize
        and processor.do_resize
        and processor.do_rescale
        and processor.do_normalize
        and not getattr(processor, "do_pad", None)
        and abs(processor.rescale_factor * 255 - 1) < 1e-6
    )
    if not is_standard:
        return WHOLE_IMAGE
    side = crop.get("height") if processor.do_center_crop else size.get("height", -1)
    square = {"height": side, "width": side}
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    interpolation = transformers.image_utils.PILImageResampling(int(processor.resample)).name.lower()
    if side and size == square and (not processor.do_center_crop or crop == square):
        return Preprocessing(side, side, interpolation, mean, std, stretch=True)
    if side and processor.do_center_crop and crop == square and list(size) == ["shortest_edge"]:
        return Preprocessing(size["shortest_edge"], side, interpolation, mean, std)
    return WHOLE_IMAGE
