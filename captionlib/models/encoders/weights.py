"""Weights of encoders: by torchvision's name, from a file, or drawn from a seed."""

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.error import URLError

import safetensors
import safetensors.torch
import torch
import torchvision
from fsspec.implementations.cached import SimpleCacheFileSystem
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor, nn

from captionlib.data.images.decoding import Preprocessing
from captionlib.errors import ConfigError
from captionlib.storage.file_systems import open_file_system

__all__ = [
    "choose_build_device",
    "find_class_names",
    "find_weights_transforms",
    "hash_weights",
    "is_weights_file",
    "load_weights",
    "read_preprocessing",
    "sample_weights",
    "serialize_weights",
]

_PREPROCESSING = "captionlib.preprocessing"  # in the header of a safetensors file


def load_weights(model: str, weights: str, network: nn.Module) -> dict[str, Tensor]:
    """The tensors of `weights` that `network` needs, as float32 where they are floating; there may be fewer.

    Raises:
        ConfigError: there are no such weights, or the file cannot be read.
    """
    needed = network.state_dict()
    if weights.startswith("random:"):
        return sample_weights(network, weights)
    found = _read_file(weights, set(needed)) if is_weights_file(weights) else _download(model, weights)
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in found.items()
        if name in needed
    }


def choose_build_device(*weights: str) -> AbstractContextManager[Any]:
    """Where to build a network for weights: in memory where some are drawn, else on `meta`, for others replace them."""
    drawn = any(one.startswith("random:") for one in weights)
    return nullcontext() if drawn else torch.device("meta")


def is_weights_file(weights: str) -> bool:
    """Whether weights are a file, rather than a name or a seed."""
    return weights.endswith((".safetensors", ".pth", ".pt"))


def sample_weights(network: nn.Module, weights: str) -> dict[str, Tensor]:
    """Draws convolutions and linear layers from He's normal distribution; other layers stay as they were built.

    Source: He et al. 2015, "Delving Deep into Rectifiers", equation 10: std = sqrt(2 / fan_in).
    """
    seed = weights.removeprefix("random:")
    if not weights.startswith("random:") or not seed.isdigit():
        raise ConfigError(f"weights {weights!r}: expected random:SEED with a whole number, such as random:0")
    generator = torch.Generator().manual_seed(int(seed))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def find_weights_transforms(model: str, weights: str) -> Any:
    """The preprocessing of torchvision's named weights; for a file or random ones, of the model's default weights."""
    entries = torchvision.models.get_model_weights(model)
    entry = entries[weights] if weights in entries.__members__ else entries.DEFAULT
    return entry.transforms()


def find_class_names(model: str, count: int) -> list[str]:
    """What a model's classes are called: ImageNet's names where it has as many, else numbers."""
    names: list[str] = torchvision.models.get_model_weights(model).DEFAULT.meta.get("categories", [])
    return names if len(names) == count else [f"class {number}" for number in range(count)]


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and contents, the same wherever the weights came from."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().numpy().data)
    return digest.hexdigest()


def _download(model: str, weights: str) -> Mapping[str, Tensor]:
    entries = torchvision.models.get_model_weights(model)
    if weights not in entries.__members__:
        raise ConfigError(
            f"weights {weights!r}: expected {' or '.join(entries.__members__)} (torchvision's for {model}), "
            "a .safetensors or .pth file, or random:SEED"
        )
    try:
        found: Mapping[str, Tensor] = entries[weights].get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"weights {weights} of {model} could not be downloaded from {entries[weights].url} ({error}); "
            "download that file elsewhere and give its path as weights, or take random:SEED"
        ) from error
    return found


def serialize_weights(weights: Mapping[str, Tensor], preprocessing: Preprocessing) -> bytes:
    """The content of a safetensors file that also says how images are prepared for these weights."""
    return safetensors.torch.save(dict(weights), {_PREPROCESSING: json.dumps(asdict(preprocessing))})


def read_preprocessing(weights: str) -> Preprocessing | None:
    """How images are prepared for weights, where they are a file that says so.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not weights.endswith(".safetensors"):
        return None
    with _opened(weights) as path, safetensors.safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get(_PREPROCESSING)
        if said is None:
            return None
        values = json.loads(said)
        return Preprocessing(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def _read_file(address: str, names: set[str]) -> Mapping[str, Tensor]:
    with _opened(address) as path:
        if address.endswith(".safetensors"):
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118
        loaded: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, Mapping) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ConfigError(
            f"weights {address}: expected a state dictionary, names and tensors, got {type(loaded).__name__}"
        )
    return loaded


@contextmanager
def _opened(address: str) -> Iterator[str]:
    """A local path of a weights file; what goes wrong in reading it becomes a ConfigError."""
    try:
        path = _local_copy(address)
        if not Path(path).is_file():
            raise ConfigError(f"weights {address}: no such file")
        yield path
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        pickle.UnpicklingError,
        safetensors.SafetensorError,
    ) as error:
        # Messages of unpicklers quote the file, whose address may come from a checkpoint.
        reason = getattr(error, "strerror", None) or f"damaged, or of another format ({type(error).__name__})"
        raise ConfigError(f"weights {address} cannot be read: {reason}") from error


def _local_copy(address: str) -> str:
    """The path of a local file, or of a copy that lives as long as the process. A cache of one plain file system."""
    fs, path = open_file_system(address)
    if isinstance(fs, LocalFileSystem):
        return str(path)
    with SimpleCacheFileSystem(fs=fs).open(path, "rb") as copy:
        return str(copy.name)
