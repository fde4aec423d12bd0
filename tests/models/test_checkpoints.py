"""Released and native checkpoints on disk, other sizes, and files that are something else."""
import os
import pickle
import re

import pytest
import timm
import torch
from golden_values import golden_state_dict, old_name, released_keys, released_shapes

import ls_vision  # noqa: F401, registers the models
from ls_vision.layers.position_bias import resize_grid_bias, resize_window_bias, window_bias_index, window_bias_rows

TOY = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=2, rank=4)


def toy(name='vil_ls_medium', **kwargs):
    return timm.create_model(name, **{**TOY, 'num_classes': 10, **kwargs}).eval()


@pytest.fixture
def released_file(tmp_path):
    """A file as the authors wrote theirs: more than tensors, DDP's prefix, index buffers."""
    state_dict = golden_state_dict(released_shapes(toy()))
    state_dict['layer1.1.attn.relative_position_index'] = torch.zeros(49, 169, dtype=torch.long)
    path = tmp_path / 'model_best.pth'
    torch.save({'epoch': 299, 'arch': 'msvit', 'net': {f'module.{k}': v for k, v in state_dict.items()},
                'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-6}]}}, path)
    return str(path)


def test_both_ways_of_loading_agree(released_file):
    x = torch.randn(1, 3, 224, 224)
    by_cfg = toy(pretrained=True, pretrained_cfg_overlay=dict(file=released_file, num_classes=10))
    by_path = toy(checkpoint_path=released_file)
    with torch.no_grad():
        assert torch.equal(by_cfg(x), by_path(x))
        assert not torch.equal(by_cfg(x), toy()(x))


def test_other_classes_and_channels(released_file):
    model = toy(pretrained=True, pretrained_cfg_overlay=dict(file=released_file, num_classes=10), num_classes=3,
                in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 3)
    features = toy(pretrained=True, pretrained_cfg_overlay=dict(file=released_file), features_only=True)
    assert len(features(torch.randn(1, 3, 64, 64))) == 4


def test_loads_into_other_size_and_window(released_file):
    model = toy('vil_ls_medium_384', checkpoint_path=released_file)
    source = toy(checkpoint_path=released_file)
    assert model.stages[0].blocks[0].attn.window_size == 8
    attn, source_attn = model.stages[2].blocks[0].attn, source.stages[2].blocks[0].attn
    assert (source_attn.feat_size, attn.feat_size) == ((14, 14), (24, 24))
    torch.testing.assert_close(
        attn.local_relative_position_bias_table,
        resize_grid_bias(source_attn.local_relative_position_bias_table, (14, 14), (24, 24)))
    # at the larger size only the windows differ from the source model's dynamic interpolation
    source.set_input_size(384, window_size=8)
    x = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        assert torch.equal(source(x), model(x))


@pytest.mark.parametrize('name,released', [
    ('vil_ls_medium', 'medium224'), ('vil_ls_base', 'base224'), ('vil_ls_medium_384', 'medium384')])
def test_released_keys_fill_the_models(name, released, tmp_path):
    model = timm.create_model(name, device='meta')
    state_dict = {k: torch.empty(v, device='meta') for k, v in released_keys(released).items()}
    converted = model.filter_state_dict({'net': state_dict})
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_native_checkpoints_are_left_alone(tmp_path):
    model = toy()
    state_dict = dict(sorted(model.state_dict().items()))
    assert all(model.filter_state_dict(state_dict)[k] is v for k, v in state_dict.items())
    headless = {k: v for k, v in state_dict.items() if not k.startswith('head')}
    toy(num_classes=0).load_state_dict(headless)
    torch.save({'state_dict': {f'module.{k}': v for k, v in state_dict.items()}, 'epoch': 1}, tmp_path / 'last.pth')
    restored = toy(checkpoint_path=str(tmp_path / 'last.pth'))
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize('kind', ['released', 'unique'])
def test_window_tables_resample_smoothly(kind):
    """A table that is linear in the offsets stays so."""
    def linear_table(window_size):
        from ls_vision.ops.window import square_window, window_offsets
        rows, cols = window_offsets(square_window(window_size), torch.device('cpu'))
        index = window_bias_index(window_size, kind, torch.device('cpu'))
        table = torch.zeros(window_bias_rows(window_size, kind), 1)
        count = torch.zeros_like(table)
        values = (rows + 0.5 * cols).flatten()[:, None].float() / window_size
        table.index_add_(0, index.flatten(), values)
        count.index_add_(0, index.flatten(), torch.ones_like(values))
        return table / count.clamp(min=1)

    assert resize_window_bias(linear_table(7), 7, kind).shape == (window_bias_rows(7, kind), 1)
    resized, expected = resize_window_bias(linear_table(7), 8, kind), linear_table(8)
    if kind == 'unique':
        inner = expected.view(23, 23)[4:-4, 4:-4]
        assert (resized.view(23, 23)[4:-4, 4:-4] - inner).abs().max() < 0.15
    assert torch.corrcoef(torch.stack([resized[:, 0], expected[:, 0]]))[0, 1] > 0.97


def test_other_bias_kind_is_converted():
    released, unique = toy(), toy(rel_pos_bias='unique')
    unique.load_state_dict(released.state_dict())
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(unique(x), released(x))


def test_other_architecture_is_named_in_few_words(tmp_path):
    path = tmp_path / 'other.pth'
    torch.save(timm.create_model('resnet18', num_classes=10).state_dict(), path)
    with pytest.raises(RuntimeError, match='does not fit this LongShortViL') as error:
        toy(checkpoint_path=str(path))
    message = str(error.value)
    assert len(message) < 1500 and 'stages.0.global_tokens' in message and 'conv1.weight' in message
    assert re.search(r'\d+ keys missing \(.*\); \d+ keys not known \(.*\)', message)
    torch.save(toy(depths=(1, 1, 3, 1)).state_dict(), path)
    with pytest.raises(RuntimeError, match=r'keys not known \(stages.2.blocks.2'):
        toy(checkpoint_path=str(path))


def test_class_count_that_does_not_fit(tmp_path):
    path = tmp_path / 'ten.pth'
    torch.save(toy().state_dict(), path)
    with pytest.raises(RuntimeError, match=r'head.fc.weight \(10, 64\) instead of \(5, 64\)'):
        toy(num_classes=5, checkpoint_path=str(path))


def test_no_tensors(tmp_path):
    path = tmp_path / 'log.pth'
    torch.save({'loss': 3.2, 'epoch': 4}, path)
    with pytest.raises(ValueError, match='holds no tensors; its entries are loss, epoch'):
        toy(checkpoint_path=str(path))


class Gadget:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_with_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / 'trap'
    for writer in (lambda obj, path: torch.save(obj, path), lambda obj, path: path.write_bytes(pickle.dumps(obj))):
        path = tmp_path / 'bad.pth'
        writer({'net': Gadget(str(trap))}, path)
        for kwargs in (dict(checkpoint_path=str(path)),
                       dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))):
            with pytest.raises(Exception, match='weights_only'):
                toy(**kwargs)
        assert not trap.exists()


def test_unreachable_download_says_how_to_pass_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')  # nothing listens there
    with pytest.raises(RuntimeError, match=r"dropbox.com/s/ng14pebstaaydug.*dict\(file='model_best.pth'\)"):
        timm.create_model('vil_ls_medium', pretrained=True, cache_dir=str(tmp_path))


def test_untrained_models_say_so():
    with pytest.raises(RuntimeError, match='No pretrained weights exist for vil_ls_tiny'):
        timm.create_model('vil_ls_tiny', pretrained=True)


@pytest.mark.parametrize('name', ['cvt_ls_13', 'cvt_13'])
@pytest.mark.parametrize('features_only', [False, True])
def test_old_names_of_convolutional_projections_load(name, features_only):
    """Checkpoints of first versions, in which `qkv` and `to_dynamic_projection` were containers, load strictly."""
    options = dict(depths=(1, 1, 1), features_only=features_only)
    model, other = timm.create_model(name, **options).eval(), timm.create_model(name, **options).eval()
    old = {old_name(key): value for key, value in model.state_dict().items()}
    assert any('attn.qkv.proj.2.weight' in key for key in old) and not set(old) & {
        key for key in model.state_dict() if '.query.' in key or '.scores.' in key}
    assert not other.load_state_dict(old, strict=True).missing_keys
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    assert any('attn.qkv.proj.2.weight' in key for key in old)  # what is read is not changed


def test_adapters_reach_linear_layers_by_the_usual_names():
    """In both families each module of these names is an nn.Linear, called as one."""
    for name in ('vil_ls_tiny_linear', 'cvt_ls_13'):
        model = timm.create_model(name)
        for suffix in ('qkv', 'proj', 'to_dynamic_projection', 'fc1', 'fc2'):
            found = [m for key, m in model.named_modules() if key.endswith(f'.{suffix}') and 'patch_embed' not in key]
            assert found and all(type(m) is torch.nn.Linear for m in found), (name, suffix)
