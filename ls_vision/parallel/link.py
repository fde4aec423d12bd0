"""What the ranks of one image send each other; the only place of the package that does.

Every message is counted by what it carries, in the bytes that this rank puts in: a collective once, whatever the
backend makes of it.
"""
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from typing import Iterator, List, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .watch import watch

WAIT_SECONDS = 45.


class Link:
    """The ranks of a mesh dimension, of which each holds a strip of the same image, top to bottom."""

    def __init__(self, mesh: DeviceMesh, timeout: float = WAIT_SECONDS):
        """
        Args:
            mesh: Of one dimension.
            timeout: Seconds to wait for another rank, on backends that let a call wait for a time (gloo).
        """
        check_mesh(mesh)
        self.mesh = mesh
        self.group = mesh.get_group()
        self.rank = mesh.get_local_rank()
        self.size = mesh.size()
        self.global_ranks: List[int] = mesh.mesh.flatten().tolist()
        self.sent: Counter[str] = Counter()
        self.watch = watch(self.group, self.global_ranks) if self.size > 1 else None
        # a wait of a time of its own would hold up the CPU on NCCL, which has a watchdog for the group's timeout
        self.timeout = timedelta(seconds=timeout) if dist.get_backend(self.group) == 'gloo' else None

    def __deepcopy__(self, memo) -> 'Link':
        return self  # copies of a model talk over the same link

    def gather(self, x: Tensor, what: str) -> Tensor:
        """(...) of each rank -> (P, ...)."""
        x = x.contiguous()
        if self.size == 1:
            return x.unsqueeze(0)
        self.sent[what] += x.nbytes
        out = x.new_empty(self.size, *x.shape)
        with self._naming_culprits(what):
            self._wait([dist.all_gather(list(out.unbind()), x, group=self.group, async_op=True)])
        return out

    def sum(self, x: Tensor, what: str) -> Tensor:
        """The sum over the ranks, a new tensor."""
        if self.size == 1:
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        self.sent[what] += x.nbytes
        with self._naming_culprits(what):
            self._wait([dist.all_reduce(x, group=self.group, async_op=True)])
        return x

    def post(
            self,
            to_above: Tensor,
            to_below: Tensor,
            from_above: Tensor,
            from_below: Tensor,
            what: str,
    ) -> List[dist.Work]:
        """Starts to send to the neighbours and to receive from them what is not empty.

        All are contiguous; what is received may be read, and what is sent be written to, after `wait`.
        """
        ops = []
        for tensor, op, step in (
                (to_above, dist.isend, -1), (to_below, dist.isend, 1),
                (from_above, dist.irecv, -1), (from_below, dist.irecv, 1)):
            if tensor.numel() > 0:
                peer = self.global_ranks[self.rank + step]
                ops.append(dist.P2POp(op, tensor, peer, self.group))
                self.sent[what] += tensor.nbytes if op is dist.isend else 0
        with self._naming_culprits(what):
            return dist.batch_isend_irecv(ops) if ops else []

    def wait(self, works: Sequence[Optional[dist.Work]], what: str) -> None:
        """Until they are done.

        Raises:
            RuntimeError: Another rank has died or does not answer; the message names it.
        """
        with self._naming_culprits(what):
            self._wait(works)

    def _wait(self, works: Sequence[Optional[dist.Work]]) -> None:
        for work in works:
            if work is not None:
                work.wait() if self.timeout is None else work.wait(self.timeout)

    @contextmanager
    def _naming_culprits(self, what: str) -> Iterator[None]:
        if self.watch is None:
            yield
            return
        self.watch.waiting = what
        self.watch.calls += 1
        try:
            yield
        except RuntimeError as e:
            raise RuntimeError(
                f'Rank {dist.get_rank()}, one of the ranks {self.global_ranks} of an image, got no {what}: '
                f'{self.watch.culprits()}. {e}') from e
        self.watch.waiting = ''


def check_mesh(mesh: DeviceMesh) -> None:
    """Raises ValueError where a mesh is not of one dimension."""
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        raise ValueError(
            f"mesh is {mesh}, expected a DeviceMesh of one dimension, such as "
            "init_device_mesh('cuda', (2, 4), mesh_dim_names=('data', 'space'))['space'].")
