"""Each recipe in configs/ builds its model, optimiser and schedule and trains, and its rates are the published ones."""
import math
from pathlib import Path

import pytest
import timm
import torch
import yaml
from training_helpers import write_images

import train_imagenet
from ls_vision.evaluation.classifier import create_classifier
from ls_vision.runtime.errors import UserError
from ls_vision.runtime.processes import Processes
from ls_vision.training.config import parse_args, resolve_lr

CONFIGS = Path(__file__).parents[2] / 'configs'
RECIPES = sorted(path.stem for path in CONFIGS.glob('*.yaml'))
FROM_SCRATCH = [name for name in RECIPES if name.startswith(('vil_ls', 'cvt_ls'))]
PUBLISHED = {  # peak rate at 1024 images, drop path where it was published
    'vil_ls_medium_224': (8e-4, .3), 'vil_ls_base_224': (8e-4, .5), 'vil_ls_medium_384': (8e-4, .2),
    'cvt_ls_13_224': (5e-4, None), 'cvt_ls_17_224': (5e-4, None), 'cvt_ls_21_224': (5e-4, None),
    'cvt_ls_21s_224': (5e-4, None), 'cvt_ls_21_384': (5e-4, None), 'cvt_ls_21_448': (5e-4, None),
}
SMALL = {  # the recipe's family at a size that ten steps of a CPU can take
    'vil_ls': dict(embed_dims=[8, 16, 16, 16], num_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1], window_size=2, rank=3),
    'cvt_ls': dict(embed_dims=[8, 16, 16], num_heads=[1, 2, 2], depths=[1, 1, 1], window_size=2, rank=2),
}


def recipe(name, *argv):
    return parse_args(['--config', str(CONFIGS / f'{name}.yaml'), '--device', 'cpu', *argv])


def test_every_published_model_has_its_recipe():
    assert sorted(PUBLISHED) == FROM_SCRATCH
    names = {path.stem: yaml.safe_load(path.read_text())['model'] for path in CONFIGS.glob('*.yaml')}
    assert all(timm.is_model(model) for model in names.values())


@pytest.mark.parametrize('name', RECIPES)
def test_head_names_command_hardware_time_and_result(name):
    head = (CONFIGS / f'{name}.yaml').read_text().split('\n\n')[0]
    assert f'train_imagenet.py --config configs/{name}.yaml' in head.replace(' \\\n#       ', ' ')
    for word in ('# Hardware', '# Time', '# Result'):
        assert word in head


@pytest.mark.parametrize('name', FROM_SCRATCH)
def test_model_is_built_as_published(name):
    """The whole model, of which torch allocates nothing, with the recipe's image size and drop path."""
    args = recipe(name, '--data-dir', 'imagenet')
    with torch.device('meta'):
        model = create_classifier(args, 1000, drop_path_rate=args.drop_path)
    assert model.pretrained_cfg['input_size'][-1] == args.img_size
    assert PUBLISHED[name][1] in (None, args.drop_path)
    groups = train_imagenet.build_state(args_with_lr(args, 8), model, 1251, Processes(torch.device('cpu')))
    decays = {group['weight_decay'] for group in groups.optimizer.param_groups}
    assert decays == {0., .1 if name.startswith('vil') else .05}


def args_with_lr(args, world_size):
    args.lr = resolve_lr(args, world_size)
    return args


@pytest.mark.parametrize('name', FROM_SCRATCH)
def test_rates_at_five_points(name):
    """Linear from the start of the warm-up, then the cosine of the whole training, at 1024 images per update."""
    args = recipe(name, '--data-dir', 'imagenet')
    args = args_with_lr(args, 1024 // args.batch_size)
    peak, updates = PUBLISHED[name][0], 1251  # of an epoch of 1,281,167 images
    assert args.lr == pytest.approx(peak)
    state = train_imagenet.build_state(args, torch.nn.Linear(2, 2), updates, Processes(torch.device('cpu')))
    assert state.num_epochs == 300
    start = .002 * peak
    published = {
        0: start if name.startswith('vil') else 1e-6,
        2.5: (peak + (start if name.startswith('vil') else 1e-6)) / 2,
        75: 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi / 4)) / 2,
        150: 1e-6 + (peak - 1e-6) / 2,
        299: 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * 299 / 300)) / 2,
    }
    for epoch, rate in published.items():
        state.scheduler.step_update(round(epoch * updates))
        assert state.lr == pytest.approx(rate, rel=1e-3), epoch


@pytest.mark.parametrize('name', RECIPES)
def test_ten_steps(name, tmp_path):
    """The recipe's optimiser, schedule and augmentation, on tiny images and a tiny model of its family."""
    write_images(tmp_path / 'data' / 'train', 20)
    write_images(tmp_path / 'data' / 'val', 2, seed=1)
    family = 'cvt_ls' if name.startswith('cvt') else 'vil_ls'
    kwargs = [f'{key}={value}' for key, value in dict(SMALL[family], img_size=32).items()
              if family == 'vil_ls' or key != 'img_size']
    source = yaml.safe_load((CONFIGS / f'{name}.yaml').read_text())
    source.pop('pretrained', None)  # would be downloaded
    source.pop('num_classes', None)
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(source))
    result = train_imagenet.main([
        '--config', str(tmp_path / 'recipe.yaml'), '--data-dir', str(tmp_path / 'data'), '--img-size', '32',
        '--batch-size', '4', '--workers', '0', '--epochs', '1', '--warmup-epochs', '0', '--device', 'cpu',
        '--output', str(tmp_path / 'out'), '--model-kwargs', *kwargs])
    checkpoint = torch.load(result['output'] / 'last.pth.tar')
    assert checkpoint['progress']['num_updates'] == 10
    assert all(torch.isfinite(weight).all() for weight in checkpoint['state_dict'].values())


@pytest.mark.parametrize('argv, world_size, rate', [
    (['--lr', '.3', '--lr-base', '.1'], 8, .3),
    (['--lr-base', '.1', '--opt', 'sgd'], 8, .1 * 4),
    (['--lr-base', '.1', '--opt', 'adamw'], 8, .1 * 2),
    (['--lr-base', '.1', '--opt', 'adamw', '--lr-base-scale', 'linear', '--grad-accum-steps', '2'], 8, .1 * 8),
])
def test_rate_follows_the_batch(argv, world_size, rate):
    args = parse_args(['--data-dir', 'x', '--batch-size', '128', *argv])
    assert resolve_lr(args, world_size) == pytest.approx(rate)


def test_pretrained_weights_with_other_classes(config, tmp_path):
    first = train_imagenet.main(['--config', str(config), '--epochs', '1'])['output'] / 'last.pth.tar'
    write_images(tmp_path / 'three' / 'train', 8)
    (tmp_path / 'three' / 'train' / 'light').rename(tmp_path / 'three' / 'train' / 'pale')
    write_images(tmp_path / 'three' / 'val', 4, seed=1)
    (tmp_path / 'three' / 'val' / 'light').rename(tmp_path / 'three' / 'val' / 'pale')
    extra = tmp_path / 'three' / 'train' / 'extra'
    extra.mkdir()
    (tmp_path / 'three' / 'train' / 'dark' / '0.png').rename(extra / '0.png')
    options = ['--config', str(config), '--data-dir', str(tmp_path / 'three'), '--epochs', '1', '--lr', '0',
               '--experiment', 'three']
    second = train_imagenet.main([*options, '--pretrained-path', str(first)])['output'] / 'last.pth.tar'
    before, after = (torch.load(path)['state_dict'] for path in (first, second))
    assert after['head.fc.weight'].shape[0] == 3
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith('head.fc'))
    with pytest.raises(SystemExit, match=r'does not fit .*head\.fc'):
        train_imagenet.main([*options, '--initial-checkpoint', str(first)])
    with pytest.raises(UserError, match='--pretrained and --pretrained-path: choose one'):
        parse_args([*options, '--pretrained', '--pretrained-path', str(first)])
