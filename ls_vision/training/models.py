"""A model from a script's arguments."""
import argparse
import difflib
from typing import Any

import timm
from timm.models import resolve_model_input_args
from torch import nn

import ls_vision  # noqa: F401  (registers the models)

from .errors import UserError, first_line


def create_model(args: argparse.Namespace, num_classes: int, **kwargs: Any) -> nn.Module:
    """Create `args.model` for `args.img_size`, with published weights where `args.pretrained` asks for them.

    Args:
        args: A script's arguments, under timm's names.
        num_classes: Width of the classifier.
        kwargs: Further arguments of the model; `args.model_kwargs` win.

    Raises:
        UserError: There is no such model, or it cannot be built with these arguments.
    """
    if not timm.is_model(args.model.split('.')[0]) and ':' not in args.model:
        close = difflib.get_close_matches(args.model, timm.list_models(), n=3)
        raise UserError(f'unknown model {args.model!r}; ' + (
            f'did you mean {" or ".join(close)}?' if close else 'timm.list_models() lists the names'))
    try:
        model_args = resolve_model_input_args(
            args.model, vars(args), num_classes=num_classes, **{**kwargs, **args.model_kwargs})
        return timm.create_model(pretrained=args.pretrained, **model_args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as e:
        raise UserError(f'model {args.model} cannot be built with {args.model_kwargs}: {first_line(e)}') from e
