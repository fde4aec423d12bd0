#!/usr/bin/env python3
"""A long-short classifier as a Hugging Face model: save it, load it, get the same logits.

    pip install ls_vision transformers
    python examples/hf_classifier.py
"""
import argparse
import tempfile

import torch
from transformers import AutoBackbone, TimmBackboneConfig, TimmWrapperConfig, TimmWrapperForImageClassification

import ls_vision  # noqa: F401  (registers the models)


def build(name: str = 'vil_ls_small', num_classes: int = 10) -> TimmWrapperForImageClassification:
    """The classifier without pretrained weights."""
    return TimmWrapperForImageClassification(TimmWrapperConfig(
        architecture=name, num_labels=num_classes, num_classes=num_classes))


def build_backbone(name: str = 'vil_ls_small_linear') -> torch.nn.Module:
    """Feature maps of all strides."""
    return AutoBackbone.from_config(TimmBackboneConfig(
        backbone=name, use_pretrained_backbone=False, out_indices=[0, 1, 2, 3]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='vil_ls_tiny')
    args = parser.parse_args()
    model = build(args.model).eval()
    images = torch.randn(2, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model.save_pretrained(folder)
        loaded = TimmWrapperForImageClassification.from_pretrained(folder).eval()
        logits, again = (m(pixel_values=images).logits for m in (model, loaded))
    same = torch.equal(logits, again)
    print(f'{args.model}: logits {tuple(logits.shape)}, the same after saving and loading: {same}')
    maps = build_backbone('vil_ls_tiny_linear')(torch.randn(1, 3, 192, 256)).feature_maps
    print(f'AutoBackbone: {", ".join(str(tuple(m.shape)) for m in maps)}')


if __name__ == '__main__':
    main()
