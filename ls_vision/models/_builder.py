"""What registering a family with timm takes: building a variant, and its default configuration."""
from typing import Any, Callable, Dict, Type, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg

from ._hierarchical import HierarchicalTransformer

Model = TypeVar('Model', bound=HierarchicalTransformer)


def build_model(
        cls: Type[Model],
        variant: str,
        pretrained: bool,
        filter_fn: Callable[..., Dict[str, Any]],
        **kwargs: Any,
) -> Model:
    """A variant of a family, as timm's entrypoints make it; `out_indices` are all stages by default."""
    out_indices = kwargs.pop('out_indices', tuple(range(len(kwargs['embed_dims']))))
    return build_model_with_cfg(
        cls, variant, pretrained, pretrained_filter_fn=filter_fn,
        feature_cfg=dict(flatten_sequential=True, out_indices=out_indices), **kwargs)


def model_cfg(**kwargs: Any) -> Dict[str, Any]:
    """timm's configuration of a variant at 224 px and stride 32, where `kwargs` do not say otherwise."""
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': .875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stages.0.patch_embed.proj', 'classifier': 'head.fc',
        'paper_ids': 'arXiv:2107.02192', 'paper_name': 'Long-Short Transformer', 'license': 'mit', **kwargs
    }
