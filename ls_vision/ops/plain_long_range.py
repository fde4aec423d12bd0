"""The long-range half as plain operations, for exporters, tracers and functorch, and to differentiate twice.

Shapes: B batch, N tokens, n kinds of tokens (keys and values), h heads, d head width, r rank; g global queries,
m own keys of the global tokens.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .joint_heads import float16_scale
from .numerics import attention_logits, to_dtype


def token_weights(scores: Tensor) -> Tensor:
    """Weights of the tokens in the dtype of the scores; in float16 `float16_scale()` times as large."""
    if scores.dtype == torch.float16:
        return (scores.softmax(dim=-1, dtype=torch.float32) * float16_scale()).to(torch.float16)
    # float32 statistics; the dtype is named because autocast would make the whole result float32
    if scores.stride(-1) != 1 and scores.device.type == 'cpu' and not torch.jit.is_scripting():
        # token by token, as a linear map makes them: along the last dimension PyTorch would copy them first
        return scores.permute(0, 3, 1, 2).softmax(dim=1, dtype=scores.dtype).permute(0, 2, 3, 1)
    return scores.softmax(dim=-1, dtype=scores.dtype)


def summarize_plainly(scores: Tensor, tokens: Tensor, with_lse: bool) -> Tuple[Tensor, Tensor]:
    """`ls_vision.ops.long_range.summarize`, which describes arguments and results."""
    sums = sums_by_head(weighted_sums(token_weights(scores), tokens))
    return sums, scores.logsumexp(dim=-1) if with_lse else scores


def sums_by_head(sums: Tensor) -> Tensor:
    """Sums (B, n, h, r, d) by `token_weights`, without the factor of these -> (B, h, r, n, d)."""
    if sums.dtype == torch.float16:
        sums = sums / float16_scale()
    return sums.permute(0, 2, 3, 1, 4)


def weighted_sums(weights: Tensor, tokens: Tensor) -> Tensor:
    """(B, h, r, N) weights and (B, N, n, h, d) tokens -> (B, n, h, r, d)."""
    return torch.matmul(weights.unsqueeze(1), tokens.permute(0, 2, 3, 1, 4))


def global_logits(query: Tensor, own: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """(B, h, g, m + N)."""
    k = torch.cat([own[:, :, 0], tokens[:, :, 0]], dim=1).transpose(1, 2)  # (B, h, m + N, d)
    return attention_logits(query.transpose(1, 2), k, None, scale)


def attend_plainly(
        query: Tensor,
        own: Tensor,
        tokens: Tensor,
        scale: float,
        with_lse: bool,
        padding: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """`ls_vision.ops.long_range.attend_globally`, which describes arguments and results."""
    logits = global_logits(query, own, tokens, scale)
    if padding is not None:
        logits = logits.masked_fill(F.pad(padding, (own.shape[1], 0))[:, None, None], float('-inf'))  # own keys remain
    v = torch.cat([own[:, :, 1], tokens[:, :, -1]], dim=1).transpose(1, 2)
    out = torch.matmul(to_dtype(logits.softmax(dim=-1), query.dtype), v).transpose(1, 2)
    return out, logits.logsumexp(dim=-1) if with_lse else query.new_empty(0)
