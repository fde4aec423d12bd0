"""Drop-in replacements for the released implementation's modules and arch strings."""
import math
from types import SimpleNamespace
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import CausalLongShortAttention1d, LongShortAttention1d, LongShortAttention2d
from .layers.checks import check_tokens
from .layers.sinusoids import sinusoids
from .models.language_model import LanguageModel
from .ops.numerics import to_autocast


class AttentionLS(LongShortAttention2d):
    """The released attention module: its constructor, its call, its state-dict keys.

    Replace `from ... import AttentionLS` by `from ls_vision.compat import AttentionLS`; state dicts load unchanged, in
    both directions. Beyond the released module it takes any grid, any number of global tokens and both of their
    variants in use.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            qkv_bias: bool = False,
            qk_scale: Optional[float] = None,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            rpe: bool = False,
            nglo: int = 1,
            dp_rank: int = 2,
            w: int = 2,
            global_attention: str = 'post',
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the tokens.
            num_heads: Number of heads.
            qkv_bias: Add a bias to queries, keys and values.
            qk_scale: Factor on the logits, (dim / num_heads) ** -0.5 by default.
            attn_drop: Dropout rate of the attention weights.
            proj_drop: Dropout rate of the output.
            rpe: Add the released relative position bias to the window's logits.
            nglo: Number of leading global tokens.
            dp_rank: r, rank of the dynamic projection.
            w: Window size.
            global_attention: 'post' (released ImageNet weights) or 'pre' (forks whose global tokens attend to local
                keys and values instead of local outputs).

        Raises:
            ValueError: An argument is out of range or does not fit another.
        """
        super().__init__(
            dim,
            num_heads,
            window_size=w,
            rank=dp_rank,
            num_global_tokens=nglo,
            qkv_bias=qkv_bias,
            rel_pos_bias='released' if rpe else None,
            global_attention=global_attention,
            scale=qk_scale or None,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        if dp_rank == 0:
            # the released module has this key whether or not it is used; frozen, so that no optimiser misses a gradient
            self.dual_ln_dp = torch.nn.LayerNorm(dim, device=device, dtype=dtype).requires_grad_(False)

    def _init_buffers(self) -> None:
        super()._init_buffers()
        # released state dicts hold the index
        self.register_buffer('relative_position_index', self.relative_position_index, persistent=True)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        if self.relative_position_index is not None:
            # it follows from the window size; the loaded one adds nothing and may have been left out
            state_dict[prefix + 'relative_position_index'] = self.relative_position_index
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, nx: Optional[int] = None, ny: Optional[int] = None) -> Tensor:  # type: ignore[override]
        """
        Args:
            x: (B, nglo + nx * ny, dim), global tokens first, then the grid row by row.
            nx: Rows of the grid; without it the grid is square.
            ny: Columns of the grid; follows from nx by default.

        Returns:
            Same shape as x.

        Raises:
            ValueError: The number of tokens does not make such a grid.
        """
        return super().forward(x, _grid(x.shape[1] - self.num_global_tokens, nx, ny))


def _grid(num_tokens: int, nx: Optional[int], ny: Optional[int]) -> Tuple[int, int]:
    """(rows, columns) of a grid of `num_tokens`, of which one or both may be left open."""
    if nx is None and ny is not None:
        raise ValueError(f'ny is {ny} without nx; give nx, both or none.')
    if nx is None:
        nx = int(num_tokens ** 0.5 + 0.5)
        if nx * nx != num_tokens:
            raise ValueError(f'{num_tokens} local tokens do not make a square grid; pass nx (rows) and ny (columns).')
    if ny is None:
        ny = num_tokens // nx if nx > 0 else 0
    if nx * ny != num_tokens:
        raise ValueError(f'{num_tokens} local tokens do not make a grid of nx {nx} x ny {ny}.')
    return nx, ny


class SequenceAttentionLS(LongShortAttention1d):
    """The released bidirectional attention over sequences, called AttentionLS there: constructor, call, state dict.

    Beyond the released module it takes any length, also one that the window does not divide, and rows without any token
    are finite.
    """

    def __init__(self, config: Any, device=None, dtype=None):
        """
        Args:
            config: Attributes (or a mapping) `transformer_dim`, `num_head`, `head_dim`, `num_landmarks` (the rank),
                `window_size`, and where they differ from what is said here `pooling_mode` ('MEAN'; 'CLS' makes the
                first token of the sequence the cls token), `cls_token` (False), `attention_dropout` (0) and
                `conv_kernel_size` (-1, none). `max_seq_len` and `fp32_attn` change nothing: any length is taken, and
                softmax and its sums are float32 always.

        Raises:
            ValueError: A value is out of range or does not fit another.
        """
        config = SimpleNamespace(**config) if isinstance(config, Mapping) else config
        dim, heads, width = config.transformer_dim, config.num_head, config.head_dim
        if dim != heads * width:
            raise ValueError(f'transformer_dim is {dim}, expected num_head * head_dim = {heads} * {width}.')
        self.cls_from_seq = getattr(config, 'pooling_mode', 'MEAN').lower() == 'cls'
        if self.cls_from_seq and getattr(config, 'cls_token', False):
            raise ValueError("pooling_mode is 'CLS' and cls_token is True, expected one of the two.")
        rank = max(config.num_landmarks, 0)
        super().__init__(
            dim,
            heads,
            window_size=max(config.window_size, 0),
            rank=rank,
            conv_kernel_size=max(getattr(config, 'conv_kernel_size', -1), 0),
            attn_drop=getattr(config, 'attention_dropout', 0.),
            device=device,
            dtype=dtype,
        )
        if rank == 0:
            # released state dicts have it, without rows; `nn.Linear(dim, 0)` would warn
            linear = self.dconv_fc = nn.Linear(dim, 1, device=device, dtype=dtype)
            linear.out_features = 0
            linear.weight, linear.bias = (
                nn.Parameter(p.detach()[:0], requires_grad=False) for p in (linear.weight, linear.bias))

    def forward(  # type: ignore[override]
            self,
            X: Tensor,
            mask: Tensor,
            cls_embed: Optional[Tensor] = None,
    ) -> Tensor:
        """
        Args:
            X: (B, N, C), normalised; with `pooling_mode='CLS'` the first token is the cls token.
            mask: (B, N) of any type, 1 or True for a TOKEN and 0 or False for padding.
            cls_embed: (B, 1, C), the cls token, not normalised; None for none.

        Returns:
            (B, N, C), with `cls_embed` (B, 1 + N, C), the cls token first.

        Raises:
            ValueError: A shape does not fit.
        """
        check_tokens('X', X, self.dim)
        if mask.shape != X.shape[:2]:
            raise ValueError(f'mask has shape {list(mask.shape)}, expected {list(X.shape[:2])}, 1 for each token of X.')
        if self.cls_from_seq:
            X, mask, cls_embed = X[:, 1:], mask[:, 1:], X[:, :1]
        out = super().forward(X, mask == 0, cls_embed)
        return torch.cat([out[1], out[0]], dim=1) if isinstance(out, tuple) else out


class ChunkedLSAttention(CausalLongShortAttention1d):
    """The released causal attention: its constructor, its call, its state-dict keys.

    Beyond the released module it takes segments of any length and memories of any number of chunks, none included.
    """
    allows_gap = True  # as the released module does

    def __init__(
            self,
            d_model: int,
            n_head: int,
            chunk_size: int,
            chunk_rank: int,
            window_len: int,
            dropout: float,
            grad_chk: bool = False,
            use_bias: bool = False,
            dp_attn: float = 0,
            probing: bool = False,
            device=None,
            dtype=None,
    ):
        """
        Args:
            d_model: Channels of the tokens.
            n_head: Number of heads.
            chunk_size: Tokens of a chunk.
            chunk_rank: Summaries of a chunk.
            window_len: Tokens that a token sees, itself included.
            dropout: Dropout rate of the output.
            grad_chk: Compute everything again for the backward pass instead of keeping it.
            use_bias: Add a bias to queries, keys, values and the output.
            dp_attn: Dropout rate of the attention weights.
            probing: Changes nothing; it chose a norm's implementation.

        Raises:
            ValueError: An argument is out of range or does not fit another.
        """
        super().__init__(
            d_model,
            n_head,
            window_size=window_len,
            chunk_size=chunk_size,
            chunk_rank=chunk_rank,
            summaries='released',
            bias=use_bias,
            attn_drop=dp_attn,
            proj_drop=dropout,
            device=device,
            dtype=dtype,
        )
        self.grad_chk = grad_chk

    def forward(  # type: ignore[override]
            self,
            h: Tensor,
            h_cache: Tensor,
            key_pe: Tensor,
            pos_embed_window: Tensor,
            chunked_attn_mask: Optional[Tensor] = None,
    ) -> Tensor:
        """
        Args:
            h: (B, M, C), the segment, normalised.
            h_cache: (B, L, C), the tokens before it, normalised alike; L a multiple of the chunk size. All of them are
                attended to, the zeros of an empty memory as well.
            key_pe: (1, n, C), sinusoids of the distances n - 1 .. 0 between summaries, n of them in memory and segment.
            pos_embed_window: (1, window_len, C), sinusoids of the distances window_len - 1 .. 0.
            chunked_attn_mask: Changes nothing: a token sees the summaries of the chunks before its own, as with the
                mask that the released model hands over.

        Returns:
            (B, M, C).

        Raises:
            ValueError: A shape does not fit.
        """
        check_tokens('h', h, self.dim)
        check_tokens('h_cache', h_cache, self.dim, h.shape[0])
        L, M, c = h_cache.shape[1], h.shape[1], self.chunk_size
        if L % c:
            raise ValueError(f'h_cache has {L} tokens, expected a multiple of chunk_size {c}.')
        num_summaries = (L + M) // c * self.chunk_rank
        expected = (('key_pe', key_pe, num_summaries), ('pos_embed_window', pos_embed_window, self.window_size))
        for name, x, count in expected:
            if x.shape != (1, count, self.dim):
                raise ValueError(f'{name} has shape {list(x.shape)}, expected [1, {count}, {self.dim}].')
        if self.grad_chk and torch.is_grad_enabled():
            return checkpoint(self._attend_to_cache, h, h_cache, key_pe, pos_embed_window, use_reentrant=False)
        return self._attend_to_cache(h, h_cache, key_pe, pos_embed_window)

    def _attend_to_cache(self, h: Tensor, h_cache: Tensor, key_pe: Tensor, pos_embed_window: Tensor) -> Tensor:
        h, h_cache = to_autocast(h), to_autocast(h_cache)
        assert self.r_net_chunk is not None
        # keys and values of the whole memory are not needed, only those of its last tokens
        query, raw, scores = self._project(h)
        _, recent, _ = self._project(h_cache[:, max(h_cache.shape[1] - (self.window_size - 1), 0):])
        pair = self._window_pair(torch.cat([recent, raw], dim=1))
        summaries = []
        if h_cache.shape[1]:
            assert self.dconv_1 is not None
            of_cache = self.dconv_1(h_cache).unflatten(-1, (self.num_heads, self.chunk_rank))
            summaries.append(self._remembered_summaries(h_cache, of_cache))
        finished, _ = self._pool(raw, scores, None, keep=False)
        if finished is not None:
            summaries.append(finished)
        out = self._attend_at(
            query, pair, torch.cat(summaries or [pair[:, :0]], dim=1), h_cache.shape[1],
            self.r_net(pos_embed_window)[0], self.r_net_chunk(key_pe)[0])
        return self._output(out)


class TransformerLSModel(LanguageModel):
    """The released language model: its constructor, its call, its state-dict keys.

    Its memory is that of the released code: a list of each layer's last inputs, all zeros at the start of a text and
    attended to all the same. `ls_vision.models.language_model.LanguageModel` has the better one.
    """

    def __init__(
            self,
            vocab_size: int,
            d_model: int,
            d_inner: int,
            n_head: int,
            n_layer: int,
            mem_len: int,
            emb_dropout: float,
            chunk_rank: int,
            chunk_size: int,
            window_len: int,
            dropout: float,
            use_bias: bool,
            pre_ln: bool,
            use_gelu: bool,
            grad_chk: bool,
            clamp_len: int,
            cpos_clamp_len: int = -1,
            probing: bool = False,
    ):
        """
        Args:
            vocab_size: Number of tokens.
            d_model, d_inner, n_head, n_layer: Widths, heads and layers.
            mem_len: Tokens that each layer remembers.
            emb_dropout: Dropout rate of embeddings, window positions and the last output.
            chunk_rank, chunk_size, window_len, dropout, grad_chk, use_bias, probing: As in `ChunkedLSAttention`.
            pre_ln, use_gelu: As in `LanguageModel`.
            clamp_len, cpos_clamp_len: Largest distance between tokens and between summaries; none below 1.
        """
        super().__init__(
            vocab_size, d_model, n_layer, n_head, d_inner, pre_ln=pre_ln, gelu=use_gelu, dropout=dropout,
            attentions=[
                ChunkedLSAttention(d_model, n_head, chunk_size, chunk_rank, window_len, dropout, grad_chk, use_bias)
                for _ in range(n_layer)])
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.mem_len, self.chunk_size, self.chunk_rank, self.window_len = mem_len, chunk_size, chunk_rank, window_len
        self.clamp_len, self.cpos_clamp_len = clamp_len, cpos_clamp_len
        self.pos_emb = nn.Module()  # released state dicts have the frequencies
        self.pos_emb.register_buffer('inv_freq', 1 / 10000 ** (torch.arange(0., d_model, 2.) / d_model))

    def forward(  # type: ignore[override]
            self,
            x: Tensor,
            h_cache: List[Tensor],
            target: Any = None,
    ) -> Tuple[Tensor, List[Tensor], None]:
        """
        Args:
            x: (B, M) token numbers. Where the chunk size does not divide M, zeros are added, which enter the memory.
            h_cache: (B, L, C) memory of each layer, L a multiple of the chunk size.
            target: Changes nothing.

        Returns:
            (B, M, V) log-probabilities, the new memories, and None.
        """
        M, c = x.shape[1], self.chunk_size
        if M % c:
            multiple = math.lcm(c, self.window_len)
            x = F.pad(x, (0, multiple - M % multiple))
        h = self.in_emb(x) * self.dim ** 0.5
        num_summaries = (x.shape[1] + h_cache[0].shape[1]) // c * self.chunk_rank
        near = self.emb_dropout(self._positions(self.window_len, self.clamp_len, h))
        far = self._positions(num_summaries, self.cpos_clamp_len, h)
        h = self.emb_dropout(h)
        memories = []
        for layer, memory in zip(self.layers, h_cache):
            memories.append(torch.cat([memory, h], dim=1)[:, -self.mem_len:].detach())
            memory = layer.norm1(memory) if layer.pre_ln else memory  # type: ignore[operator]
            h, _ = layer(h, h_cache=memory, key_pe=far, pos_embed_window=near)
        logits = self.out_emb(self.emb_dropout(h)).float()
        return logits.log_softmax(-1).to(h.dtype)[:, :M], memories, None

    def _positions(self, count: int, clamp: int, like: Tensor) -> Tensor:
        """(1, count, C) sinusoids of the distances count - 1 .. 0."""
        distances = torch.arange(count - 1, -1, -1, device=like.device)
        if clamp > 0:
            distances = distances.clamp(max=clamp)
        return sinusoids(distances, self.dim).to(like.dtype).unsqueeze(0)


def arch_to_model_args(arch: str) -> Dict[str, Any]:
    """Translates an arch string of the released ImageNet code into arguments of `ls_vision.models.LongShortViL`.

    A stage reads `l1,h3,d96,n1,s1,g1,p4,f7,a0,r8`: stage number, heads, width, depth, long-short (1) or full (0)
    attention, global tokens, patch size, window size, absolute position (only 0) and rank; stages are joined by `_`.

    Args:
        arch: For example `l1,h3,d96,n1,s1,g1,p4,f7,a0,r8_l2,h3,d192,n2,s1,g1,p2,f7,a0,r8_...`.

    Returns:
        Keyword arguments for `timm.create_model('vil_ls_medium', **args)` or the class itself.

    Raises:
        ValueError: A stage asks for something that no released checkpoint has (absolute positions, other patch sizes).
    """
    defaults = dict(l=1, h=3, d=192, n=1, s=1, g=1, p=2, f=7, a=1, r=0)
    stages = [{**defaults, **{item[0]: int(item[1:]) for item in stage.split(',')}} for stage in arch.split('_')]
    if any(stage['a'] for stage in stages):
        raise ValueError(f'arch {arch!r} has absolute position embeddings (a1); only relative ones (a0) are supported.')
    if any(stage['p'] != 2 for stage in stages[1:]):
        raise ValueError(f'arch {arch!r} has patch sizes {[s["p"] for s in stages]}; all but the first must be 2.')
    return dict(
        patch_size=stages[0]['p'],
        embed_dims=tuple(s['d'] for s in stages),
        depths=tuple(s['n'] for s in stages),
        num_heads=tuple(s['h'] for s in stages),
        attn_types=tuple('long-short' if s['s'] else 'full' for s in stages),
        window_size=tuple(s['f'] for s in stages),
        rank=tuple(s['r'] for s in stages),
        num_global_tokens=tuple(s['g'] for s in stages),
    )
