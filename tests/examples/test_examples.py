"""Every example runs as documented, on a small model and from the command line."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / 'examples'))

import hf_classifier
import hf_deformable_detr
import hf_rt_detr
import smp_segmentation

ROOT = Path(__file__).parents[2]


def backbone_gradients(model, part):
    """Gradients of the parameters whose name says that they belong to the backbone's stages."""
    found = {name: p.grad for name, p in model.named_parameters() if part in name and 'stages' in name}
    assert found
    return found


def labels(count):
    return [dict(class_labels=torch.tensor([3]), boxes=torch.tensor([[.5, .5, .2, .3]])) for _ in range(count)]


def test_rt_detr():
    model = hf_rt_detr.build('vil_ls_tiny_linear')
    images = torch.randn(1, 3, 128, 160)
    loss = hf_rt_detr.train_step(model, images, labels(1))
    assert 0 < loss < float('inf')
    assert all(g is not None and g.isfinite().all() for g in backbone_gradients(model, 'backbone').values())
    logits, boxes = hf_rt_detr.predict(model, images)
    assert logits.shape[2] == 80 and boxes.shape[2] == 4
    assert logits.isfinite().all() and (boxes >= 0).all() and (boxes <= 1).all()


def test_deformable_detr():
    model = hf_deformable_detr.build('vil_ls_tiny_linear', num_queries=20)
    images, mask = torch.randn(2, 3, 128, 160), torch.ones(2, 128, 160, dtype=torch.long)
    mask[1, :, 100:] = 0
    loss = hf_deformable_detr.train_step(model, images, mask, labels(2))
    assert 0 < loss < float('inf')
    gradients = backbone_gradients(model, 'backbone')
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in gradients.values()) > len(gradients) / 2
    logits, boxes = hf_deformable_detr.predict(model, images)
    assert logits.shape == (2, 20, 80) and boxes.isfinite().all()


def test_classifier_round_trip(tmp_path):
    from transformers import TimmWrapperForImageClassification

    model = hf_classifier.build('vil_ls_tiny', num_classes=5).eval()
    model.save_pretrained(tmp_path)
    loaded = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        torch.testing.assert_close(model(pixel_values=images).logits, loaded(pixel_values=images).logits)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_auto_backbone():
    maps = hf_classifier.build_backbone('vil_ls_tiny_linear')(torch.randn(2, 3, 96, 128)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 48, 24, 32), (2, 96, 12, 16), (2, 192, 6, 8), (2, 384, 3, 4)]


@pytest.mark.parametrize('decoder', ['unet', 'fpn', 'upernet'])
def test_segmentation_takes_images_that_are_not_square(decoder):
    model = smp_segmentation.build(decoder, 'vil_ls_tiny_linear', num_classes=3)
    images = torch.randn(2, 3, 96, 160)
    out = model(images)
    assert out.shape == (2, 3, 96, 160)
    out.mean().backward()
    assert all(g is not None and g.isfinite().all() for g in backbone_gradients(model, 'encoder').values())


@pytest.mark.parametrize('decoder', ['fpn', pytest.param('upernet', marks=pytest.mark.slow)])
def test_segmentation_of_a_real_photograph(decoder):
    torch.manual_seed(0)
    image, target = smp_segmentation.read_photograph()
    assert image.shape == (1, 3, 480, 640) and target.float().mean() > 0.05
    image, target = image[..., 64:416, 96:544], target[:, 64:416, 96:544]
    model = smp_segmentation.build(decoder, 'vil_ls_tiny_linear')
    losses = smp_segmentation.train(model, image, target, steps=12)
    assert losses[-1] < 0.8 * losses[0]
    assert smp_segmentation.intersection_over_union(model, image, target) > 0.2


@pytest.mark.parametrize('encoder', ['vil_ls_tiny_linear', 'cvt_ls_13', 'swin_tiny_patch4_window7_224'])
def test_segmentation_decoders_with_an_output_stride_are_refused(encoder):
    """As docs/libraries.md says, by ours as by timm's Swin."""
    with pytest.raises(TypeError, match='output_stride'):
        smp.DeepLabV3Plus(f'tu-{encoder}', encoder_weights=None)


@pytest.mark.parametrize('decoder', ['Unet', 'PSPNet', 'UPerNet'])
def test_segmentation_on_three_stages(decoder):
    channels = dict(decoder_channels=(32, 32, 16, 16)) if decoder == 'Unet' else {}
    model = getattr(smp, decoder)('tu-cvt_ls_13', encoder_weights=None, encoder_depth=4, **channels).eval()
    assert model(torch.randn(1, 3, 64, 96)).shape[:2] == (1, 1)


@pytest.mark.parametrize('name', ['torchvision_detector', 'hf_rt_detr'])
def test_command_line(name):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    done = subprocess.run(
        [sys.executable, f'examples/{name}.py'], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'loss' in done.stdout
