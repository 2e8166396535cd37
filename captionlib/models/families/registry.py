"""Finds the family of a model by the prefix of its address, such as `hf` in `hf:Salesforce/blip@REVISION`.

A family is a provider of models. It is an entry point of an installed package, in the group `captionlib.captioners`,
`captionlib.encoders` or `captionlib.rankers` (dual encoders for image-text retrieval). An address without a prefix is
the folder of a checkpoint that captionlib trained or, for encoders, the name of a torchvision model.

An address may end with options, such as `?template=a photo of {}`; each family defines its own.
"""

import os
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from captionlib.errors import CaptionlibError, CheckpointError, ConfigError, suggest
from captionlib.storage.folders import Folder, resolve_address

__all__ = ["ModelKind", "find_family", "resolve_model_address", "split_address"]

ModelKind = Literal["captioners", "encoders", "rankers"]
"""Kind of model, and the last part of the name of an entry point group."""

_ADDRESS = re.compile(r"([a-z][a-z0-9_-]*):(?!//|:)(.+)", re.DOTALL)  # excludes URLs


def split_address(address: str | os.PathLike[str]) -> tuple[str, str]:
    """Splits an address into the prefix of its family, which may be empty, and the location of the model."""
    match = _ADDRESS.fullmatch(os.fspath(address))
    return (match[1], match[2]) if match else ("", os.fspath(address))


def resolve_model_address(address: str | os.PathLike[str]) -> str:
    """Makes the path of a local folder absolute, and keeps the prefix of the family.

    Raises:
        StorageError: the local storage failed.
    """
    prefix, location = split_address(address)
    if not prefix:
        return resolve_address(address)
    path, question_mark, options = location.partition("?")
    folder = Folder(path)
    is_local_folder = folder.is_local and folder.exists("")  # not the name of a model
    return f"{prefix}:{resolve_address(path) if is_local_folder else path}{question_mark}{options}"


def find_family(kind: ModelKind, prefix: str) -> Callable[..., Any]:
    """Returns the function that loads models of a family. The function raises CheckpointError if loading fails.

    Raises:
        ConfigError: no installed package provides the family, or a package that the family needs is missing.
        CheckpointError: importing the family's code fails.
    """
    families: dict[str, EntryPoint] = {entry.name: entry for entry in entry_points(group=f"captionlib.{kind}")}
    if prefix not in families:
        raise ConfigError(
            f"{prefix}: expected the prefix of an installed family of {kind} "
            f"({', '.join(sorted(families)) or 'none is installed'}){suggest(prefix, families)}; install the package "
            "that provides it"
        )
    entry = families[prefix]
    package = "captionlib" if entry.dist is None else entry.dist.name
    try:
        load: Callable[..., Any] = entry.load()
    except ImportError as error:
        raise ConfigError(
            f"{prefix}: models of this family need a package that is not installed ({error}); "
            f"run pip install '{package}{f'[{entry.extras[0]}]' if entry.extras else ''}'"
        ) from error
    except Exception as error:
        raise _family_error(prefix, package, error) from error

    def load_model(location: str, *arguments: Any) -> Any:
        try:
            return load(location, *arguments)
        except (CaptionlibError, MemoryError):
            raise
        except Exception as error:
            raise _family_error(f"{prefix}:{location}", package, error) from error

    return load_model


def _family_error(address: str, package: str, error: Exception) -> CheckpointError:
    reason = str(error).strip().partition("\n")[0]
    return CheckpointError(
        f"{address}: the package {package}, which provides this family of models, failed with "
        f"{type(error).__name__}{f' ({reason})' if reason else ''}; check the model, or report this "
        "to the package's maintainers"
    )
