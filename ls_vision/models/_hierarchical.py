"""What ViL-LS and CvT-LS share: blocks, stages, and everything that timm expects of a hierarchical backbone.

A stage takes and returns one NCHW tensor; global tokens live and die inside it.

Shapes: B batch, H x W grid, N = H * W local tokens, g global tokens, L = g + N, C channels.
"""
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Type, Union, cast

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    Mlp,
    calculate_drop_path_rates,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
    trunc_normal_,
)
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from ..layers import FullAttention2d, LongShortAttention2d, cpu
from ..layers.patch_embed import PatchEmbed, check_image_size
from ..ops.numerics import to_dtype
from ._checkpoint import describe_mismatch

ATTN_TYPES = ('long-short', 'full')


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each with a residual."""

    def __init__(
            self,
            dim: int,
            attn: nn.Module,
            *,
            mlp_ratio: float,
            proj_drop: float,
            drop_path: float,
            act_layer: Type[nn.Module],
            norm_layer: Callable[..., nn.Module],
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: Tensor, feat_size: Tuple[int, int]) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = x + self.drop_path1(self.attn(self.norm1(x), feat_size))
        y = self.norm2(x)
        y = self.mlp(y) if torch.jit.is_scripting() else cpu.mlp(self.mlp, y)
        return x + self.drop_path2(y)


class Blocks(nn.Sequential):
    """The blocks of a stage, one after the other."""

    def forward(  # type: ignore[override]
            self,
            x: Tensor,
            feat_size: Tuple[int, int],
            grad_checkpointing: bool = False,
    ) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        for block in self:
            if grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, feat_size)
            else:
                x = block(x, feat_size)
        return x


class Stage(nn.Module):
    """Token embedding, global tokens and blocks."""

    def __init__(
            self,
            patch_embed: PatchEmbed,
            blocks: Sequence[Block],
            dim: int,
            *,
            num_global_tokens: int = 0,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.num_global_tokens = num_global_tokens
        self.patch_embed = patch_embed
        self.global_tokens = None
        if num_global_tokens > 0:
            self.global_tokens = nn.Parameter(torch.empty(1, num_global_tokens, dim, device=device, dtype=dtype))
        self.blocks = Blocks(*blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the module's own parameter, the global tokens."""
        if self.global_tokens is not None:
            trunc_normal_(self.global_tokens, std=.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', H', W') -> (B, C, H, W), channels last in memory."""
        x = self.patch_embed(x)
        B, H, W, C = x.shape
        x = x.reshape(B, H * W, C)
        if self.global_tokens is not None:
            x = torch.cat([to_dtype(self.global_tokens.expand(B, -1, -1), x.dtype), x], dim=1)  # (B, L, C)
        x = self.blocks(x, (H, W), self.grad_checkpointing)
        x = x[:, self.num_global_tokens:]
        return x.reshape(B, H, W, C).permute(0, 3, 1, 2)


class HierarchicalTransformer(nn.Module):
    """Stages, final norm and classifier, with timm's interface; subclasses say what embeds and what attends."""

    def __init__(
            self,
            *,
            make_embed: Callable[..., PatchEmbed],
            make_attention: Callable[[int, Tuple[int, int]], nn.Module],
            embed_dims: Sequence[int],
            depths: Sequence[int],
            window_sizes: Sequence[int],
            num_global_tokens: Sequence[int],
            img_size: Union[int, Tuple[int, int]] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            act_layer: Union[str, Type[nn.Module]] = 'gelu',
            norm_layer: Union[str, Callable[..., nn.Module]] = 'layernorm',
            device=None,
            dtype=None,
    ):
        """
        Args:
            make_embed: Makes the token embedding of a stage, called as make_embed(stage, in_chans, dim, norm_layer).
            make_attention: Makes the attention of one of its blocks, called as make_attention(stage, feat_size).
            embed_dims, depths, window_sizes, num_global_tokens: One for each stage.
            img_size: (H, W) in pixels that position tables are made for, or one number for both.
            in_chans: Channels of the image.
            num_classes: Width of the classifier, 0 for none.
            global_pool: timm's pooling name, '' for none.
            mlp_ratio: Hidden width of the MLP over its width.
            drop_rate: Dropout rate in front of the classifier.
            proj_drop_rate: Dropout rate in the MLP.
            drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0.
            act_layer: Activation of the MLP.
            norm_layer: Norm of blocks, embeddings and final features.

        Raises:
            ValueError: An argument is out of range or does not fit another.
        """
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.img_size = image_size(img_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.window_sizes = tuple(window_sizes)
        check_window_sizes(window_sizes)
        act = cast(Type[nn.Module], get_act_layer(act_layer))
        norm = cast(Callable[..., nn.Module], get_norm_layer(norm_layer))
        dpr = cast(List[List[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))

        stages: List[Stage] = []
        self.feature_info: List[Dict[str, Any]] = []
        feat_size, reduction = self.img_size, 1
        for i, dim in enumerate(embed_dims):
            patch_embed = make_embed(i, embed_dims[i - 1] if i else in_chans, dim, norm)
            if i == 0:
                check_image_size(feat_size[0], feat_size[1], patch_embed.stride)
            feat_size = patch_embed.feat_size(feat_size)
            reduction *= patch_embed.stride
            blocks = [
                Block(
                    dim, make_attention(i, feat_size), mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, drop_path=rate,
                    act_layer=act, norm_layer=norm, **dd)
                for rate in dpr[i]
            ]
            stages.append(Stage(patch_embed, blocks, dim, num_global_tokens=num_global_tokens[i], **dd))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f'stages.{i}'))

        self.stages = nn.Sequential(*stages)
        self.num_features = embed_dims[-1]
        self.norm = norm(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises all weights, also those of a model that `to_empty` left without any."""
        self.apply(partial(self._init_weights, needs_reset=needs_reset))

    def _init_weights(self, m: nn.Module, needs_reset: bool = True) -> None:
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif needs_reset and hasattr(m, 'reset_parameters'):
            cast(Any, m).reset_parameters()
        if isinstance(m, LongShortAttention2d):
            m.init_projection()  # after its linear maps, which `apply` visits first

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads native and released checkpoints, resampling position tables to this model's size.

        Raises:
            RuntimeError: The checkpoint is of another architecture; says which keys differ.
        """
        state_dict = self.filter_state_dict(state_dict)
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError:
            mismatch = describe_mismatch(self.state_dict(), state_dict)
            if not mismatch:
                raise
            raise RuntimeError(f'The checkpoint does not fit this {type(self).__name__}: {mismatch}.') from None

    def filter_state_dict(self, state_dict: Mapping[str, Any]) -> Dict[str, Any]:
        """The state dict with this model's key names and table sizes."""
        raise NotImplementedError

    @torch.jit.ignore
    def set_input_size(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            window_size: Optional[Union[int, Sequence[int]]] = None,
    ) -> None:
        """Makes another size the one that position tables are made for; they are resampled.

        Any image size is accepted without this call, which makes the interpolation permanent (bit-identical outputs).

        Args:
            img_size: (H, W) in pixels or one number for both; None leaves it.
            window_size: Window of all long-short stages, or one for each stage; None leaves them.

        Raises:
            ValueError: A size is out of range; nothing is changed then.
        """
        new_img_size = self.img_size if img_size is None else image_size(img_size)
        windows = self.window_sizes
        if window_size is not None:
            windows = per_stage(len(self.stages), window_size=window_size)[0]
            check_window_sizes(windows, minimum=1)
        stages = cast(List[Stage], list(self.stages))
        check_image_size(new_img_size[0], new_img_size[1], stages[0].patch_embed.stride)

        for stage, feat_size, window in zip(stages, feat_sizes(stages, new_img_size), windows):
            for block in cast(List[Block], list(stage.blocks)):
                if isinstance(block.attn, FullAttention2d):
                    block.attn.set_feat_size(feat_size)
                elif isinstance(block.attn, LongShortAttention2d) and block.attn.window_size != 0:
                    block.attn.set_window_size(window)
        self.img_size = new_img_size
        self.window_sizes = windows
        update_model_input_size(self, new_img_size, window_size=windows if window_size is not None else None)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of global tokens and position tables."""
        kinds = ('global_tokens', 'relative_position_bias')
        return {name for name, _ in self.named_parameters() if any(kind in name for kind in kinds)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Layer groups for layer-wise learning rate decay."""
        return dict(
            stem=r'^stages\.0\.(?:patch_embed|global_tokens)',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.(?:patch_embed|global_tokens)', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes blocks in the backward pass instead of keeping what they compute."""
        for stage in cast(List[Stage], list(self.stages)):
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replaces the classifier; the pooling stays as it is by default."""
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Final features and those of chosen stages.

        Args:
            x: (B, in_chans, H, W).
            indices: Stages to take: all if None, the last n if a number.
            norm: Apply the final norm to the last stage's features.
            stop_early: Leave out stages after the last one taken.
            output_fmt: Only 'NCHW'.
            intermediates_only: Return the chosen features alone.

        Returns:
            Final features and a list, (B, C, H, W) each, or the list alone.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        if torch.jit.is_scripting() or not stop_early:  # can't slice stages in TorchScript
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]

        last = len(self.stages) - 1
        i = 0
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self._apply_norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        if i == last:
            x = self._apply_norm(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Removes what the chosen stages do not need; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        if prune_norm or prune_end:
            self.norm = nn.Identity()  # it is made for the last stage
        self.stages = self.stages[:max_index + 1]
        self.window_sizes = self.window_sizes[:max_index + 1]
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def _apply_norm(self, x: Tensor) -> Tensor:
        """Norm over the channels of (B, C, H, W)."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H', W'), normalised, not pooled."""
        return self._apply_norm(self.stages(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or (B, C) with `pre_logits`."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def image_size(size: Union[int, Tuple[int, int]]) -> Tuple[int, int]:
    """(H, W) of a size given as a pair or as one number."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(s < 1 for s in pair):
        raise ValueError(f'img_size is {size}, expected a positive number or a pair (height, width) of them.')
    return int(pair[0]), int(pair[1])


def per_stage(num_stages: int, **args: Any) -> List[Tuple[Any, ...]]:
    """For each argument one value per stage, of a value for all stages or of a sequence.

    Raises:
        ValueError: A sequence has another length.
    """
    out = []
    for name, value in args.items():
        value = tuple(value) if isinstance(value, list) else value
        if not isinstance(value, tuple):
            value = (value,) * num_stages
        if len(value) != num_stages:
            raise ValueError(
                f'{name} has {len(value)} entries {value}, expected one for each of {num_stages} stages.')
        out.append(value)
    return out


def check_window_sizes(window_sizes: Sequence[int], minimum: int = 0) -> None:
    """Raises ValueError where a stage's window is not an integer of `minimum` or more."""
    for window_size in window_sizes:
        if not isinstance(window_size, int) or window_size < minimum:
            raise ValueError(f'window_size is {window_size!r}, expected an integer of {minimum} or more.')


def feat_sizes(stages: Sequence[Stage], img_size: Tuple[int, int]) -> List[Tuple[int, int]]:
    """(H, W) in tokens of every stage's grid for an image."""
    sizes = []
    for stage in stages:
        img_size = stage.patch_embed.feat_size(img_size)
        sizes.append(img_size)
    return sizes
