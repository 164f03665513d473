"""What the Hopper W4A16 kernels share: registers full of nibbles become matrix operands, without a detour.

Written in Gluon, Triton's lower level, because a kernel must name its register layouts to get this: a tile
in the order of `w4a16_tiles` is loaded 16 bytes a thread, `lop3` turns each word into four 16-bit pairs (a
nibble in the low mantissa bits of 1024.0 is the number 1024 + q in fp16; of 128.0, 128 + q in bf16), one
subtraction makes each pair q - z exactly, and the pairs already lie where the matrix instruction wants its A
operand: no shuffle, no shared memory, no `cvt`. Prefixes as in `w4a16_triton`: p_ pointer, b_ registers,
o_ offsets, m_ mask, i_ index, s_ stride or shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

# Names of Triton 3.6, and of 3.9.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
copy_block_to_shared = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

# $8 the word, $9 1024 + z twice, $10 -(64 + z) twice. High nibbles of a byte need no shift:
# 1024 + 16 q, divided by 16, is 64 + q, exactly.
_FP16 = gl.constexpr("""
{
.reg .b32 a, b, c, d, u, sixteenth;
mov.b32 sixteenth, 0x2c002c00;
shr.u32 u, $8, 8;
lop3.b32 a, $8, 0x000f000f, 0x64006400, 0xEA;
lop3.b32 b, $8, 0x00f000f0, 0x64006400, 0xEA;
lop3.b32 c, u, 0x000f000f, 0x64006400, 0xEA;
lop3.b32 d, u, 0x00f000f0, 0x64006400, 0xEA;
sub.rn.f16x2 a, a, $9;
fma.rn.f16x2 b, b, sixteenth, $10;
sub.rn.f16x2 c, c, $9;
fma.rn.f16x2 d, d, sixteenth, $10;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}
""")
# bf16 has too few mantissa bits for the trick with 16 q: every nibble is shifted down. $9 is 128 + z twice.
_BF16 = gl.constexpr("""
{
.reg .b32 a, b, c, d, u, v, w;
shr.u32 u, $8, 4;
shr.u32 v, $8, 8;
shr.u32 w, $8, 12;
lop3.b32 a, $8, 0x000f000f, 0x43004300, 0xEA;
lop3.b32 b, u, 0x000f000f, 0x43004300, 0xEA;
lop3.b32 c, v, 0x000f000f, 0x43004300, 0xEA;
lop3.b32 d, w, 0x000f000f, 0x43004300, 0xEA;
sub.rn.bf16x2 a, a, $9;
sub.rn.bf16x2 b, b, $9;
sub.rn.bf16x2 c, c, $9;
sub.rn.bf16x2 d, d, $9;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}
""")
# Programs that run at the same time share weights and tokens in the L2 cache: blocks of this many row tiles
# go through all tokens before the next block starts.
_ROW_TILES_TOGETHER = gl.constexpr(8)
_OPERANDS = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r")


@gluon.constexpr_function
def words_layout(rows, num_warps):
    """Layout of a tile's words ``[rows, 16]``: each thread has four consecutive words of its rows.

    Lane ``4 g + t`` of warp w holds rows ``16 w + g`` and ``16 w + g + 8``: the rows of the A operand.
    """
    warps = [[16 << i, 0] for i in range(num_warps.bit_length() - 1)]
    more = [[16 * num_warps << i, 0] for i in range((rows // (16 * num_warps)).bit_length() - 1)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0], *more], lanes, warps, [], [rows, 16])


@gluon.constexpr_function
def quarter_layout(rows, num_warps):
    """Layout of the words of 32 of a tile's inputs, ``[rows, 4]``: each thread has one word of its rows."""
    warps = [[16 << i, 0] for i in range(num_warps.bit_length() - 1)]
    more = [[16 * num_warps << i, 0] for i in range((rows // (16 * num_warps)).bit_length() - 1)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8, 0], *more], lanes, warps, [], [rows, 4])


@gluon.jit
def launch_dependents():
    """Let the next kernel start as soon as there is room: it may read weights before this one has ended."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_previous():
    """Wait until the previous kernel has ended and its results can be read (and overwritten)."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def zero_constants(b_zero, dtype: gl.constexpr):
    """What `unpack` subtracts, from zero points as int32: pairs of 16-bit numbers, both halves the same."""
    if dtype == gl.float16:
        return 0x64006400 + b_zero * 0x00010001, b_zero * 0x00100010 - 0x2BFF2C00
    else:
        b_constant = 0x43004300 + b_zero * 0x00010001
        return b_constant, b_constant


@gluon.jit
def split_words(b_words):
    """``[rows, 16]`` words -> four tensors ``[rows, 4]``, one for each 32 inputs."""
    even, odd = gl.split(gl.reshape(b_words, (b_words.shape[0], 4, 2, 2)))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def unpack(b_words, b_constants, dtype: gl.constexpr):
    """Words of 32 inputs ``[rows, 4]`` -> q - z as ``[rows, t, p, e, s]``, input k = 16 s + 8 e + 2 t + p."""
    b_words, b_first = gl.broadcast(b_words, gl.expand_dims(b_constants[0], 1))
    b_words, b_second = gl.broadcast(b_words, gl.expand_dims(b_constants[1], 1))
    asm: gl.constexpr = _FP16 if dtype == gl.float16 else _BF16
    q0, q1, q2, q3, q4, q5, q6, q7 = gl.inline_asm_elementwise(
        asm,
        _OPERANDS,
        [b_words, b_first, b_second],
        dtype=(gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16),
        is_pure=True,
        pack=1,
    )
    b_low = gl.join(gl.join(q0, q1), gl.join(q2, q3))
    b_high = gl.join(gl.join(q4, q5), gl.join(q6, q7))
    return gl.join(b_low, b_high).to(dtype, bitcast=True)


@gluon.jit
def operand_32(b_words, b_constants, dtype: gl.constexpr, layout: gl.constexpr):
    """Words of 32 inputs ``[rows, 4]`` -> the operand ``[rows, 32]`` of q - z."""
    b_q = gl.permute(unpack(b_words, b_constants, dtype), (0, 4, 3, 1, 2))
    return gl.convert_layout(gl.reshape(b_q, (b_words.shape[0], 32)), layout)


@gluon.jit
def operand_64(b_first, b_second, b_constants, dtype: gl.constexpr, layout: gl.constexpr):
    """Words of two times 32 inputs -> the operand ``[rows, 64]`` of q - z."""
    b_q = gl.join(unpack(b_first, b_constants, dtype), unpack(b_second, b_constants, dtype))
    b_q = gl.permute(b_q, (0, 5, 4, 3, 1, 2))
    return gl.convert_layout(gl.reshape(b_q, (b_first.shape[0], 64)), layout)


@gluon.jit
def load_groups(p_values, o_rows, first, s_group, m, GROUPS: gl.constexpr, ABSENT: gl.constexpr):
    """The scales or zeros of one tile's groups, ``first`` and following: a tuple of ``[rows]``.

    Values lie group by group, so that the rows of a tile are neighbours. With one group per row
    (GROUPS = 0) they do not belong to a tile, and a placeholder stands for them.
    """
    values = ()
    if p_values is None or GROUPS == 0:
        values += (ABSENT,)
    else:
        for i in gl.static_range(GROUPS):
            p_group = p_values + (first + i).to(gl.int64) * s_group
            values += (gl.load(p_group + o_rows, mask=m, other=0),)
    return values


@gluon.jit
def load_group_words(p_values, o_rows, first, s_group, m, GROUPS: gl.constexpr, ABSENT: gl.constexpr):
    """As `load_groups`, but the 32-bit words that the values are in; see `value_of_word`.

    The assembler packs narrower values with others into one register as soon as they are loaded: it waits for
    them there, however much later they are used.
    """
    values = ()
    if p_values is None or GROUPS == 0:
        values += (ABSENT,)
    else:
        PER_WORD: gl.constexpr = 32 // p_values.dtype.element_ty.primitive_bitwidth
        p_words = p_values.to(gl.pointer_type(gl.int32), bitcast=True)
        for i in gl.static_range(GROUPS):
            p_group = p_words + (first + i).to(gl.int64) * (s_group // PER_WORD)
            values += (gl.load(p_group + o_rows // PER_WORD, mask=m, other=0),)
    return values


@gluon.jit
def value_of_word(b_word, o_rows, dtype: gl.constexpr):
    """A row's value of `load_group_words`; 8-bit integers as int32.

    o_rows may differ from those that were loaded by multiples of 4.
    """
    BITS: gl.constexpr = dtype.primitive_bitwidth
    if BITS == 32:
        return b_word.to(dtype, bitcast=True)
    else:
        b_value = b_word >> o_rows % (32 // BITS) * BITS
        if BITS == 8:
            return b_value & 0xFF
        else:
            return b_value.to(gl.int16).to(dtype, bitcast=True)


@gluon.jit
def store_sum(
    b_acc,
    first_n,
    o_m,
    i_k,
    i_tile,
    p_bias,
    p_out,
    p_partials,
    p_arrived,
    M,
    N,
    SPLIT_K: gl.constexpr,
    OUT: gl.constexpr,
):
    """Store rows o_m of out [M, N] from their transpose; with SPLIT_K > 1 only the last program does.

    Which program that is changes from run to run; what it adds, and in which order, does not. Rows from M on
    are left out. OUT: the layout in which the sum is exchanged, o_m in its slice; large sums need one with
    several neighbours a thread, or else addresses fill the registers.
    """
    o_n = first_n + gl.arange(0, b_acc.shape[0], layout=gl.SliceLayout(1, OUT))
    m_n = o_n < N
    m_out = gl.expand_dims(m_n, 1) & gl.expand_dims(o_m < M, 0)
    o_out = gl.expand_dims(o_n, 1) + gl.expand_dims(o_m.to(gl.int64) * N, 0)
    b_acc = gl.convert_layout(b_acc, OUT)
    is_last = True
    if SPLIT_K > 1:
        size = M.to(gl.int64) * N
        gl.store(p_partials + i_k * size + o_out, b_acc, mask=m_out)
        barrier()
        is_last = gl.atomic_add(p_arrived + i_tile, 1, sem="acq_rel") == SPLIT_K - 1
        barrier()
    if is_last:
        if SPLIT_K > 1:
            b_acc = gl.zeros(b_acc.shape, gl.float32, layout=OUT)
            for i in gl.static_range(SPLIT_K):
                b_acc += gl.load(p_partials + i * size + o_out, mask=m_out, other=0.0, cache_modifier=".cg")
            gl.store(p_arrived + i_tile, 0)
        if p_bias is not None:
            b_bias = gl.load(p_bias + o_n, mask=m_n, other=0.0).to(gl.float32)
            b_acc += gl.expand_dims(b_bias, 1)
        gl.store(p_out + o_out, b_acc.to(p_out.dtype.element_ty), mask=m_out)


@gluon.constexpr_function
def rows_layout():
    """Layout of a warpgroup's out^T ``[64, BM]`` in which each thread has 8 neighbours of a row of out."""
    return gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])


@gluon.jit
def store_rows(b_acc, first_n, first_m, has_product, p_bias, p_slots, p_out, M, N):
    """Store rows first_m ... M - 1 of out [M, N] from their transpose.

    p_slots: which rows of out these are; None: as they are numbered. Only with it there may be no product,
    which means zeros, without a bias.
    """
    ACC: gl.constexpr = b_acc.type.layout
    OUT: gl.constexpr = rows_layout()
    if p_bias is not None:
        o_bias = first_n + gl.arange(0, b_acc.shape[0], layout=gl.SliceLayout(1, ACC))
        m_bias = o_bias < N
        if p_slots is not None:
            m_bias = m_bias & has_product
        b_acc += gl.expand_dims(gl.load(p_bias + o_bias, mask=m_bias, other=0.0).to(gl.float32), 1)
    o_n = first_n + gl.arange(0, b_acc.shape[0], layout=gl.SliceLayout(1, OUT))
    o_m = first_m + gl.arange(0, b_acc.shape[1], layout=gl.SliceLayout(0, OUT))
    m_m = o_m < M
    if p_slots is not None:
        o_m = gl.load(p_slots + o_m, mask=m_m, other=0)
    o_out = gl.expand_dims(o_n, 1) + gl.expand_dims(o_m.to(gl.int64) * N, 0)
    m_out = gl.expand_dims(o_n < N, 1) & gl.expand_dims(m_m, 0)
    gl.store(p_out + o_out, gl.convert_layout(b_acc.to(p_out.dtype.element_ty), OUT), mask=m_out)


@gluon.jit
def place_of_program(n_tiles, m_tiles):
    """The tile of rows and the tile of tokens of a program."""
    i_program = gl.program_id(0)
    block = _ROW_TILES_TOGETHER * m_tiles
    first_n = i_program // block * _ROW_TILES_TOGETHER
    height = gl.minimum(n_tiles - first_n, _ROW_TILES_TOGETHER)
    return first_n + i_program % block % height, i_program % block // height


@gluon.jit
def block_of_expert(p_blocks, i_block, experts):
    """Of a block of `w4a16_routing`: its expert, its first row of x and the one after its last.

    And whether there is a product: not for blocks without rows, nor for experts that are not there.
    """
    # The previous kernel may be the one that made the blocks.
    wait_for_previous()
    p_block = p_blocks + 3 * i_block
    expert = gl.load(p_block)
    first = gl.load(p_block + 1)
    end = gl.load(p_block + 2)
    has_product = (first < end) & (expert < experts)
    return gl.minimum(expert, experts - 1).to(gl.int64), first, end, has_product
