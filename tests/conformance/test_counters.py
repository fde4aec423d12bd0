"""What other people's counters of parameters and multiply-adds see of a model, at 224 px.

The reference is counted here from the shapes that hooks see: linear maps and convolutions. Attention's own products come
on top of it and are what counters differ in: each must see the linear part in full, and no counter that follows operators
may miss more of ours than of the peer.
"""
import math
import warnings

import pytest
import torch
from families import each_model, full, images, linears
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)


def count_layers(model, x):
    """Multiply-adds of linear maps and convolutions, from the shapes of their outputs."""
    total = 0

    def count(module, args, out):
        nonlocal total
        if isinstance(module, nn.Linear):
            total += out.numel() * module.in_features
        else:
            total += out.numel() * math.prod(module.kernel_size) * module.in_channels // module.groups

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return total


def count_torch(model, x, mode=torch.no_grad):
    with mode(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


@pytest.mark.slow
@pytest.mark.item("PyTorch's FlopCounterMode: the same with and without gradients and in inference mode")
@each_model()
def test_torch_counter(name):
    model, x = full(name), images(1, 224)
    counts = {mode.__name__: count_torch(model, x, mode) for mode in MODES}
    assert len(set(counts.values())) == 1, counts
    layers = count_layers(model, x)
    assert layers < counts['no_grad'] < 1.5 * layers


@pytest.mark.slow
@pytest.mark.item("PyTorch's FlopCounterMode of training: the backward pass of products twice the forward pass")
@each_model()
def test_torch_counter_of_training(name):
    """But for convolutions: of depthwise ones PyTorch's formula counts the backward pass as if they were dense."""
    model, x = full(name), images(1, 224).requires_grad_()
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            out = model(x).sum()
            if backward:
                out.backward()
        counts.append(sum(
            flops for op, flops in counter.get_flop_counts()['Global'].items() if 'convolution' not in str(op)))
    assert counts[1] / counts[0] == pytest.approx(3., rel=.12)


@pytest.mark.slow
@pytest.mark.item('fvcore: with its own handles, all that is a product')
@each_model()
def test_fvcore(name):
    from fvcore.nn import FlopCountAnalysis
    model, x = full(name), images(1, 224)
    analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        counted = analysis.total()
    assert not [op for op in analysis.unsupported_ops() if 'attention' in op or 'ls_vision' in op or 'mkldnn' in op]
    assert count_layers(model, x) < counted == pytest.approx(count_torch(model, x), rel=.03)


@pytest.mark.slow
@pytest.mark.item('ptflops: by PyTorch operators (`backend="aten"`), as PyTorch counts', 'ptflops')
@each_model()
def test_ptflops(name):
    import ptflops
    model, x = full(name), images(1, 224)
    macs, params = ptflops.get_model_complexity_info(
        model, (3, 224, 224), as_strings=False, print_per_layer_stat=False, backend='aten')
    assert params == sum(p.numel() for p in model.parameters())
    assert macs == pytest.approx(count_torch(model, x), rel=.05)


@pytest.mark.slow
@pytest.mark.item('torchinfo, thop, ptflops (`backend="pytorch"`): every linear layer and convolution', 'torchinfo', 'thop',
                  'ptflops')
@each_model()
def test_counters_by_module(name):
    import ptflops
    import thop
    import torchinfo
    model, x = full(name), images(1, 224)
    layers = count_layers(model, x)
    summary = torchinfo.summary(model, input_data=x, verbose=0, depth=20)  # of linear maps it counts one token's work
    assert {id(m) for m in linears(model).values()} <= {info.layer_id for info in summary.summary_list}
    assert summary.total_params >= .97 * sum(p.numel() for p in model.parameters())
    assert ptflops.get_model_complexity_info(
        model, (3, 224, 224), as_strings=False, print_per_layer_stat=False, backend='pytorch')[0] >= .97 * layers
    assert thop.profile(full(name), (x,), verbose=False)[0] >= .97 * layers


@pytest.mark.slow
@pytest.mark.item('DeepSpeed-style profilers that replace functions (calflops): as PyTorch counts', 'calflops')
@each_model()
def test_calflops(name):
    import calflops
    model, x = full(name), images(1, 224)
    _, macs, params = calflops.calculate_flops(
        model, kwargs={'x': x}, output_as_string=False, print_results=False, print_detailed=False)
    assert params == sum(p.numel() for p in model.parameters())
    assert macs == pytest.approx(count_torch(model, x), rel=.05)


def profiled_share(model, x, mode):
    """What PyTorch's profiler counts, over what linear layers and convolutions are known to be."""
    with mode(), torch.profiler.profile(with_flops=True) as profile:
        model(x)
    return sum(e.flops or 0 for e in profile.key_averages()) / 2 / count_layers(model, x)


@pytest.mark.slow
@pytest.mark.item('the profiler (`with_flops=True`) of training sees every linear map')
@each_model()
def test_profiler_of_training(name):
    assert profiled_share(full(name), images(1, 224), torch.enable_grad) >= .95


@pytest.mark.slow
@pytest.mark.item('the profiler (`with_flops=True`) of inference sees every linear map')
@each_model()
def test_profiler_of_inference(name):
    assert profiled_share(full(name), images(1, 224), torch.no_grad) >= .95
