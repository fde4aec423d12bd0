#!/usr/bin/env python3
"""Hugging Face's RT-DETR on a long-short backbone: a training step and a prediction.

    pip install ls_vision transformers scipy
    python examples/hf_rt_detr.py

`import ls_vision` is all that transformers needs to find the models by name. Give the configuration of the backbone as
`backbone_config`: a name alone (`backbone='vil_ls_small_linear'`) makes transformers look for weights on its hub.
"""
import argparse

import torch
from torch import Tensor
from transformers import RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig

import ls_vision  # noqa: F401  (registers the models)


def build(backbone: str = 'vil_ls_small_linear', num_classes: int = 80) -> RTDetrForObjectDetection:
    """RT-DETR whose features of strides 8, 16 and 32 come from the named timm model, without pretrained weights."""
    backbone_config = TimmBackboneConfig(backbone=backbone, use_pretrained_backbone=False, out_indices=[1, 2, 3])
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone_config, num_labels=num_classes))


def train_step(model: RTDetrForObjectDetection, images: Tensor, labels: list[dict[str, Tensor]]) -> float:
    """One update; boxes are (centre x, centre y, width, height) in shares of the image, classes count from 0."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss = model(pixel_values=images, labels=labels).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.inference_mode()
def predict(model: RTDetrForObjectDetection, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, queries, classes) and boxes (B, queries, 4)."""
    out = model.eval()(pixel_values=images)
    return out.logits, out.pred_boxes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--backbone', default='vil_ls_tiny_linear')
    parser.add_argument('--size', type=int, nargs=2, default=[256, 320], metavar=('H', 'W'))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build(args.backbone)
    images = torch.randn(1, 3, *args.size)
    labels = [dict(class_labels=torch.tensor([3]), boxes=torch.tensor([[.5, .5, .2, .3]]))]
    print(f'RT-DETR on {args.backbone}: loss {train_step(model, images, labels):.3f}')
    logits, boxes = predict(model, images)
    print(f'prediction: logits {tuple(logits.shape)}, boxes {tuple(boxes.shape)}')


if __name__ == '__main__':
    main()
