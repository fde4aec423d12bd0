"""Arguments of train_detection.py; those of optimiser, schedule and run are shared with train_imagenet.py."""
import argparse
from collections.abc import Sequence

from ..runtime.arguments import KeyValues, create_config_parser, parse_with_config
from ..runtime.devices import check_device
from ..runtime.errors import UserError
from ..training.config import add_optimizer_args, add_run_args, check_optimizer_args
from .detectors import DETECTORS


def create_parser() -> argparse.ArgumentParser:
    """The parser of every argument that a config file may hold."""
    parser = argparse.ArgumentParser(
        description='Train a detector of torchvision on a timm backbone; long-short models are registered.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # an abbreviation would let a misspelt name through
        parents=[create_config_parser()],
    )
    _add_data_args(parser.add_argument_group('data'))
    _add_model_args(parser.add_argument_group('model'))
    _add_augmentation_args(parser.add_argument_group('augmentation'))
    _add_evaluation_args(parser.add_argument_group('evaluation'))
    add_optimizer_args(parser.add_argument_group('optimiser and schedule'))
    add_run_args(parser.add_argument_group('run'))
    parser.set_defaults(opt='adamw', weight_decay=.05, epochs=12, warmup_epochs=1)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the config file, then the command line, which wins; returns checked arguments."""
    args = parse_with_config(create_parser(), argv)
    _check_args(args)
    return args


def _add_data_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--train-annotations', metavar='PATH', help='COCO .json, or VOC .xml file or folder')
    group.add_argument('--train-images', metavar='DIR', help='their images; where the annotations lie if not set')
    group.add_argument('--val-annotations', metavar='PATH', help='the same for evaluation')
    group.add_argument('--val-images', metavar='DIR', help='the same for evaluation')
    group.add_argument('--skip-bad', action='store_true', help='leave out bad records and images instead of stopping')
    group.add_argument('--max-unreadable', type=float, default=1., metavar='SHARE',
                       help='share of undecodable training images that ends the run, with --skip-bad')
    group.add_argument('-b', '--batch-size', type=int, default=16, help='training batch of a process')
    group.add_argument('-j', '--workers', type=int, default=4, help='loader processes; 0 loads in the main process')


def _add_model_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--detector', default='retinanet', choices=tuple(DETECTORS), help='detector of torchvision')
    group.add_argument('--model', default='vil_ls_small_linear', help='timm model name of the backbone')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValues, help='its arguments, k=v')
    group.add_argument('--detector-kwargs', nargs='*', default={}, action=KeyValues, help="the detector's, k=v")
    group.add_argument('--strides', type=int, nargs='+', help="strides of the pyramid; the detector's own if not set")
    group.add_argument('--out-channels', type=int, default=256, help='width of pyramid and heads')
    group.add_argument('--trainable-stages', type=int, help='last stages of the backbone to train; all if not set')
    group.add_argument('--grad-checkpointing', action='store_true', help='less memory for a third more time')
    group.add_argument('--drop-path', type=float, default=0., help='stochastic depth rate of the backbone')
    group.add_argument('--pretrained', action='store_true', help="start from the backbone's published weights")
    group.add_argument('--initial-backbone', default='', metavar='PATH', help='start from these classifier weights')
    group.add_argument('--initial-checkpoint', default='', metavar='PATH', help='start from this detector')
    group.add_argument('--amp', action='store_true', help='automatic mixed precision')
    group.add_argument('--amp-dtype', default='bfloat16', choices=('float16', 'bfloat16'), help='its lower precision')
    group.add_argument('--model-ema', action='store_true', help='average the weights, evaluate the average')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, help='decay of the average')
    group.add_argument('--model-ema-warmup', action='store_true', help='raise the decay from 0 at the start')


def _add_augmentation_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--crop-size', type=int, help='train on random squares of this side; on whole images if not set')
    group.add_argument('--crop-scale', type=float, nargs=2, default=[1., 1.], help='range of their magnification')
    group.add_argument('--crops-per-image', type=int, default=1, help='crops of each image per epoch')
    group.add_argument('--min-size', type=int, nargs='+', help='resize shorter sides to one of these, evaluation to '
                       'the last; not at all if not set')
    group.add_argument('--max-size', type=int, help='limit of longer sides with --min-size; 1333 if not set')
    group.add_argument('--hflip', type=float, default=0.5, help='horizontal flip probability')
    group.add_argument('--vflip', type=float, default=0., help='vertical flip probability')
    group.add_argument('--transpose', type=float, default=0., help='probability of exchanging rows and columns')
    group.add_argument('--color-jitter', type=float, default=0., help='brightness, contrast and saturation jitter')
    group.add_argument('--photometric-distort', type=float, default=0., help="probability of each change of the SSD's "
                       'colours: brightness, contrast, saturation, hue, order of channels')


def _add_evaluation_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--max-dets', type=int, default=100, help='detections per image that count; raise it where '
                       'images have more objects')
    group.add_argument('--tile-size', type=int, help='evaluate tile by tile; whole images if not set')
    group.add_argument('--tile-overlap', type=int, default=128, help='pixels that tiles share')
    group.add_argument('--eval-interval', type=int, default=1, help='epochs between evaluations')
    group.add_argument('--picture-score', type=float, default=.3, help='weaker detections are not drawn')


def _check_args(args: argparse.Namespace) -> None:
    """Refuse values that would fail only after training."""
    for name in ('train_annotations', 'val_annotations'):
        if getattr(args, name) is None:
            raise UserError(f'--{name.replace("_", "-")} is missing')
    if args.lr is None and args.lr_base is None:
        raise UserError('no learning rate: pass --lr or --lr-base')
    for name in ('batch_size', 'epochs', 'crop_size', 'crops_per_image', 'max_dets', 'tile_size', 'max_size',
                 'eval_interval', 'log_interval', 'grad_accum_steps', 'max_nonfinite'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f'--{name.replace("_", "-")} {value}: must be 1 or more')
    for name in ('hflip', 'vflip', 'transpose', 'photometric_distort'):
        value = getattr(args, name)
        if not 0 <= value <= 1:
            raise UserError(f'--{name.replace("_", "-")} {value}: must be a probability, from 0 to 1')
    if not 0 < args.crop_scale[0] <= args.crop_scale[1]:
        raise UserError(f'--crop-scale {args.crop_scale}: must be two numbers above 0, the smaller first')
    if args.tile_size is not None and not 0 <= args.tile_overlap < args.tile_size:
        raise UserError(f'--tile-overlap {args.tile_overlap}: must be 0 or more and below --tile-size {args.tile_size}')
    if args.max_size is not None and args.min_size is None:
        raise UserError(f'--max-size {args.max_size}: images are resized only with --min-size')
    if args.model_kwargs.get('in_chans', 3) != 3:
        raise UserError(f'--model-kwargs in_chans={args.model_kwargs["in_chans"]}: images are read as RGB, 3 channels')
    check_optimizer_args(args)
    if args.pretrained and args.initial_backbone:
        raise UserError(f'--pretrained and --initial-backbone {args.initial_backbone}: choose one')
    check_device(args.device)
