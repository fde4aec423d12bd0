"""The golden values of tests/golden, and the deterministic parameters and images behind them.

A tensor is standard normal noise from numpy's PCG64, seeded with the CRC-32 of its name, and scaled by its kind.
"""
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parent / 'golden'
ATTENTION_FILES = sorted(GOLDEN.glob('attn_*.safetensors'))
SEQUENCE_GOLDEN = GOLDEN / 'sequence'


def read_golden(path):
    """(metadata, tensors) of a file."""
    with safe_open(str(path), 'pt') as f:
        return f.metadata(), {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118, not a dict


def check_gradients(module, tensors, vanishing=None, unused=(), tolerance=1e-4):
    """Compares the gradients of all parameters with a file's, relative to the largest entry.

    That of `vanishing`, a bias that a softmax cancels, is zero but for rounding.
    """
    for name, parameter in module.named_parameters():
        expected = tensors[f'grad.{name}'] if name not in unused else None
        if expected is None:
            assert parameter.grad is None or parameter.grad.abs().max() == 0, name
        elif name.endswith(vanishing or ' '):
            assert max(parameter.grad.abs().max(), expected.abs().max()) < 1e-4
        else:
            assert (parameter.grad - expected).abs().max() <= tolerance * expected.abs().max(), name


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


def golden_tensors():
    """(name, tensor) of outputs and gradients of every golden case, fused and not, with and without gradients.

    Golden files say what the released implementation gives to within rounding; these are this implementation's own
    values, which a refactor must leave as they are to the last bit.
    """
    import timm

    import ls_vision  # noqa: F401  registers the models
    from ls_vision.compat import AttentionLS

    def run(name, module, x, *args):
        module.eval()
        with torch.no_grad():
            yield f'{name} without gradients', module(x, *args)
        x = x.clone().requires_grad_()
        out = module(x, *args)
        yield f'{name} output', out.detach()
        module.zero_grad()
        out.backward(golden_image(f'{name} gradient', out.shape))
        yield f'{name} input gradient', x.grad
        for key in sorted(dict(module.named_parameters()), key=old_name):
            grad = module.get_parameter(key).grad
            if grad is not None:  # frozen parameters have none
                yield f'{name} gradient of {old_name(key)}', grad

    for path in ATTENTION_FILES:
        meta, tensors = read_golden(path)
        module = AttentionLS(
            int(meta['dim']), int(meta['num_heads']), qkv_bias=meta.get('qkv_bias') != 'False',
            rpe=meta['rpe'] == 'True', nglo=int(meta['nglo']), dp_rank=int(meta['rank']), w=int(meta['window']),
            global_attention=meta.get('global_mode', 'post'))
        module.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith('param.')})
        for fused in (True, False):
            module.fused_attn = fused
            grid = int(meta['grid'])
            yield from run(f'{path.stem} {"fused" if fused else "explicit"}', module, tensors['x'], grid, grid)
    for name, size in (('vil_ls_tiny', (96, 128)), ('vil_ls_tiny_linear', (97, 128)), ('cvt_ls_13', (64, 96))):
        model = timm.create_model(name, num_classes=7)
        shapes = {old_name(key): tuple(value.shape) for key, value in model.state_dict().items()}
        state_dict = golden_state_dict({k: s for k, s in shapes.items() if s and 'running' not in k})
        model.load_state_dict(state_dict, strict=False)
        yield from run(name, model, golden_image(name, (2, 3, *size)))


def old_name(key):
    """A parameter's name in checkpoints of the first versions, in which CvT's linear maps had other names."""
    kinds = {'query': 0, 'key': 1, 'value': 2}
    for pattern, old in (
            (r'attn\.(query|key|value)\.conv\.', 'attn.qkv.conv.{}.0.'),
            (r'attn\.(query|key|value)\.norm\.', 'attn.qkv.conv.{}.1.'),
            (r'attn\.(query|key|value)\.qkv\.', 'attn.qkv.proj.{}.'),
            (r'attn\.scores\.(conv)\.', 'attn.to_dynamic_projection.conv.0.'),
            (r'attn\.scores\.(to_dynamic_projection)\.', 'attn.to_dynamic_projection.proj.')):
        key = re.sub(pattern, lambda match, old=old: old.format(kinds.get(match[1])), key)
    return key


def main():
    """Prints a SHA-256 for each golden case and one over all: equal before and after a change that moves code alone."""
    import hashlib

    torch.set_num_threads(1)
    total, cases = hashlib.sha256(), {}
    for name, tensor in golden_tensors():
        digest = hashlib.sha256(tensor.contiguous().numpy().tobytes())
        case = name.split(' gradient of')[0]
        cases.setdefault(case, hashlib.sha256()).update(digest.digest())
        total.update(digest.digest())
    for case, digest in cases.items():
        print(digest.hexdigest()[:16], case)
    print(total.hexdigest(), 'all')


if __name__ == '__main__':
    main()
