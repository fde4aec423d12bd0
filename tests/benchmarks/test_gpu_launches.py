"""Kernels and copies that are counted without a GPU."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))
import gpu_kernels
import gpu_launches
import pytest


def test_swin_is_what_a_profile_shows():
    """24 blocks: its operations are PyTorch's own, of which PyTorch's dispatcher shows each."""
    row = gpu_launches.count('swin_small_patch4_window7_224', 2, 224)
    assert (row.inference, row.step, row.copied_forward, row.copied_backward) == (598, 1654, 0, 0)


def test_operators_are_opened_and_copy_little():
    row = gpu_launches.count('vil_ls_medium_linear', 64, 224)
    layers = 22
    for kernel in ('query_gradient', 'key_gradient', 'additional_gradient', 'bias_gradient'):
        assert row.kernels[f'long_short_attention_backward: Triton {kernel}'] == layers
    assert row.step <= 1654 and gpu_launches.count('vil_ls_medium', 64, 224).step <= 1654  # those of Swin-S
    tokens = 64 * 56 ** 2 * 96 * 2  # bytes of the keys of one layer in the first stage
    assert row.copied_forward == 0 and row.copied_backward < tokens / 2  # by all layers


@pytest.mark.parametrize('script,args,message', [
    (gpu_launches, ['vil_ls_huge'], "unknown model 'vil_ls_huge'"),
    (gpu_kernels, ['--widths', '32', '-3'], '--widths -3: expected 1 to 128'),
    (gpu_kernels, ['--windows', '51'], '--windows 51: expected 1 to 50'),
])
def test_wrong_input_is_one_line(script, args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['script', *args])
    with pytest.raises(SystemExit):
        script.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
