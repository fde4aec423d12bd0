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


@pytest.mark.parametrize(('argv', 'message'), [
    (['vil_tiny', '--out', 'DIR/model.onnx'], "unknown model 'vil_tiny'"),
    (['vil_ls_tiny', '--out', 'DIR/nowhere/model.onnx'], 'there is no folder .*nowhere'),
    (['vil_ls_tiny', '--out', 'DIR'], 'is a folder; name a file'),
    (['vil_ls_tiny', '--out', 'DIR/m.onnx', '--checkpoint', 'DIR/none.pth'], 'none.pth: no such file'),
    (['vil_ls_tiny', '--out', 'DIR/m.onnx', '--checkpoint', 'DIR/bad.pth'], 'bad.pth is damaged or not a checkpoint'),
    (['vil_ls_tiny', '--out', 'DIR/bad.pth', '--checkpoint', 'DIR/bad.pth'], 'is the checkpoint itself'),
    (['vil_ls_tiny', '--out', 'DIR/m.onnx', '--checkpoint', 'DIR/toy.pth'], 'toy.pth does not fit LongShortViL'),
    (['vil_ls_tiny', '--out', 'DIR/m.onnx', '--img-size', '1', '2', '3'], 'expected a side, or height and width'),
    (['vil_ls_tiny', '--out', 'DIR/m.onnx', '--img-size', '3'], 'cannot be exported at 3 x 3: Image of 3 x 3'),
    (['vil_ls_tiny', '--out', 'DIR/m.onnx', '--model-kwargs', 'depth=3'], "cannot be built with {'depth': 3}"),
])
def test_wrong_input_is_one_line_and_nothing_is_written(argv, message, tmp_path):
    (tmp_path / 'bad.pth').write_bytes(b'bad')
    torch.save(toy('vil_ls_tiny').state_dict(), tmp_path / 'toy.pth')
    with pytest.raises(SystemExit, match=f'error: .*{message}') as stopped:
        main([text.replace('DIR', str(tmp_path)) for text in argv])
    assert '\n' not in str(stopped.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bad.pth', 'toy.pth']


@pytest.mark.parametrize('argv', [['--img-size', '0'], ['--img-size', '-5'], ['--num-classes', '0']])
def test_sizes_of_zero_and_less(argv, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['vil_ls_tiny', '--out', str(tmp_path / 'm.onnx'), *argv])
    assert stopped.value.code == 2 and 'expected a whole number of 1 or more' in capsys.readouterr().err


@pytest.mark.slow
def test_model_of_other_arguments(tmp_path):
    """As the demo's: the checkpoint fits only with the arguments that the model was built with."""
    kwargs = dict(TOY, in_chans=1)
    model = timm.create_model('vil_ls_tiny', **kwargs).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'last.pth.tar')
    main(['vil_ls_tiny', '--out', str(tmp_path / 'm.onnx'), '--checkpoint', str(tmp_path / 'last.pth.tar'),
          '--img-size', '64', '--model-kwargs', *(f'{name}={value}' for name, value in kwargs.items())])
    image = torch.randn(1, 1, 64, 96)
    found = onnxruntime.InferenceSession(str(tmp_path / 'm.onnx')).run(None, {'image': image.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(image), atol=1e-4, rtol=1e-4)
