"""Loads encoder weights from torchvision or a file, or samples random weights."""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Condition
from urllib.error import URLError

import safetensors
import safetensors.torch
import torch
from cachetools import cached
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor, nn

from captionlib.data.images.decoding import Preprocessing
from captionlib.data.shards.markers import from_json
from captionlib.errors import CaptionlibError, ConfigError
from captionlib.models.encoders.vgg import VGG_PREPROCESSING, VGG_URLS, VGG_WEIGHTS
from captionlib.storage.file_systems import open_file_system
from captionlib.storage.retries import call_with_retries

__all__ = [
    "choose_build_device",
    "hash_weights",
    "is_weights_file",
    "load_weights",
    "resolve_preprocessing",
    "sample_weights",
    "serialize_weights",
]

_PREPROCESSING = "captionlib.preprocessing"  # key in the header of a safetensors file
_COPY = "weights"  # file name of the copy of a remote file


def load_weights(model: str, weights: str, network: nn.Module) -> dict[str, Tensor]:
    """Loads the tensors of `weights` that `network` has. Tensors that `weights` lacks are missing from the result.

    Args:
        model: a torchvision model name.
        weights: a torchvision weights name, the address (local path or fsspec URL) of a `.safetensors`, `.pth` or `.pt`
            file, or `random:SEED`.
        network: the model, or part of it.

    Returns:
        Tensors by name; floating-point ones as float32. They are copies, so changes to the file do not affect them.

    Raises:
        ConfigError: the weights do not exist, or the file cannot be read.
    """
    if weights.startswith("random:"):
        return sample_weights(network, weights)
    needed = network.state_dict()
    tensors = _read_file(weights, set(needed)) if is_weights_file(weights) else _download(model, weights)
    return {
        name: tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in tensors.items()
        if name in needed
    }


def choose_build_device(*weights: str) -> torch.device:
    """Returns the device to build a network on before `weights` are loaded.

    Random weights keep parts of PyTorch's initialization, so the network is built on the CPU. Other weights replace
    every tensor, so it is built on `meta`, which skips the initialization.
    """
    return torch.device("cpu" if any(source.startswith("random:") for source in weights) else "meta")


def is_weights_file(weights: str) -> bool:
    return weights.endswith((".safetensors", ".pth", ".pt"))


def sample_weights(network: nn.Module, weights: str) -> dict[str, Tensor]:
    """Samples the weights of convolutional and linear layers of `network`, in place; other layers are unchanged.

    Source: He et al. 2015, "Delving Deep into Rectifiers", equation 10: std = sqrt(2 / fan_in).

    Raises:
        ConfigError: `weights` is not `random:SEED`.
    """
    match = re.fullmatch("random:([0-9]{1,20})", weights)
    if match is None or int(match[1]) >= 2**64:
        raise ConfigError(f"weights {weights!r}: expected random:SEED with a whole number below 2^64, such as random:0")
    generator = torch.Generator().manual_seed(int(match[1]))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def resolve_preprocessing(model: str, weights: str) -> Preprocessing:
    """Returns the preprocessing in the header of a weights file, of named weights, or of a model's default weights.

    `weights` has the form of `load_weights`.

    Raises:
        ConfigError: the weights file cannot be read.
    """
    if preprocessing := _read_preprocessing(weights):
        return preprocessing
    if model in VGG_URLS and (weights == VGG_WEIGHTS or is_weights_file(weights) or weights.startswith("random:")):
        return VGG_PREPROCESSING
    import torchvision

    entries = torchvision.models.get_model_weights(model)
    preset = (entries[weights] if weights in entries.__members__ else entries.DEFAULT).transforms()
    return Preprocessing(
        resize_size=preset.resize_size[0],
        crop_size=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the names and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().numpy().data)
    return digest.hexdigest()


def serialize_weights(weights: Mapping[str, Tensor], preprocessing: Preprocessing) -> bytes:
    """Returns the content of a safetensors file whose header records the preprocessing."""
    return safetensors.torch.save(dict(weights), {_PREPROCESSING: json.dumps(asdict(preprocessing))})


def _read_preprocessing(weights: str) -> Preprocessing | None:
    if not weights.endswith(".safetensors"):
        return None
    with _open_local(weights) as path, safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_PREPROCESSING)
        if text is None:
            return None
        values = from_json(text)
        return Preprocessing(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def _download(model: str, weights: str) -> Mapping[str, Tensor]:
    load: Callable[..., Mapping[str, Tensor]]
    if model in VGG_URLS and weights == VGG_WEIGHTS:
        url = VGG_URLS[model]
        load = partial(torch.hub.load_state_dict_from_url, url)
    else:
        import torchvision

        entries = torchvision.models.get_model_weights(model)
        if weights not in entries.__members__:
            raise ConfigError(
                f"weights {weights!r}: expected {' or '.join(entries.__members__)} (torchvision's weights for {model}),"
                " a .safetensors or .pth file, or random:SEED"
            )
        url, load = entries[weights].url, entries[weights].get_state_dict
    try:
        return load(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"weights {weights} of {model} cannot be downloaded from {url} ({error}); download the file elsewhere and "
            "set weights to its path, or use random:SEED"
        ) from error


def _read_file(address: str, names: set[str]) -> Mapping[str, Tensor]:
    with _open_local(address) as path:
        if address.endswith(".safetensors"):
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118
        if zipfile.is_zipfile(path) and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ConfigError(f"weights {address}: expected a file from torch.save, got one with compressed entries")
        tensors: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ConfigError(
            f"weights {address}: expected a state dictionary of names and tensors, got {type(tensors).__name__}"
        )
    return tensors


@contextmanager
def _open_local(address: str) -> Iterator[str]:
    """Yields a local path to a weights file; raises ConfigError if an error occurs while the file is read."""
    try:
        fs, path = open_file_system(address)
        local_path = path if isinstance(fs, LocalFileSystem) else f"{_copy_to_temporary_folder(address).name}/{_COPY}"
        if not Path(local_path).is_file():
            raise FileNotFoundError
        yield str(local_path)
    except CaptionlibError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"weights {address}: file not found") from error
    except Exception as error:  # PyTorch raises various exceptions on damaged files
        # The message omits `error`, because it may contain parts of the file, and the address may come from an
        # untrusted checkpoint.
        reason = getattr(error, "strerror", None) or f"damaged or in an unknown format ({type(error).__name__})"
        raise ConfigError(f"weights {address} cannot be read: {reason}") from error


@cached({}, condition=Condition())  # threads wait while one copies
def _copy_to_temporary_folder(address: str) -> TemporaryDirectory[str]:
    """Copies a remote file to a folder that is deleted when the process ends."""
    fs, path = open_file_system(address)
    folder = TemporaryDirectory(prefix="captionlib-")
    call_with_retries(path, lambda: fs.get_file(path, f"{folder.name}/{_COPY}"))
    return folder
