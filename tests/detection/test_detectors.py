"""torchvision's detectors train and evaluate on our backbones and on timm's."""
import pytest
import torch
from detection_helpers import TINY, targets, tiny_detector
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet

from ls_vision.detection import build_detector

KINDS = {'fcos': FCOS, 'retinanet': RetinaNet, 'faster_rcnn': FasterRCNN, 'mask_rcnn': MaskRCNN}


def batch():
    """Two images of different sizes, neither square."""
    images = [torch.rand(3, 96, 160), torch.rand(3, 128, 90)]
    return images, [targets([[10., 12., 60., 50.], [70., 8., 90., 30.]], image.shape[1:]) for image in images]


def total(losses):
    return sum(losses.values())


@pytest.mark.parametrize('name', KINDS)
def test_trains_and_evaluates(name):
    model = tiny_detector(name, detections_per_img=7)
    assert type(model) is KINDS[name]
    loss = total(model(*batch()))
    loss.backward()
    assert loss.isfinite()
    gradients = {n: p.grad for n, p in model.backbone.named_parameters()}
    assert all(g is not None and g.isfinite().all() for n, g in gradients.items()), [
        n for n, g in gradients.items() if g is None]
    found = model.eval()(batch()[0])[0]
    assert found['boxes'].shape[1:] == (4,) and len(found['boxes']) <= 7
    assert ('masks' in found) == (name == 'mask_rcnn')


@pytest.mark.parametrize('name', ['fcos', 'faster_rcnn'])
def test_levels_of_all_strides(name):
    model = tiny_detector(name, strides=(4, 8, 16, 32))
    sizes = [tuple(x.shape[-2:]) for x in model.backbone(torch.rand(1, 3, 64, 128)).values()]
    assert sizes[:4] == [(16, 32), (8, 16), (4, 8), (2, 4)]
    assert len(sizes) == (6 if name == 'fcos' else 5)
    assert total(model(*batch())).isfinite()


@pytest.mark.parametrize('backbone', ['resnet10t', 'test_convnext', 'swin_tiny_patch4_window7_224'])
def test_models_of_timm(backbone):
    kwargs = dict(depths=(1, 1, 1, 1), embed_dim=24) if backbone.startswith('swin') else {}
    strides = (8, 16) if backbone == 'resnet10t' else None
    model = build_detector('fcos', backbone, 1, strides=strides, out_channels=32, backbone_kwargs=kwargs)
    assert total(model(*batch())).isfinite()


@pytest.mark.parametrize(('trainable', 'expected'), [(4, {0, 1, 2, 3}), (2, {2, 3}), (0, set())])
def test_frozen_stages(trainable, expected):
    model = tiny_detector(trainable_stages=trainable)
    total(model(*batch())).backward()
    trained = {int(name.split('.')[1]) for name, p in model.backbone.body.model.named_parameters()
               if p.grad is not None and name.startswith('stages')}
    assert trained == expected
    assert all(p.grad is not None for p in model.backbone.fpn.parameters())


def test_frozen_stages_count_from_the_last_one_that_is_used():
    model = tiny_detector(strides=(8, 16), trainable_stages=2).backbone.body.model
    assert {name.split('.')[1] for name, p in model.named_parameters() if p.requires_grad} == {'1', '2'}


def test_frozen_batch_norm_keeps_its_statistics():
    model = build_detector('fcos', 'resnet10t', 1, out_channels=32, trainable_stages=1)
    body = model.backbone.body.model
    before = {name: value.clone() for name, value in body.state_dict().items() if 'running_mean' in name}
    total(model(*batch()))
    changed = {name for name, value in body.state_dict().items() if name in before and not value.equal(before[name])}
    assert changed and all(name.startswith('layer4') for name in changed)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_detector(grad_checkpointing=checkpointing)
        total(model(*batch())).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert model.backbone.body.model.stages[0].grad_checkpointing
    torch.testing.assert_close(*gradients)


def test_images_are_resized_only_if_asked_to():
    images, _ = batch()
    for model in (tiny_detector(), tiny_detector().eval()):
        assert model.transform(images)[0].image_sizes == [(96, 160), (128, 90)]
    resized = tiny_detector(min_size=64, max_size=100).transform(images)[0].image_sizes
    assert resized == [(60, 100), (91, 64)]


def test_fcos_learns_boxes_from_scratch():
    """Without a positive bias all distances of torchvision's head are 0 after a few updates, and stay so."""
    model = tiny_detector()
    images, truth = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model(images, truth)
        optimizer.zero_grad()
        total(loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        losses.append(loss['bbox_regression'].item())
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(name='yolo'), r"detector 'yolo': must be one of fcos, retinanet, faster_rcnn, mask_rcnn"),
    (dict(num_classes=0), 'num_classes 0: must be 1 or more'),
    (dict(out_channels=40), 'out_channels 40: must be a multiple of 32'),
    (dict(trainable_stages=5), 'trainable_stages 5: must be 0 to 4'),
    (dict(strides=(2, 4)), r'strides \(2, 4\): vil_ls_tiny_linear has feature maps of strides \[4, 8, 16, 32\]'),
    (dict(strides=(16, 8)), r'strides \(16, 8\)'),
    (dict(max_size=100), 'max_size 100: images are resized only with min_size'),
    (dict(image_mean=[.5, .5]), r'image_mean \[0.5, 0.5\]: must be 3 numbers'),
    (dict(image_std=[.5] * 3, backbone_kwargs=dict(TINY, in_chans=4)), 'image_std .* must be 4 numbers'),
])
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_detector(**kwargs)


def test_strides_follow_the_arguments_of_the_backbone():
    kwargs = dict(patch_size=8, embed_dims=[16, 32], num_heads=[1, 2], depths=[1, 1], num_global_tokens=1)
    model = tiny_detector(strides=(8, 16), backbone_kwargs=kwargs)
    assert [tuple(x.shape[-2:]) for x in model.backbone(torch.rand(1, 3, 64, 128)).values()][:2] == [(8, 16), (4, 8)]


def test_arguments_of_the_backbone():
    model = tiny_detector(backbone_kwargs=dict(TINY, drop_path_rate=0.5))
    assert model.backbone.body.model.stages[3].blocks[0].drop_path1.drop_prob == 0.5


@pytest.mark.parametrize('min_size', [None, 64])
def test_arguments_of_the_transform_are_used(min_size):
    model = tiny_detector(min_size=min_size, image_mean=[.1, .2, .3], image_std=[.5], size_divisible=64)
    assert (model.transform.image_mean, model.transform.image_std) == ([.1, .2, .3], [.5, .5, .5])
    assert model.transform(batch()[0])[0].tensors.shape[-2:] == ((128, 192) if min_size is None else (128, 128))
    assert tiny_detector(fixed_size=(64, 96)).transform(batch()[0])[0].tensors.shape[-2:] == (96, 64)


@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_other_channels(channels):
    model = tiny_detector(backbone_kwargs=dict(TINY, in_chans=channels))
    assert len(model.transform.image_mean) == len(model.transform.image_std) == channels
    images = [image[:1].expand(channels, -1, -1) for image in batch()[0]]
    assert total(model(images, batch()[1])).isfinite()


@pytest.mark.parametrize('name', ['fcos', 'retinanet'])
def test_maps_of_one_pixel(name):
    """A group norm of one channel in a group has no statistics there."""
    model = tiny_detector(name, out_channels=32)
    loss = total(model([torch.rand(3, 32, 32)], [targets([[4., 3., 20., 28.]], (32, 32))]))
    assert loss.isfinite() and len(model.eval()([torch.rand(3, 32, 32)])) == 1


@pytest.mark.parametrize('detector', ['fcos', 'retinanet'])
def test_candidates_grow_with_detections(detector):
    def build(**kwargs):
        return build_detector(detector, 'resnet10t', 2, out_channels=32, **kwargs).topk_candidates

    assert build() == 1000 and build(detections_per_img=700) == 7000  # torchvision's ratio
    assert build(detections_per_img=700, topk_candidates=50) == 50
