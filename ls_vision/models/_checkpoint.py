"""Reading checkpoints of other origins and sizes, and saying what does not fit."""
import http.client
import logging
import math
from typing import Any, Dict, List, Mapping, Tuple

import torch
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import download_cached_file
from torch import nn

from ..layers import FullAttention2d, LongShortAttention2d
from ..layers.position_bias import grid_bias_rows, resize_grid_bias, resize_window_bias

_logger = logging.getLogger(__name__)


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    """The tensors of a checkpoint, without what training scripts and wrappers put around them.

    Raises:
        ValueError: There are none.
    """
    for key in ('net', 'model', 'state_dict'):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    state_dict = {k: v for k, v in checkpoint.items() if isinstance(v, torch.Tensor)}
    if not state_dict:
        raise ValueError(
            f'The checkpoint holds no tensors; its entries are {_first(list(checkpoint))}. Expected a state dict, or a '
            "dict with one under 'net', 'model' or 'state_dict'.")
    for prefix in ('module.', '_orig_mod.', 'module.'):
        if all(k.startswith(prefix) for k in state_dict):
            state_dict = {k[len(prefix):]: v for k, v in state_dict.items()}
    return state_dict


def describe_mismatch(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """Which keys are missing, unexpected or of another shape, a few of each; empty where all fit."""
    missing = [k for k in expected if k not in found]
    unexpected = [k for k in found if k not in expected]
    shapes = [
        f'{k} {_shape(found[k])} instead of {_shape(expected[k])}'
        for k in expected if k in found and _shape(found[k]) != _shape(expected[k])
    ]
    parts = (('keys missing', missing), ('keys not known', unexpected), ('shapes differ', shapes))
    return '; '.join(f'{len(names)} {what} ({_first(names)})' for what, names in parts if names)


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _first(names: List[str], count: int = 4) -> str:
    return ', '.join(names[:count]) + (', ...' if len(names) > count else '')


def resize_position_tables(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
    """Fits the position tables of a state dict with this model's key names to its windows and grids.

    What does not follow from any window or grid is left as it is, for `load_state_dict` to report.
    """
    for name, module in model.named_modules():
        prefix = f'{name}.' if name else ''
        key = prefix + 'local_relative_position_bias_table'
        table = state_dict.get(key)
        if table is None:
            continue
        if isinstance(module, LongShortAttention2d) and module.rel_pos_bias is not None:
            resized = _fit_window_bias(table, module.window_size, module.rel_pos_bias)
        elif isinstance(module, FullAttention2d):
            resized = _fit_grid_bias(table, module.feat_size)
        else:
            continue
        if resized.shape != table.shape:
            _logger.info(f'Resampled {key} from {table.shape[0]} to {resized.shape[0]} relative positions.')
        state_dict[key] = resized
    return state_dict


def _fit_window_bias(table: torch.Tensor, window_size: int, kind: str) -> torch.Tensor:
    try:
        return resize_window_bias(table, window_size, kind)
    except ValueError:
        return table


def _fit_grid_bias(table: torch.Tensor, feat_size: Tuple[int, int]) -> torch.Tensor:
    """A table with the right number of rows is taken to be of the same grid, else its grid is taken to be square."""
    side = math.isqrt(table.shape[0])
    if table.shape[0] == grid_bias_rows(feat_size) or side * side != table.shape[0] or side % 2 == 0:
        return table
    return resize_grid_bias(table, ((side + 1) // 2, (side + 1) // 2), feat_size)


def fetch_released_weights(variant: str, pretrained_kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Where `pretrained=True` names no other source, downloads the authors' file and makes it the source.

    Args:
        variant: Registered name of the model.
        pretrained_kwargs: Arguments of `build_model_with_cfg`, of which those on pretrained weights are read.

    Returns:
        The `pretrained_cfg_overlay` to use.

    Raises:
        RuntimeError: The download page can't be reached; says how to pass a local file.
    """
    overlay = dict(pretrained_kwargs.get('pretrained_cfg_overlay') or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_kwargs.get('pretrained_cfg'), overlay).to_dict()
    page = cfg.get('origin_url')
    if not page or any(cfg.get(source) for source in ('url', 'file', 'state_dict', 'hf_hub_id')):
        return overlay
    try:
        # all released files have the same name
        overlay['file'] = download_cached_file(
            (f'{page}?dl=1', f'{variant}_released.pth'), cache_dir=pretrained_kwargs.get('cache_dir'))
    except (OSError, http.client.HTTPException) as e:
        raise RuntimeError(
            f'Could not download the released weights of {variant} from {page} ({e}). Download the file in a browser '
            f"and pass it: timm.create_model({variant!r}, pretrained=True, pretrained_cfg_overlay=dict(file="
            "'model_best.pth'))") from None
    return overlay
