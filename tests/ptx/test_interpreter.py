"""The interpreter on kernels of a few lines, written by hand."""
import numpy as np
import pytest
import torch

from ptx.arithmetic import OPERATIONS
from ptx.instructions import UnknownInstruction
from ptx.interpreter import Kernel
from ptx.memory import DataRace, EarlyAccess, Fault, GlobalMemory, Misaligned, OutOfBounds, UnwrittenRead

MODULE = """
.version 8.0
.target sm_80
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 64
{{
    .reg .pred     %p<9>;
    .reg .b16     %rs<9>;
    .reg .b32     %r<9>;
    .reg .b64     %rd<9>;
    ld.param.b64     %rd1, [kernel_param_0];  // the tensor
    mov.u32     %r1, %tid.x;
    shl.b32     %r2, %r1, 2;             // the thread's place in shared memory
    xor.b32     %r3, %r2, 128;           // that of a thread of the other warp
    mad.wide.u32     %rd2, %r1, 4, %rd1;      // the thread's place in the tensor
{body}
    ret;
}}
"""
COPY = 'cp.async.ca.shared.global [%r2], [%rd2], 4;'


def run(body, tensor=None, programs=1):
    """Runs a kernel of two warps with 256 bytes of shared memory -> the tensor of 64 numbers afterwards."""
    tensor = np.zeros(64, np.uint32) if tensor is None else tensor
    memory = GlobalMemory([tensor.view(np.uint8)])
    Kernel(MODULE.format(body=body)).run({'kernel_param_0': memory.addresses[0]}, memory, programs, 64, 256)
    return memory.storage(0).view(tensor.dtype)


def test_names_unknown_instructions():
    with pytest.raises(UnknownInstruction, match=r'atom\.global\.add\.u32 %r4, \[%rd2\], 1; fence\.sc\.cta$'):
        run('atom.global.add.u32 %r4, [%rd2], 1; add.s32 %r4, %r1, 1; fence.sc.cta;')


def test_refuses_text_that_is_no_ptx():
    with pytest.raises(ValueError, match=r'expected statements of PTX, got .\+ 3'):
        run('add.s32 %r4, %r1, 1; + 3 ;')


@pytest.mark.parametrize('instruction,expected', [
    ('sub.s32 %r4, %r1, 3', lambda i: i - 3),
    ('div.s32 %r4, -7, 2', -3),
    ('rem.s32 %r4, -7, 2', -1),
    ('mul.hi.u32 %r4, %r1, 1431655766', lambda i: i // 3),
    ('mul.hi.s32 %r4, -5, 0x40000000', -2),
    ('cvt.u16.u32 %rs1, %r1; mul.hi.u16 %rs2, %rs1, 21846; cvt.u32.u16 %r4, %rs2', lambda i: i // 3),
    ('bfe.u32 %r4, 0xABCD, 4, 8', 0xBC),
    ('bfe.s32 %r4, 0xABCD, 4, 8', 0xBC - 0x100),
    ('shr.s32 %r4, -8, 1', -4),
    ('shl.b32 %r4, 1, 32', 0),
    ('mad.lo.s32 %r4, %r1, %r1, 5', lambda i: i * i + 5),
    ('setp.lt.u32 %p1, -1, 5; selp.b32 %r4, 1, 2, %p1', 2),
    ('setp.lt.s32 %p1, -1, 5; selp.b32 %r4, 1, 2, %p1', 1),
    ('mov.b32 {%rs1, %rs2}, 0x10002; mov.b32 %r4, {%rs2, %rs1}', 0x20001),
    ('mov.b32 {_, %rs2}, 0xFFFF0000; cvt.s32.s16 %r4, %rs2', -1),
    ('shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1', lambda i: i ^ 1),
    ('shfl.sync.idx.b32 %r4, %r1, 5, 31, -1', lambda i: i // 32 * 32 + 5),
    ('mov.b32 %r4, 0; setp.lt.s32 %p1, %r1, 9; @!%p1 mov.b32 %r4, 7', lambda i: np.where(i < 9, 0, 7)),
    ('setp.nan.f32 %p1, 0f7FC00000, 0f3F800000; selp.b32 %r4, 1, 2, %p1', 1),
    ('max.f32 %r4, 0f7FC00000, 0f3F800000', 0x3F800000),
    ('max.NaN.f32 %r5, 0f7FC00000, 0f3F800000; setp.num.f32 %p1, %r5, %r5; selp.b32 %r4, 1, 2, %p1', 2),
    ('ex2.approx.ftz.f32 %r4, 0fC3010000', 0),  # 2 ** -129 is subnormal
])
def test_instructions(instruction, expected):
    thread = np.arange(64)
    expected = expected(thread) if callable(expected) else expected
    result = run(f'{instruction}; st.global.b32 [%rd2], %r4;')
    np.testing.assert_array_equal(result.view(np.int32), np.broadcast_to(expected, 64))


@pytest.mark.parametrize('name', ['bfloat16', 'float16'])
def test_rounds_as_torch_does(name):
    x = torch.cat([torch.randn(1000), torch.tensor([1 + 2. ** -8, 1 + 3 * 2. ** -8, float('inf'), float('nan'), 0.])])
    short = {'bfloat16': 'bf16', 'float16': 'f16'}[name]
    bits = OPERATIONS[f'cvt.rn.{short}.f32'].function(x.numpy())
    torch.testing.assert_close(
        torch.from_numpy(bits.view(np.int16)).view(getattr(torch, name)), x.to(getattr(torch, name)), rtol=0, atol=0,
        equal_nan=True)


def test_multiplies_matrices():
    """a (16, 16) by b (16, 8) of float16 from shared memory; b is read from its rows, transposed."""
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-9, 9, (16, n)).astype(np.float16) for n in (16, 8))
    tensor = np.concatenate([a.ravel(), b.ravel(), np.zeros(128, np.float16)]).view(np.uint32)
    memory = GlobalMemory([tensor.view(np.uint8)])
    kernel = Kernel(MODULE.replace('%r<9>', '%r<99>').format(body="""
        shl.b32 %r4, %r1, 4; mad.wide.u32 %rd3, %r1, 16, %rd1;
        cp.async.cg.shared.global [%r4], [%rd3], 16; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
        and.b32 %r5, %r1, 15; shl.b32 %r6, %r5, 5; bfe.u32 %r7, %r1, 4, 1; mad.lo.s32 %r8, %r7, 16, %r6;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r8];
        shl.b32 %r9, %r5, 4;
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r14, %r15}, [%r9+512];
        mov.b32 %r20, 0f00000000;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r30, %r31, %r32, %r33}, {%r10, %r11, %r12, %r13},
            {%r14, %r15}, {%r20, %r20, %r20, %r20};
        and.b32 %r40, %r1, 31; bfe.u32 %r41, %r40, 2, 3; and.b32 %r42, %r40, 3; shl.b32 %r43, %r42, 1;
        mad.lo.s32 %r44, %r41, 8, %r43; mad.wide.u32 %rd4, %r44, 4, %rd1; setp.lt.u32 %p1, %r1, 32;
        @%p1 st.global.v2.b32 [%rd4], {%r30, %r31};
        @%p1 st.global.v2.b32 [%rd4+256], {%r32, %r33};
        """))
    kernel.run({'kernel_param_0': memory.addresses[0]}, memory, 1, 64, 1024)
    result = memory.storage(0).view(np.float32)[:128].reshape(16, 8)
    np.testing.assert_array_equal(result, a.astype(np.float32) @ b.astype(np.float32))


def test_threads_branch_apart_and_meet():
    """Thread i counts to i, but for those of the second warp, which count to 5."""
    result = run("""
        mov.b32 %r4, 0; setp.lt.u32 %p1, %r1, 32; mov.b32 %r5, 5; @!%p1 bra $second; mov.b32 %r5, %r1;
        $second: setp.ge.s32 %p2, %r4, %r5; @%p2 bra $end; add.s32 %r4, %r4, 1; bra.uni $second;
        $end: bar.sync 0; st.global.b32 [%rd2], %r4;""")
    np.testing.assert_array_equal(result, np.where(np.arange(64) < 32, np.arange(64), 5))


def test_barrier_in_a_branch():
    with pytest.raises(Fault, match='only some threads of a program'):
        run('setp.lt.u32 %p1, %r1, 32; @!%p1 bra $end; bar.sync 0; $end: mov.b32 %r4, 0;')


def test_register_that_nothing_wrote():
    with pytest.raises(Fault, match='reads %r7'):
        run('add.s32 %r4, %r7, 1;')


WRITE, READ, WRITE_OTHER, READ_OTHER, BARRIER = (
    'st.shared.b32 [%r2], %r1;', 'ld.shared.b32 %r4, [%r2];', 'st.shared.b32 [%r3], %r1;', 'ld.shared.b32 %r4, [%r3];',
    'bar.sync 0;')
BOTH_READ = f'{WRITE} {BARRIER} mov.b32 %r5, 0; ld.shared.b32 %r4, [%r5];'


@pytest.mark.parametrize('body', [
    f'{WRITE} {READ_OTHER}',
    f'{WRITE} {BARRIER} {READ} {WRITE_OTHER}',
    f'{WRITE} {WRITE_OTHER}',
    'mov.b32 %r5, 0; st.shared.b32 [%r5], %r1;',  # all threads their own number
    f'{BOTH_READ} setp.eq.s32 %p1, %r1, 0; @%p1 st.shared.b32 [%r5], %r1;',
    f'{BOTH_READ} setp.eq.s32 %p1, %r1, 63; @%p1 st.shared.b32 [%r5], %r1;',
    f'{COPY} cp.async.commit_group; cp.async.wait_group 0; {READ_OTHER}',
    f'{WRITE} {BARRIER} {READ_OTHER} {COPY}',
])
def test_races(body):
    with pytest.raises(DataRace, match=r'kernel: .* in program 0, thread \d+'):
        run(body)


@pytest.mark.parametrize('body', [
    f'{WRITE} {BARRIER} {READ_OTHER}',
    f'{WRITE} {READ} {WRITE}',
    f'{WRITE} {BARRIER} {READ_OTHER} {BARRIER} {WRITE}',
    f'mov.b32 %r5, 0; st.shared.b32 [%r5], 7; {BARRIER} ld.shared.b32 %r4, [%r5];',  # all threads the same value
    f'{COPY} cp.async.commit_group; cp.async.wait_group 0; {BARRIER} {READ_OTHER}',
])
def test_no_races(body):
    run(body)


@pytest.mark.parametrize('body', [
    f'{COPY} cp.async.commit_group; {READ}',
    f'{COPY} cp.async.wait_group 0; {READ}',  # of no group yet
    f'{COPY} cp.async.commit_group; cp.async.wait_group 1; {READ}',
    f'{COPY} cp.async.commit_group; {BARRIER} {WRITE}',
])
def test_access_before_a_copy_arrives(body):
    with pytest.raises(EarlyAccess):
        run(body)


def test_copies_arrive_group_by_group():
    """The first of two groups, the first warp's, is waited for. Odd threads copy nothing, which makes zeros."""
    thread = np.arange(64, dtype=np.uint32)
    result = run("""
        setp.lt.u32 %p1, %r1, 32; and.b32 %r6, %r1, 1; setp.eq.s32 %p2, %r6, 0; selp.b32 %r5, 4, 0, %p2;
        @%p1 cp.async.ca.shared.global [%r2], [%rd2], 4, %r5; cp.async.commit_group;
        @!%p1 cp.async.ca.shared.global [%r2], [%rd2], 4, %r5; cp.async.commit_group;
        cp.async.wait_group 1; mov.b32 %r4, 7; @%p1 ld.shared.b32 %r4, [%r2]; st.global.b32 [%rd2], %r4;""", thread)
    np.testing.assert_array_equal(result, np.where(thread < 32, np.where(thread % 2 == 0, thread, 0), 7))


@pytest.mark.parametrize('kind,body', [
    (UnwrittenRead, READ),
    (OutOfBounds, 'st.shared.b32 [%r2+4], %r1;'),
    (OutOfBounds, 'st.shared.b32 [%r2+-4], %r1;'),
    (Misaligned, 'st.shared.b32 [%r2+2], %r1;'),
    (Misaligned, 'st.shared.v4.b32 [%r2], {%r1, %r1, %r1, %r1};'),
    (OutOfBounds, 'ld.global.b32 %r4, [%rd2+4];'),
    (OutOfBounds, 'st.global.b32 [%rd2+-4], %r1;'),
    (OutOfBounds, 'ld.global.b32 %r4, [%r2];'),
    (OutOfBounds, 'cp.async.ca.shared.global [%r2], [%rd2+4], 4;'),
    (Misaligned, 'ld.global.b16 %rs1, [%rd1+1];'),
    (Misaligned, 'ld.global.v2.b32 {%r4, %r5}, [%rd2];'),
])
def test_refused_accesses(kind, body):
    with pytest.raises(kind, match='in program 0, thread'):
        run(body)


def test_masked_threads_may_have_any_address():
    run('setp.lt.u32 %p1, %r1, 63; @%p1 ld.global.b32 %r4, [%rd2+4];')


def test_programs_that_write_the_same_place():
    with pytest.raises(DataRace, match='another program'):
        run('st.global.b32 [%rd2], %r1;', programs=2)


def test_program_that_reads_what_another_wrote():
    with pytest.raises(DataRace, match='reads what another program wrote'):
        run("""
            mov.u32 %r4, %ctaid.x; setp.eq.s32 %p1, %r4, 0;
            @%p1 st.global.b32 [%rd2], %r1; ld.global.b32 %r5, [%rd2];""", programs=2)
