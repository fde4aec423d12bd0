"""Pruning: by masks (`torch.nn.utils.prune`) and structured, where layers become narrower (`torch-pruning`)."""
import pytest
import torch
from families import each_model, images, linears, small
from torch import nn
from torch.nn.utils import prune


@pytest.mark.item('masks by `torch.nn.utils.prune`: as with the weights set to zero, in all modes; they train')
@each_model()
def test_masks(name):
    model, plain, x = small(name), small(name), images(2)
    for n, module in linears(model).items():
        prune.l1_unstructured(module, 'weight', amount=.5)
        plain.get_submodule(n).weight.data.mul_(module.weight_mask)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    model(x).square().sum().backward()
    for module in linears(model).values():
        assert module.weight_orig.grad[module.weight_mask == 0].abs().sum() == 0
        assert module.weight_orig.grad.abs().sum() > 0
        prune.remove(module, 'weight')
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def attention_layers(model):
    """Layers whose channels are tied to heads."""
    return [m for n, m in model.named_modules()
            if n.split('.')[-1] in ('qkv', 'to_dynamic_projection') and isinstance(m, nn.Linear)]


@pytest.mark.slow
@pytest.mark.item('torch-pruning: the dependency graph is built, hidden widths of MLPs are halved', 'torch-pruning')
@each_model()
def test_prune_hidden_widths(name):
    import torch_pruning as tp
    model, x = small(name), images(2)
    graph = tp.DependencyGraph().build_dependency(model, x)
    expected = small(name)
    for n, module in list(model.named_modules()):
        if n.endswith('mlp.fc1'):
            group = graph.get_pruning_group(module, tp.prune_linear_out_channels, list(range(0, module.out_features, 2)))
            assert graph.check_pruning_group(group)
            group.prune()
            reference = expected.get_submodule(n[:-len('.fc1')])
            with torch.no_grad():
                reference.fc2.weight[:, ::2] = 0
            assert module.out_features == reference.fc1.out_features // 2
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.item('torch-pruning: widths of residual stream and MLPs by a high-level pruner, then trained', 'torch-pruning')
@each_model(peer_cannot="torch-pruning narrows Swin's patch merging to a wrong width")
def test_prune_model(name):
    import torch_pruning as tp
    model, x = small(name), images(2)
    before = sum(p.numel() for p in model.parameters())
    pruner = tp.pruner.MetaPruner(
        model, x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=.25,
        ignored_layers=[model.head.fc, *attention_layers(model)], round_to=12)
    pruner.step()
    assert sum(p.numel() for p in model.parameters()) < .95 * before
    out = model.train()(x)
    assert out.shape == (2, 10)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
