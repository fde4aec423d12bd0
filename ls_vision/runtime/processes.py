"""One process or several. torchrun starts them; they talk over nccl on GPUs and over gloo on CPUs."""
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import unwrap_model
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, nn

from .errors import UserError, first_line


@dataclass(frozen=True)
class Processes:
    """This process and how many there are."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_primary(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def device_ids(self) -> list[torch.device] | None:
        """The argument of DistributedDataParallel; None on the CPU."""
        return [self.device] if self.device.type != 'cpu' else None

    def max(self, *values: float) -> list[float]:
        """The largest of each value over all processes."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the CPU."""
        if self.world_size == 1:
            return tensor.cpu()
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, *modules: nn.Module | None) -> None:
        """Copy the first process's buffers, e.g. batch-norm statistics, to all others, before an evaluation."""
        if self.world_size == 1:
            return
        for module in modules:
            for buffer in unwrap_model(module).buffers() if module is not None else ():
                dist.broadcast(buffer, src=0)

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def join_processes(device: str) -> Processes:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device: 'cpu' or 'cuda'; with several processes each takes the GPU of its local rank.

    Raises:
        UserError: The processes cannot find each other.
    """
    try:
        found = init_distributed_device_so(device)
    except (RuntimeError, ValueError, AssertionError) as e:
        raise UserError(f'--device {device}: the processes cannot be joined: {first_line(e)}') from e
    return Processes(torch.device(found['device']), found['global_rank'], found['world_size'])
