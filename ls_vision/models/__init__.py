"""The models; importing this package registers them with timm."""
from ._hierarchical import HierarchicalTransformer
from .cvt_ls import LongShortCvT
from .vil_ls import LongShortViL

__all__ = ['HierarchicalTransformer', 'LongShortCvT', 'LongShortViL']
