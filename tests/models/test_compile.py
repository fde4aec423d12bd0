"""torch.compile of models on images of many sizes."""
import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter

import ls_vision  # noqa: F401  (registers the models)

THIN = dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), num_classes=2)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['vil_ls_tiny', 'vil_ls_tiny_linear'])
def test_few_versions_for_all_sizes(name):
    """Square, native and ragged sizes: one version for squares, and another that PyTorch's convolution asks for."""
    torch._dynamo.reset()
    model, counter = timm.create_model(name, **THIN).eval(), CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    sizes = [(224, 224), (256, 256), (192, 320)]
    sizes += torch.randint(64, 400, (17, 2), generator=generator).tolist()
    with torch.no_grad():
        for height, width in sizes:
            x = torch.randn(1, 3, height, width, generator=generator)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 3
