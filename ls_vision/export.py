"""Writes a model as ONNX, for any batch and image size.

    ls-vision export vil_ls_tiny --out model.onnx
    ls-vision export vil_ls_medium --checkpoint model_best.pth --out model.onnx
    ls-vision export vil_ls_tiny --checkpoint output/cifar10/model_best.pth.tar --out model.onnx --img-size 32 \\
        --model-kwargs img_size=32 patch_size=4 num_classes=10

Needs the `onnx` extra. The file holds ONNX's own operators alone, so whatever runs it needs nothing of this package.
`torch.onnx.export(model, ..., dynamo=True)` writes the same; this command adds open sizes and a checkpoint.
"""
import argparse
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Sequence, Tuple, Union

from ls_vision.runtime.arguments import KeyValues, positive_int
from ls_vision.runtime.errors import UserError, first_line
from ls_vision.runtime.files import atomic_write, check_output

if TYPE_CHECKING:
    from torch import nn


def export_onnx(
        model: 'nn.Module',
        path: Union[str, Path],
        img_size: Tuple[int, int] = (224, 224),
        opset: int = 20,
) -> None:
    """Writes a model in evaluation mode; batch, height and width stay open.

    Args:
        model: One of this package's models, or any other that `torch.export` follows at open sizes.
        path: Of the file; it appears when it is complete.
        img_size: (H, W) in pixels of the example that the model is exported with.
        opset: ONNX version of the operators in the file.
    """
    import torch
    from torch.export import Dim

    # a batch of 1 would be taken for a constant
    example = torch.randn(2, model_channels(model), *img_size)
    with torch.no_grad():
        program = torch.onnx.export(
            model.eval(), (example,), dynamo=True, opset_version=opset, input_names=['image'], output_names=['output'],
            dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},), verbose=False)
    assert program is not None
    with atomic_write(path) as file:
        file.write(program.model_proto.SerializeToString())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', help='name of a registered model, e.g. vil_ls_tiny')
    parser.add_argument('--out', required=True, type=Path, help='file to write')
    parser.add_argument('--checkpoint', type=Path, help='weights to load; random ones without it')
    parser.add_argument(
        '--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='NAME=VALUE',
        help='arguments that the model was built with')
    parser.add_argument('--num-classes', type=positive_int, help='width of the classifier')
    parser.add_argument(
        '--img-size', type=positive_int, nargs='+', default=[224], metavar='N',
        help='of the traced example: side, or H W (default: 224)')


def run(args: argparse.Namespace) -> None:
    """Raises UserError where the model, a size or a file does not fit, or a package is missing."""
    out = check_output(args.out, '--out')
    if args.checkpoint is not None and out.exists() and args.checkpoint.exists() and out.samefile(args.checkpoint):
        raise UserError(f'--out {out}: is the checkpoint itself, which would be overwritten')
    if len(args.img_size) > 2:
        raise UserError(f'--img-size {" ".join(map(str, args.img_size))}: expected a side, or height and width')
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("ONNX export needs more packages: pip install 'ls_vision[onnx]'") from None

    import torch

    from ls_vision.analysis import zoo

    size: List[int] = args.img_size * 2 if len(args.img_size) == 1 else args.img_size
    width = {} if args.num_classes is None else dict(num_classes=args.num_classes)
    model = zoo.load(args.model, args.checkpoint, {**args.model_kwargs, **width})
    try:
        model(torch.zeros(1, model_channels(model), *size))  # the exporter's errors name symbols, not sizes
        export_onnx(model, out, (size[0], size[1]))
    except UserError:
        raise
    except Exception as e:  # torch's exporter raises many kinds, each around the model's own
        cause: BaseException = e
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f'{args.model} cannot be exported at {size[0]} x {size[1]}: {first_line(cause)}') from e
    print(f'{out}: {out.stat().st_size / 2 ** 20:.1f} MiB, input image (batch, {model_channels(model)}, height, width)')


def model_channels(model: 'nn.Module') -> int:
    """Channels of the images that a model of timm takes."""
    from timm.models import get_model_input_config

    return get_model_input_config(model)['input_size'][0]


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0], allow_abbrev=False)
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except UserError as e:
        raise SystemExit(f'error: {e}') from None


if __name__ == '__main__':
    main()
