"""Where a model runs, and what to do where its memory is short."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from captionlib.errors import ConfigError

__all__ = ["copy_to_host_async", "halve_on_out_of_memory", "resolve_device"]

Part = TypeVar("Part")


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU; what was asked for by name is had or refused.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(
                f"device {name!r} was asked for, but PyTorch sees {count} GPUs; take auto or cpu, or check the driver"
            )
    return device


def copy_to_host_async(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Starts to copy a tensor into the host's memory, and says how to wait for it; from a GPU that takes its time."""
    if tensor.device.type != "cuda":
        return tensor, lambda: None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # else the copy would wait for the GPU
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return host, copied.synchronize


def halve_on_out_of_memory(compute: Callable[[slice], Part], count: int) -> list[Part]:
    """What is computed of some items: of all at once, or of halves of what does not fit into the device's memory.

    Args:
        compute: takes which of the items.
        count: how many there are.

    Raises:
        torch.OutOfMemoryError: a single item does not fit.
    """
    return _halve_on_out_of_memory(compute, 0, count)


def _halve_on_out_of_memory(compute: Callable[[slice], Part], begin: int, end: int) -> list[Part]:
    try:
        return [compute(slice(begin, end))]
    except torch.OutOfMemoryError:
        if end - begin == 1:
            raise
    torch.cuda.empty_cache()  # here, where the error no longer holds what was computed
    middle = (begin + end) // 2
    return [*_halve_on_out_of_memory(compute, begin, middle), *_halve_on_out_of_memory(compute, middle, end)]
