"""The ablation compares models of equal size, and its shifts move images as described."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))

import ablation


@pytest.mark.parametrize('variant', ablation.VARIANTS)
def test_variants_have_equally_many_parameters_and_run(variant):
    model = ablation.build(variant, ablation.matched_mlp_ratio(variant))
    assert ablation.count(model) == pytest.approx(ablation.count(ablation.build('long-short')), rel=2e-3)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert model(ablation.prepare(images)).shape == (2, 10)
    assert len(ablation.similarity_per_layer(model, images)) == ablation.DEPTH


def test_shift_moves_the_content():
    images = torch.rand(1, 3, 32, 32)
    moved = ablation.move(images, 3, 2, 1.)
    torch.testing.assert_close(moved[:, :, 2:, 3:], images[:, :, :-2, :-3], rtol=1e-3, atol=1e-3)
    assert ablation.move(images, 0, 0, 1.) is images


def test_fixed_projection_does_not_look_at_the_image():
    projection = ablation.FixedProjection(2, 3, 16)
    first, second = projection(torch.randn(2, 1 + 16, 8))  # with a global token, whose scores are not used
    assert torch.equal(first, second)
    torch.testing.assert_close(first[1:].t().reshape(2, 3, 16), projection.scores.detach())
