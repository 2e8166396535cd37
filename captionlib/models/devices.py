"""Selects devices, copies results to the host, and splits batches that exceed the memory of a device."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from captionlib.errors import ConfigError

__all__ = ["copy_to_host_async", "halve_on_out_of_memory", "resolve_device"]

Result = TypeVar("Result")


def resolve_device(name: str) -> torch.device:
    """Returns the device with this name; `auto` selects the first GPU if there is one, and otherwise the CPU.

    Raises:
        ConfigError: the name is unknown, or this machine has no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        found = "1 GPU" if count == 1 else f"{count} GPUs"
        raise ConfigError(f"device {name!r}: PyTorch found {found}; use auto or cpu, or check the driver")
    return device


def copy_to_host_async(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Starts copying a tensor to host memory. Returns the copy, and a function that waits until it is complete."""
    if tensor.device.type != "cuda":
        return tensor, lambda: None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # an unpinned copy would block
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return host, copied.synchronize


def halve_on_out_of_memory(compute: Callable[[slice], Result], count: int, first: int = 0) -> list[Result]:
    """Computes `count` items. If the device runs out of memory, computes each half separately, recursively.

    Returns:
        The results of `compute` for consecutive slices.

    Raises:
        torch.OutOfMemoryError: a single item does not fit into the memory of the device.
    """
    try:
        return [compute(slice(first, first + count))]
    except torch.OutOfMemoryError:
        if count == 1:
            raise
    torch.cuda.empty_cache()  # outside the handler, because the error's traceback keeps tensors alive
    half = count // 2
    return [*halve_on_out_of_memory(compute, half, first), *halve_on_out_of_memory(compute, count - half, first + half)]
