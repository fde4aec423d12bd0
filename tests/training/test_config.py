"""Arguments: config file, command line, and errors in them."""
from pathlib import Path

import pytest

from ls_vision.runtime.arguments import save_args
from ls_vision.runtime.errors import UserError
from ls_vision.training.config import parse_args


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / 'config.yaml'
    path.write_text(f'data_dir: data\nlr: 0.1\n{text}\n')
    return str(path)


def test_command_line_wins_over_the_file(tmp_path):
    args = parse_args(['--config', write(tmp_path, 'epochs: 7\nopt: adamw'), '--epochs', '3'])
    assert (args.epochs, args.opt, args.lr) == (3, 'adamw', 0.1)


def test_model_kwargs_come_from_either(tmp_path):
    config = write(tmp_path, 'model_kwargs:\n  depths: [1, 1]\n  attn_types: [full, full]')
    assert parse_args(['--config', config]).model_kwargs == dict(depths=[1, 1], attn_types=['full', 'full'])
    given = parse_args(['--config', config, '--model-kwargs', 'rank=4', 'depths=(1,2)'])
    assert given.model_kwargs == dict(rank=4, depths=(1, 2))


def test_false_on_the_command_line_is_not_true(tmp_path):
    config = write(tmp_path, '')
    args = parse_args(['--config', config, '--model-kwargs', 'a=false', 'b=True', 'c=x', 'd=(1,2)', 'e=x=y'])
    assert args.model_kwargs == dict(a=False, b=True, c='x', d=(1, 2), e='x=y')


def test_numbers_that_yaml_reads_as_text(tmp_path):
    assert parse_args(['--config', write(tmp_path, 'weight_decay: 5e-4')]).weight_decay == 5e-4


@pytest.mark.parametrize('number', ['1e-8', '2E5', '-3e2', '.5e-1', '5.e+3'])
def test_numbers_with_exponents_in_lists_and_mappings(tmp_path, number):
    args = parse_args(['--config', write(tmp_path, (
        f'mean: [{number}, 1]\nopt_kwargs: {{eps: {number}}}\nmodel_kwargs: {{a: [{number}], b: {{c: {number}}}}}\n'
        f'experiment: "{number}"\nmodel_ema_decay: {number}'))])
    value = float(number)
    assert (args.mean, args.opt_kwargs) == ([value, 1], dict(eps=value))
    assert args.model_kwargs == dict(a=[value], b=dict(c=value)) and args.model_ema_decay == value
    assert args.experiment == number
    save_args(args, tmp_path / 'args.yaml')
    assert parse_args(['--config', str(tmp_path / 'args.yaml')]) == args


def test_saved_arguments_are_read_back(tmp_path):
    args = parse_args(['--config', write(tmp_path, 'model_kwargs: {rank: 4}\ncolor_jitter: null'), '--drop-path', '.1'])
    save_args(args, tmp_path / 'args.yaml')
    assert parse_args(['--config', str(tmp_path / 'args.yaml')]) == args


@pytest.mark.parametrize('text, message', [
    ('epoch: 3', "unknown argument 'epoch'; did you mean 'epochs'"),
    ('learnin_rate: 3', "unknown argument 'learnin_rate'"),
    ('model-kwargs: {}', "unknown argument 'model-kwargs'; did you mean 'model_kwargs'"),
    ('epochs: 2.5', 'epochs: 2.5 is not an integer'),
    ('batch_size: [1]', r'batch_size: \[1\] is not an integer'),
    ('scale: 0.5', 'scale: 0.5 is not a list of numbers'),
    ('scale: [0.5]', r'scale: \[0.5\] is not a list of two numbers'),
    ('hflip: null', 'hflip: None is not a number'),
    ('epochs: null', 'epochs: None is not an integer'),
    ('model_ema: null', 'model_ema: None is not true or false'),
    ('hflip: true', 'hflip: True is not a number'),
    ('model_ema: 3', 'model_ema: 3 is not true or false'),
    ('model: 3', 'model: 3 is not text'),
    ('clip_mode: soft', "clip_mode: 'soft' is not one of norm, value, agc"),
    ('model_kwargs: 3', 'model_kwargs: 3 is not `name: value` lines'),
    ('epochs: 0', '--epochs 0: must be 1 or more'),
    ('weight_decay: -1', '--weight-decay -1: must be 0 or more'),
    ('opt_kwargs: {lr: 3}', '--opt-kwargs lr=3: pass --lr'),
    ('mixup: 0.8\nbatch_size: 7', '--batch-size 7: must be even, since --mixup and --cutmix mix pairs'),
    ('cutmix: 1.\nbatch_size: 1', '--batch-size 1: must be even'),
    ('device: abacus', '--device abacus cannot be used'),
    ('a: [', 'is not valid YAML'),
])
def test_wrong_value_in_the_file(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        parse_args(['--config', write(tmp_path, text)])


@pytest.mark.parametrize('argv, message', [
    (['--epoch', '3'], "unknown argument --epoch; did you mean '--epochs'"),
    (['--config', 'nowhere.yaml'], 'nowhere.yaml cannot be read'),
    (['--lr', '.1'], 'no data: pass --data-dir'),
    (['--data-dir', 'x'], 'no learning rate: pass --lr'),
])
def test_wrong_command_line(argv, message):
    with pytest.raises(UserError, match=message):
        parse_args(argv)


def test_wrong_type_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        parse_args(['--epochs', 'ten'])
    assert "invalid int value: 'ten'" in capsys.readouterr().err


def test_file_that_is_a_list(tmp_path):
    (tmp_path / 'list.yaml').write_text('- epochs\n')
    with pytest.raises(UserError, match='must hold `name: value` lines, found list'):
        parse_args(['--config', str(tmp_path / 'list.yaml')])
