"""The models; importing this package registers them with timm."""
from .cvt_ls import LongShortCvT
from .vil_ls import LongShortViL

__all__ = ['LongShortCvT', 'LongShortViL']
