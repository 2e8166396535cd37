"""Data-parallel training by several processes that `torchrun` starts.

Each process computes the gradients of its part of every batch. The gradients are averaged with weights proportional to
token counts, so the result equals the gradient of the whole batch. Process 0 validates, saves and reports.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from captionlib.errors import ConfigError

__all__ = ["ProcessGroup", "is_first_process", "join_process_group"]

Value = TypeVar("Value")

_TIMEOUT = timedelta(hours=4)  # the other processes wait while process 0 validates


class ProcessGroup:
    """The group of processes that train together; a single process forms a group of one.

    Attributes:
        rank: the index of this process, from 0.
        world_size: the number of processes.
        is_first: whether this is process 0.
    """

    def __init__(self) -> None:
        is_distributed = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if is_distributed else 0
        self.world_size: int = dist.get_world_size() if is_distributed else 1
        self.is_first = self.rank == 0

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Returns the sum of each value over all processes."""
        if self.world_size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        return cast(list[float], summed.tolist())

    def average_gradients(self, parameters: Sequence[Tensor], weight: float) -> None:
        """Replaces each gradient with its weighted average over all processes.

        `weight` is the weight of this process. The weights of all processes must sum to 1.
        """
        # DistributedDataParallel weights all processes equally, needs a part of every batch in each process, and only
        # supports calls of `forward`.
        if self.world_size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients]) * weight
        dist.all_reduce(flat)
        chunks = torch.split(flat, [gradient.numel() for gradient in gradients])
        for parameter, chunk in zip(parameters, chunks, strict=True):
            parameter.grad = chunk.view_as(parameter)

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copies the tensors of process 0 to all processes, because initial values may vary between machines."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def run_on_process_0(self, function: Callable[[], Value]) -> Value:
        """Calls a function in process 0. All processes return its result or raise its error."""
        if self.world_size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:  # raised by all processes, so that none waits forever
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(Value, outcome[0])

    def gather(self, value: Value) -> list[Value]:
        """Returns the values of all processes, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def is_first_process() -> bool:
    """Returns whether this is process 0. Unlike `ProcessGroup`, it works outside `join_process_group`."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join_process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins the process group during the block if `torchrun` started this process. Yields the device to use.

    With CUDA, each process uses its own GPU.

    Raises:
        ConfigError: CUDA is used, and this machine has more processes than GPUs.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield device
        return
    if device.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this machine needs its own GPU, but PyTorch finds "
                f"{torch.cuda.device_count()}; start one process per GPU, or use --device cpu"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield device
        dist.barrier()  # wait until all processes have finished communicating
    finally:
        dist.destroy_process_group()
