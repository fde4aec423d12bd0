"""Models by name: the registered ones, their published accuracy, and building one for an image size."""
from typing import Any, NamedTuple, Union

import timm
import torch
from torch import nn

import ls_vision.models  # noqa: F401  registers the models
from ls_vision.runtime.errors import UserError, first_line
from ls_vision.runtime.spelling import did_you_mean

ImageSize = tuple[int, int]
"""Height and width in pixels."""


class Published(NamedTuple):
    """ImageNet-1k accuracy in percent as its authors published it, and where."""
    top1: float
    source: str


LONG_SHORT_PAPER = 'arXiv:2107.02192'
PUBLISHED = {
    'vil_ls_medium': Published(83.8, LONG_SHORT_PAPER),
    'vil_ls_base': Published(84.1, LONG_SHORT_PAPER),
    'vil_ls_medium_384': Published(84.4, LONG_SHORT_PAPER),
    'cvt_ls_13': Published(81.9, LONG_SHORT_PAPER),
    'cvt_ls_17': Published(82.5, LONG_SHORT_PAPER),
    'cvt_ls_21': Published(82.7, LONG_SHORT_PAPER),
    'cvt_ls_21s': Published(82.9, LONG_SHORT_PAPER),
    'cvt_ls_21_384': Published(83.2, LONG_SHORT_PAPER),
    'cvt_ls_21_448': Published(83.6, LONG_SHORT_PAPER),
    'swin_tiny_patch4_window7_224': Published(81.3, 'arXiv:2103.14030'),
    'swin_small_patch4_window7_224': Published(83.0, 'arXiv:2103.14030'),
    'swin_base_patch4_window7_224': Published(83.5, 'arXiv:2103.14030'),
    'vit_small_patch16_224': Published(79.8, 'arXiv:2012.12877'),  # DeiT: the same models without distillation
    'vit_base_patch16_224': Published(81.8, 'arXiv:2012.12877'),
}


def own_models() -> list[str]:
    """Names of this package's models."""
    return sorted(
        name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('ls_vision.models.'))


def check_model(name: str) -> None:
    """Raises UserError, with similar names, where no model is registered under a name."""
    if timm.is_model(name.split('.')[0]):
        return
    hint = did_you_mean(name, timm.list_models(), count=3) or '; timm.list_models() lists the names'
    raise UserError(f'unknown model {name!r}{hint}')


def default_size(name: str) -> ImageSize:
    """The image size that a model is configured for."""
    _, height, width = _config(name).input_size
    return height, width


def parse_size(text: str) -> ImageSize:
    """(height, width) of '224' or '640x480'.

    Raises:
        UserError: The text is neither.
    """
    numbers = text.lower().split('x')
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f'image size {text!r}: expected pixels, as 224 or as HEIGHTxWIDTH, 640x480')
    return int(numbers[0]), int(numbers[-1])


def size_name(size: ImageSize) -> str:
    """The text that `parse_size` reads."""
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


def _config(name: str) -> Any:
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise UserError(f'{name}: timm has no configuration for it, so its image size is unknown')
    return config
