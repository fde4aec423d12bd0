"""ViL-LS: the multi-scale Vision Longformer with long-short attention.

`Long-Short Transformer: Efficient Transformers for Language and Vision`, Zhu et al., NeurIPS 2021
    - https://arxiv.org/abs/2107.02192
    - released implementation and weights: https://github.com/NVIDIA/transformer-ls (MIT)
`Multi-Scale Vision Longformer`, Zhang et al., ICCV 2021 - https://arxiv.org/abs/2103.15358

An independent implementation, numerically the released one, whose checkpoints load.
"""
import re
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple, Union

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import FullAttention2d, LongShortAttention2d
from ..layers.checks import check_choice
from ..layers.patch_embed import PatchEmbed
from ..layers.projection_init import starts_of_stages
from ._builder import build_model, model_cfg
from ._checkpoint import fetch_released_weights, resize_position_tables, unwrap_state_dict
from ._hierarchical import ATTN_TYPES, HierarchicalTransformer, per_stage

__all__ = ['LongShortViL']


class LongShortViL(HierarchicalTransformer):
    """Hierarchical transformer with a choice of long-short or full attention for each stage.

    Takes images of any size. Position tables of full-attention stages are made for `img_size` and interpolated for
    others.
    """

    def __init__(
            self,
            *,
            patch_size: int = 4,
            embed_dims: Sequence[int] = (96, 192, 384, 768),
            depths: Sequence[int] = (1, 4, 16, 1),
            num_heads: Union[int, Sequence[int]] = (3, 3, 6, 12),
            attn_types: Union[str, Sequence[str]] = ('long-short', 'long-short', 'full', 'full'),
            window_size: Union[int, Sequence[int]] = 7,
            rank: Union[int, Sequence[int]] = 8,
            num_global_tokens: Union[int, Sequence[int]] = (1, 1, 1, 0),
            rel_pos_bias: Optional[str] = 'released',
            global_attention: str = 'post',
            dual_ln: bool = True,
            projection_init: Union[float, str, None] = None,
            qkv_bias: bool = True,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            patch_size: Side of the first stage's patches in pixels; later stages halve the grid.
            embed_dims: Channels of each stage; their number is the number of stages.
            depths: Blocks of each stage.
            num_heads: Heads, for all stages or each.
            attn_types: 'long-short' or 'full', for all stages or each.
            window_size: Window of long-short attention in tokens, for all stages or each.
            rank: Rank of its dynamic projection, for all stages or each.
            num_global_tokens: Global tokens inside a stage, for all stages or each.
            rel_pos_bias: Position bias of windows: 'released', 'unique' or None; None also drops full attention's.
            global_attention: Keys of global tokens in long-short attention: 'post' or 'pre'.
            dual_ln: Normalise keys and values of long-short attention to one scale.
            projection_init: Start of the dynamic projection in new training: the standard deviation of its scores, or
                'orthogonal'; None is the start of all other linear maps.
            qkv_bias: Add a bias to queries, keys and values.
            proj_drop_rate: Dropout rate after attention and in the MLP.
            attn_drop_rate: Dropout rate of attention weights.
            **kwargs: The other arguments of `HierarchicalTransformer`.

        Raises:
            TypeError: There is no such argument.
            ValueError: An argument is out of range or does not fit another.
        """
        dd = {'device': device, 'dtype': dtype}
        depths, num_heads, attn_types, window_sizes, ranks, num_global_tokens = per_stage(
            len(embed_dims), depths=depths, num_heads=num_heads, attn_types=attn_types, window_size=window_size,
            rank=rank, num_global_tokens=num_global_tokens)
        for attn_type in attn_types:
            check_choice('attn_types', attn_type, ATTN_TYPES)
        projection_inits = starts_of_stages(projection_init, attn_types, ranks)

        def make_embed(i: int, in_chans: int, dim: int, norm_layer: Callable[..., nn.Module]) -> PatchEmbed:
            stride = patch_size if i == 0 else 2
            return PatchEmbed(
                in_chans, dim, kernel_size=stride, stride=stride, padding=0, norm_layer=norm_layer,
                min_size=patch_size if i == 0 else 1, **dd)

        def make_attention(i: int, feat_size: Tuple[int, int]) -> nn.Module:
            args: Dict[str, Any] = dict(
                dim=embed_dims[i], num_heads=num_heads[i], num_global_tokens=num_global_tokens[i], qkv_bias=qkv_bias,
                attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, **dd)
            if attn_types[i] == 'full':
                return FullAttention2d(feat_size=None if rel_pos_bias is None else feat_size, **args)
            return LongShortAttention2d(
                window_size=window_sizes[i], rank=ranks[i], rel_pos_bias=rel_pos_bias,
                global_attention=global_attention, dual_ln=dual_ln,
                projection_init=projection_inits[i], **args)

        super().__init__(
            make_embed=make_embed, make_attention=make_attention, embed_dims=embed_dims, depths=depths,
            window_sizes=window_sizes, num_global_tokens=num_global_tokens, proj_drop_rate=proj_drop_rate, **dd,
            **kwargs)

    def filter_state_dict(self, state_dict: Mapping[str, Any]) -> Dict[str, Any]:
        return checkpoint_filter_fn(state_dict, self)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, Tensor]:
    """Turns released and native checkpoints into state dicts of `model`.

    Released ones are dicts with the tensors under 'net', name layers `layer1.0` (embedding), `layer1.1` (attention of
    the first block), `layer1.2` (its MLP) and so on, and hold index buffers. Position tables are resampled where the
    window or the grid differs.
    """
    state_dict = unwrap_state_dict(state_dict)
    out = {}
    for key, value in state_dict.items():
        if key.endswith('relative_position_index'):
            continue
        key = re.sub(r'^layer(\d+)\.(\d+)\.(.+)$', _rename_released, key)
        out[re.sub(r'^head\.(weight|bias)$', r'head.fc.\1', key)] = value
    return resize_position_tables(out, model)


def _rename_released(match: re.Match) -> str:
    stage, index, name = int(match[1]) - 1, int(match[2]), match[3]
    if index == 0:
        name = name.replace('norm_embed.', 'patch_embed.norm.').replace('cls_token', 'global_tokens')
        return f'stages.{stage}.{re.sub("^proj[.]", "patch_embed.proj.", name)}'
    norm = 'norm1.' if index % 2 else 'norm2.'
    return f'stages.{stage}.blocks.{(index - 1) // 2}.{re.sub("^norm[.]", norm, name)}'


def _create_vil_ls(variant: str, pretrained: bool = False, **kwargs) -> LongShortViL:
    if pretrained:
        kwargs['pretrained_cfg_overlay'] = fetch_released_weights(variant, kwargs)
    return build_model(LongShortViL, variant, pretrained, checkpoint_filter_fn, **kwargs)


# origin_url, not url: the authors' files lie behind a share page, which the build function fetches them from
default_cfgs = generate_default_cfgs({
    'vil_ls_medium.nvidia_in1k': model_cfg(origin_url='https://www.dropbox.com/s/ng14pebstaaydug/model_best.pth'),
    'vil_ls_base.nvidia_in1k': model_cfg(origin_url='https://www.dropbox.com/s/80u5p5eh4txad10/model_best.pth'),
    'vil_ls_medium_384.nvidia_in1k': model_cfg(
        origin_url='https://www.dropbox.com/s/390tzi2ll3sfibl/model_best.pth',
        input_size=(3, 384, 384), pool_size=(12, 12)),
    'vil_ls_tiny.untrained': model_cfg(),
    'vil_ls_small.untrained': model_cfg(),
    'vil_ls_tiny_linear.untrained': model_cfg(),
    'vil_ls_small_linear.untrained': model_cfg(),
    'vil_ls_medium_linear.untrained': model_cfg(),
    'vil_ls_base_linear.untrained': model_cfg(),
    'vil_full_medium.untrained': model_cfg(),
})

_TINY = dict(embed_dims=(48, 96, 192, 384), depths=(1, 1, 9, 1), num_heads=(1, 3, 3, 6))
_SMALL = dict(embed_dims=(96, 192, 384, 768), depths=(1, 2, 8, 1), num_heads=(3, 3, 6, 12))
_MEDIUM = dict(_SMALL, depths=(1, 4, 16, 1))
_BASE = dict(_SMALL, depths=(1, 8, 24, 1))


@register_model
def vil_ls_tiny(pretrained: bool = False, **kwargs) -> LongShortViL:
    """ViL-LS-Tiny: the widths and depths of ViL-Tiny."""
    return _create_vil_ls('vil_ls_tiny', pretrained, **dict(_TINY, **kwargs))


@register_model
def vil_ls_small(pretrained: bool = False, **kwargs) -> LongShortViL:
    """ViL-LS-Small: the widths and depths of ViL-Small."""
    return _create_vil_ls('vil_ls_small', pretrained, **dict(_SMALL, **kwargs))


@register_model
def vil_ls_medium(pretrained: bool = False, **kwargs) -> LongShortViL:
    """ViL-LS-Medium at 224 px, as published: 83.8 % ImageNet top-1."""
    return _create_vil_ls('vil_ls_medium', pretrained, **dict(_MEDIUM, **kwargs))


@register_model
def vil_ls_base(pretrained: bool = False, **kwargs) -> LongShortViL:
    """ViL-LS-Base at 224 px, as published: 84.1 % ImageNet top-1."""
    return _create_vil_ls('vil_ls_base', pretrained, **dict(_BASE, **kwargs))


@register_model
def vil_ls_medium_384(pretrained: bool = False, **kwargs) -> LongShortViL:
    """ViL-LS-Medium at 384 px with windows of 8, as published: 84.4 % ImageNet top-1."""
    model_args = dict(_MEDIUM, img_size=384, window_size=8)
    return _create_vil_ls('vil_ls_medium_384', pretrained, **dict(model_args, **kwargs))


@register_model
def vil_ls_tiny_linear(pretrained: bool = False, **kwargs) -> LongShortViL:
    """ViL-LS-Tiny with long-short attention in all stages, for dense prediction on large images."""
    return _create_vil_ls('vil_ls_tiny_linear', pretrained, **{**_TINY, 'attn_types': 'long-short', **kwargs})


@register_model
def vil_ls_small_linear(pretrained: bool = False, **kwargs) -> LongShortViL:
    """ViL-LS-Small with long-short attention in all stages, for dense prediction on large images."""
    return _create_vil_ls('vil_ls_small_linear', pretrained, **{**_SMALL, 'attn_types': 'long-short', **kwargs})


@register_model
def vil_ls_medium_linear(pretrained: bool = False, **kwargs) -> LongShortViL:
    """ViL-LS-Medium with long-short attention in all stages, for dense prediction on large images."""
    return _create_vil_ls('vil_ls_medium_linear', pretrained, **{**_MEDIUM, 'attn_types': 'long-short', **kwargs})


@register_model
def vil_ls_base_linear(pretrained: bool = False, **kwargs) -> LongShortViL:
    """ViL-LS-Base with long-short attention in all stages, for dense prediction on large images."""
    return _create_vil_ls('vil_ls_base_linear', pretrained, **{**_BASE, 'attn_types': 'long-short', **kwargs})


@register_model
def vil_full_medium(pretrained: bool = False, **kwargs) -> LongShortViL:
    """ViL-Medium with full attention in all stages, the baseline of scaling experiments."""
    return _create_vil_ls('vil_full_medium', pretrained, **{**_MEDIUM, 'attn_types': 'full', **kwargs})
