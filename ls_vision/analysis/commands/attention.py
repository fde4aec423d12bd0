"""Draws the attention of one block of a model in an image: a sheet as PNG, and its arrays as .npz.

    ls-vision attention photo.jpg --model vil_ls_medium --checkpoint model_best.pth
    ls-vision attention photo.jpg --model vil_ls_medium --checkpoint model_best.pth --stage 1 --block 3 --pixel 120 340
    ls-vision attention photo.jpg --model vil_ls_tiny --checkpoint output/cifar10/model_best.pth.tar \\
        --model-kwargs img_size=32 patch_size=4 num_classes=10

    ls-vision attention photo.jpg --model vil_ls_medium --checkpoint model_best.pth --summary

The sheet shows the attention of a pixel to its window and, through the summaries, to the whole image, the share of
each, attention rollout, and the maps of the dynamic projection of every head. --summary prints a table instead: of
every head of all blocks, how many directions its summaries span and what share of the attention they get. In Python:
`ls_vision.analysis.record` and `ls_vision.analysis.summaries`.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ls_vision.runtime.arguments import KeyValues, image_size
from ls_vision.runtime.errors import UserError
from ls_vision.runtime.files import atomic_write, check_output, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('image', type=Path, metavar='IMAGE', help='a picture file')
    parser.add_argument('--model', default='vil_ls_medium', help='model of this package (default: %(default)s)')
    parser.add_argument('--checkpoint', type=Path, help='weights to load; random weights without it')
    parser.add_argument(
        '--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='NAME=VALUE',
        help='arguments that the model was built with')
    parser.add_argument(
        '--img-size', type=image_size, metavar='SIZE',
        help='size to resize the image to (default: shorter side as configured for the model, same aspect ratio)')
    parser.add_argument('--stage', type=int, help='stage of the sheet, numbered from 0 (default: 0)')
    parser.add_argument('--block', type=int, help='block of the stage, from 0 (default: 0)')
    parser.add_argument(
        '--pixel', type=int, nargs=2, metavar=('ROW', 'COLUMN'), help='query pixel in the file (default: its centre)')
    parser.add_argument(
        '--summary', action='store_true', help='print what the summaries of all blocks are worth; --out writes JSON')
    parser.add_argument(
        '--out', type=Path,
        help='.png file of the sheet; the arrays are written beside it as .npz (default: attention.png). With '
        '--summary a .json file')


def run(args: argparse.Namespace) -> None:
    if args.summary:
        summarize(args)
    else:
        draw(args)
    if not args.checkpoint:
        print('No --checkpoint: this is the attention of an untrained model.', file=sys.stderr)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model, and the image (C, H, W) as bytes."""
    from ls_vision.analysis import attention_sheet, zoo

    model = zoo.load(args.model, args.checkpoint, args.model_kwargs)
    shorter = min(getattr(model, 'img_size', zoo.default_size(args.model)))
    image = attention_sheet.load_image(args.image, args.img_size, shorter)
    return model, image


def summarize(args: argparse.Namespace) -> None:
    """Prints the table, and writes its rows."""
    for option in ('stage', 'block', 'pixel'):
        if getattr(args, option) is not None:
            raise UserError(f'--{option}: chooses what the sheet shows; --summary is of all blocks and tokens')
    out = None if args.out is None else check_output(args.out, '--out', '.json')

    from ls_vision.analysis import attention_sheet
    from ls_vision.analysis.summaries import table, use_of_summaries

    model, image = load(args)
    rows = use_of_summaries(attention_sheet.record_image(model, image))
    print(table(rows))
    if out is not None:
        write_text(out, json.dumps([row.as_dict() for row in rows], indent=1) + '\n')


def draw(args: argparse.Namespace) -> None:
    """Writes the sheet and its arrays."""
    args.out = args.out or Path('attention.png')
    out, arrays = check_outputs(args)

    import numpy as np

    from ls_vision.analysis import attention_sheet, pictures

    pictures.check_available()
    model, image = load(args)
    weights = f'weights of {args.checkpoint.name}' if args.checkpoint else 'random weights'
    title = f'{args.model}, {weights}: {args.image.name} at {image.shape[1]} x {image.shape[2]}'
    sheet = attention_sheet.look(model, image, args.stage or 0, args.block or 0, share_of_image(args), title)
    attention_sheet.draw(sheet, out)
    with atomic_write(arrays) as file:
        np.savez_compressed(file, **sheet.arrays())  # type: ignore[arg-type]
    print(f'{out}, {arrays}')


def check_outputs(args: argparse.Namespace) -> tuple[Path, Path]:
    """The files of the sheet and of the arrays. Raises UserError where they cannot be written."""
    out = check_output(args.out, '--out', '.png')
    if out.exists() and args.image.exists() and out.samefile(args.image):
        raise UserError(f'--out {out}: is the picture itself, which would be overwritten')
    return out, out.with_suffix('.npz')


def share_of_image(args: argparse.Namespace) -> tuple[float, float] | None:
    """Position of the pixel as fractions of height and width; None where none was given.

    Raises:
        UserError: It lies outside.
    """
    if args.pixel is None:
        return None

    from PIL import Image

    with Image.open(args.image) as image:
        width, height = image.size
    row, col = args.pixel
    if not (0 <= row < height and 0 <= col < width):
        raise UserError(f'--pixel {row} {col}: outside of {args.image.name}, which is {height} x {width}')
    return (row + 0.5) / height, (col + 0.5) / width
