"""Explanations of predictions: class activation maps (`grad-cam`) and attributions (`captum`)."""
import pytest
import torch
from families import PEER, each_model, images, small
from torch.nn import functional as F

pytestmark = pytest.mark.slow
TARGETS = [1, 4]  # a class for each image


def stage(model, name, index):
    """One of the last stages."""
    return (model.layers if name == PEER else model.stages)[index]


def channels_first(x):
    """What users of Swin give as `reshape_transform`."""
    return x.permute(0, 3, 1, 2)


def activations_and_gradients(model, layer, x, transform):
    """Maps (B, C, H, W) after a layer and their gradients of the targets' logits."""
    kept = []
    handle = layer.register_forward_hook(lambda module, args, out: kept.append(out))
    out = model(x)
    handle.remove()
    gradients, = torch.autograd.grad(sum(logits[target] for logits, target in zip(out, TARGETS)), kept[0])
    return tuple(transform(t.detach()) if transform else t.detach() for t in (kept[0], gradients))


def between_0_and_1(cam):
    """Each map (1, H, W) of a batch from its smallest to its largest value."""
    cam = cam - cam.amin(dim=(2, 3), keepdim=True)
    return cam / (cam.amax(dim=(2, 3), keepdim=True) + 1e-7)


def cam_by_hand(model, layer, x, transform):
    """Grad-CAM from its formula, between 0 and 1 and as large as the image."""
    maps, gradients = activations_and_gradients(model, layer, x, transform)
    cam = (gradients.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True).relu()
    cam = F.interpolate(between_0_and_1(cam), size=x.shape[2:], mode='bilinear')
    return between_0_and_1(cam)[:, 0]


@pytest.mark.item('grad-cam: GradCAM of the last stages as its formula; ours are NCHW, Swin needs `reshape_transform`', 'grad-cam')
@each_model()
def test_grad_cam(name):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    model, x = small(name, 128), images(2, 128)
    transform = channels_first if name == PEER else None
    seen = []
    for index in (-1, -2):
        layer = stage(model, name, index)
        with GradCAM(model, target_layers=[layer], reshape_transform=transform) as cam:
            maps = torch.from_numpy(cam(x, targets=[ClassifierOutputTarget(target) for target in TARGETS]))
        torch.testing.assert_close(maps, cam_by_hand(model, layer, x, transform), rtol=0, atol=.01)  # OpenCV's resize
        seen.append(maps.max().item())
    assert max(seen) > .5


def check_cam(name, method):
    """The method gives a map for each image."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    model, x = small(name, 128), images(2, 128)
    cam = getattr(pytorch_grad_cam, method)(
        model, target_layers=[stage(model, name, -2)], reshape_transform=channels_first if name == PEER else None)
    maps = torch.from_numpy(cam(x, targets=[ClassifierOutputTarget(target) for target in TARGETS]))
    assert maps.shape == (2, 128, 128) and maps.isfinite().all()
    assert maps.min() >= 0 and maps.max() > .5


@pytest.mark.item('grad-cam: eight methods give finite maps between 0 and 1', 'grad-cam')
@pytest.mark.parametrize('method', [
    'GradCAMPlusPlus', 'XGradCAM', 'LayerCAM', 'HiResCAM', 'GradCAMElementWise', 'EigenCAM', 'EigenGradCAM', 'ScoreCAM'])
@each_model()
def test_cam_methods(name, method):
    check_cam(name, method)


@pytest.mark.item('grad-cam: AblationCAM, which silences the channels of a stage one by one', 'grad-cam')
@each_model(peer_cannot='AblationCAM silences indices of dimension 1; the maps of Swin end in channels')
def test_ablation_cam(name):
    check_cam(name, 'AblationCAM')


@pytest.mark.item('captum: IntegratedGradients sum to the difference of the logits; convergence delta', 'captum')
@each_model()
def test_integrated_gradients(name):
    from captum.attr import IntegratedGradients
    model, x = small(name).double(), images(2, dtype=torch.float64)
    baseline = torch.zeros_like(x)
    attributions, delta = IntegratedGradients(model).attribute(
        x, baseline, target=TARGETS, n_steps=64, internal_batch_size=32, return_convergence_delta=True)
    with torch.no_grad():
        logits, of_baseline = (model(t).gather(1, torch.tensor(TARGETS)[:, None])[:, 0] for t in (x, baseline))
    assert attributions.shape == x.shape and (attributions != 0).any()
    torch.testing.assert_close(attributions.sum(dim=(1, 2, 3)), logits - of_baseline, rtol=.02, atol=.02)
    assert delta.abs().max() < .02


@pytest.mark.item('captum: LayerGradCam of the last stages as its formula', 'captum')
@each_model()
def test_layer_grad_cam(name):
    from captum.attr import LayerGradCam
    model, x = small(name, 128), images(2, 128)
    for index in (-1, -2):
        layer = stage(model, name, index)
        found = LayerGradCam(model, layer).attribute(x, target=TARGETS)
        maps, gradients = activations_and_gradients(model, layer, x, None)  # captum knows no layout: dimension 1
        expected = (gradients.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.item('captum: Saliency, GradientShap, DeepLift, Occlusion, LayerIntegratedGradients, LayerActivation, KernelShap', 'captum')
@each_model()
def test_attributions(name):
    from captum import attr
    model, x = small(name), images(2)
    layer = stage(model, name, -1)
    found = dict(
        saliency=attr.Saliency(model).attribute(x, target=TARGETS),
        shap=attr.GradientShap(model).attribute(x, baselines=torch.zeros_like(x), target=TARGETS),
        deep_lift=attr.DeepLift(model).attribute(x, target=TARGETS),
        occlusion=attr.Occlusion(model).attribute(x, (3, 32, 32), (3, 32, 32), target=TARGETS),
        layer=attr.LayerIntegratedGradients(model, layer).attribute(x, target=TARGETS, n_steps=4),
        activation=attr.LayerActivation(model, layer).attribute(x),
        kernel=attr.KernelShap(model).attribute(
            x, target=TARGETS, n_samples=8, feature_mask=torch.arange(4).view(2, 2).repeat_interleave(32, 0)
            .repeat_interleave(32, 1).expand(1, 3, 64, 64)))
    for what, values in found.items():
        assert values.isfinite().all() and values.abs().sum() > 0, what
    assert found['activation'].shape == found['layer'].shape
