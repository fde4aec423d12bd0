"""The one reader of weights: of other origins and sizes, with a report of what does not fit."""
import http.client
import logging
import math
import os
from typing import Any, Dict, List, Mapping, Tuple, Union

import torch
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import download_cached_file
from timm.models._manipulate import adapt_input_conv
from torch import nn

from ..layers import FullAttention2d, LongShortAttention2d
from ..layers.position_bias import WindowSize, grid_bias_rows, resize_grid_bias, resize_window_bias
from ..runtime.archives import load_checkpoint
from ..runtime.errors import UserError

_logger = logging.getLogger(__name__)


# Averaged weights come first, as in timm.
WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'net')
# Of DistributedDataParallel and averages, of torch.compile, and of Lightning's usual attribute.
PREFIXES = ('module.', '_orig_mod.', 'model.')
COUNTER = 'n_averaged'  # of torch's AveragedModel, beside the weights


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    """The tensors of a checkpoint, without the wrappers and prefixes of training scripts, however they are nested.

    Raises:
        ValueError: The checkpoint holds no tensors.
    """
    while True:
        inner = next((checkpoint[key] for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)), None)
        if inner is None:
            break
        checkpoint = inner
    state_dict = {k: v for k, v in checkpoint.items() if isinstance(v, torch.Tensor) and k != COUNTER}
    if not state_dict:
        raise ValueError(
            f'The checkpoint holds no tensors; its entries are {_first(list(checkpoint))}. Expected a state dict, or a '
            f'dict with one under {", ".join(map(repr, WRAPPERS))}.')
    while True:
        prefix = next((p for p in PREFIXES if all(k.startswith(p) for k in state_dict)), None)
        if prefix is None:
            return state_dict
        state_dict = {k[len(prefix):]: v for k, v in state_dict.items()}


def load_weights(
        model: nn.Module,
        path: Union[str, 'os.PathLike[str]'],
        new_classifier: bool = False,
        ignore_unused: bool = False,
) -> None:
    """Load a checkpoint's weights, the averaged ones where it has them, into a model of the same architecture.

    Args:
        model: A model of this package, of timm or of torchvision.
        path: A checkpoint or a file of weights.
        new_classifier: Keep the model's own classifier where the file's is one of other classes.
        ignore_unused: Leave out weights that the model lacks, e.g. a classifier's head where only its stages are built.

    Raises:
        UserError: The file is missing, damaged, refused, or of another architecture.
    """
    checkpoint = load_checkpoint(path)
    try:
        # this package's models also read the released files, and weights of other sizes
        read = getattr(model, 'filter_state_dict', unwrap_state_dict)
        weights = read(checkpoint)
    except ValueError as e:
        raise UserError(f'checkpoint {path}: {e}') from e
    expected = model.state_dict()
    weights = _adapt_channels(model, weights, expected)
    if ignore_unused:
        weights = {name: weight for name, weight in weights.items() if name in expected}
    if new_classifier:
        weights = _keep_classifier(model, weights)
    mismatch = describe_mismatch(expected, weights)
    if mismatch:
        raise UserError(f'checkpoint {path} does not fit {type(model).__name__}: {mismatch}')
    nn.Module.load_state_dict(model, weights)  # the class's own method would convert the weights again


def _adapt_channels(
        model: nn.Module,
        weights: Dict[str, Any],
        expected: Mapping[str, torch.Tensor],
) -> Dict[str, Any]:
    """The weights, with the first convolution's fitted to the model's number of channels, as timm does."""
    name = f'{getattr(model, "pretrained_cfg", {}).get("first_conv")}.weight'
    if name not in weights or name not in expected or weights[name].shape == expected[name].shape:
        return weights
    found, wanted = weights[name], expected[name]
    if found.ndim != 4 or found.shape[1] != 3 or (found.shape[0], *found.shape[2:]) != (
            wanted.shape[0], *wanted.shape[2:]):
        return weights
    return {**weights, name: adapt_input_conv(wanted.shape[1], found)}


def _keep_classifier(model: nn.Module, weights: Dict[str, Any]) -> Dict[str, Any]:
    """The weights, with the model's own classifier in place of one of another shape."""
    names = model.pretrained_cfg['classifier']  # type: ignore[index, union-attr]
    prefixes = tuple(f'{name}.' for name in ((names,) if isinstance(names, str) else names))
    classifier = {name: weight for name, weight in model.state_dict().items() if name.startswith(prefixes)}
    if all(name in weights and weights[name].shape == weight.shape for name, weight in classifier.items()):
        return weights
    return {**weights, **classifier}


def describe_mismatch(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """Some of the keys that are missing, unexpected or of another shape; empty where all fit."""
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

    A table that belongs to no window or grid is left unchanged; `load_state_dict` then reports it.
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


def _fit_window_bias(table: torch.Tensor, window_size: WindowSize, kind: str) -> torch.Tensor:
    try:
        return resize_window_bias(table, window_size, kind)
    except ValueError:
        return table


def _fit_grid_bias(table: torch.Tensor, feat_size: Tuple[int, int]) -> torch.Tensor:
    """A table with the right number of rows is assumed to be of the same grid; any other one, of a square grid."""
    side = math.isqrt(table.shape[0])
    if table.shape[0] == grid_bias_rows(feat_size) or side * side != table.shape[0] or side % 2 == 0:
        return table
    return resize_grid_bias(table, ((side + 1) // 2, (side + 1) // 2), feat_size)


def fetch_released_weights(variant: str, pretrained_kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Downloads the authors' file and makes it the source of `pretrained=True`, unless another source is named.

    Args:
        variant: Registered name of the model.
        pretrained_kwargs: Arguments of `build_model_with_cfg`; only those on pretrained weights are read.

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
