"""The drop-in for the released attention module."""
import pytest
import torch

from ls_vision.compat import AttentionLS, arch_to_model_args


def test_state_dict_keys_of_the_released_module():
    keys = {'qkv.weight', 'proj.weight', 'proj.bias', 'to_dynamic_projection.weight', 'to_dynamic_projection.bias',
            'dual_ln_dp.weight', 'dual_ln_dp.bias', 'dual_ln_full.weight', 'dual_ln_full.bias'}
    assert set(AttentionLS(16).state_dict()) == keys
    bias = {'local_relative_position_bias_table', 'relative_position_index', 'qkv.bias'}
    assert set(AttentionLS(16, qkv_bias=True, rpe=True).state_dict()) == keys | bias
    assert set(AttentionLS(16, dp_rank=0).state_dict()) == {k for k in keys if 'to_dynamic' not in k}


def test_default_arguments():
    module = AttentionLS(16)
    assert (module.num_heads, module.num_global_tokens, module.rank, module.window_size) == (8, 1, 2, 2)
    assert module.qkv.bias is None and module.global_attention == 'post'
    assert AttentionLS(16, qk_scale=0.3).scale == 0.3


def test_grids():
    module = AttentionLS(16, nglo=2).eval()
    square, wide = torch.randn(1, 2 + 36, 16), torch.randn(1, 2 + 40, 16)
    assert torch.equal(module(square), module(square, 6, 6))
    assert torch.equal(module(wide, 5), module(wide, 5, 8))
    with pytest.raises(ValueError, match='40 local tokens do not make a square grid'):
        module(wide)
    with pytest.raises(ValueError, match='40 local tokens do not make a grid of nx 7 x ny 5'):
        module(wide, 7)
    with pytest.raises(ValueError, match='ny is 8 without nx'):
        module(wide, ny=8)


def test_index_buffer_may_be_missing_or_old():
    module = AttentionLS(16, rpe=True)
    state_dict = {k: v for k, v in module.state_dict().items() if k != 'relative_position_index'}
    module.load_state_dict(state_dict)
    module.load_state_dict({**state_dict, 'relative_position_index': torch.zeros(1, 1, dtype=torch.long)})


def test_unused_norm_is_frozen():
    module = AttentionLS(16, dp_rank=0)
    module(torch.randn(1, 17, 16)).sum().backward()
    assert not [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize('arch,message', [
    ('l1,h3,d96,n1,s1,g1,p4,f7,a1,r8', 'absolute position'),
    ('l1,d96,p4,a0_l2,d96,p4,a0', r'patch sizes \[4, 4\]'),
])
def test_arch_strings_that_no_released_model_has(arch, message):
    with pytest.raises(ValueError, match=message):
        arch_to_model_args(arch)
