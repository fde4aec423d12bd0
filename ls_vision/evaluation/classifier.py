"""A classifier from a script's arguments."""
import argparse
from typing import Any

import timm
from timm.models import resolve_model_input_args
from torch import nn

import ls_vision.models  # noqa: F401  (registers the models)

from ..analysis.zoo import check_model
from ..runtime.archives import load_checkpoint
from ..runtime.errors import UserError, first_line


def create_classifier(args: argparse.Namespace, num_classes: int, **kwargs: Any) -> nn.Module:
    """Create `args.model` for `args.img_size`, with published weights where `args.pretrained` asks for them.

    Args:
        args: A script's arguments, with timm's names.
        num_classes: Width of the classifier.
        kwargs: Further arguments of the model; `args.model_kwargs` override them.

    Raises:
        UserError: There is no such model, or it cannot be built with these arguments.
    """
    check_model(args.model)
    try:
        model_args = resolve_model_input_args(
            args.model, vars(args), num_classes=num_classes, **{**kwargs, **args.model_kwargs})
        return timm.create_model(pretrained=args.pretrained, **model_args)
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as e:  # the last: weights out of reach
        raise UserError(f'model {args.model} cannot be built with {args.model_kwargs}: {first_line(e)}') from e


def read_class_names(path: str) -> list[str] | None:
    """The names of the classes that a checkpoint of train_imagenet.py was trained on, by number; None without any.

    Raises:
        UserError: The checkpoint cannot be read.
    """
    names = load_checkpoint(path).get('class_names')
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
