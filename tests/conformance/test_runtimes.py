"""Runtimes that take exported programs: ExecuTorch and Core ML; what PyTorch's own compilers make of them.

Core ML's files are made on every system but run on macOS alone: here the conversion is what is tested.
"""
import pytest
import torch
from exports import draw
from families import each_model, images, small

pytestmark = pytest.mark.slow
NO_COREML = 'coremltools 9.0 converts no program of torch 2.14 (unknown nodes) and no trace with numpy 2.4'


@pytest.mark.item('ExecuTorch: `to_edge_transform_and_lower`, a program of the portable kernels, run', 'executorch')
@each_model()
def test_executorch(name, tmp_path):
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    model, x = small(name), images(1)
    program = to_edge_transform_and_lower(torch.export.export(model, (x,))).to_executorch()
    (tmp_path / 'model.pte').write_bytes(program.buffer)
    method = Runtime.get().load_program(str(tmp_path / 'model.pte')).load_method('forward')
    with torch.no_grad():
        assert (method.execute([x])[0] - model(x)).abs().max() < 1e-4


@pytest.mark.item('ExecuTorch with XNNPACK: partitioned, run', 'executorch')
@each_model()
def test_executorch_xnnpack(name, tmp_path):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    model, x = small(name), images(1)
    program = to_edge_transform_and_lower(
        torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()]).to_executorch()
    (tmp_path / 'model.pte').write_bytes(program.buffer)
    method = Runtime.get().load_program(str(tmp_path / 'model.pte')).load_method('forward')
    with torch.no_grad():
        assert (method.execute([x])[0] - model(x)).abs().max() < 1e-3


@pytest.mark.item('Core ML: `coremltools.convert` of an exported and of a traced program', 'coremltools')
@pytest.mark.parametrize('how', ['export', 'trace'])
@each_model(NO_COREML, vil_ls_tiny=NO_COREML, vil_ls_tiny_linear=NO_COREML, cvt_ls_13=NO_COREML)
def test_coreml(name, how):
    import coremltools as ct
    model, x = small(name), images(1)
    if how == 'export':
        program = ct.convert(torch.export.export(model, (x,)).run_decompositions({}))
    else:
        program = ct.convert(torch.jit.trace(model, x), inputs=[ct.TensorType(shape=x.shape)])
    outputs = program.get_spec().description.output
    assert len(outputs) == 1


@pytest.mark.item('`torch.compile(dynamic=True)`: three batch sizes in one compilation, as eager')
@each_model()
def test_compile_dynamic(name):
    torch.compiler.reset()
    model = small(name)
    compiled = torch.compile(model, dynamic=True)
    with torch.no_grad():
        for x in draw((2, 3, 64, 64), (3, 3, 64, 64), (5, 3, 64, 64)):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
