"""Detectors and segmenters of transformers with a timm backbone: training reaches the backbone, predictions have their form.

`TimmBackboneConfig` takes a name and no constructor arguments, so that the models are as registered.
"""
import pytest
import torch
from families import each_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]
CHANNELS_LAST = 'the feature maps of Swin end in channels; transformers takes the second dimension for them'
SIZE = 224  # Swin's


def backbone_config(name, stages=None):
    """The last three stages, or those that are given."""
    from transformers import TimmBackboneConfig
    last = 2 if name.startswith('cvt') else 3  # the index of the last stage
    return TimmBackboneConfig(
        backbone=name, use_pretrained_backbone=False, out_indices=stages or list(range(last - 2, last + 1)))


def pixels(batch=1):
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def check_backbone_trains(model, loss):
    """The loss is finite and its gradients reach every stage of the backbone."""
    assert loss.isfinite()
    loss.backward()
    seen = {}
    for name, parameter in model.named_parameters():
        stage = next((part for part in name.split('.') if part.startswith(('stages_', 'layers_'))), None)
        if stage and parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
            seen[stage] = seen.get(stage, 0) + parameter.grad.abs().sum().item()
    assert len(seen) >= 3 and all(seen.values()), seen


@pytest.mark.item('RT-DETRv2 and D-FINE with `backbone_config=TimmBackboneConfig(...)`: a training step, boxes', 'transformers')
@pytest.mark.parametrize('kind', ['RTDetrV2', 'DFine'])
@each_model(peer_cannot=CHANNELS_LAST)
def test_real_time_detectors(name, kind):
    import transformers
    strides = [4, 8, 16] if name.startswith('cvt') else [8, 16, 32]
    config = getattr(transformers, f'{kind}Config')(
        backbone_config=backbone_config(name), num_labels=5, d_model=32, encoder_hidden_dim=32, encoder_ffn_dim=32,
        decoder_in_channels=[32] * 3, decoder_ffn_dim=32, decoder_layers=2, num_queries=20, num_denoising=4,
        encoder_attention_heads=2, decoder_attention_heads=2, feat_strides=strides)
    model = getattr(transformers, f'{kind}ForObjectDetection')(config)
    labels = [dict(class_labels=torch.tensor([3]), boxes=torch.tensor([[.5, .5, .2, .3]]))]
    check_backbone_trains(model, model.train()(pixel_values=pixels(), labels=labels).loss)
    with torch.no_grad():
        out = model.eval()(pixel_values=pixels())
    assert out.logits.shape == (1, 20, 5) and out.pred_boxes.shape == (1, 20, 4)
    assert out.logits.isfinite().all() and ((out.pred_boxes >= 0) & (out.pred_boxes <= 1)).all()


@pytest.mark.item('Mask2Former with `backbone_config=TimmBackboneConfig(...)`: a training step, masks', 'transformers')
@each_model(peer_cannot=CHANNELS_LAST)
def test_mask2former(name):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
    stages = [0, 1, 2] if name.startswith('cvt') else [0, 1, 2, 3]
    config = Mask2FormerConfig(
        backbone_config=backbone_config(name, stages), feature_strides=[4, 8, 16, 32][:len(stages)], num_labels=5,
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=10, train_num_points=100)
    model = Mask2FormerForUniversalSegmentation(config)
    masks = torch.zeros(1, SIZE, SIZE)
    masks[:, 40:90, 60:150] = 1
    out = model.train()(pixel_values=pixels(), mask_labels=[masks], class_labels=[torch.tensor([2])])
    check_backbone_trains(model, out.loss.sum())
    with torch.no_grad():
        out = model.eval()(pixel_values=pixels())
    assert out.masks_queries_logits.shape == (1, 10, SIZE // 4, SIZE // 4)
    assert out.class_queries_logits.shape == (1, 10, 6) and out.masks_queries_logits.isfinite().all()


@pytest.mark.item('UPerNet of transformers with `backbone_config=TimmBackboneConfig(...)`: a training step, a map of classes', 'transformers')
@each_model(peer_cannot=CHANNELS_LAST)
def test_upernet(name):
    from transformers import UperNetConfig, UperNetForSemanticSegmentation
    stages = [0, 1, 2] if name.startswith('cvt') else [0, 1, 2, 3]
    config = UperNetConfig(
        backbone_config=backbone_config(name, stages), num_labels=5, hidden_size=32, use_auxiliary_head=False)
    model = UperNetForSemanticSegmentation(config)
    out = model.train()(pixel_values=pixels(2), labels=torch.randint(5, (2, SIZE, SIZE)))
    check_backbone_trains(model, out.loss)
    with torch.no_grad():
        logits = model.eval()(pixel_values=pixels()).logits
    assert logits.shape == (1, 5, SIZE, SIZE) and logits.isfinite().all()
