"""The choice among a kernel's block shapes: the first, or on request the fastest, timed once and kept.

Which shape is the fastest may differ from process to process, and with it the last bits of a sum. So nothing is timed
unless somebody asks for it, nor under deterministic algorithms, nor while a CUDA graph is captured.
"""
import os
import threading
from typing import Callable, Dict, Hashable, Sequence, TypeVar

import torch

# Set to 1 to time the block shapes of each kernel on the first call of a kind.
AUTOTUNE_ENV = 'LS_VISION_TRITON_AUTOTUNE'

_REPEATS = 10

Shape = TypeVar('Shape')

_winners: Dict[Hashable, object] = {}
_lock = threading.Lock()


def choose(kind: Hashable, shapes: Sequence[Shape], run: Callable[[Shape], object]) -> Shape:
    """The block shape for a kind of problem.

    Args:
        kind: What the choice depends on.
        shapes: Block shapes, the default first.
        run: Runs the kernel with a block shape; running it again changes nothing.
    """
    if len(shapes) == 1 or not _is_wanted():
        return shapes[0]
    with _lock:  # threads that come here at the same time time one after the other
        if kind not in _winners:
            if torch.cuda.is_current_stream_capturing():
                return shapes[0]
            _winners[kind] = min(shapes, key=lambda shape: _time(run, shape))
        return _winners[kind]  # type: ignore[return-value]


def _is_wanted() -> bool:
    return os.environ.get(AUTOTUNE_ENV, '0') == '1' and not torch.are_deterministic_algorithms_enabled()


def _time(run: Callable[[Shape], object], shape: Shape) -> float:
    """Milliseconds of some runs after the first, which compiles; infinite where the shape does not fit the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        run(shape)
        start.record()
        for _ in range(_REPEATS):
            run(shape)
        end.record()
        end.synchronize()
    except Exception:  # out of registers, shared memory or memory, in the words of Triton, its assembler or PyTorch
        return float('inf')
    return start.elapsed_time(end)
