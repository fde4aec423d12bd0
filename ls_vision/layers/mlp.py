"""The MLP of a block, which on the CPU never holds the hidden features of a whole image.

Shapes: B batch, L tokens, C channels.
"""
import math

import torch
from timm.layers import GELU, Mlp
from torch import Tensor, nn

from ..ops.inference import is_eager_inference
from ..ops.linear import linear

# Hidden features computed at a time without gradients, 4 MB in float32. They stay in a cache, and memory for all of
# them, four times the image's features, is neither asked for nor touched: a tenth of vil_ls_medium_linear's time at
# 896 px on two cores.
CHUNK_ELEMENTS = 2 ** 20


class ChunkedMlp(Mlp):
    """timm's MLP with the same results; without gradients on the CPU it works through long sequences in chunks."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        if not torch.jit.is_scripting() and self._takes_chunks(x):
            return self._forward_in_chunks(x)
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))

    @torch.jit.unused
    def _takes_chunks(self, x: Tensor) -> bool:
        if not is_eager_inference(x) or self.training or x.device.type != 'cpu':
            return False
        parts = (self.fc1, self.act, self.norm, self.fc2)
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in parts)
        return not hooked and type(self.fc1) is type(self.fc2) is nn.Linear  # adapters and quantised layers stand in

    @torch.jit.unused
    def _forward_in_chunks(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        num_chunks = max(math.ceil(rows.shape[0] * self.fc1.weight.shape[0] / CHUNK_ELEMENTS), 1)
        if num_chunks == 1:
            return self._apply_to_chunk(x)
        chunks = rows.tensor_split(num_chunks)  # (rows, C) each
        first = self._apply_to_chunk(chunks[0])
        out = first.new_empty(*x.shape[:-1], first.shape[-1])
        done = out.view(-1, out.shape[-1]).tensor_split(num_chunks)
        done[0].copy_(first)
        for chunk, target in zip(chunks[1:], done[1:]):
            target.copy_(self._apply_to_chunk(chunk))
        return out

    def _apply_to_chunk(self, x: Tensor) -> Tensor:
        is_gelu = type(self.act) is GELU or (type(self.act) is nn.GELU and self.act.approximate == 'none')
        x = linear(x, self.fc1.weight, self.fc1.bias, gelu=is_gelu)
        if not is_gelu:
            x = self.act(x)
        return linear(self.norm(x), self.fc2.weight, self.fc2.bias)
