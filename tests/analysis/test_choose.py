"""`ls-vision choose`: what fits is listed fastest first, the rest with a reason; what was not measured says so."""
import json

import pytest
import timm
import torch

from ls_vision.analysis import choose
from ls_vision.analysis.choose import Candidate, Wish, smaller, work
from ls_vision.analysis.memory import count_parameters, extrapolate, grows_faster, saved_bytes, training_memory
from ls_vision.analysis.worker import Point, Settings, training_loss, visit
from ls_vision.analysis.zoo import PUBLISHED, build
from ls_vision.cli import main

pytestmark = pytest.mark.usefixtures('one_thread')
SETTINGS = Settings(device='cpu', dtype='float32', threads=1, seconds=1e-9, memory_limit=2 ** 33)


def rows_of(text):
    """The table's rows, as lists of cells."""
    lines = [line.strip('| ').split('|') for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def run(*args):
    main(['choose', '--threads', '1', '--seconds', '0.01', *args])


def test_fastest_first_and_the_rest_with_reasons(tmp_path, capsys):
    models = ['resnet18', 'resnet10t', 'vgg11', 'resnet50.a1_in1k']
    run('--img-size', '24', '--memory', '80MB', '--models', *models, '--json', str(tmp_path / 'a.json'))
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert {row[0] for row in rows} == {'resnet18', 'resnet10t'}
    assert [float(row[1]) for row in rows] == sorted(float(row[1]) for row in rows)
    assert all(row[3] == row[5] == 'measured' and 0 < float(row[4]) < 0.08 for row in rows)
    assert 'Not among them:\n  vgg11: cannot be counted at 24: ' in out and '\n  resnet50.a1_in1k: needs ' in out
    saved = {row['model']: row for row in json.loads((tmp_path / 'a.json').read_text())['rows']}
    assert list(saved) == models and saved['resnet10t']['is_choice']
    large = saved['resnet50.a1_in1k']
    assert large['memory'] > 80e6 and not large['is_choice'] and large['published']['top1'] == 80.4


@pytest.mark.parametrize('mode', ['inference', 'training'])
def test_what_takes_too_long_is_estimated(mode, capsys):
    run('--img-size', '512x1024', '--models', 'resnet10t', *(['--train'] if mode == 'training' else []))
    out = capsys.readouterr().out
    (model, ms, speed, time, _, memory, *_), = rows_of(out)
    assert (model, time[:10], memory) == ('resnet10t', 'estimated,', 'predicted')
    assert float(speed) == pytest.approx(1e3 / float(ms), rel=0.05)
    assert mode.capitalize() + ' at 512x1024, batch 1, float32' in out and 'says nothing about 512x1024' in out


def test_batches_of_small_images(capsys):
    run('--img-size', '128', '--batch-size', '8', '--models', 'vil_ls_tiny')
    assert [row[0] for row in rows_of(capsys.readouterr().out)] == ['vil_ls_tiny']


def test_a_model_that_wants_two_images_to_train(capsys):
    for size in ('320', '64'):
        run('--img-size', size, '--train', '--models', 'levit_128s', 'vil_ls_tiny')
        out = capsys.readouterr().out
        assert [row[0] for row in rows_of(out)] == ['vil_ls_tiny'] and '  levit_128s: Expected more than 1 value' in out
    settings = SETTINGS._replace(seconds=0.01)
    assert training_memory('levit_128s', (256, 256), 2, settings) > 4 * 4 * count_parameters('levit_128s', (256, 256))


def test_interrupted(monkeypatch, capsys):
    """The models that were finished are printed."""
    measure = choose.measure

    def interrupt(candidate, *args):
        if candidate.model == 'resnet18':
            raise KeyboardInterrupt
        measure(candidate, *args)

    monkeypatch.setattr(choose, 'measure', interrupt)
    with pytest.raises(SystemExit) as stopped:
        run('--img-size', '32', '--models', 'resnet10t', 'resnet18')
    assert stopped.value.code == 130
    out = capsys.readouterr().out
    assert [row[0] for row in rows_of(out)] == ['resnet10t'] and 'Not examined: 1 of 2 models.' in out


@pytest.mark.parametrize('args, message', [
    ('--img-size wide', "image size 'wide': expected pixels"),
    ('--img-size -64', "image size '-64': expected pixels"),
    ('--img-size 64 --memory -5GiB', '--memory -5GiB: expected a number above 0 and its unit, MiB, GiB'),
    ('--img-size 64 --memory 24', '--memory 24: expected a number above 0 and its unit, MiB, GiB'),
    ('--img-size 64 --memory 24Gb', '--memory 24Gb: expected a number above 0 and its unit, MiB, GiB'),
    ('--img-size 64 --models nothing_*', "no model matches 'nothing_*'; expected a name, or a pattern"),
    ('--img-size 64 --models resnet18x', "unknown model 'resnet18x'; did you mean"),
    ('--img-size 64 --json nowhere/a.json', '--json nowhere/a.json: there is no folder nowhere'),
    ('--img-size 32 --memory 1MiB --models resnet10t', '--memory 1 MiB: none of 1 models fits; resnet10t needs'),
    ('--img-size 3 --models vil_ls_tiny', '--img-size 3: none of 1 models can be measured; vil_ls_tiny: cannot be'),
])
def test_wrong_input_is_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['choose', *args.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {message}') and error.count('\n') == 1


def test_smaller_batches_come_before_smaller_images():
    point = Point('a', (512, 1024), 8, 'inference')
    assert [(p.batch_size, p.img_size) for p in smaller(point)] == [
        (2, (512, 1024)), (1, (512, 1024)), (1, (256, 512)), (1, (128, 256))]
    assert list(smaller(Point('a', (256, 256), 1, 'inference'))) == []
    assert [p.img_size for p in smaller(Point('a', (20, 10 ** 4), 1, 'inference'))] == [(20, 5024), (20, 2528)]


def test_time_that_does_not_depend_on_the_image_is_not_scaled():
    candidate = Candidate('resnet10t', Wish((256, 256), 1, 'training', 1))
    small, large = (Point('resnet10t', (side, side), 1, 'training') for side in (64, 128))
    candidate.visits = {p: [dict(seconds=[9., 1. + work(p) / 1e9, 0.])] for p in (small, large)}
    assert candidate.seconds(candidate.point) == pytest.approx(1. + work(candidate.point) / 1e9)
    candidate.visits[small] = [dict(seconds=[0.01])]  # faster than in proportion: noise
    assert candidate.seconds(candidate.point) == pytest.approx(4 * candidate.seconds(large), rel=0.01)


def test_extrapolation():
    values = {10.: 1. + 10 + 100, 20.: 1. + 20 + 400, 30.: 1. + 30 + 900}
    assert extrapolate(values, 100, quadratic=True) == pytest.approx(1. + 100 + 10_000)
    assert extrapolate(values, 100, quadratic=False) == pytest.approx(931 + 70 * 51)
    concave = {10.: 5., 20.: 9., 30.: 12.}
    assert extrapolate(concave, 40, quadratic=True) == pytest.approx(15.)  # the parabola would be below the line


def test_only_full_attention_grows_faster_than_pixels():
    names = ('vil_ls_tiny_linear', 'vit_tiny_patch16_224')
    assert [grows_faster(name, (224, 224), (448, 896)) for name in names] == [False, True]


def test_saved_bytes_are_those_that_autograd_keeps():
    """Memory that is freed while counting is used again, which must not hide a tensor."""
    model = build('resnet10t', (64, 64)).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = training_loss(model, torch.randn(1, 3, 64, 64), SETTINGS)
    assert loss.requires_grad
    assert saved_bytes('resnet10t', 64, 1, SETTINGS) == sum(kept[at].nbytes() for at in kept.keys() - own) > 1e6


@pytest.mark.parametrize('name', ['vil_ls_tiny', 'vit_tiny_patch16_224'])
def test_predicted_memory_is_near_the_measured_one(name):
    """Of a single call: it must have AdamW's moments, which the first update allocates, from the start."""
    measured = visit(Point(name, (448, 448), 1, 'training'), SETTINGS)
    assert len(measured['seconds']) == 1
    assert training_memory(name, (448, 448), 1, SETTINGS) == pytest.approx(measured['memory'], rel=0.25)
    weights = 4 * count_parameters(name, (448, 448))
    assert measured['memory'] > 3 * weights + saved_bytes(name, 448, 1, SETTINGS)


def test_published_accuracy_is_that_of_weights_that_timm_has():
    tags = timm.list_models(include_tags=True)
    assert {p.weights for p in PUBLISHED.values()} - {None} <= set(tags)
    wish = Wish((64, 64), 1, 'inference', 1)
    assert Candidate('resnet50', wish).published == Candidate('resnet50.a1_in1k', wish).published != None  # noqa: E711
    assert Candidate('resnet50.tv_in1k', wish).published is None  # other weights of the same model
