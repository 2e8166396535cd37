"""Several processes that train one model together, as `torchrun` starts them; one alone is the same with one share.

Each takes its share of a batch; the gradients are averaged over all tokens, so that a step is the step of one process
with the whole batch. The first process is the one that validates, saves and speaks.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from captionlib.errors import ConfigError

__all__ = ["ProcessGroup", "is_first_process", "join_processes"]

Value = TypeVar("Value")

_PATIENCE = timedelta(hours=4)  # the others wait while the first validates


class ProcessGroup:
    """The processes that this one belongs to, and its number among them."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if together else 0
        self.count: int = dist.get_world_size() if together else 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The sum of each value over all processes."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        totals: list[float] = summed.tolist()
        return totals

    def average_gradients(self, parameters: Sequence[Tensor], share: float) -> None:
        """Replaces each gradient by the average over all processes, this one's counting as much as its share."""
        if self.count == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients]) * share
        dist.all_reduce(flat)
        pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Gives each process the first one's weights; worked out on another machine, they may differ in a bit."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def from_first(self, function: Callable[[], Value]) -> Value:
        """What a function returns in the first process, or raises: the others wait for it and do the same."""
        if self.count == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = function()
            except Exception as error:  # told to all, so that none waits for what will not come
                answer[1] = error
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        value: Value = answer[0]
        return value

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values


def is_first_process() -> bool:
    """Whether this process is the one that speaks, also before they join and after they part."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join_processes(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that were started with this one, where there are any, until the block ends.

    Args:
        device: asked for; of a machine's GPUs each process takes its own.

    Yields:
        The device of this process.

    Raises:
        ConfigError: there are fewer GPUs than processes on this machine.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield device
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} of this machine has no GPU of its own: PyTorch sees {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs, or take --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield device
        dist.barrier()  # none leaves while another still talks to it
    finally:
        dist.destroy_process_group()
