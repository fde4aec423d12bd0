"""The MLP of a block, which on the CPU never holds the hidden features of a whole image.

Shapes: B batch, L tokens, C channels.
"""
import torch
from timm.layers import Mlp
from torch import Tensor

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
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))

    @torch.jit.unused
    def _takes_chunks(self, x: Tensor) -> bool:
        if type(x) is not Tensor or x.device.type != 'cpu' or self.training:
            return False  # other kinds of tensors record a program
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (self.fc1, self.act, self.fc2))
        return not hooked and self._num_chunks(x) > 1

    def _num_chunks(self, x: Tensor) -> int:
        return -(-x.numel() // x.shape[-1] * self.fc1.out_features // CHUNK_ELEMENTS)

    @torch.jit.unused
    def _forward_in_chunks(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).tensor_split(self._num_chunks(x))  # (rows, C) each
        first = self._forward(rows[0])
        out = first.new_empty(*x.shape[:-1], first.shape[-1])
        done = out.view(-1, out.shape[-1]).tensor_split(len(rows))
        done[0].copy_(first)
        for chunk, target in zip(rows[1:], done[1:]):
            target.copy_(self._forward(chunk))
        return out
