"""Every reader of weights accepts the same wrappers and prefixes, and names what does not fit."""
import itertools

import pytest
import timm
import torch
from torch import nn

import ls_vision  # noqa: F401  (registers the models)
from ls_vision.models._checkpoint import PREFIXES, WRAPPERS, load_weights, unwrap_state_dict
from ls_vision.runtime.errors import UserError

TOY = dict(
    embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_size=2, rank=2, num_classes=3)


@pytest.mark.parametrize('outer, inner', list(itertools.product(WRAPPERS, WRAPPERS)))
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.module.'])
def test_wrappers_and_prefixes_in_any_order(outer, inner, prefix):
    weights = dict(weight=torch.ones(2), bias=torch.zeros(2))
    checkpoint = {outer: {inner: {prefix + name: w for name, w in weights.items()}, 'epoch': 3}, 'arch': 'any'}
    assert unwrap_state_dict(checkpoint) == weights


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('prefix', PREFIXES)
def test_three_ways_of_loading_agree(tmp_path, wrapper, prefix):
    """timm's `checkpoint_path`, the scripts' `load_weights`, and a backbone without its head."""
    source = timm.create_model('vil_ls_tiny', **TOY)
    torch.save({wrapper: {prefix + k: v for k, v in source.state_dict().items()}, 'epoch': 1}, tmp_path / 'w.pth')
    by_timm = timm.create_model('vil_ls_tiny', checkpoint_path=str(tmp_path / 'w.pth'), **TOY)
    by_script = timm.create_model('vil_ls_tiny', **TOY)
    load_weights(by_script, tmp_path / 'w.pth')
    backbone = timm.create_model('vil_ls_tiny', features_only=True, feature_cls='getter', **TOY).model
    load_weights(backbone, tmp_path / 'w.pth', ignore_unused=True)
    for name, weight in source.state_dict().items():
        assert torch.equal(by_timm.state_dict()[name], weight) and torch.equal(by_script.state_dict()[name], weight)
    assert all(torch.equal(weight, source.state_dict()[name]) for name, weight in backbone.state_dict().items())


def test_file_without_tensors_is_one_clear_error(tmp_path):
    torch.save(dict(epoch=3), tmp_path / 'w.pth')
    for model in (nn.Linear(2, 2), timm.create_model('vil_ls_tiny', **TOY)):
        with pytest.raises(UserError, match=r"w.pth: The checkpoint holds no tensors; its entries are epoch"):
            load_weights(model, tmp_path / 'w.pth')


def test_weights_of_another_architecture_name_a_few_keys(tmp_path):
    torch.save(nn.Sequential(*[nn.Linear(2, 2) for _ in range(6)]).state_dict(), tmp_path / 'w.pth')
    message = (
        r'does not fit Linear: 2 keys missing \(weight, bias\); '
        r'12 keys not known \(0.weight.*\.\.\.\)')
    with pytest.raises(UserError, match=message):
        load_weights(nn.Linear(2, 2), tmp_path / 'w.pth')
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / 'w.pth')
    with pytest.raises(UserError, match=r'1 shapes differ \(weight \(2, 3\) instead of \(2, 2\)\)'):
        load_weights(nn.Linear(2, 2), tmp_path / 'w.pth')


def test_averaged_weights_are_preferred(tmp_path):
    plain, averaged = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(dict(state_dict=plain.state_dict(), state_dict_ema=averaged.state_dict()), tmp_path / 'w.pth')
    model = nn.Linear(2, 2)
    load_weights(model, tmp_path / 'w.pth')
    assert torch.equal(model.weight, averaged.weight)


@pytest.mark.parametrize('channels', [1, 12])
def test_weights_of_colour_images_in_models_of_other_channels(tmp_path, channels):
    """As timm's `pretrained=True` adapts them: a grey image gives what its three equal channels gave."""
    source = timm.create_model('vil_ls_tiny', **TOY).eval()
    torch.save(source.state_dict(), tmp_path / 'w.pth')
    model = timm.create_model('vil_ls_tiny', in_chans=channels, **TOY).eval()
    load_weights(model, tmp_path / 'w.pth')
    by_timm = timm.create_model(
        'vil_ls_tiny', in_chans=channels, pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.pth'), num_classes=3), **TOY)
    for name, weight in by_timm.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    backbone = timm.create_model('vil_ls_tiny', features_only=True, feature_cls='getter', in_chans=channels, **TOY)
    load_weights(backbone.model, tmp_path / 'w.pth', ignore_unused=True)
    grey = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(model(grey.expand(-1, channels, -1, -1)), source(grey.expand(-1, 3, -1, -1)))


def test_counter_of_averages_is_no_weight(tmp_path):
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    torch.save(average.state_dict(), tmp_path / 'w.pth')
    model = nn.Linear(2, 2)
    load_weights(model, tmp_path / 'w.pth')
    assert torch.equal(model.weight, average.module.weight)
