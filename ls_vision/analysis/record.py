"""The attention weights of a model: `record(model, image)` runs it once and returns the weights of every block.

    model = timm.create_model('vil_ls_small', checkpoint_path=...)
    records = record(model, image)                        # (1, 3, H, W), normalised
    records[0].projection                                 # (h, r, H, W) maps of the dynamic projection
    records[0].at(row=5, col=7).window                    # (h, H, W) weights of a token's window
    rollout(records)                                      # (H, W) over the first stage's grid

The model contains no code for this: hooks record its weights during the one call and are then removed.

Shapes: H x W grid of a block, N = H * W local tokens, g global tokens, L = g + N, h heads, r rank, M = r + g additional
keys, T windows, Q = w * w queries and K = (w + 2p)^2 keys of a window.
"""
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional, cast

import torch
from torch import Tensor, nn

from ls_vision.layers import FullAttention2d, LongShortAttention2d
from ls_vision.models import HierarchicalTransformer
from ls_vision.ops.window import square_window, window_key_index, window_query_index


@dataclass
class PixelAttention:
    """The attention of one token; all weights of a head sum to 1."""
    window: Tensor
    """(h, H, W) weights of the tokens that it attends to directly."""
    summaries: Tensor
    """(h, r) weights of the summaries of the image; r is 0 for full attention."""
    global_tokens: Tensor
    """(h, g) weights of the global tokens."""
    long_range: Tensor
    """(h, H, W) weights through the summaries: the sum of the projection's maps, each times its weight."""

    @property
    def shares(self) -> Tensor:
        """(h, 3) total weight of the window, of the summaries and of the global tokens."""
        parts = self.window.flatten(1), self.summaries, self.global_tokens
        return torch.stack([part.sum(-1) for part in parts], dim=-1)


@dataclass
class Record:
    """The attention weights of one block for one image."""
    stage: int
    block: int
    feat_size: tuple[int, int]
    num_global_tokens: int
    window_size: Optional[int]
    """None for full attention; 0 for long-short attention without a window."""
    weights: Tensor
    """Of local queries: (T, h, Q, M + K) with windows, (h, N, M) without; (h, L, L) for full attention."""
    projection: Optional[Tensor]
    """(h, r, H, W) maps, each with a sum of 1; None without a dynamic projection."""
    global_weights: Optional[Tensor]
    """(h, g, L) of the global tokens' queries in long-short attention."""
    summary_keys: Optional[Tensor] = None
    """(h, r, d) of the summaries; None without them."""

    @property
    def name(self) -> str:
        return f'stages.{self.stage}.blocks.{self.block}'

    @property
    def num_heads(self) -> int:
        return self.weights.shape[1 if self.window_size else 0]

    @property
    def rank(self) -> int:
        return 0 if self.projection is None else self.projection.shape[1]

    def at(self, row: int, col: int) -> PixelAttention:
        """The attention of one token of the grid.

        Raises:
            ValueError: The grid has no such token.
        """
        H, W = self.feat_size
        if not (0 <= row < H and 0 <= col < W):
            raise ValueError(f'token ({row}, {col}) is outside of the grid of {self.name}, {H} x {W}.')
        query = torch.zeros(H * W)
        query[row * W + col] = 1.
        tokens, additional = self._spread(query)
        summaries, global_tokens = additional.split([self.rank, self.num_global_tokens], dim=-1)
        window = tokens.unflatten(-1, (H, W))
        long_range = torch.zeros_like(window)
        if self.projection is not None:
            long_range = torch.einsum('hr,hrxy->hxy', summaries, self.projection)
        return PixelAttention(window, summaries, global_tokens, long_range)

    @property
    def mean_shares(self) -> Tensor:
        """(h, 3) total weight of the tokens themselves, of the summaries and of the global tokens, of a local query on
        average."""
        N = self.feat_size[0] * self.feat_size[1]
        tokens, additional = self._spread(torch.full((N,), 1. / N))
        summaries, global_tokens = additional.split([self.rank, self.num_global_tokens], dim=-1)
        return torch.stack([part.sum(-1) for part in (tokens, summaries, global_tokens)], dim=-1)

    def pull(self, relevance: Tensor) -> Tensor:
        """Pull relevance back from output tokens to input tokens: relevance times the matrix of weights.

        Args:
            relevance: (L,) of the block's output tokens, global ones first.

        Returns:
            (L,) of its input tokens, the mean over heads; the sum stays the same.
        """
        g = self.num_global_tokens
        tokens, additional = self._spread(relevance[g:])
        summaries, global_tokens = additional.split([self.rank, g], dim=-1)
        if self.projection is not None:
            tokens = tokens + torch.einsum('hr,hrn->hn', summaries, self.projection.flatten(2))
        pulled = torch.cat([global_tokens, tokens], dim=-1)  # (h, L)
        if g > 0:
            rows = self.weights[:, :g] if self.window_size is None else self.global_weights
            assert rows is not None
            pulled = pulled + torch.einsum('g,hgl->hl', relevance[:g], rows)
        return pulled.mean(0)

    def _spread(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the weights over local queries, weighted by (N,): (h, N) of tokens, (h, M) of additional keys."""
        g, N = self.num_global_tokens, self.feat_size[0] * self.feat_size[1]
        if self.window_size is None:
            spread = torch.einsum('n,hnl->hl', queries, self.weights[:, g:])
            return spread[:, g:], spread[:, :g]
        if self.window_size == 0:
            spread = torch.einsum('n,hnm->hm', queries, self.weights)
            return spread.new_zeros(spread.shape[0], N), spread
        keys, _ = window_key_index(self.feat_size, square_window(self.window_size), queries.device)  # (T, K)
        _, to_raster = window_query_index(self.feat_size, square_window(self.window_size), queries.device)  # (N,)
        T, h, Q, _ = self.weights.shape
        in_windows = queries.new_zeros(T * Q).index_copy(0, to_raster, queries).view(T, Q)  # 0 outside of the grid
        spread = torch.einsum('tq,thqk->htk', in_windows, self.weights)
        additional, windows = spread.split([spread.shape[-1] - keys.shape[1], keys.shape[1]], dim=-1)
        tokens = spread.new_zeros(h, N).index_add(1, keys.flatten(), windows.flatten(1))
        return tokens, additional.sum(1)


def record(
        model: nn.Module,
        image: Tensor,
        stage: Optional[int] = None,
        block: Optional[int] = None,
) -> list[Record]:
    """Runs a model on an image and returns its attention weights.

    Args:
        model: One of this package's models.
        image: (1, C, H, W), normalised as the model wants it.
        stage: Record only this stage, numbered from 0.
        block: Record only this block of each stage, numbered from 0.

    Returns:
        A record for each block, in order, on the CPU in float32.

    Raises:
        ValueError: The model is not of this package or has no such block, or there is more than one image.
    """
    if not isinstance(model, HierarchicalTransformer):
        raise ValueError(f'{type(model).__name__} is not a model of ls_vision; only their attention can be recorded.')
    if image.dim() != 4 or image.shape[0] != 1:
        raise ValueError(f'image has shape {list(image.shape)}, expected one image, (1, channels, height, width).')
    blocks = [list(part.blocks) for part in cast(Any, model.stages)]
    chosen = {
        (i, j): member.attn for i, members in enumerate(blocks) for j, member in enumerate(members)
        if stage in (None, i) and block in (None, j)}
    if not chosen:
        depths = [len(members) for members in blocks]
        raise ValueError(f'no stage {stage} with a block {block}; the stages have {depths} blocks, numbered from 0.')
    training = model.training
    model.eval()
    records: dict[tuple[int, int], Record] = {}
    try:
        with contextlib.ExitStack() as stack, torch.no_grad():
            for key, layer in chosen.items():
                stack.enter_context(_listening(layer, records, key))
            model(image)
    finally:
        model.train(training)
    return [records[key] for key in chosen]


@contextlib.contextmanager
def _listening(layer: nn.Module, records: dict[tuple[int, int], Record], key: tuple[int, int]) -> Iterator[None]:
    """Puts a record of each call of a layer into `records` while the context lasts."""
    handle = layer.register_forward_pre_hook(
        lambda module, args: records.update({key: _make_record(*key, module, *args)}))
    try:
        yield
    finally:
        handle.remove()


def _make_record(stage: int, block: int, layer: nn.Module, x: Tensor, feat_size: tuple[int, int]) -> Record:
    """The weights of a layer for its arguments (1, L, C) and (H, W)."""
    if isinstance(layer, FullAttention2d):
        weights = _first(layer.attention_maps(x, feat_size))
        return Record(stage, block, feat_size, layer.num_global_tokens, None, weights, None, None)
    assert isinstance(layer, LongShortAttention2d)
    if not isinstance(layer.window_size, int):
        raise ValueError(f'window_size is {layer.window_size}, pictures of attention show square windows alone.')
    maps = layer.attention_maps(x, feat_size)
    local = _first(maps.local)
    projection = None if maps.projection is None else _first(maps.projection).unflatten(-1, feat_size)
    return Record(
        stage, block, feat_size, layer.num_global_tokens, layer.window_size,
        local if layer.window_size else local[0], projection,
        None if maps.global_tokens is None else _first(maps.global_tokens),
        None if maps.summaries is None else _first(maps.summaries[:, :, 0].transpose(1, 2)))


def _first(x: Tensor) -> Tensor:
    """That of the only image."""
    return x[0].float().cpu()


def rollout(records: Sequence[Record]) -> Tensor:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928): the origin of the pooled features in the image.

    Relevance starts uniformly over the last grid, which the classifier averages. Each block passes half of it through
    its attention weights, averaged over heads, and half through its residual. A token of a later stage divides its
    relevance equally among the tokens that its patch covers (the overlap of CvT's patches is ignored). Relevance of
    global tokens is dropped at the start of a stage, where they hold nothing of the image, and the rest is scaled to a
    sum of 1.

    Args:
        records: Of all blocks of the model's stages from the first on.

    Returns:
        (H, W) over the first stage's grid, sum 1.
    """
    last = records[-1]
    grid = torch.full(last.feat_size, 1. / (last.feat_size[0] * last.feat_size[1]))
    for stage in range(last.stage, -1, -1):
        blocks = [r for r in records if r.stage == stage]
        if [r.block for r in blocks] != list(range(len(blocks))) or not blocks:
            raise ValueError(f'stage {stage} is incomplete; rollout needs the records of all blocks.')
        grid = _refine(grid, blocks[-1].feat_size)
        relevance = torch.cat([torch.zeros(blocks[-1].num_global_tokens), grid.flatten()])
        for member in reversed(blocks):
            relevance = 0.5 * relevance + 0.5 * member.pull(relevance)
        grid = relevance[blocks[0].num_global_tokens:].view(blocks[0].feat_size)
        grid = grid / grid.sum()
    return grid


def _refine(grid: Tensor, feat_size: tuple[int, int]) -> Tensor:
    """Divides the value of each cell equally among the cells of a finer grid that lie in it."""
    rows, cols = (
        torch.arange(fine) * coarse // fine for fine, coarse in zip(feat_size, grid.shape))
    counts = torch.bincount(rows, minlength=grid.shape[0])[:, None] * torch.bincount(cols, minlength=grid.shape[1])
    return (grid / counts)[rows][:, cols]
