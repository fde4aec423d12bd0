"""One process or several. torchrun starts them; they talk over nccl on GPUs and over gloo on CPUs."""
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import unwrap_model
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .errors import UserError, first_line


@dataclass(frozen=True)
class Processes:
    """This process and how many there are.

    Several may share each image (`ls_vision.parallel.scripts.share_images`). These count as one: they have the same
    rank, and so the same batches and random numbers.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    """Of dimensions 'data' and 'space' where several processes share each image; None where none do."""

    @property
    def is_primary(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0 and (self.mesh is None or self.mesh.get_local_rank('space') == 0)

    @property
    def is_only(self) -> bool:
        """Whether there are no other processes."""
        return self.world_size == 1 and self.mesh is None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Processes of which each has other images; None for all."""
        return None if self.mesh is None else self.mesh.get_group('data')

    @property
    def device_ids(self) -> list[torch.device] | None:
        """The argument of DistributedDataParallel; None on the CPU."""
        return [self.device] if self.device.type != 'cpu' else None

    def max(self, *values: float) -> list[float]:
        """The largest of each value over all processes."""
        if self.is_only:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the CPU; processes that share images count once."""
        if self.world_size == 1:
            return tensor.cpu()
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor, group=self.group)
        return tensor.cpu()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks; processes that share images count once."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def share_buffers(self, *modules: nn.Module | None) -> None:
        """Copy the first process's buffers, e.g. batch-norm statistics, to all others, before an evaluation."""
        if self.is_only:
            return
        for module in modules:
            for buffer in unwrap_model(module).buffers() if module is not None else ():
                dist.broadcast(buffer, src=0)

    def close(self) -> None:
        if not self.is_only:
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
