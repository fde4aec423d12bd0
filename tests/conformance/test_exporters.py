"""Exported models: core ATen alone in the graph; files run where ls_vision is not installed, equal to eager to 1e-4.

By `torch.export`, `torch.onnx.export(dynamo=True)`, OpenVINO, AOTInductor and TorchScript; at three image sizes, and with
a batch, height and width that stay open.
"""
import pytest
import torch
from exports import ANY_SIZE, OPEN_BATCH, OPEN_SIZE, check_alone, draw, flexible, operators
from families import each_model, images, small

each_size = pytest.mark.parametrize('img_size', [
    64, pytest.param(96, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow)])
PEER_HAS_FIXED_SIZES = 'Swin pads to windows by Python arithmetic: torch.export finds constraints on height and width'


@pytest.mark.item('`torch.export`: core ATen alone after `run_decompositions()`, and equal when run in a process of its own')
@each_size
@each_model()
def test_core_aten(name, img_size, tmp_path, capsys):
    model, x = small(name, img_size), images(1, img_size)
    program = torch.export.export(model, (x,))
    _, others = operators(program)
    assert [op for op in others if not op.startswith('aten.')] == []
    torch.export.save(program, tmp_path / 'model.pt2')
    names, others = operators(program.run_decompositions())
    with capsys.disabled():
        print(f'\n{name}: {len(names)} operators: {", ".join(names)}')
    assert others == []
    check_alone('program', tmp_path / 'model.pt2', model, [x])


@pytest.mark.slow
@pytest.mark.item('`torch.export` of the model in training: core ATen alone')
@each_model(cvt_ls_13='batch norm in training decomposes to no core operator, in any model')
def test_core_aten_in_training(name):
    program = torch.export.export(small(name).train(), (images(2),))
    _, others = operators(program.run_decompositions())
    assert others == []


@pytest.mark.slow
@pytest.mark.item('`torch.export` program of open batch, decomposed, run in a process of its own')
@each_model()
def test_program_of_open_batch(name, tmp_path):
    model = small(name)
    program = torch.export.export(model, (images(2),), dynamic_shapes=OPEN_BATCH).run_decompositions()
    _, others = operators(program)
    assert others == []
    torch.export.save(program, tmp_path / 'model.pt2')
    check_alone('program', tmp_path / 'model.pt2', model, draw(*((b, 3, 64, 64) for b in (1, 2, 5))))


@pytest.mark.slow
@pytest.mark.item('`torch.export` program of open batch, height and width, decomposed, at three image sizes')
@each_model(peer_cannot=PEER_HAS_FIXED_SIZES)
def test_program_of_open_size(name, tmp_path):
    model = flexible(name)
    program = torch.export.export(model, (torch.randn(2, 3, 192, 224),), dynamic_shapes=OPEN_SIZE)
    program = program.run_decompositions()
    _, others = operators(program)
    assert others == []
    torch.export.save(program, tmp_path / 'model.pt2')
    check_alone('program', tmp_path / 'model.pt2', model, draw(*ANY_SIZE))


@pytest.mark.slow
@pytest.mark.item('`torch.onnx.export(dynamo=True)`, run by onnxruntime without torch, at three image sizes', 'onnx',
                  'onnxruntime')
@pytest.mark.parametrize('img_size', [64, 96, 128])
@each_model()
def test_onnx(name, img_size, tmp_path):
    model, x = small(name, img_size), images(1, img_size)
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', dynamo=True, verbose=False)
    check_alone('onnx', tmp_path / 'model.onnx', model, [x])


@pytest.mark.slow
@pytest.mark.item('`torch.onnx.export(dynamo=True)` of open batch', 'onnx', 'onnxruntime')
@each_model()
def test_onnx_of_open_batch(name, tmp_path):
    model = small(name)
    torch.onnx.export(
        model, (images(2),), tmp_path / 'model.onnx', dynamo=True, dynamic_shapes=OPEN_BATCH, verbose=False)
    check_alone('onnx', tmp_path / 'model.onnx', model, draw(*((b, 3, 64, 64) for b in (1, 2, 5))))


@pytest.mark.slow
@pytest.mark.item('`torch.onnx.export(dynamo=True)` of open batch, height and width, at three image sizes', 'onnx',
                  'onnxruntime')
@each_model()
def test_onnx_of_open_size(name, tmp_path):
    model = flexible(name)
    torch.onnx.export(
        model, (torch.randn(2, 3, 192, 224),), tmp_path / 'model.onnx', dynamo=True, dynamic_shapes=OPEN_SIZE,
        verbose=False)
    check_alone('onnx', tmp_path / 'model.onnx', model, draw(*ANY_SIZE))


@pytest.mark.slow
@pytest.mark.item('`torch.onnx.export(dynamo=False)`, the exporter that traces', 'onnx', 'onnxruntime')
@each_model()
def test_onnx_by_tracing(name, tmp_path):
    model = small(name)
    torch.onnx.export(model, (images(1),), tmp_path / 'model.onnx', dynamo=False, opset_version=17)
    check_alone('onnx', tmp_path / 'model.onnx', model, [images(1)])


@pytest.mark.slow
@pytest.mark.item('`openvino.convert_model(model, example_input=...)`, run without torch, at three image sizes', 'openvino')
@pytest.mark.parametrize('img_size', [64, 96, 128])
@each_model()
def test_openvino(name, img_size, tmp_path):
    import openvino
    model, x = small(name, img_size), images(1, img_size)
    openvino.save_model(openvino.convert_model(model, example_input=x), tmp_path / 'model.xml', compress_to_fp16=False)
    check_alone('openvino', tmp_path / 'model.xml', model, [x])


@pytest.mark.slow
@pytest.mark.item('`openvino.convert_model(torch.export.export(model, ...))`', 'openvino')
@each_model()
def test_openvino_of_program(name, tmp_path):
    import openvino
    model, x = small(name), images(1)
    program = torch.export.export(model, (x,))
    openvino.save_model(openvino.convert_model(program), tmp_path / 'model.xml', compress_to_fp16=False)
    check_alone('openvino', tmp_path / 'model.xml', model, [x])


@pytest.mark.slow
@pytest.mark.item('AOTInductor package, run in a process of its own, at three image sizes')
@pytest.mark.parametrize('img_size', [64, 96, 128])
@each_model()
def test_aoti(name, img_size, tmp_path):
    model, x = small(name, img_size), images(1, img_size)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'model.pt2'))
    check_alone('aoti', tmp_path / 'model.pt2', model, [x])


@pytest.mark.slow
@pytest.mark.item('TorchScript by trace and by script, run in a process of its own')
@pytest.mark.parametrize('how', ['trace', 'script'])
@each_model()
def test_torchscript(name, how, tmp_path):
    model, x = small(name), images(2)
    program = torch.jit.trace(model, x) if how == 'trace' else torch.jit.script(model)
    program.save(str(tmp_path / 'model.pt'))
    check_alone('jit', tmp_path / 'model.pt', model, [x])


@pytest.mark.slow
@pytest.mark.item('`torch.compile(fullgraph=True)`: forward and gradients as in eager mode')
@each_model()
def test_compile(name):
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model, x = small(name), images(2).requires_grad_()
        out = (torch.compile(model, fullgraph=True) if compiled else model)(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
