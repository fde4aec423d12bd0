"""A resumed run has the position and moments of its checkpoint and the settings of its own command line."""
import copy
import shutil

import pytest
import torch
from torch import nn

import train_imagenet
from ls_vision.runtime.errors import UserError
from ls_vision.runtime.processes import Processes
from ls_vision.training.config import parse_args
from ls_vision.training.engine import update
from ls_vision.training.resume import restore

pytestmark = pytest.mark.usefixtures('one_thread')
BASE = ('--data-dir', 'x', '--device', 'cpu', '--opt', 'adamw', '--lr', '1e-2', '--warmup-epochs', '0', '--batch-size',
        '4', '--weight-decay', '.05', '--epochs', '4')


class Run:
    """A run on random numbers, of two updates per epoch."""

    def __init__(self, *argv, updates_per_epoch=2, num_classes=3, class_names=None, samples=8):
        self.args = parse_args([*BASE, *argv])
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, num_classes))
        self.state = train_imagenet.build_state(
            self.args, model, updates_per_epoch, Processes(torch.device('cpu')))
        self.state.class_names, self.state.data = class_names, dict(samples=samples, digest=str(samples))
        self.rates = []

    def train(self, num_epochs, and_updates=0):
        for last in (False,) * num_epochs + (True,) * bool(and_updates):
            for _ in range(and_updates if last else self.state.updates_per_epoch):
                generator = torch.Generator().manual_seed(self.state.progress.num_updates)
                batch = torch.randn(4, 6, generator=generator), torch.tensor([0, 1, 2, 0])
                self.rates.append(self.state.lr)
                update(self.state, [batch], self.args, '')
                self.state.progress.batch += 1
            if not last:
                self.state.end_epoch(dict(top1=10. - abs(2 - self.state.progress.epoch)))  # gets worse after epoch 2
        return self

    def checkpoint(self):
        return copy.deepcopy(self.state.checkpoint(self.args, torch.zeros(0, dtype=torch.long)))

    def resumed(self, checkpoint):
        self.notes = restore(self.state, copy.deepcopy(checkpoint), self.args, 'last.pth.tar')
        return self

    def settings(self):
        names = ('weight_decay', 'betas', 'eps', 'lr_scale', 'initial_lr')
        return [{k: group[k] for k in names if k in group} for group in self.state.optimizer.param_groups]


def weights(run):
    return {**run.state.task.get_checkpoint_state()['state_dict']}


def assert_equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SCHEDULES = (
    ('cosine', '--sched-on-updates'), ('cosine', '--warmup-epochs', '2'), ('cosine', '--cooldown-epochs', '1'),
    ('poly', '--sched-on-updates'), ('tanh',), ('multistep', '--decay-milestones', '3'),
    ('step', '--sched-on-updates', '--warmup-epochs', '1'), ('constant',), ('none',))


@pytest.mark.parametrize('sched', SCHEDULES, ids=' '.join)
def test_longer_run_goes_on_at_the_rates_of_one_begun_with_its_length(sched):
    short, long = (Run('--sched', *sched, '--epochs', n) for n in ('4', '8'))
    rest = Run('--sched', *sched, '--epochs', '8').resumed(short.train(4).checkpoint())
    assert rest.train(4).rates == long.train(8).rates[8:]
    if sched[0] in ('cosine', 'poly', 'tanh'):
        assert min(rest.rates[:-2]) > 0
        assert any('depends on the number of epochs' in note and 'not equal' in note for note in rest.notes)
    else:
        assert f'the rates of --sched {sched[0]} are those of one begun with --epochs 8' in rest.notes
        assert_equal(weights(rest), weights(long))


@pytest.mark.parametrize('argv', [
    *(('--sched', *sched) for sched in SCHEDULES), ('--sched', 'plateau', '--decay-rate', '.5'),
    ('--opt', 'sgd'), ('--opt', 'lamb'), ('--opt', 'adan'), ('--opt', 'lookahead_adamw'), ('--opt', 'muon'),
    ('--layer-decay', '.7'), ('--model-ema', '--model-ema-warmup'),
], ids=' '.join)
@pytest.mark.parametrize('and_updates', [0, 1])
def test_unchanged_settings_give_the_same_bits(argv, and_updates):
    whole = Run(*argv).train(4)
    begun = Run(*argv).train(2, and_updates)
    rest = Run(*argv).resumed(begun.checkpoint())
    assert not rest.notes
    rest.state.updates_per_epoch = 2 - and_updates  # the rest of the epoch
    rest.train(1)
    rest.state.updates_per_epoch = 2
    rest.train(1)
    assert begun.rates + rest.rates == whole.rates
    assert_equal(weights(whole), weights(rest))


def test_plateau_counts_on():
    """Three bad epochs lower the rate; timm's own state forgets how many there were."""
    def make():
        run = Run('--sched', 'plateau', '--decay-rate', '.5', '--epochs', '9')
        run.state.scheduler.lr_scheduler.patience = 3
        return run

    whole = make().train(9)
    begun = make().train(5)
    rest = make().resumed(begun.checkpoint()).train(4)
    assert begun.rates + rest.rates == whole.rates and whole.rates[-1] < whole.rates[0]


@pytest.mark.parametrize('change', [
    ('--lr', '.5'), ('--weight-decay', '.3'), ('--weight-decay', '0'), ('--opt-betas', '.5', '.6'), ('--opt-eps', '.1'),
    ('--layer-decay', '.5'), ('--sched', 'constant'), ('--sched-on-updates',), ('--warmup-epochs', '3'),
    ('--min-lr', '.005'), ('--opt-kwargs', 'maximize=True'),
], ids=' '.join)
def test_changed_setting_is_used_and_said(change):
    begun = Run().train(2)
    fresh, rest = Run(*change), Run(*change).resumed(begun.checkpoint())
    name = change[0][2:].replace('-', '_')
    assert rest.notes[0].startswith('changed arguments, used from here on: ') and f'{name} ' in rest.notes[0]
    assert rest.settings() == fresh.settings()
    assert rest.train(2).rates == fresh.train(4).rates[4:]
    # moments of the same parameters, also where the groups are others
    moments = Run(*change).resumed(begun.checkpoint()).state
    names = {id(p): name for name, p in moments.task.get_trainable_module().named_parameters()}
    found = {names[id(p)]: state['exp_avg'] for p, state in moments.optimizer.state.items()}
    names = {id(p): name for name, p in begun.state.task.get_trainable_module().named_parameters()}
    assert_equal(found, {names[id(p)]: state['exp_avg'] for p, state in begun.state.optimizer.state.items()})


def test_schedule_follows_epochs_where_their_length_has_changed():
    argv = ('--sched-on-updates', '--batch-size', '2')
    rest = Run(*argv, updates_per_epoch=4).resumed(Run('--sched-on-updates').train(2).checkpoint())
    assert rest.state.progress.num_updates == 4
    assert rest.train(1).rates == Run(*argv, updates_per_epoch=4).train(3).rates[8:]
    again = Run(*argv, updates_per_epoch=4).resumed(rest.checkpoint())
    assert again.train(1).rates == Run(*argv, updates_per_epoch=4).train(4).rates[12:]


@pytest.mark.parametrize(('argv', 'other', 'message'), [
    (('--opt', 'sgd'), {}, '--opt sgd: last.pth.tar was written with --opt adamw'),
    (('--opt', 'lion'), {}, '--opt lion: last.pth.tar was written with --opt adamw'),
    (('--seed', '7'), {}, '--seed 7: last.pth.tar was written with --seed 42, and the order of the data'),
    (('--opt-kwargs', 'amsgrad=True'), {}, 'has kept no max_exp_avg_sq, which --opt adamw'),
    (('--epochs', '1'), {}, '--epochs 1: last.pth.tar is in epoch 3, beyond the 1 of this run'),
    (('--epochs', '2'), {}, '--epochs 2: last.pth.tar is in epoch 3'),
    (('--batch-size', '2'), {}, 'middle of an epoch with .*batch_size 4.* this run has .*batch_size 2'),
    ((), dict(samples=9), r'middle of an epoch, and the training data have changed since \(8 -> 9 samples\)'),
    ((), dict(num_classes=4), r'does not fit vil_ls_tiny: .*2\.weight \(3, 5\) instead of \(4, 5\)'),
    ((), dict(class_names=['b', 'a', 'c']), 'trained on 3 classes .*: their order differs'),
    ((), dict(class_names=['a', 'b', 'd']), 'missing c; new d'),
])
def test_what_cannot_change_is_refused_and_nothing_is_loaded(argv, other, message):
    checkpoint = Run(class_names=['a', 'b', 'c']).train(2, 1).checkpoint()
    rest = Run(*argv, **{'class_names': ['a', 'b', 'c'], **other})
    before = copy.deepcopy(weights(rest))
    with pytest.raises(UserError, match=message):
        rest.resumed(checkpoint)
    assert_equal(weights(rest), before)
    assert rest.state.progress.epoch == 0


def test_what_a_checkpoint_lacks_starts_from_its_weights():
    begun = Run().train(2)
    rest = Run('--model-ema', '--amp', '--amp-dtype', 'float16').resumed(begun.checkpoint())
    assert_equal(rest.state.task.get_checkpoint_state(ema=True)['state_dict_ema'], weights(begun))
    assert "the average of the weights starts from the checkpoint's weights" in rest.notes
    assert rest.state.scaler.is_enabled()
    rest.train(1)
    Run().resumed(rest.checkpoint())  # and back


def test_start_weights_are_not_used_and_that_is_said():
    rest = Run('--initial-checkpoint', 'other.pth').resumed(Run().train(1).checkpoint())
    assert rest.notes == ["not used, since the weights come from the checkpoint: initial_checkpoint '' -> 'other.pth'"]


def test_other_number_of_processes():
    """Between epochs it may change; the first processes go on with their random numbers."""
    checkpoint = Run().train(2).checkpoint()
    checkpoint['processes'] *= 2
    rest = Run().resumed(checkpoint)
    assert rest.notes == ['2 -> 1 processes']
    assert torch.equal(torch.get_rng_state(), checkpoint['processes'][0]['random']['torch'])
    checkpoint = Run().train(2, 1).checkpoint()
    checkpoint['processes'] *= 2
    with pytest.raises(UserError, match=r'middle of an epoch with processes 2, .* this run has processes 1'):
        Run().resumed(checkpoint)


def test_checkpoint_of_an_older_version():
    begun = Run().train(2)
    checkpoint = begun.checkpoint()
    for name in ('parameters', 'updates_per_epoch', 'class_names', 'data'):
        del checkpoint[name]
    del checkpoint['progress']['schedule_shift']
    whole, rest = Run().train(4), Run().resumed(checkpoint).train(2)
    assert_equal(weights(whole), weights(rest))
    with pytest.raises(UserError, match=r'does not fit .* parameter groups of sizes'):
        Run('--weight-decay', '0').resumed(checkpoint)


def test_images_removed_between_epochs(config, image_folder, tmp_path, capsys):
    """The numbers of unreadable images are those of the old list."""
    (image_folder / 'train' / 'light' / '7.png').write_bytes(b'x')
    argv = ['--config', str(config), '--max-unreadable', '1', '--resume', 'auto']
    train_imagenet.main([*argv, '--epochs', '1'])
    for name in ('6', '7'):
        (image_folder / 'train' / 'light' / f'{name}.png').unlink()
    train_imagenet.main([*argv, '--epochs', '2'])
    text = capsys.readouterr().out
    assert 'the training data have changed: 16 -> 14 samples' in text
    assert text.count('1 training images unreadable') == 1
    shutil.move(image_folder / 'train' / 'light' / '5.png', image_folder / 'train' / 'light' / '9.png')
    train_imagenet.main([*argv, '--epochs', '3'])
    assert 'the training data have changed: 14 samples as before, but other ones' in capsys.readouterr().out
