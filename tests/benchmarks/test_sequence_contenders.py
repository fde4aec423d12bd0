"""What attention over sequences is measured against computes the same, and the benchmark runs."""
import runpy
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
sys.path.insert(0, str(BENCHMARKS))

from sequence_contenders import FullAttention1d, TileCopying1d, TileCopyingCausal  # noqa: E402

from ls_vision.layers import CausalLongShortAttention1d, LongShortAttention1d  # noqa: E402


def test_tile_copying_layers_give_the_layers_results():
    causal = CausalLongShortAttention1d(32, 2, window_size=16, chunk_size=4, chunk_rank=2)
    torch.nn.init.normal_(causal.r_w_bias)
    torch.nn.init.normal_(causal.r_r_bias)
    x = torch.randn(2, 64, 32, requires_grad=True)
    for layer, copying in (
            (LongShortAttention1d(32, 2, window_size=8, rank=6), TileCopying1d), (causal, TileCopyingCausal)):
        expected, actual = layer(x), copying(layer)(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        weight = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, x, weight), torch.autograd.grad(expected, x, weight), rtol=1e-3, atol=1e-5)


def test_full_attention_decodes_what_it_computes_at_once():
    module, x = FullAttention1d(16, 2, causal=True), torch.randn(1, 5, 16)
    cache = (torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))
    with torch.no_grad():
        steps = [module.step(x[:, i:i + 1], cache, i) for i in range(5)]
        torch.testing.assert_close(torch.cat(steps, 1), module(x))


def test_benchmark_writes_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [
        'sequence_attention.py', '--lengths', '64', '--decode', '40', '70', '--seconds', '0.01', '--threads', '1',
        '--out', str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(BENCHMARKS / 'sequence_attention.py'), run_name='__main__')
    finally:
        torch.set_num_threads(threads)
    table = next(tmp_path.glob('*.md')).read_text()
    for row in ('| bidirectional | 64 | tiles |', '| causal | 64 | full |', '| decoding | 70 | long-short |'):
        assert row in table


