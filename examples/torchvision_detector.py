#!/usr/bin/env python3
"""A torchvision detector on a long-short backbone, and detection in a large image tile by tile.

    pip install ls_vision
    python examples/torchvision_detector.py
"""
import torch

import ls_vision  # noqa: F401  (registers the models)
from ls_vision.detection import build_detector, detect


def main() -> None:
    torch.manual_seed(0)
    model = build_detector('fcos', 'vil_ls_tiny_linear', num_classes=3, trainable_stages=3, grad_checkpointing=True)
    images = [torch.rand(3, 256, 320), torch.rand(3, 192, 256)]  # of any sizes
    targets = [dict(boxes=torch.tensor([[20., 30., 90., 120.]]), labels=torch.tensor([1])) for _ in images]
    losses = model(images, targets)
    sum(losses.values()).backward()
    print('losses: ' + ', '.join(f'{name} {value.item():.3f}' for name, value in losses.items()))

    found = detect(model.eval(), torch.rand(3, 600, 800), tile_size=384, overlap=128, max_dets=50)
    print(f'{len(found["boxes"])} boxes in an image of 600 x 800 seen in tiles')


if __name__ == '__main__':
    main()
