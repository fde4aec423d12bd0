"""Writes a model as ONNX, for any batch and image size.

    ls-vision export vil_ls_tiny --out model.onnx
    ls-vision export vil_ls_medium --checkpoint model_best.pth --out model.onnx

Needs the `onnx` extra. The file holds ONNX's own operators alone, so whatever runs it needs nothing of this package.
`torch.onnx.export(model, ..., dynamo=True)` writes the same; this command adds open sizes and a checkpoint.
"""
import argparse
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, Union

import timm
import torch
from torch import nn
from torch.export import Dim

from ls_vision.analysis.zoo import check_model
from ls_vision.runtime.errors import UserError
from ls_vision.runtime.files import atomic_write


def export_onnx(
        model: nn.Module,
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
    # a batch of 1 would be taken for a constant
    example = torch.randn(2, getattr(model, 'in_chans', 3), *img_size)
    with torch.no_grad():
        program = torch.onnx.export(
            model.eval(), (example,), dynamo=True, opset_version=opset, input_names=['image'], output_names=['output'],
            dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},), verbose=False)
    assert program is not None
    with atomic_write(path) as file:
        file.write(program.model_proto.SerializeToString())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', help='name of a registered model, e.g. vil_ls_tiny')
    parser.add_argument('--out', required=True, help='file to write')
    parser.add_argument('--checkpoint', default=None, help='weights to load; random ones without it')
    parser.add_argument('--num-classes', type=int, default=None, help='width of the classifier')
    parser.add_argument('--img-size', type=int, nargs='+', default=[224], help='of the traced example: side, or H W')


def run(args: argparse.Namespace) -> None:
    """Raises UserError where the model does not exist or a package is missing."""
    check_model(args.model)
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("ONNX export needs more packages: pip install 'ls_vision[onnx]'") from None
    size: List[int] = args.img_size * 2 if len(args.img_size) == 1 else args.img_size
    model = timm.create_model(args.model, num_classes=args.num_classes, checkpoint_path=args.checkpoint)
    export_onnx(model, args.out, (size[0], size[1]))
    print(f'{args.out}: {Path(args.out).stat().st_size / 2 ** 20:.1f} MiB, input image (batch, 3, height, width)')


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0], allow_abbrev=False)
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except UserError as e:
        raise SystemExit(f'error: {e}') from None


if __name__ == '__main__':
    main()
