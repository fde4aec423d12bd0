"""Arguments of the training scripts, from a YAML file and the command line.

Names and defaults are those of timm's train.py, which therefore runs the same file.
"""
import argparse
from collections.abc import Sequence

import torch

from ..parallel.scripts import add_space_parallel
from ..runtime.arguments import KeyValues, create_config_parser, parse_with_config
from ..runtime.devices import check_device
from ..runtime.errors import UserError


def create_parser() -> argparse.ArgumentParser:
    """The parser of every argument that a config file may hold."""
    parser = argparse.ArgumentParser(
        description='Train an image classifier; long-short models are registered with timm.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # an abbreviation would let a misspelt name through
        parents=[create_config_parser()],
    )
    _add_data_args(parser.add_argument_group('data'))
    _add_model_args(parser.add_argument_group('model'))
    add_optimizer_args(parser.add_argument_group('optimiser and schedule'))
    _add_augmentation_args(parser.add_argument_group('augmentation and regularisation'))
    add_run_args(parser.add_argument_group('run'))
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the config file, then the command line over it.

    Args:
        argv: Command line without the program's name; None reads `sys.argv`.

    Returns:
        Checked arguments.
    """
    args = parse_with_config(create_parser(), argv)
    _check_args(args)
    return args


def check_optimizer_args(args: argparse.Namespace) -> None:
    """Refuse what would override an argument of its own."""
    for name in ('lr', 'weight_decay'):
        if name in args.opt_kwargs:
            raise UserError(f'--opt-kwargs {name}={args.opt_kwargs[name]}: pass --{name.replace("_", "-")}')


def resolve_lr(args: argparse.Namespace, world_size: int) -> float:
    """The peak learning rate: --lr, or --lr-base scaled to the images of an update, by timm's rule."""
    if args.lr is not None:
        return args.lr
    ratio = args.batch_size * args.grad_accum_steps * world_size / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
    scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
    return args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def _add_data_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--data-dir', metavar='DIR', help='dataset folder, with one sub-folder per split')
    group.add_argument('--dataset', default='', help='timm dataset name, e.g. hfds/...; empty reads a folder or tar')
    group.add_argument('--train-split', default='train', help='name of the training split')
    group.add_argument('--val-split', default='validation', help='name of the evaluation split')
    group.add_argument('--class-map', default='', metavar='FILE', help='class names in order, where not as sorted')
    group.add_argument('--dataset-download', action='store_true', help='let torchvision or the hub fetch the dataset')
    group.add_argument('--train-num-samples', type=int, metavar='N', help='training images, where shards do not say')
    group.add_argument('--val-num-samples', type=int, metavar='N', help='evaluation images, likewise')
    group.add_argument('--input-key', metavar='KEY', help="name of the images, where not the dataset's usual one")
    group.add_argument('--target-key', metavar='KEY', help="name of the labels, where not the dataset's usual one")
    group.add_argument('-b', '--batch-size', type=int, default=128, help='training batch of one process')
    group.add_argument('-vb', '--validation-batch-size', type=int, help='evaluation batch; as in training if not set')
    group.add_argument('-j', '--workers', type=int, default=4, help='loader processes; 0 loads in the main process')
    group.add_argument('--max-unreadable', type=float, default=.01, metavar='SHARE',
                       help='share of unreadable training images that ends the run')
    group.add_argument('--img-size', type=int, help="image size; the model's own if not set")
    group.add_argument('--crop-pct', type=float, help='evaluation crop / resize ratio')
    group.add_argument('--mean', type=float, nargs='+', help='pixel mean')
    group.add_argument('--std', type=float, nargs='+', help='pixel standard deviation')
    group.add_argument('--interpolation', default='', help="evaluation resize; the model's own if not set")


def _add_model_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--model', default='vil_ls_tiny', help='timm model name')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValues, help='constructor arguments, k=v')
    group.add_argument('--num-classes', type=int, help="classes; the dataset's if not set")
    group.add_argument('--pretrained', action='store_true', help='start from the published weights')
    group.add_argument('--pretrained-path', default='', metavar='PATH',
                       help='start from this weight file, with a new classifier where the classes differ')
    group.add_argument('--initial-checkpoint', default='', metavar='PATH',
                       help='start from this weight file, its classifier included')
    group.add_argument('--drop', type=float, default=0., help='classifier dropout rate')
    group.add_argument('--drop-path', type=float, help='stochastic depth rate')
    add_space_parallel(group)
    group.add_argument('--channels-last', action='store_true', help='channels-last memory layout')
    group.add_argument('--grad-checkpointing', action='store_true', help='recompute activations, to save memory')
    group.add_argument('--sync-bn', action='store_true', help='batch norms over all processes')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')
    group.add_argument('--torchcompile-mode', metavar='MODE', help="mode of torch.compile, e.g. 'max-autotune'")
    group.add_argument('--amp', action='store_true', help='automatic mixed precision')
    group.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='its lower precision')
    group.add_argument('--model-ema', action='store_true', help='average the weights, evaluate the average')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, help='decay of the average')
    group.add_argument('--model-ema-warmup', action='store_true', help='raise the decay from 0 at the start')


def add_optimizer_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--opt', default='sgd', help='timm optimiser name')
    group.add_argument('--opt-eps', type=float, help="epsilon; the optimiser's own if not set")
    group.add_argument('--opt-betas', type=float, nargs='+', help="betas; the optimiser's own if not set")
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=KeyValues,
                       help="the optimiser's other arguments, k=v, e.g. fused=True")
    group.add_argument('--momentum', type=float, default=0.9, help='momentum')
    group.add_argument('--weight-decay', type=float, default=2e-5, help='weight decay')
    group.add_argument('--layer-decay', type=float, help='layer-wise learning-rate decay')
    group.add_argument('--clip-grad', type=float, help='gradient clipping; none if not set')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='kind of clipping')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches that make an update')
    group.add_argument('--lr', type=float, help='peak learning rate; follows from --lr-base if not set')
    group.add_argument('--lr-base', type=float, help='peak learning rate at a batch of --lr-base-size')
    group.add_argument('--lr-base-size', type=int, default=256, help='global batch that --lr-base is meant for')
    group.add_argument('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'),
                       help='how the rate grows with the batch; sqrt for adaptive optimisers, else linear if not set')
    group.add_argument('--sched', default='cosine', help='timm schedule name')
    group.add_argument('--sched-on-updates', action='store_true', help='step the schedule per update, not per epoch')
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N',
                       help='epochs after which a multistep schedule lowers the rate')
    group.add_argument('--decay-rate', type=float, default=0.1, help='by this factor')
    group.add_argument('--epochs', type=int, default=300, help='epochs')
    group.add_argument('--warmup-epochs', type=float, default=5, help='epochs of linear warm-up')
    group.add_argument('--warmup-lr', type=float, default=1e-5, help='learning rate at the start of the warm-up')
    group.add_argument('--warmup-prefix', action='store_true', help='warm-up comes before, not within, the epochs')
    group.add_argument('--cooldown-epochs', type=int, default=0, help='epochs at the lowest rate after the schedule')
    group.add_argument('--min-lr', type=float, default=0., help='lowest learning rate')


def _add_augmentation_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--no-aug', action='store_true', help='no augmentation at all')
    group.add_argument('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'), help='random crop; rrc if not set')
    group.add_argument('--scale', type=float, nargs=2, default=[0.08, 1.0], help='area of the random crop')
    group.add_argument('--ratio', type=float, nargs=2, default=[3 / 4, 4 / 3], help='aspect of the random crop')
    group.add_argument('--hflip', type=float, default=0.5, help='horizontal flip probability')
    group.add_argument('--vflip', type=float, default=0., help='vertical flip probability')
    group.add_argument('--color-jitter', type=float, default=0.4, help='colour jitter')
    group.add_argument('--aa', help='RandAugment or AutoAugment policy, e.g. rand-m9-mstd0.5-inc1')
    group.add_argument('--train-interpolation', default='random', help='resize of the training crop')
    group.add_argument('--reprob', type=float, default=0., help='random erasing probability')
    group.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='random erasing fill')
    group.add_argument('--recount', type=int, default=1, help='random erasing count')
    group.add_argument('--mixup', type=float, default=0., help='mixup alpha')
    group.add_argument('--cutmix', type=float, default=0., help='CutMix alpha')
    group.add_argument('--mixup-prob', type=float, default=1., help='probability of mixup or CutMix')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, help='probability of CutMix where both are on')
    group.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='what shares a mix')
    group.add_argument('--mixup-off-epoch', type=int, default=0, help='epoch that ends mixup; 0 never does')
    group.add_argument('--aug-repeats', type=float, default=0, help='augmented versions of an image in an epoch')
    group.add_argument('--smoothing', type=float, default=0.1, help='label smoothing')


def add_run_args(group: argparse._ArgumentGroup) -> None:
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    group.add_argument('--device', default=device, help='torch device')
    group.add_argument('--seed', type=int, default=42, help='random seed')
    group.add_argument('--deterministic', action='store_true', help='use only algorithms with reproducible bits')
    group.add_argument('--resume', default='', metavar='PATH',
                       help="resume from this checkpoint; 'auto': from the last one of --experiment, if any")
    group.add_argument('--recovery-interval', type=int, default=0, metavar='N',
                       help='updates between checkpoints within an epoch; 0: only at its end')
    group.add_argument('--max-nonfinite', type=int, default=10, metavar='K',
                       help='abort after K consecutive non-finite losses')
    group.add_argument('--dry-run-loader', action='store_true', help='print the images/s of the loaders, do not train')
    group.add_argument('--log-tensorboard', action='store_true', help='write TensorBoard events')
    group.add_argument('--log-wandb', action='store_true', help='send figures to Weights & Biases')
    group.add_argument('--wandb-project', default='ls_vision', metavar='NAME', help='project there')
    group.add_argument('--log-interval', type=int, default=50, help='updates between lines where there is no terminal')
    group.add_argument('--output', default='', metavar='DIR', help='folder of runs; output/train if not set')
    group.add_argument('--experiment', default='', metavar='NAME', help='folder of this run; time and model if not set')


def _check_args(args: argparse.Namespace) -> None:
    """Refuse values that would fail, or mislead, only after training."""
    if not args.data_dir and not args.dataset:
        raise UserError('no data: pass --data-dir (a folder with one sub-folder per split)')
    if args.lr is None and args.lr_base is None:
        raise UserError('no learning rate: pass --lr, or --lr-base and --lr-base-size')
    for name in ('batch_size', 'epochs', 'log_interval', 'validation_batch_size', 'num_classes', 'img_size',
                 'grad_accum_steps', 'lr_base_size', 'max_nonfinite', 'train_num_samples', 'val_num_samples',
                 'space_parallel'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f'--{name.replace("_", "-")} {value}: must be 1 or more')
    for name in ('workers', 'lr', 'lr_base', 'weight_decay', 'warmup_epochs', 'cooldown_epochs', 'clip_grad',
                 'aug_repeats', 'recovery_interval', 'max_unreadable'):
        value = getattr(args, name)
        if value is not None and not value >= 0:  # also refuses nan
            raise UserError(f'--{name.replace("_", "-")} {value}: must be 0 or more')
    check_optimizer_args(args)
    if args.resume == 'auto' and not args.experiment:
        raise UserError('--resume auto: pass the --experiment whose last checkpoint is meant')
    if (args.mixup > 0 or args.cutmix > 0) and args.batch_size % 2:
        raise UserError(f'--batch-size {args.batch_size}: must be even, since --mixup and --cutmix mix pairs of images')
    starts = [name for name in ('pretrained', 'pretrained_path', 'initial_checkpoint') if getattr(args, name)]
    if args.sync_bn and args.space_parallel > 1:
        raise UserError(f'--sync-bn: not with --space-parallel {args.space_parallel}, expected one of the two')
    if len(starts) > 1:
        raise UserError(f'{" and ".join("--" + name.replace("_", "-") for name in starts)}: choose one')
    check_device(args.device)
