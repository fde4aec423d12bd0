"""What timm offers around a model: averaged weights, optimisers, parameter groups, fx graphs, saved and shared files."""
import json

import pytest
import timm
import torch
from families import PEER, SMALL, each_model, images, small
from timm.layers import create_feature_extractor, get_graph_node_names
from timm.models import load_checkpoint, save_for_hf
from timm.models._features_fx import FeatureGraphNet
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch.nn import functional as F

pytestmark = pytest.mark.slow


@pytest.mark.item('ModelEmaV3 over three steps, one by one and `foreach`: the average from its formula')
@pytest.mark.parametrize('foreach', [False, True])
@each_model()
def test_model_ema(name, foreach):
    model = small(name).train()
    ema = ModelEmaV3(model, decay=.8, foreach=foreach)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images(2)), torch.arange(2)).backward()
        optimizer.step()
        ema.update(model)
        for key, value in model.state_dict().items():
            expected[key] = torch.lerp(value, expected[key], .8) if value.is_floating_point() else value.clone()
    for key, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert not torch.equal(ema(images(2)), model.eval()(images(2)))


@pytest.mark.item("timm's optimisers on default parameter groups: the loss of a batch falls")
@pytest.mark.parametrize('opt', ['muon', 'nmuon', 'adamuon', 'adamw', 'lamb', 'lion', 'adafactorbv', 'cadamw'])
@each_model()
def test_optimizers(name, opt):
    model, x, y = small(name).train(), images(4), torch.arange(4)
    optimizer = create_optimizer_v2(model, opt=opt, lr=1e-4 if opt == 'lion' else 1e-3, weight_decay=.05)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.item('Muon orthogonalises all linear maps of the blocks, AdamW takes biases and norms')
@each_model()
def test_muon_takes_matrices(name):
    model = small(name).train()
    optimizer = create_optimizer_v2(model, opt='muon', lr=1e-3, verbose=True)
    F.cross_entropy(model(images(2)), torch.arange(2)).backward()
    optimizer.step()
    by_muon = {n for n, p in model.named_parameters() if 'momentum_buffer' in optimizer.state[p]}
    matrices = {f'{n}.weight' for n, m in model.named_modules()
                if isinstance(m, torch.nn.Linear) and ('blocks' in n or 'downsample' in n)}
    assert matrices <= by_muon
    assert not [n for n in by_muon if n.endswith('.bias') or 'norm' in n]


@pytest.mark.item('layer decay: scales rise from the first to the last block, without decay where the model says so')
@each_model()
def test_layer_decay(name):
    model = small(name)
    groups = param_groups_layer_decay(
        model, weight_decay=.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    named = dict(model.named_parameters())
    assert scale.keys() == {id(p) for p in named.values()}
    scales = [scale[id(p)] for n, p in named.items() if n.endswith(('attn.proj.weight', 'head.fc.weight'))]
    assert scales == sorted(scales) and len(set(scales)) == len(scales) and scales[-1] == 1
    assert min(scale.values()) == min(scale[id(p)] for n, p in named.items() if 'patch_embed' in n)
    for n, p in named.items():
        assert (decay[id(p)] == 0) == (p.ndim <= 1 or n in model.no_weight_decay() or 'relative_position' in n), n


@pytest.mark.item('fx: `create_feature_extractor` and `FeatureGraphNet`: the maps of the stages, trained through')
@each_model()
def test_fx_features(name):
    model, x = small(name), images(2)
    stages = [info['module'] for info in (model.feature_info if isinstance(model.feature_info, list)
                                          else model.feature_info.info)]
    nodes = get_graph_node_names(model)[1]
    assert {*stages, 'head.fc'} <= {*nodes, *(node.rsplit('.', count)[0] for node in nodes for count in (1, 2, 3, 4))}
    expected = {}
    handles = [model.get_submodule(s).register_forward_hook(lambda m, a, out, s=s: expected.update({s: out}))
               for s in stages]
    model(x)
    for handle in handles:
        handle.remove()
    maps = create_feature_extractor(model, {s: s for s in stages})(x)
    for s in stages:
        torch.testing.assert_close(maps[s], expected[s], rtol=1e-4, atol=1e-5)
    net = FeatureGraphNet(model, out_indices=(0, 2))
    first, third = net(x)
    torch.testing.assert_close(first, expected[stages[0]], rtol=1e-4, atol=1e-5)
    third.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.named_parameters() if 'patch_embed' in n)


@pytest.mark.item('safetensors: `save_model`, `load_checkpoint`, `checkpoint_path=`, other channels and classes', 'safetensors')
@each_model()
def test_safetensors(name, tmp_path):
    from safetensors.torch import load_file, save_model
    model, x, path = small(name), images(2), tmp_path / 'model.safetensors'
    save_model(model, str(path))
    assert load_file(path).keys() <= model.state_dict().keys()
    arguments = dict(SMALL[name], img_size=64, num_classes=10)
    others = timm.create_model(name, checkpoint_path=str(path), **arguments).eval(), timm.create_model(name, **arguments).eval()
    load_checkpoint(others[1], str(path))
    with torch.no_grad():
        assert all(torch.equal(other(x), model(x)) for other in others)
        new = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=10), in_chans=12,
            **dict(arguments, num_classes=7)).eval()
        assert new(images(2, channels=12)).shape == (2, 7)
        torch.testing.assert_close(new.forward_features(x.repeat(1, 4, 1, 1)), model.forward_features(x), rtol=1e-3, atol=1e-4)


@pytest.mark.item('`save_for_hf` and `local-dir:`: the same logits; other sizes and classes; `features_only`', 'huggingface_hub', 'safetensors')
@pytest.mark.parametrize('safe', ['both', True, False], ids=['both', 'safetensors', 'pickle'])
@each_model()
def test_local_dir(name, safe, tmp_path):
    model, x = small(name), images(2)
    model.pretrained_cfg['mean'] = (.1, .2, .3)
    save_for_hf(model, tmp_path, model_args=dict(SMALL[name], img_size=64),
                safe_serialization=safe)
    source = f'local-dir:{tmp_path}'
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == name
    loaded = timm.create_model(source, pretrained=True).eval()
    assert tuple(loaded.pretrained_cfg['mean']) == (.1, .2, .3)
    other = timm.create_model(source, pretrained=True, num_classes=3, img_size=96).eval()
    features = timm.create_model(source, pretrained=True, features_only=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        assert other(images(1, 96)).shape == (1, 3)
        last = features(x)[-1]
    channels = last.shape[-1 if name == PEER else 1]
    assert channels == features.feature_info.channels()[-1] == model.num_features


@pytest.mark.item('`timm.create_model(..., in_chans=12)`, `reset_classifier`, `forward_head(pre_logits=True)`')
@each_model()
def test_bands_and_heads(name):
    model = small(name, in_chans=12)
    x = images(2, channels=12)
    with torch.no_grad():
        assert model(x).shape == (2, 10)
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), features)
        model.reset_classifier(3, 'max')
        assert model(x).shape == (2, 3)
