"""Random generators: their states for a checkpoint, and seeds that depend on a key alone."""
import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.utils import random_seed


def capture() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, the current GPU's included, as plain values."""
    kind, keys, position, has_gauss, cached_gauss = np.random.get_state()
    states: dict[str, Any] = dict(
        python=random.getstate(),
        numpy=(kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached_gauss),
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_initialized():
        states['cuda'] = torch.cuda.get_rng_state()
    return states


def restore(states: dict[str, Any]) -> None:
    """Set the generators to the states that `capture` returned."""
    version, internal, gauss = states['python']
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached_gauss = states['numpy']
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached_gauss))
    torch.set_rng_state(states['torch'])
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'])


@contextmanager
def isolated() -> Iterator[None]:
    """Restore the CPU's generators at the end of the block."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def seed_cpu(seed: int) -> None:
    """Seed the CPU's generators, but no GPU's."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.default_generator.manual_seed(seed)


def derive_seed(*key: int) -> int:
    """A seed of 63 bits for a key such as (run's seed, epoch, rank, position)."""
    digest = hashlib.blake2b(','.join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def prepare(seed: int, rank: int, deterministic: bool) -> None:
    """Seed this process's generators. With `deterministic`, torch uses only algorithms with reproducible bits."""
    random_seed(seed, rank)
    if not deterministic:
        return
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # required by cuBLAS
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
