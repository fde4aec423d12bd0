"""What is recorded is what the model computes, and the model is afterwards what it was."""
import copy
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image

import ls_vision  # noqa: F401, registers the models
from ls_vision.analysis.pictures import window_bounds
from ls_vision.analysis.record import record, rollout
from ls_vision.cli import main
from ls_vision.ops.backends.reference import reference_attention
from ls_vision.ops.window import make_window

TOY = dict(embed_dims=(16, 32, 48, 64), depths=(1, 2, 1, 1), num_heads=2, rank=4, num_classes=10)
SIZE = (68, 100)  # grids that windows of 7 do not divide


def toy(name='vil_ls_tiny', **kwargs):
    model = timm.create_model(name, **{**TOY, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # so that attention is not uniform
    return model


MODELS = {
    'mixed': dict(),
    'linear': dict(name='vil_ls_tiny_linear', num_global_tokens=2),
    'pre': dict(name='vil_ls_tiny_linear', global_attention='pre'),
    'no window': dict(name='cvt_ls_13', embed_dims=(16, 32, 48), depths=(1, 2, 1), window_size=0),
    'window only': dict(attn_types='long-short', rank=0, num_global_tokens=0),
    'cvt': dict(name='cvt_ls_13', embed_dims=(16, 32, 48), depths=(1, 2, 1)),
    'full': dict(name='vil_full_medium'),
}


@pytest.fixture(params=MODELS)
def model(request):
    return toy(**MODELS[request.param])


def test_weights_are_distributions(model):
    for r in record(model, torch.randn(1, 3, *SIZE)):
        H, W = r.feat_size
        for token in ((0, 0), (H // 2, W // 3), (H - 1, W - 1)):
            attention = r.at(*token)
            torch.testing.assert_close(attention.shares.sum(-1), torch.ones(r.num_heads))
            torch.testing.assert_close(attention.long_range.sum((1, 2)), attention.shares[:, 1])
            if r.window_size:
                top, left, bottom, right = window_bounds(token, r.feat_size, r.window_size)[1]
                outside = attention.window.clone()
                outside[:, top:bottom, left:right] = 0.
                assert outside.abs().max() == 0.


def test_pulling_is_multiplying_by_the_matrix(model):
    """Row by row from `at`, and of global tokens from their weights."""
    r = record(model, torch.randn(1, 3, *SIZE))[1]
    g, (H, W) = r.num_global_tokens, r.feat_size
    rows = []
    for i in range(H * W):
        attention = r.at(i // W, i % W)
        tokens = (attention.window + attention.long_range).flatten(1)
        rows.append(torch.cat([attention.global_tokens, tokens], 1).mean(0))
    if g:
        first = r.weights[:, :g] if r.window_size is None else r.global_weights
        rows = [*first.mean(0), *rows]
    relevance = torch.rand(g + H * W)
    torch.testing.assert_close(r.pull(relevance), relevance @ torch.stack(rows))


def test_recorded_weights_give_the_layers_output():
    """The attention of the layer, made again from what was recorded, against the dense reference."""
    seen = {}
    model = toy()
    attn = model.stages[0].blocks[0].attn
    attn.register_forward_pre_hook(lambda m, args: seen.update(x=args[0], feat_size=args[1]))
    r = record(model, torch.randn(1, 3, *SIZE))[0]
    x, (H, W) = seen['x'], seen['feat_size']
    with torch.no_grad():
        query, _, pair, own, scores = attn._project(x, (H, W))
        additional = attn._additional(pair, own, scores)
        expected, _ = reference_attention(
            query, pair, make_window(attn.window_size), additional, attn.position_bias(), attn.scale)
    value, values = pair[:, :, :, 1], additional[:, :, 1]
    for token in ((0, 0), (5, 11), (H - 1, W - 1)):
        attention = r.at(*token)
        weights = torch.cat([attention.summaries, attention.global_tokens], -1)  # (h, M)
        out = torch.einsum('hxy,xyhd->hd', attention.window, value[0]) + torch.einsum('hm,mhd->hd', weights, values[0])
        torch.testing.assert_close(out, expected[0, token[0], token[1]], rtol=1e-4, atol=1e-5)


def test_nothing_stays_in_the_model():
    model = toy().train()
    image = torch.randn(1, 3, *SIZE)
    before = copy.deepcopy(model.eval())(image)
    model.train()
    record(model, image)
    assert model.training
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert getattr(module, 'fused_attn', True)
    assert torch.equal(model.eval()(image), before)


def test_rollout(model):
    image = torch.randn(1, 3, *SIZE)
    records = record(model, image)
    grid = rollout(records)
    assert grid.shape == records[0].feat_size and (grid >= 0).all()
    torch.testing.assert_close(grid.sum(), torch.tensor(1.))
    with pytest.raises(ValueError, match='stage 1 is incomplete'):
        rollout([r for r in records if r.stage != 1])


def test_wrong_input():
    model = toy()
    with pytest.raises(ValueError, match='expected one image'):
        record(model, torch.randn(2, 3, *SIZE))
    with pytest.raises(ValueError, match=r'no stage 0 with a block 5; the stages have \[1, 2, 1, 1\] blocks'):
        record(model, torch.randn(1, 3, *SIZE), stage=0, block=5)
    with pytest.raises(ValueError, match='not a model of ls_vision'):
        record(timm.create_model('test_vit2'), torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r'token \(0, 99\) is outside'):
        record(model, torch.randn(1, 3, *SIZE))[0].at(0, 99)


def attention(*args):
    return subprocess.run(
        [sys.executable, '-m', 'ls_vision', 'attention', *map(str, args)], capture_output=True, text=True, timeout=300)


def test_sheet_of_a_photograph(tmp_path):
    photo, out, weights = tmp_path / 'cat.png', tmp_path / 'sheet.png', tmp_path / 'weights.pth'
    Image.fromarray(skimage.data.chelsea()).save(photo)  # 300 x 451
    torch.save(timm.create_model('vil_ls_tiny', depths=(1, 1, 1, 1)).state_dict(), weights)
    result = attention(
        photo, '--model', 'vil_ls_tiny', '--model-kwargs', 'depths=[1,1,1,1]', '--checkpoint', weights, '--stage', 1,
        '--pixel', 290, 10, '--img-size', '96x144', '--out', out)
    assert result.returncode == 0, result.stderr
    with Image.open(out) as sheet:
        assert sheet.width > 800 and len(np.unique(np.asarray(sheet.convert('L')))) > 100
    arrays = np.load(out.with_suffix('.npz'))
    assert arrays['projection'].shape == (3, 8, 12, 18)
    assert arrays['token'].tolist() == [11, 0]
    np.testing.assert_allclose(arrays['shares'].sum(-1), 1., rtol=1e-4)
    assert arrays['rollout'].shape == (24, 36) and arrays['image'].shape == (3, 96, 144)


@pytest.mark.parametrize('args, message', [
    (['--model', 'test_vit2'], 'is not a model of ls_vision'),
    (['--model', 'vil_ls_tini'], "unknown model 'vil_ls_tini'; did you mean 'vil_ls_tiny'"),
    (['--model', 'vil_ls_tiny', '--stage', '7'], 'no block 0 in stage 7; expected one of stages.0.blocks.0'),
    (['--model', 'vil_ls_tiny', '--pixel', '5', '64'], '--pixel 5 64: outside of image.png, which is 32 x 64'),
    (['--model', 'vil_ls_tiny', '--checkpoint', 'nowhere.pth'], '--checkpoint nowhere.pth: no such file'),
])
def test_wrong_arguments(args, message, tmp_path, capsys):
    Image.new('RGB', (64, 32)).save(tmp_path / 'image.png')
    with pytest.raises(SystemExit) as stopped:
        main(['attention', str(tmp_path / 'image.png'), *args])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith('error: ') and message in error and error.count('\n') == 1


def test_not_an_image(tmp_path, capsys):
    (tmp_path / 'text.png').write_text('no image')
    with pytest.raises(SystemExit):
        main(['attention', str(tmp_path / 'text.png'), '--model', 'vil_ls_tiny'])
    assert 'text.png cannot be read as an image' in capsys.readouterr().err
