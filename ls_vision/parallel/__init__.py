"""One image over several devices: long-short models on strips of rows, with the results of the unsplit model."""
from .model import parallelize
from .strips import gather_maps, row_multiple, split_image

__all__ = ['gather_maps', 'parallelize', 'row_multiple', 'split_image']
