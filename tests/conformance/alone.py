"""Runs an exported file in a process where neither ls_vision nor timm can be imported.

    python alone.py KIND FILE DATA      KIND: program, jit, aoti, onnx, openvino

DATA is a .npz with images x0, x1, ... ; what the file makes of them is written beside it as y0, y1, ... The last two
kinds run without torch, too.
"""
import importlib.abc
import sys

import numpy as np


class Closed(importlib.abc.MetaPathFinder):
    """Refuses to import packages."""

    def __init__(self, *names):
        self.names = names

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split('.')[0] in self.names:
            raise ImportError(f'{fullname} is not for this process')
        return None


def load(kind, file):
    """A function from an array to an array."""
    if kind == 'onnx':
        import onnxruntime
        session = onnxruntime.InferenceSession(file)
        domains = {node.domain for node in __import__('onnx').load(file).graph.node}
        assert domains <= {'', 'pkg.onnxscript.torch_lib', 'pkg.onnxscript.torch_lib.common'}, domains
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0]
    if kind == 'openvino':
        import openvino
        model = openvino.Core().compile_model(file, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
        return lambda x: model(x)[0]
    import torch
    torch.set_num_threads(2)
    if kind == 'program':
        model = torch.export.load(file).module()
    elif kind == 'jit':
        model = torch.jit.load(file)
    else:
        import torch._inductor
        model = torch._inductor.aoti_load_package(file)

    def run(x):
        with torch.no_grad():
            return model(torch.from_numpy(x)).numpy()
    return run


def main(kind, file, data):
    sys.meta_path.insert(0, Closed('ls_vision', 'timm', *(['torch'] if kind in ('onnx', 'openvino') else [])))
    run = load(kind, file)
    images = np.load(data)
    out = {f'y{i}': run(images[f'x{i}']) for i in range(len(images.files))}
    np.savez(data.replace('.npz', '_out.npz'), **out)


if __name__ == '__main__':
    main(*sys.argv[1:])
