"""Layers that compute on a strip what the unsplit layer computes there.

Each is a class that a layer of the unsplit model takes on, as PyTorch's `fully_shard` does it: parameters, their names
and hooks stay.

Shapes: B batch, R x W strip of the grid, N = R * W local tokens, g global tokens, C channels, h heads, d head width,
r rank of the dynamic projection.
"""
from typing import Dict, Optional, Sequence, Tuple, Type

import torch
import torch.nn.functional as F
from timm.layers import DropPath, SelectAdaptivePool2d
from torch import Tensor, nn

from ..layers import LongShortAttention2d, cpu
from ..layers.long_short_attention import AttentionMaps
from ..layers.patch_embed import PatchEmbed, pad_to_patches
from ..models._hierarchical import Block, Blocks
from ..ops.long_range import attend_globally, summarize
from ..ops.numerics import at_least_float32, statistics_dtype
from .collectives import Halo, Margin, merge_strips, sum_strips
from .strips import StripGrid, Strips


class StripLayer(nn.Module):
    """What the layers here have in common."""
    strips: Strips
    number: int
    """Of the layer among all: two layers draw different numbers."""

    def same_everywhere(self, x: Tensor, shape: Sequence[int], keep: float) -> Tensor:
        """A mask of zeros and ones that all ranks of an image draw alike, also when a block is recomputed."""
        generator = torch.Generator(x.device).manual_seed((self.strips.seed + self.number) % 2 ** 63)
        return x.new_empty(shape).bernoulli_(keep, generator=generator)


class StripAttention(LongShortAttention2d, StripLayer):
    """Windows reach into the neighbours' rows; summaries and global tokens are of all strips."""

    def forward(self, x: Tensor, feat_size: StripGrid) -> Tensor:  # type: ignore[override]
        """
        Args:
            x: (B, g + N, C), global tokens first, the same on all ranks, then this rank's strip.
            feat_size: (R, W) with the rows of all ranks.

        Returns:
            (B, g + N, C).
        """
        query, q_global, pair, own, scores = self._project(x, feat_size)
        halo = self._window_halo(feat_size)
        if halo is not None:
            extended = halo.start(pair)
            pair = halo.strip(extended)
        additional = self._additional(pair, own, scores)
        if halo is not None:
            # rows above the strip are a whole window, so that the windows of the strip stay where they are
            query = F.pad(query, (0, 0, 0, 0, 0, 0, halo.top, halo.bottom))
            out = halo.strip(self._attend(query, halo.finish(extended), additional))
        else:
            out = self._attend(query, pair, additional)
        x = out.flatten(3).flatten(1, 2)  # (B, N, C)
        if self.num_global_tokens > 0:
            out_global = self._merge_global(q_global, own, self._global_keys(out, pair))
            x = torch.cat([out_global.flatten(2), x], dim=1)
        return self.proj_drop(cpu.linear(self.proj, x))

    def attention_maps(self, x: Tensor, feat_size: Tuple[int, int]) -> AttentionMaps:
        raise NotImplementedError('A split model gives no attention maps, expected an unsplit one.')

    def _window_halo(self, grid: StripGrid) -> Optional[Halo]:
        """Keys and values of the rows that windows reach over the strip; None without windows."""
        window, link = self._make_window(), self.strips.link
        if window.rows == 0:
            return None
        last = link.rank == link.size - 1
        below = 0 if last else min(window.row_margin, grid.rows[link.rank + 1])
        top = 0 if link.rank == 0 else window.rows
        return Halo(grid.rows, Margin(window.row_margin, window.row_margin, top, below), link, 'window halo')

    def _conv_grid(self, x: Tensor, feat_size: Tuple[int, int]) -> Tensor:
        assert isinstance(feat_size, StripGrid)
        grid = x.reshape(x.shape[0], feat_size[0], feat_size[1], x.shape[2])
        halo = Halo(feat_size.rows, Margin(1, 1, 1, 1), self.strips.link, 'convolution halo')
        return halo.finish(halo.start(grid)).permute(0, 3, 1, 2)

    def _project(
            self,
            x: Tensor,
            feat_size: Tuple[int, int],
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Optional[Tensor]]:
        query, q_global, pair, own, scores = super()._project(x, feat_size)
        # copies, for autograd would keep all tokens for these views, and those extended by the halo as well
        return query, q_global.clone(), pair, own.clone(), scores

    def _summarize(self, scores: Tensor, pair: Tensor) -> Tensor:
        sums, lse = summarize(scores, pair.flatten(1, 2), with_lse=True)
        return merge_strips(sums.flatten(3), lse, self.strips.link, 'summaries').view(sums.shape)

    def _merge_global(self, query: Tensor, own: Tensor, tokens: Tensor) -> Tensor:
        """(B, g, h, d), the attention of global tokens, of which the first rank counts them themselves."""
        own = own if self.strips.link.rank == 0 else own[:, :0]
        out, lse = attend_globally(query, own, tokens, self.scale, with_lse=True)  # (B, g, h, d), (B, h, g)
        return merge_strips(out, lse.transpose(1, 2), self.strips.link, 'global tokens')


class StripPatchEmbed(PatchEmbed, StripLayer):
    """Patches that overlap reach into the neighbours' rows; the first stage's embedding learns the layout."""
    stage: int

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, R', W') -> (B, R, W, C)."""
        if self.stage == 0:
            self.strips.begin(x)
        if self.side_by_side:
            x = self.proj(pad_to_patches(x, self.stride))
        else:
            kernel, rows = self.proj.kernel_size[0], self.strips.layout.rows[self.stage]
            margin = Margin(self.padding, max(kernel - self.padding - self.stride, 0), self.padding, self.padding)
            halo = Halo(rows, margin, self.strips.link, 'convolution halo')
            x = halo.finish(halo.start(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            x = self.proj(x)
        return self.norm(x.permute(0, 2, 3, 1))


class StripBlocks(Blocks, StripLayer):
    """Passes the strips of the stage's grid to its blocks, by value: they may be recomputed when there are others."""
    stage: int

    def forward(  # type: ignore[override]
            self,
            x: Tensor,
            feat_size: Tuple[int, int],
            grad_checkpointing: bool = False,
    ) -> Tensor:
        """(B, g + N, C) -> (B, g + N, C)."""
        layout = self.strips.layout
        grid = StripGrid(feat_size, layout.rows[self.stage + 1], layout.seed)
        return super().forward(x, grid, grad_checkpointing)


class StripBlock(Block, StripLayer):
    """Says what its layers draw from."""

    def forward(self, x: Tensor, feat_size: StripGrid) -> Tensor:  # type: ignore[override]
        """(B, g + N, C) -> (B, g + N, C)."""
        self.strips.seed = feat_size.seed
        if not self.training or not any(isinstance(m, StripDropout) for m in self.modules()):
            return super().forward(x, feat_size)
        # Each rank drops other local tokens, and leaves the generators as they are: the same on all ranks.
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed((feat_size.seed + self.number + 2 ** 32 * (self.strips.link.rank + 1)) % 2 ** 63)
            return super().forward(x, feat_size)


class StripBatchNorm2d(nn.BatchNorm2d, StripLayer):
    """Statistics of all strips."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, R, W) -> (B, C, R, W)."""
        if not self.training and self.running_mean is not None:
            return super().forward(x)
        link, x_wide = self.strips.link, at_least_float32(x)
        count = x.numel() // x.shape[1]
        local_var, local_mean = torch.var_mean(x_wide, dim=(0, 2, 3), correction=0)
        counted = torch.cat([local_mean * count, local_mean.new_tensor([float(count)])])
        total = sum_strips(counted, link, 'batch norm')
        num, mean = total[-1].detach(), total[:-1] / total[-1].detach()
        var = sum_strips(count * (local_var + (local_mean - mean).square()), link, 'batch norm') / num
        self._update_statistics(mean, var, num)
        scale = (var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], x_wide, scale[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, var: Tensor, num: Tensor) -> None:
        """As `nn.BatchNorm2d` does."""
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1. / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_((var * (num / (num - 1))).to(self.running_var.dtype), factor)


class StripPool(SelectAdaptivePool2d, StripLayer):
    """The mean over all tokens of all strips."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, R, W) -> (B, C), or (B, C, 1, 1) where it does not flatten."""
        if self.is_identity():
            return super().forward(x)
        rows, link = self.strips.layout.rows[-1], self.strips.link
        if rows[link.rank] != x.shape[2]:
            raise ValueError(
                f'Features of {x.shape[2]} rows, expected {rows[link.rank]}, those of the image that the model saw '
                'last.')
        out = x.sum((2, 3), dtype=statistics_dtype(x)) / (sum(rows) * x.shape[3])
        out = sum_strips(out, link, 'head').to(x.dtype)  # (B, C)
        return self.flatten(out[:, :, None, None])


class StripDropPath(DropPath, StripLayer):
    """Drops the same images' paths on all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        if self.drop_prob == 0. or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = self.same_everywhere(x, (x.shape[0],) + (1,) * (x.dim() - 1), keep)
        return x * (mask / keep if keep > 0. and self.scale_by_keep else mask)


class StripDropout(nn.Dropout, StripLayer):
    """Drops the same features of global tokens, and of what is pooled, on all ranks."""
    num_same: Optional[int] = None
    """Leading tokens that all ranks have; None where they have all."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) or (B, C) -> the same."""
        if self.p == 0. or not self.training:
            return x
        if self.num_same is None:
            return self._drop_everywhere(x)
        same, other = x[:, :self.num_same], F.dropout(x[:, self.num_same:], self.p)
        return other if self.num_same == 0 else torch.cat([self._drop_everywhere(same), other], dim=1)

    def _drop_everywhere(self, x: Tensor) -> Tensor:
        keep = 1 - self.p
        return x * (self.same_everywhere(x, x.shape, keep) / max(keep, 1e-6))


STRIP_LAYERS: Dict[Type[nn.Module], Type[StripLayer]] = {
    LongShortAttention2d: StripAttention,
    PatchEmbed: StripPatchEmbed,
    Blocks: StripBlocks,
    Block: StripBlock,
    nn.BatchNorm2d: StripBatchNorm2d,
    SelectAdaptivePool2d: StripPool,
    DropPath: StripDropPath,
    nn.Dropout: StripDropout,
}
