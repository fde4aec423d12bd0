"""Compiles what Triton is asked to launch and runs it in the interpreter instead."""
import contextlib
import inspect
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from .interpreter import Kernel
from .memory import GlobalMemory


class Driver:
    """Stands for one GPU of compute capability 8.0 that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', 80, 32)

    def get_current_device(self) -> int:
        return -80  # none that there is, for compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


class Launch(NamedTuple):
    """A launch of a kernel, as it was before it ran."""
    name: str
    ptx: str
    parameters: Tuple[int, ...]
    storages: Tuple[np.ndarray, ...]
    """Bytes of the tensors' memory."""
    owners: Tuple[Tuple[int, int], ...]
    """Of the parameters that are tensors: number of the parameter and of its storage."""
    programs: int
    threads: int
    shared: int

    def run(self, ptx: Optional[str] = None) -> List[np.ndarray]:
        """Runs the kernel, or another text of it. Returns what it leaves in the storages."""
        kernel = Kernel(ptx or self.ptx)
        memory = GlobalMemory(list(self.storages))
        values = list(self.parameters)
        for parameter, storage in self.owners:
            values[parameter] += memory.addresses[storage]
        names = kernel.program.parameters
        # the last are buffers that our kernels do not ask for
        values += [0] * (len(names) - len(values))
        kernel.run(dict(zip(names, values)), memory, self.programs, self.threads, self.shared)
        return [memory.storage(number) for number in range(len(self.storages))]


@contextlib.contextmanager
def interpreted() -> Iterator[List[Launch]]:
    """In here launches of Triton kernels run in the interpreter. Yields the list that they are added to."""
    launches: List[Launch] = []
    compile_and_launch = triton.runtime.JITFunction.run

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = compile_and_launch(function, *args, grid=grid, warmup=True, **kwargs)
        names = [name for name in kwargs if name in function.arg_names]
        bound = inspect.signature(function.fn).bind(*args, **{name: kwargs[name] for name in names})
        bound.apply_defaults()
        programs = int(np.prod(grid(bound.arguments) if callable(grid) else grid))
        storages = _storages(bound.arguments)
        launch = _record(compiled, bound.arguments, storages, programs)
        launches.append(launch)
        for storage, result in zip(storages.values(), launch.run()):
            storage[:] = result

    # there is no public way back to no driver
    with mock.patch.object(triton.runtime.driver, '_active', Driver()), \
            mock.patch.object(triton.runtime.JITFunction, 'run', run):
        yield launches


def _bits(number: Any, kind: str) -> int:
    """Of an integer or a float32."""
    if kind == 'fp32':
        return int(np.float32(number).view(np.uint32))
    if not kind.startswith(('i', 'u')):
        raise ValueError(f'a parameter is a {kind}, expected an integer, fp32 or a tensor.')
    return int(number)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The whole storage of a tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _storages(arguments: Dict[str, Any]) -> Dict[int, np.ndarray]:
    """Bytes of the tensors' memory by its address."""
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    return {x.untyped_storage().data_ptr(): _bytes(x) for x in tensors}


def _record(compiled: Any, arguments: Dict[str, Any], storages: Dict[int, np.ndarray], programs: int) -> Launch:
    """What the driver would be given, with tensors as offsets in their storages."""
    parameters, owners, starts = [], [], list(storages)
    for name, kind in compiled.src.signature.items():
        x = arguments[name]
        if kind == 'constexpr':  # in the text
            continue
        if isinstance(x, torch.Tensor):
            start = x.untyped_storage().data_ptr()
            owners.append((len(parameters), starts.index(start)))
            parameters.append(x.data_ptr() - start)
        else:
            parameters.append(_bits(x, kind))
    contents, metadata = tuple(x.copy() for x in storages.values()), compiled.metadata
    return Launch(
        metadata.name, compiled.asm['ptx'], tuple(parameters), contents, tuple(owners), programs,
        metadata.num_warps * 32, metadata.shared)
