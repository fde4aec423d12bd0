"""Faster inference on the CPU, in one place: what `linear`, `mlp` and `position_bias` give is what the modules give.

A fast path is taken only where nobody could tell: in plain eager inference (`ls_vision.ops.calls`), in evaluation mode,
by modules of exactly the type that it knows, with no hooks, no forward of their own and no tensor subclasses. In every
other case the module is called.

* float32 linear maps by oneDNN, which PyTorch has for its compiler, in place of MKL: a tenth faster on a thousand
  tokens, a third on fifty, and with the GELU applied to what is still in a cache (two cores of an AMD EPYC, AVX-512).
* MLPs in chunks of tokens, whose hidden features stay in a cache; memory for all of them, four times the features of
  the image, is never touched: a tenth of the time of `vil_ls_medium_linear` at 896 px on two cores.
* The position bias of full attention, made again only where its tables, the grid or the dtype have changed.

Shapes: B batch, L tokens, C channels, D output channels.
"""
import math
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from timm.layers import GELU, Mlp
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.calls import is_plain_inference
from ..ops.numerics import autocast_dtype, to_dtype

# Hidden features of an MLP computed at a time, 4 MB in float32.
CHUNK_ELEMENTS = 2 ** 20
# Largest position bias that is kept for a layer: enough for grids of 24 x 24 (384 px) and 6 heads in float32.
KEPT_BIAS_BYTES = 2 ** 23

_F_LINEAR = F.linear  # profilers put a function of their own in its place
_HAS_ONEDNN = (
    torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, '_linear_pointwise'))


def is_unmodified(module: nn.Module, kind: type) -> bool:
    """True for a module of exactly this type whose call is its class's forward and nothing else."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or 'forward' in module.__dict__ or module._compiled_call_impl is not None or _has_any_global_hook())


def is_inactive_dropout(module: Any) -> bool:
    """True for an unmodified dropout that passes on what it gets."""
    return is_unmodified(module, nn.Dropout) and not (module.training and module.p > 0.)


# ---- linear maps -----------------------------------------------------------------------------------------------------

def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """`module(x)`, (..., C) -> (..., D)."""
    if _takes_onednn(x) and _is_plain_linear(module):
        return _onednn(module, x)
    return module(x)


def split_linear(module: nn.Linear, x: Tensor, parts: Sequence[int]) -> Sequence[Tensor]:
    """`module(x)`, (..., C), in parts of these shares of the output, (..., D_i) each.

    On the fast path each part is a product of its own and contiguous, which spares a norm of it a copy. With gradients
    the parts are copies: views would keep the whole output for the backward pass, and a norm would copy them twice.
    """
    sizes = [module.out_features * part // sum(parts) for part in parts] if isinstance(module, nn.Linear) else []
    if sizes and _takes_onednn(x) and _is_plain_linear(module):
        biases = [None] * len(sizes) if module.bias is None else module.bias.split(sizes)
        return [
            torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], 'none')
            for weight, bias in zip(module.weight.split(sizes), biases)]
    out = module(x)
    split = out.split([out.shape[-1] * part // sum(parts) for part in parts], dim=-1)
    copies = torch.is_grad_enabled() and not torch.jit.is_tracing()
    # by number: torch.fx can't iterate over what it traces
    return [split[i].contiguous() if copies else split[i] for i in range(len(parts))]


def dense(x: Tensor) -> Tensor:
    """x, on the CPU and for tracers as a contiguous tensor; kernels of GPUs read any strides."""
    return x if isinstance(x, Tensor) and x.device.type != 'cpu' else x.contiguous()


def _takes_onednn(x: Tensor) -> bool:
    return bool(
        _HAS_ONEDNN and is_plain_inference(x) and x.device.type == 'cpu' and x.dtype == torch.float32
        and x.numel() > 0 and torch.backends.mkldnn.enabled and autocast_dtype(x) is None and F.linear is _F_LINEAR)


def _is_plain_linear(module: nn.Module) -> bool:
    if not is_unmodified(module, nn.Linear) or module.training:
        return False
    tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
    return all(
        type(t) in (Tensor, nn.Parameter) and t.device.type == 'cpu' and t.dtype == torch.float32 for t in tensors)


def _onednn(module: nn.Linear, x: Tensor, activation: str = 'none') -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, activation, [], 'none')


# ---- MLPs ------------------------------------------------------------------------------------------------------------

def mlp(module: Any, x: Tensor) -> Tensor:
    """`module(x)`, (B, L, C) -> (B, L, C)."""
    if not (_takes_onednn(x) and _is_plain_mlp(module)):
        return module(x)
    rows = x.reshape(-1, x.shape[-1])
    hidden = module.fc1.out_features
    num_chunks = max(math.ceil(rows.shape[0] * hidden / CHUNK_ELEMENTS), 1)
    if num_chunks == 1:
        return _apply_mlp(module, x)
    out = x.new_empty(*x.shape[:-1], module.fc2.out_features)
    for chunk, target in zip(rows.tensor_split(num_chunks), out.view(-1, out.shape[-1]).tensor_split(num_chunks)):
        target.copy_(_apply_mlp(module, chunk))
    return out


def _is_plain_mlp(module: Any) -> bool:
    return (
        is_unmodified(module, Mlp) and _is_plain_linear(module.fc1) and _is_plain_linear(module.fc2)
        and _is_gelu(module.act) and is_unmodified(module.norm, nn.Identity)
        and is_inactive_dropout(module.drop1) and is_inactive_dropout(module.drop2))


def _is_gelu(module: nn.Module) -> bool:
    return is_unmodified(module, GELU) or (is_unmodified(module, nn.GELU) and module.approximate == 'none')


def _apply_mlp(module: Any, x: Tensor) -> Tensor:
    return _onednn(module.fc2, _onednn(module.fc1, x, 'gelu'))


# ---- position bias ---------------------------------------------------------------------------------------------------

class KeptBias(NamedTuple):
    """A position bias and what it was made of."""
    bias: Tensor
    feat_size: Tuple[int, int]
    tables: List[Tensor]


# not attributes of the layers, so that copies and files of a model hold weights alone
_kept: 'WeakKeyDictionary[nn.Module, KeptBias]' = WeakKeyDictionary()


def position_bias(
        layer: nn.Module,
        x: Tensor,
        feat_size: Tuple[int, int],
        make: Callable[[Tuple[int, int]], Optional[Tensor]],
) -> Optional[Tensor]:
    """`make(feat_size)`, the (h, L, L) bias of a layer's own tables on a grid; kept in the dtype of x."""
    tables: List[Any] = list(layer.parameters(recurse=False))
    if not tables or layer.training or not is_plain_inference(x) or any(
            type(t) is not nn.Parameter or t.device.type != 'cpu' for t in tables):
        return make(feat_size)
    kept = _kept.get(layer)
    if kept is None or kept.feat_size != feat_size or kept.bias.dtype != x.dtype or not are_equal(tables, kept.tables):
        bias = make(feat_size)
        assert bias is not None
        kept = KeptBias(to_dtype(bias, x.dtype), feat_size, [t.detach().clone() for t in tables])
        if kept.bias.nbytes <= KEPT_BIAS_BYTES:
            _kept[layer] = kept
    return kept.bias


def are_equal(tables: List[Tensor], known: List[Tensor]) -> bool:
    """True where tensors are what they were, to the last bit."""
    return len(tables) == len(known) and all(
        t.dtype == k.dtype and t.shape == k.shape and torch.equal(t, k) for t, k in zip(tables, known))
