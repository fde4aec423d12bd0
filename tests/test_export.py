"""ONNX files of open batch and image size, read by onnxruntime."""
import subprocess
import sys

import onnxruntime
import pytest
import timm
import torch
from torch.export import Dim

import ls_vision  # noqa: F401, registers the models
from ls_vision.export import export_onnx, main

TOY = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=2, rank=4, num_classes=10)
SIZES = ((1, 3, 160, 256), (3, 3, 96, 96), (2, 3, 97, 65))  # none the traced one


def toy(name):
    model = timm.create_model(name, **TOY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize('name', ['vil_ls_tiny', pytest.param('vil_ls_tiny_linear', marks=pytest.mark.slow)])
def test_onnx_at_other_sizes(name, tmp_path):
    model = toy(name)
    path = tmp_path / 'model.onnx'
    export_onnx(model, path)
    assert all(m.fused_attn for m in model.modules() if hasattr(m, 'fused_attn'))
    session = onnxruntime.InferenceSession(str(path))
    for shape in SIZES:
        x = torch.randn(shape)
        with torch.no_grad():
            assert (torch.from_numpy(session.run(None, {'image': x.numpy()})[0]) - model(x)).abs().max() < 1e-4


@pytest.mark.parametrize('name', ['vil_ls_tiny', 'vil_ls_tiny_linear'])
def test_exported_program_of_open_size(name):
    model = toy(name)
    open_size = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    program = torch.export.export(model, (torch.randn(2, 3, 192, 224),), dynamic_shapes=open_size).module()
    for shape in SIZES:
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x))


@pytest.mark.slow
def test_command(tmp_path):
    out = subprocess.run(
        [sys.executable, '-m', 'ls_vision.export', 'vil_ls_tiny', '--out', str(tmp_path / 'model.onnx')],
        capture_output=True, text=True, check=True)
    assert 'input image (batch, 3, height, width)' in out.stdout
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'))
    assert session.run(None, {'image': torch.randn(1, 3, 128, 96).numpy()})[0].shape == (1, 1000)


def test_unknown_model(tmp_path):
    with pytest.raises(SystemExit, match="unknown model 'vil_tiny'"):
        main(['vil_tiny', '--out', str(tmp_path / 'model.onnx')])
