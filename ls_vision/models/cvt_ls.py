"""CvT-LS: the Convolutional vision Transformer with long-short attention.

`Long-Short Transformer: Efficient Transformers for Language and Vision`, Zhu et al., NeurIPS 2021
    - https://arxiv.org/abs/2107.02192, section 4.2
`CvT: Introducing Convolutions to Vision Transformers`, Wu et al., ICCV 2021 - https://arxiv.org/abs/2103.15808

No code or weights were ever released; rebuilt from the paper. GMACs agree with it to 1 %; its parameter counts are
0.6 % above this layout's (2 % below for cvt_ls_21s), for which it names no cause.
"""
from typing import Any, Callable, Dict, Mapping, Sequence, Tuple, Union

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import FullAttention2d, LongShortAttention2d
from ..layers.checks import check_choice
from ..layers.patch_embed import PatchEmbed
from ..layers.projection_init import starts_of_stages
from ._builder import build_model, model_cfg
from ._checkpoint import resize_position_tables, unwrap_state_dict
from ._hierarchical import ATTN_TYPES, HierarchicalTransformer, per_stage

__all__ = ['LongShortCvT']


class LongShortCvT(HierarchicalTransformer):
    """Hierarchical transformer with convolutional embeddings and projections, without position encoding.

    Takes images of any size.
    """

    def __init__(
            self,
            *,
            patch_size: int = 7,
            patch_stride: int = 4,
            embed_dims: Sequence[int] = (64, 192, 384),
            depths: Sequence[int] = (1, 2, 10),
            num_heads: Union[int, Sequence[int]] = (1, 3, 6),
            attn_types: Union[str, Sequence[str]] = 'long-short',
            window_size: Union[int, Sequence[int]] = (8, 4, 2),
            rank: Union[int, Sequence[int]] = (64, 16, 4),
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
            patch_size: Side of the first stage's overlapping patches in pixels.
            patch_stride: Their distance; later stages have patches of 3 at a distance of 2.
            embed_dims: Channels of each stage; their number is the number of stages.
            depths: Blocks of each stage.
            num_heads: Heads, for all stages or each.
            attn_types: 'long-short' or 'full', for all stages or each.
            window_size: Window of long-short attention in tokens, for all stages or each.
            rank: Rank of its dynamic projection, for all stages or each.
            dual_ln: Normalise keys and values of long-short attention to one scale.
            projection_init: Start of the dynamic projection in new training: the standard deviation of its scores, or
                'orthogonal'; None is the start of all other linear maps.
            qkv_bias: Add a bias to queries, keys and values.
            proj_drop_rate: Dropout rate after attention and in the MLP.
            attn_drop_rate: Dropout rate of attention weights.
            **kwargs: The other arguments of `HierarchicalTransformer`; nothing in this model depends on `img_size`.

        Raises:
            TypeError: There is no such argument.
            ValueError: An argument is out of range or does not fit another.
        """
        dd = {'device': device, 'dtype': dtype}
        depths, num_heads, attn_types, window_sizes, ranks = per_stage(
            len(embed_dims), depths=depths, num_heads=num_heads, attn_types=attn_types, window_size=window_size,
            rank=rank)
        for attn_type in attn_types:
            check_choice('attn_types', attn_type, ATTN_TYPES)
        projection_inits = starts_of_stages(projection_init, attn_types, ranks)

        def make_embed(i: int, in_chans: int, dim: int, norm_layer: Callable[..., nn.Module]) -> PatchEmbed:
            kernel_size, stride = (patch_size, patch_stride) if i == 0 else (3, 2)
            return PatchEmbed(
                in_chans, dim, kernel_size=kernel_size, stride=stride, padding=(kernel_size - 1) // 2,
                norm_layer=norm_layer, min_size=patch_stride if i == 0 else 1, **dd)

        def make_attention(i: int, feat_size: Tuple[int, int]) -> nn.Module:
            args: Dict[str, Any] = dict(
                dim=embed_dims[i], num_heads=num_heads[i], qkv_bias=qkv_bias, conv_projection=True,
                attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, **dd)
            if attn_types[i] == 'full':
                return FullAttention2d(**args)
            return LongShortAttention2d(
                window_size=window_sizes[i], rank=ranks[i], rel_pos_bias=None, dual_ln=dual_ln,
                projection_init=projection_inits[i], **args)

        super().__init__(
            make_embed=make_embed, make_attention=make_attention, embed_dims=embed_dims, depths=depths,
            window_sizes=window_sizes, num_global_tokens=(0,) * len(embed_dims), proj_drop_rate=proj_drop_rate, **dd,
            **kwargs)

    def filter_state_dict(self, state_dict: Mapping[str, Any]) -> Dict[str, Any]:
        return checkpoint_filter_fn(state_dict, self)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, Tensor]:
    """The tensors of a checkpoint, without what training scripts put around them."""
    return resize_position_tables(unwrap_state_dict(state_dict), model)


def _create_cvt_ls(variant: str, pretrained: bool = False, **kwargs) -> LongShortCvT:
    return build_model(LongShortCvT, variant, pretrained, checkpoint_filter_fn, **kwargs)


default_cfgs = generate_default_cfgs({
    'cvt_ls_13.untrained': model_cfg(pool_size=(14, 14)),
    'cvt_ls_17.untrained': model_cfg(pool_size=(14, 14)),
    'cvt_ls_21.untrained': model_cfg(pool_size=(14, 14)),
    'cvt_ls_21s.untrained': model_cfg(pool_size=(14, 14)),
    'cvt_ls_21_384.untrained': model_cfg(input_size=(3, 384, 384), pool_size=(24, 24)),
    'cvt_ls_21_448.untrained': model_cfg(input_size=(3, 448, 448), pool_size=(28, 28)),
    'cvt_13.untrained': model_cfg(pool_size=(14, 14)),
    'cvt_21.untrained': model_cfg(pool_size=(14, 14)),
})

_CVT_13 = dict(embed_dims=(64, 192, 384), depths=(1, 2, 10), num_heads=(1, 3, 6))
_CVT_21 = dict(_CVT_13, depths=(1, 4, 16))
_CVT_17 = dict(embed_dims=(128, 256, 384), depths=(3, 4, 10), num_heads=(2, 4, 6))
_CVT_21S = dict(_CVT_17, depths=(3, 4, 14))


@register_model
def cvt_ls_13(pretrained: bool = False, **kwargs) -> LongShortCvT:
    """CvT-LS-13 at 224 px; the paper's has 81.9 % ImageNet top-1."""
    return _create_cvt_ls('cvt_ls_13', pretrained, **dict(_CVT_13, **kwargs))


@register_model
def cvt_ls_17(pretrained: bool = False, **kwargs) -> LongShortCvT:
    """CvT-LS-17 at 224 px; the paper's has 82.5 % ImageNet top-1."""
    return _create_cvt_ls('cvt_ls_17', pretrained, **dict(_CVT_17, **kwargs))


@register_model
def cvt_ls_21(pretrained: bool = False, **kwargs) -> LongShortCvT:
    """CvT-LS-21 at 224 px; the paper's has 82.7 % ImageNet top-1."""
    return _create_cvt_ls('cvt_ls_21', pretrained, **dict(_CVT_21, **kwargs))


@register_model
def cvt_ls_21s(pretrained: bool = False, **kwargs) -> LongShortCvT:
    """CvT-LS-21S at 224 px; the paper's has 82.9 % ImageNet top-1."""
    return _create_cvt_ls('cvt_ls_21s', pretrained, **dict(_CVT_21S, **kwargs))


@register_model
def cvt_ls_21_384(pretrained: bool = False, **kwargs) -> LongShortCvT:
    """CvT-LS-21 at 384 px with windows 12, 6, 3; the paper's has 83.2 % ImageNet top-1."""
    model_args = dict(_CVT_21, img_size=384, window_size=(12, 6, 3))
    return _create_cvt_ls('cvt_ls_21_384', pretrained, **dict(model_args, **kwargs))


@register_model
def cvt_ls_21_448(pretrained: bool = False, **kwargs) -> LongShortCvT:
    """CvT-LS-21 at 448 px with windows 16, 8, 4; the paper's has 83.6 % ImageNet top-1."""
    model_args = dict(_CVT_21, img_size=448, window_size=(16, 8, 4))
    return _create_cvt_ls('cvt_ls_21_448', pretrained, **dict(model_args, **kwargs))


@register_model
def cvt_13(pretrained: bool = False, **kwargs) -> LongShortCvT:
    """CvT-13 with full attention (stride 1 keys and values), the paper's baseline."""
    return _create_cvt_ls('cvt_13', pretrained, **{**_CVT_13, 'attn_types': 'full', **kwargs})


@register_model
def cvt_21(pretrained: bool = False, **kwargs) -> LongShortCvT:
    """CvT-21 with full attention (stride 1 keys and values), the paper's baseline."""
    return _create_cvt_ls('cvt_21', pretrained, **{**_CVT_21, 'attn_types': 'full', **kwargs})
