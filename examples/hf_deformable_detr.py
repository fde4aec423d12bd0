#!/usr/bin/env python3
"""Hugging Face's Deformable DETR on a long-short backbone: a training step and a prediction.

    pip install ls_vision transformers scipy
    python examples/hf_deformable_detr.py

Images of different sizes are padded to one, and `pixel_mask` says where they end.
"""
import argparse

import torch
from torch import Tensor
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, TimmBackboneConfig

import ls_vision  # noqa: F401  (registers the models)


def build(
        backbone: str = 'vil_ls_small_linear',
        num_classes: int = 80,
        num_queries: int = 300,
) -> DeformableDetrForObjectDetection:
    """Deformable DETR whose features of strides 8, 16 and 32 come from the named timm model, without weights."""
    backbone_config = TimmBackboneConfig(backbone=backbone, use_pretrained_backbone=False, out_indices=[1, 2, 3])
    return DeformableDetrForObjectDetection(DeformableDetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone_config, num_labels=num_classes,
        num_queries=num_queries))


def train_step(
        model: DeformableDetrForObjectDetection,
        images: Tensor,
        pixel_mask: Tensor,
        labels: list[dict[str, Tensor]],
) -> float:
    """One update; boxes are (centre x, centre y, width, height) in shares of the image, classes count from 0."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss = model(pixel_values=images, pixel_mask=pixel_mask, labels=labels).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.inference_mode()
def predict(model: DeformableDetrForObjectDetection, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, queries, classes) and boxes (B, queries, 4)."""
    out = model.eval()(pixel_values=images)
    return out.logits, out.pred_boxes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--backbone', default='vil_ls_tiny_linear')
    parser.add_argument('--size', type=int, nargs=2, default=[256, 320], metavar=('H', 'W'))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build(args.backbone, num_queries=100)
    images = torch.randn(2, 3, *args.size)
    mask = torch.ones(2, *args.size, dtype=torch.long)
    mask[1, :, 192:] = 0  # the second image is narrower
    labels = [dict(class_labels=torch.tensor([3]), boxes=torch.tensor([[.5, .5, .2, .3]])) for _ in range(2)]
    print(f'Deformable DETR on {args.backbone}: loss {train_step(model, images, mask, labels):.3f}')
    logits, boxes = predict(model, images)
    print(f'prediction: logits {tuple(logits.shape)}, boxes {tuple(boxes.shape)}')


if __name__ == '__main__':
    main()
