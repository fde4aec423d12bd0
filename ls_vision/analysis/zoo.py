"""Models by name: the registered ones, their published accuracy, and building one for an image size."""
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import timm
import torch
from timm.models import PretrainedCfg, resolve_model_input_args
from torch import nn

import ls_vision.models  # noqa: F401  registers the models
from ls_vision.models._checkpoint import load_weights
from ls_vision.runtime.errors import UserError, first_line
from ls_vision.runtime.spelling import did_you_mean

ImageSize = tuple[int, int]
"""Height and width in pixels."""


class Published(NamedTuple):
    """ImageNet-1k accuracy in percent as its authors published it, and where."""
    top1: float
    source: str
    weights: Optional[str] = None
    """timm's name of the weights that reach it; they are not always those that it loads by default."""
    px: int = 224
    """Side of the images."""


LONG_SHORT_PAPER = 'arXiv:2107.02192'
PUBLISHED = {
    'vil_ls_medium': Published(83.8, LONG_SHORT_PAPER),
    'vil_ls_base': Published(84.1, LONG_SHORT_PAPER),
    'vil_ls_medium_384': Published(84.4, LONG_SHORT_PAPER, px=384),
    'cvt_ls_13': Published(81.9, LONG_SHORT_PAPER),
    'cvt_ls_17': Published(82.5, LONG_SHORT_PAPER),
    'cvt_ls_21': Published(82.7, LONG_SHORT_PAPER),
    'cvt_ls_21s': Published(82.9, LONG_SHORT_PAPER),
    'cvt_ls_21_384': Published(83.2, LONG_SHORT_PAPER, px=384),
    'cvt_ls_21_448': Published(83.6, LONG_SHORT_PAPER, px=448),
    'swin_tiny_patch4_window7_224': Published(81.3, 'arXiv:2103.14030', 'swin_tiny_patch4_window7_224.ms_in1k'),
    'swin_small_patch4_window7_224': Published(83.0, 'arXiv:2103.14030', 'swin_small_patch4_window7_224.ms_in1k'),
    'swin_base_patch4_window7_224': Published(83.5, 'arXiv:2103.14030', 'swin_base_patch4_window7_224.ms_in1k'),
    'convnext_tiny': Published(82.1, 'arXiv:2201.03545', 'convnext_tiny.fb_in1k'),
    'convnext_small': Published(83.1, 'arXiv:2201.03545', 'convnext_small.fb_in1k'),
    'convnext_base': Published(83.8, 'arXiv:2201.03545', 'convnext_base.fb_in1k'),
    'resnet50': Published(80.4, 'arXiv:2110.00476', 'resnet50.a1_in1k'),
    # DeiT: the same models without distillation
    'vit_small_patch16_224': Published(79.8, 'arXiv:2012.12877', 'deit_small_patch16_224.fb_in1k'),
    'vit_base_patch16_224': Published(81.8, 'arXiv:2012.12877', 'deit_base_patch16_224.fb_in1k'),
}


def own_models() -> list[str]:
    """Names of this package's models."""
    return sorted(
        name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('ls_vision.models.'))


def find_models(patterns: Sequence[str]) -> list[str]:
    """Registered models whose names match patterns as `timm.list_models` takes them; a name may have a tag.

    Raises:
        UserError: A pattern matches none, or there is no model of a name.
    """
    names: list[str] = []
    for pattern in patterns:
        if any(sign in pattern for sign in '*?['):
            found = timm.list_models(pattern)
            if not found:
                raise UserError(f'no model matches {pattern!r}; expected a name, or a pattern such as \'vil_ls_*\'')
            names += found
        else:
            check_model(pattern)
            names.append(pattern)
    return list(dict.fromkeys(names))


def check_model(name: str) -> None:
    """Raises UserError, with similar names, where there is no such model, tag, folder or repository.

    Args:
        name: Registered name, with or without the tag of pretrained weights, or hf-hub:OWNER/NAME or local-dir:FOLDER.
    """
    if ':' in name:
        _config(name)
        return
    arch, _, tag = name.partition('.')
    if not timm.is_model(arch):
        hint = did_you_mean(name, timm.list_models(), count=3) or '; timm.list_models() lists the names'
        raise UserError(f'unknown model {name!r}{hint}')
    known = [n for n in timm.list_models(f'{arch}.*', include_tags=True) if n != arch]
    if tag and name not in known:
        raise UserError(f'unknown tag {tag!r} of model {arch!r}; {", ".join(known) or "it has none"}')


def default_size(name: str) -> ImageSize:
    """The image size that a model is configured for."""
    _, height, width = _config(name).input_size
    return height, width


def size_name(size: ImageSize) -> str:
    """The text that `ls_vision.runtime.arguments.image_size` reads."""
    return str(size[0]) if size[0] == size[1] else f'{size[0]}x{size[1]}'


def build(name: str, size: ImageSize, device: Union[str, torch.device] = 'cpu', **kwargs: Any) -> nn.Module:
    """A model with random weights that takes images of a size.

    Models for a fixed size (`fixed_input_size` in timm's configuration: ViT, Swin) are built for this size. All others,
    those of this package included, accept any size and are built as registered.

    Raises:
        UserError: There is no such model, or it cannot be built for the size.
    """
    check_model(name)
    if _config(name).fixed_input_size and size != default_size(name):
        kwargs['img_size'] = size
    try:
        with torch.device(device):
            return timm.create_model(name, **kwargs)
    except (AssertionError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f'{name} cannot be built for images of {size_name(size)}: {first_line(e)}') from e


def load(name: str, checkpoint: Optional[Path], model_kwargs: dict[str, Any]) -> nn.Module:
    """A model in evaluation mode, with the weights of a file or with random ones.

    Args:
        name: As for `check_model`.
        checkpoint: File of weights.
        model_kwargs: Arguments that the model was built with.

    Raises:
        UserError: There is no such model or file, or they do not fit.
    """
    check_model(name)
    if checkpoint is not None and not checkpoint.is_file():
        raise UserError(f'--checkpoint {checkpoint}: no such file')
    try:
        model = timm.create_model(name, **model_kwargs).eval()
    except (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f'{name} cannot be built with {model_kwargs}: {first_line(e)}') from e
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


@functools.cache
def _config(name: str) -> Any:
    try:
        if ':' in name:
            return PretrainedCfg(**resolve_model_input_args(name)['pretrained_cfg'])
        config = timm.get_pretrained_cfg(name)
    except (OSError, RuntimeError, ValueError) as e:
        raise UserError(f'model {name!r}: {first_line(e)}') from e
    if config is None:
        raise UserError(f'{name}: timm has no configuration for it, so its image size is unknown')
    return config
