"""The golden values of tests/golden, and the deterministic parameters and images behind them.

A tensor is standard normal noise from numpy's PCG64, seeded with the CRC-32 of its name, and scaled by its kind.
"""
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parent / 'golden'
ATTENTION_FILES = sorted(GOLDEN.glob('attn_*.safetensors'))


def read_golden(path):
    """(metadata, tensors) of a file."""
    with safe_open(str(path), 'pt') as f:
        return f.metadata(), {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118, not a dict


def released_keys(name):
    """Key names and shapes of a released state dict: medium224, base224 or medium384."""
    return json.loads((GOLDEN / 'released_keys.json').read_text())[name]


def noise(name, shape, salt=0):
    return np.random.default_rng(zlib.crc32(name.encode()) + salt).standard_normal(tuple(shape))


def golden_image(name, shape):
    return torch.from_numpy(noise(name, shape).astype(np.float32))


def golden_state_dict(shapes, salt=0):
    """Parameters for `shapes` (released name -> shape), index buffers left out."""
    return {
        key: torch.from_numpy((noise(key, shape, salt) * _scale(key, shape) + _offset(key, shape)).astype(np.float32))
        for key, shape in shapes.items() if not key.endswith('relative_position_index')
    }


def _is_norm_weight(key, shape):
    return key.endswith('.weight') and len(shape) == 1


def _offset(key, shape):
    return 1. if _is_norm_weight(key, shape) else 0.


def _scale(key, shape):
    if key.endswith('to_dynamic_projection.weight'):
        return 3 / np.sqrt(shape[-1])
    if _is_norm_weight(key, shape) or key.endswith('.bias'):
        return 0.1
    if key.endswith('.weight'):
        return 1 / np.sqrt(np.prod(shape[1:]))
    return 0.5


def released_shapes(model):
    """Key names and shapes that the released implementation would give to one of our ViL models."""
    shapes = {}
    for key, value in model.state_dict().items():
        parts = key.split('.')
        if parts[0] == 'stages':
            layer = f'layer{int(parts[1]) + 1}'
            if parts[2] == 'blocks':
                index = 2 * int(parts[3]) + (1 if parts[4] in ('norm1', 'attn') else 2)
                name = '.'.join(['norm' if parts[4].startswith('norm') else parts[4], *parts[5:]])
                key = f'{layer}.{index}.{name}'
            elif parts[2] == 'global_tokens':
                key = f'{layer}.0.cls_token'
            else:
                key = f'{layer}.0.{"norm_embed" if parts[3] == "norm" else "proj"}.{parts[4]}'
        shapes[key.replace('head.fc', 'head')] = tuple(value.shape)
    return shapes
