"""The one rule of resuming.

Weights, averages, moments, position, random states and the order of the data come from the checkpoint; every setting
comes from this run, and the log says which of them have changed. What cannot change is refused before any work.
"""
import argparse
import copy
from typing import Any

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import PlateauLRScheduler
from timm.utils import unwrap_model
from torch import nn

from ..models._checkpoint import describe_mismatch
from ..runtime import randomness
from ..runtime.errors import UserError, first_line
from .state import Progress, TrainingState, batch_sizes, parameter_names

# And why.
UNCHANGEABLE = dict(
    opt='moments of one optimiser are of no use to another', seed='the order of the data follows from it')
# Where a run starts from; a resumed one has started.
STARTS = ('pretrained', 'pretrained_path', 'initial_checkpoint', 'initial_backbone')
# Names of the run and of what it resumes from.
PLACES = ('resume', 'experiment', 'output')
# Schedules whose rates are the same in a longer run.
WITHOUT_LENGTH = ('constant', 'multistep', 'step', 'plateau', 'none')


def restore(state: TrainingState, checkpoint: dict[str, Any], args: argparse.Namespace, path: str) -> list[str]:
    """Return to the state in which a checkpoint was written, with the settings of this run.

    Args:
        state: Of this run, at its start.
        checkpoint: Its content.
        args: This run's arguments.
        path: The checkpoint's file, for messages.

    Returns:
        What the log should say: the settings that have changed, and what follows from them.

    Raises:
        UserError: The checkpoint is of another program, model, optimiser or data, or a setting cannot change here; the
            state is unchanged.
    """
    try:
        _refuse(state, checkpoint, args, path)
        notes = _changes(state, checkpoint, args)
        rate = checkpoint['optimizer']['param_groups'][0]['lr']
        _load(state, checkpoint)
    except KeyError as e:
        raise UserError(
            f'--resume {path}: it lacks {e}; to start from weights alone, use --initial-checkpoint') from e
    except (RuntimeError, ValueError, TypeError) as e:
        raise UserError(f'--resume {path} does not fit {args.model} and its optimiser: {first_line(e)}') from e
    if state.lr != rate:
        notes.append(f'the learning rate goes on at {state.lr:g} instead of {rate:g}')
    return notes


# ---- what is refused -------------------------------------------------------------------------------------------------

def _refuse(state: TrainingState, checkpoint: dict[str, Any], args: argparse.Namespace, path: str) -> None:
    progress, old = Progress(**checkpoint['progress']), checkpoint['args']
    for name, reason in UNCHANGEABLE.items():
        if old.get(name, getattr(args, name)) != getattr(args, name):
            raise UserError(
                f'--{name} {getattr(args, name)}: {path} was written with --{name} {old[name]}, and {reason}; resume '
                'with the same, or start from its weights with --initial-checkpoint')
    begun = progress.epoch + bool(progress.batch)
    if begun > state.num_epochs:
        raise UserError(
            f'--epochs {args.epochs}: {path} is in epoch {begun}, beyond the {state.num_epochs} of this run; pass '
            'more, or evaluate the checkpoint as it is')
    _refuse_data(state, checkpoint, progress, path)
    found = {'processes': len(checkpoint['processes']), **checkpoint['sizes']}
    given = {'processes': state.processes.world_size, **batch_sizes(args)}
    if progress.batch and found != given:  # the position is a number of batches
        raise UserError(
            f'--resume {path} was written in the middle of an epoch with {_text(found)}, this run has '
            f'{_text(given)}: resume with the same')
    expected = unwrap_model(state.task.get_trainable_module()).state_dict()
    mismatch = describe_mismatch(expected, checkpoint['state_dict'])
    if mismatch:
        raise UserError(f'--resume {path} does not fit {args.model}: {mismatch}')
    _refuse_moments(state, checkpoint, args, path)


def _refuse_data(state: TrainingState, checkpoint: dict[str, Any], progress: Progress, path: str) -> None:
    """Other classes would get the weights of the old ones; within an epoch the order is that of the old images."""
    old = checkpoint.get('class_names')
    if old is not None and state.class_names is not None and old != state.class_names:
        raise UserError(
            f'--resume {path} was trained on {len(old)} classes ({_first(old)}), these data have '
            f'{len(state.class_names)} ({_first(state.class_names)}): {_difference(old, state.class_names)}')
    if progress.batch and _data_changed(state, checkpoint):
        raise UserError(
            f'--resume {path} was written in the middle of an epoch, and the training data have changed since '
            f'({_data_text(checkpoint["data"], state.data)}): restore them, or resume from a checkpoint at the end of '
            'an epoch')


def _refuse_moments(state: TrainingState, checkpoint: dict[str, Any], args: argparse.Namespace, path: str) -> None:
    """Settings like amsgrad need what the checkpoint's optimiser did not keep."""
    parameters = [p for group in state.optimizer.param_groups for p in group['params']]
    kept = {i: moments for i, moments in _moments(state, checkpoint).items() if moments}
    if not kept:
        return
    i = min(kept, key=lambda i: parameters[i].numel())
    missing = _names_of_moments(args, parameters[i]) - kept[i].keys()
    if missing:
        raise UserError(
            f'--resume {path}: its optimiser has kept no {", ".join(sorted(missing))}, which --opt {args.opt} with '
            f'these arguments needs; resume with the same')


def _names_of_moments(args: argparse.Namespace, parameter: nn.Parameter) -> set[str]:
    """What this run's optimiser keeps of a parameter, by a step on a copy of it."""
    twin = nn.Parameter(torch.zeros_like(parameter))
    twin.grad = torch.zeros_like(twin)
    settings = {**optimizer_kwargs(args), **args.opt_kwargs}
    settings.pop('layer_decay', None)
    optimizer = create_optimizer_v2([twin], **settings)
    optimizer.step()
    return set(optimizer.state_dict()['state'].get(0, ()))


# ---- what is said ----------------------------------------------------------------------------------------------------

def _changes(state: TrainingState, checkpoint: dict[str, Any], args: argparse.Namespace) -> list[str]:
    old = checkpoint['args']
    changed = {
        name: f'{name} {value!r} -> {getattr(args, name)!r}' for name, value in old.items()
        if name not in PLACES and getattr(args, name, value) != value}
    used = [text for name, text in changed.items() if name not in STARTS]
    notes = [f'changed arguments, used from here on: {", ".join(used)}'] if used else []
    unused = [text for name, text in changed.items() if name in STARTS]
    if unused:
        notes.append(f'not used, since the weights come from the checkpoint: {", ".join(unused)}')
    if {'epochs', 'cooldown_epochs'} & changed.keys():
        notes.append(_about_length(state, args))
    if _data_changed(state, checkpoint):
        notes.append(f'the training data have changed: {_data_text(checkpoint["data"], state.data)}')
    if state.task.has_ema() and 'state_dict_ema' not in checkpoint:
        notes.append("the average of the weights starts from the checkpoint's weights")
    if len(checkpoint['processes']) != state.processes.world_size:
        notes.append(f'{len(checkpoint["processes"])} -> {state.processes.world_size} processes')
    return notes


def _about_length(state: TrainingState, args: argparse.Namespace) -> str:
    begin = f'one begun with --epochs {args.epochs}'
    if args.sched in WITHOUT_LENGTH:
        return f'the rates of --sched {args.sched} are those of {begin}'
    return (f'--sched {args.sched} depends on the number of epochs: the run goes on at the rates of {begin}, but is '
            'not equal to it, since its epochs so far had other rates')


def _data_changed(state: TrainingState, checkpoint: dict[str, Any]) -> bool:
    return 'data' in checkpoint and checkpoint['data'] != state.data


def _data_text(old: dict[str, Any], new: dict[str, Any]) -> str:
    if old['samples'] != new['samples']:
        return f'{old["samples"]} -> {new["samples"]} samples'
    return f'{new["samples"]} samples as before, but other ones'


def _difference(old: list[str], new: list[str]) -> str:
    missing, added = [n for n in old if n not in new], [n for n in new if n not in old]
    if not missing and not added:
        return 'their order differs'
    return '; '.join(f'{what} {_first(names)}' for what, names in (('missing', missing), ('new', added)) if names)


def _text(sizes: dict[str, Any]) -> str:
    return ', '.join(f'{name} {value}' for name, value in sizes.items())


def _first(names: list[str], count: int = 5) -> str:
    return ', '.join(names[:count]) + (', ...' if len(names) > count else '')


# ---- what is loaded --------------------------------------------------------------------------------------------------

def _load(state: TrainingState, checkpoint: dict[str, Any]) -> None:
    state.task.load_checkpoint_state(checkpoint['state_dict'])
    if state.task.has_ema():
        state.task.load_checkpoint_state(checkpoint.get('state_dict_ema', checkpoint['state_dict']), ema=True)
    _load_moments(state, checkpoint)
    if checkpoint['amp_scaler']:  # empty where the scaler was off
        state.scaler.load_state_dict(checkpoint['amp_scaler'])
    state.guard.load_state_dict(checkpoint['guard'])
    progress = state.progress = Progress(**checkpoint['progress'])
    if checkpoint.get('updates_per_epoch', state.updates_per_epoch) != state.updates_per_epoch:
        # The schedule counts updates as if all epochs had been of this run's length.
        progress.schedule_shift = progress.epoch * state.updates_per_epoch - progress.num_updates
    _set_schedule(state, checkpoint)
    processes, rank = checkpoint['processes'], state.processes.rank
    if rank < len(processes):
        randomness.restore(processes[rank]['random'])
        state.loss_sum, state.num_images = processes[rank]['loss_sum'], processes[rank]['num_images']
    if not _data_changed(state, checkpoint):  # otherwise the numbers are of other images
        state.unreadable = checkpoint['unreadable']


def _moments(state: TrainingState, checkpoint: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The moments by the parameters' numbers in this run; its groups may be others, e.g. with another weight decay."""
    saved, names = checkpoint['optimizer'], checkpoint.get('parameters')
    if names is None:  # written before names were
        mine, old = ([len(g['params']) for g in groups] for groups in (
            state.optimizer.param_groups, saved['param_groups']))
        if mine != old:
            raise ValueError(f'parameter groups of sizes {old} in the checkpoint, {mine} in this run')
        return saved['state']
    number = {name: i for i, name in enumerate(parameter_names(state))}
    return {number[name]: saved['state'][i] for i, name in enumerate(names) if name in number and i in saved['state']}


def _load_moments(state: TrainingState, checkpoint: dict[str, Any]) -> None:
    # Some optimisers count their steps in the groups.
    counts = {k: v for k, v in checkpoint['optimizer']['param_groups'][0].items() if k.endswith('step')}
    groups = [{**group, **copy.deepcopy(counts)} for group in state.optimizer.state_dict()['param_groups']]
    state.optimizer.load_state_dict(dict(state=_moments(state, checkpoint), param_groups=groups))


def _set_schedule(state: TrainingState, checkpoint: dict[str, Any]) -> None:
    """The learning rates of this run's schedule at the position."""
    scheduler, progress = state.scheduler, state.progress
    if scheduler is None:
        return
    if isinstance(scheduler, PlateauLRScheduler):
        _set_plateau(scheduler, checkpoint)
        return
    if progress.num_updates:
        scheduler.step_update(num_updates=state.schedule_position)
    if progress.epoch:
        scheduler.step(progress.epoch, progress.metrics.get(state.metric))


def _set_plateau(scheduler: PlateauLRScheduler, checkpoint: dict[str, Any]) -> None:
    """Its rates follow from the metrics of all epochs; what they were lowered by comes from the checkpoint."""
    position = checkpoint['scheduler']
    if position is None or 'num_bad_epochs' not in position:
        return  # written under another schedule
    for name in ('best', 'last_epoch', 'num_bad_epochs', 'cooldown_counter'):
        setattr(scheduler.lr_scheduler, name, position[name])
    old = checkpoint['optimizer']['param_groups'][0]
    for group in scheduler.optimizer.param_groups:
        same = group['initial_lr'] == old['initial_lr']
        group['lr'] = old['lr'] if same else group['initial_lr'] * old['lr'] / old['initial_lr']
