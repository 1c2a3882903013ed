"""Products for Hopper that leave their tiles through an epilogue of more than a rounding.

1. `gelu_kernel`: pre = x w_in^T, rounded, and gelu of the rounded numbers; both are stored.
2. `gelu_backward_kernel`: dy w_out, rounded, times gelu'(pre), which the epilogue reads.
3. `swiglu_kernel` and `swiglu_backward_kernel`: the same for SwiGLU, of which a tile of the first
   has 64 columns of the gate and the 64 of the value that belong to them.
4. `gate_kernel`: dout w, rounded: the gradient of y = x silu(z), which with z and y becomes those
   of x and z (`norm_triton.gate_backward_kernel`).

With K of some hundred, as here, a tile's epilogue takes half as long as its product. So one program
a multiprocessor walks its tiles in three parts that run beside each other: a warp loads, and two
consumers, of four warps each, take tiles in turn. While one is in its epilogue the other has the
tensor cores. Tiles come and go by tensor maps (TMA), made on the host, which need no scratch
memory, count in 64 bits, give zeros outside and drop what is stored there: M, N and K need not be
multiples of a tile. Additions go in the order of K, so that runs agree bit for bit.

This is written in Gluon, where the parts of a program, shared memory and barriers are the author's
and not the compiler's. With M = 32768, D = 768 and H = 3072 on an H200 the first two take 0.272 and
0.284 ms; in plain Triton it was 0.294 and 0.331 at best, and the separate form takes 0.312 and
0.386. The gate with D = 768 and an inner width of 1536 takes 0.187 ms, and apart 0.247. Gluon lies
in `triton.experimental` and may change with any version: `ablate.kernels.hopper` alone imports this
file, for the versions it was tested with; for all others there are separate forms.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ablate.kernels.tiles_triton import multiprocessors

ROWS, COLUMNS, DEPTH = 128, 128, 64  # of a tile, and of a step of its product
# Steps of operands in shared memory, of which this takes 224 of 227 KiB, and pieces of a tile that
# an epilogue takes one after the other: with one it has no registers left, with four more barriers.
STAGES, PIECES = 5, 2
GATE_DEPTH, GATE_STAGES = 32, 6  # where an epilogue needs twice the memory
FORWARD_GROUP, BACKWARD_GROUP = 1, 8  # rows of tiles that are walked column by column
GELU, SWIGLU = gl.constexpr(0), gl.constexpr(1)
GELU_GRADIENT, SWIGLU_GRADIENT, GATE_GRADIENT = gl.constexpr(2), gl.constexpr(3), gl.constexpr(4)
REGISTERS = 168  # a thread before consumers take 232 of them, and the loader keeps 40

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its names in Triton 3.6 and 3.7


@gluon.jit
def _reciprocal(x):
    """`tiles_triton.reciprocal`."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _normal(x):
    """`gelu_triton._normal`, operation by operation: the two forms must agree bit for bit."""
    z = gl.abs(x) * 0.7071067811865476
    t = _reciprocal(1.0 + 0.3275911 * z)
    tail = 1.061405429 * t - 1.453152027
    tail = tail * t + 1.421413741
    tail = tail * t - 0.284496736
    tail = tail * t + 0.254829592
    bell = gl.exp2(z * z * -1.4426950408889634)
    half = 0.5 * t * tail * bell
    return gl.where(x < 0, half, 1.0 - half), bell


@gluon.jit
def _gate_gradients(dy, y, z, dsquares):
    """Of z and x, as `norm_triton.gate_backward_kernel` has them."""
    z = gl.where(gl.abs(z) < 7.888609052210118e-31, 7.888609052210118e-31, z)
    dy += 2.0 * dsquares * y
    gate = _sigmoid(z)
    return dy * (y * _reciprocal(z) + y * (1.0 - gate)), dy * (z * gate)


@gluon.jit
def _sigmoid(x):
    return _reciprocal(1.0 + gl.exp2(x * -1.4426950408889634))


@gluon.jit
def _swiglu_gradients(dy, gate, value):
    """Of gate and value, as `swiglu_triton.backward_kernel` has them."""
    opened = _sigmoid(gate)
    silu = gate * opened
    return dy * value * (opened + (silu - silu * opened)), dy * silu


@gluon.jit
def _round(x, dtype: gl.constexpr):
    """float32 to 16 bits by pairs: LLVM would round numbers that are wanted back one by one, at a
    quarter of the rate."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def _place(tile, M, N: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """First row and column of a tile."""
    columns: gl.constexpr = (N + BN - 1) // BN
    first = tile // (GROUP * columns) * GROUP
    height = gl.minimum(gl.cdiv(M, BM) - first, GROUP)
    at = tile % (GROUP * columns)
    return (first + at % height) * BM, at // height * BN


@gluon.jit
def _halves(acc, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """The left and the right columns of a product. Each thread has its share of both, so that
    nothing moves."""
    return gl.split(gl.permute(gl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@gluon.jit
def _load(
    left, right, a, b, ready, empty, in_desc, more_desc, out, pre_ready, pre_empty, M,
    N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    GROUP: gl.constexpr, PIECES: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """The part that loads: operands of all tiles, step by step, as far ahead as there are stages,
    which is into the next tile while the last one's product is still under way."""
    stages: gl.constexpr = b.type.shape[0]
    piece: gl.constexpr = BN // PIECES
    own: gl.constexpr = out.type.shape[0] // 2  # pieces in shared memory, of a consumer
    width: gl.constexpr = BN // 2 if KIND == SWIGLU else BN
    tiles = gl.cdiv(M, BM) * gl.cdiv(N, width)
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = _place(tile, M, N, BM, width, GROUP)
        for k in range(0, K, BK):
            stage = step % stages
            mbarrier.wait(empty.index(stage), (step // stages & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, left.block_type.nbytes + BN * BK * 2)
            tma.async_copy_global_to_shared(left, [row, k], bar, a.index(stage))
            if KIND == GELU:
                tma.async_copy_global_to_shared(right, [column, k], bar, b.index(stage))
            elif KIND == SWIGLU:
                upper = b.index(stage).slice(0, width)
                lower = b.index(stage).slice(width, width)
                tma.async_copy_global_to_shared(right, [column, k], bar, upper)
                tma.async_copy_global_to_shared(in_desc, [column, k], bar, lower)
            else:
                tma.async_copy_global_to_shared(right, [k, column], bar, b.index(stage))
            step += 1
            if KIND >= GELU_GRADIENT:  # noqa: SIM102
                # Amid the operands: by then the consumer's last epilogue is over, whose results lay
                # where pre comes to lie, and there is half a product left for it to come.
                if k == (K + BK - 1) // BK // 2 * BK:
                    who = turn % 2
                    parity = turn // 2 & 1
                    mbarrier.wait(pre_empty.index(who), parity ^ 1)
                    bar = pre_ready.index(who)
                    mbarrier.expect(bar, own * in_desc.block_type.nbytes)
                    for i in gl.static_range(PIECES):
                        at = [row, column + i * piece]
                        tma.async_copy_global_to_shared(in_desc, at, bar, out.index(own * who + i))
                        if KIND != GELU_GRADIENT:
                            tma.async_copy_global_to_shared(
                                more_desc, at, bar, out.index(own * who + PIECES + i)
                            )
        turn += 1  # noqa: SIM113


@gluon.jit
def _put(desc, buffer, value, row, column):
    """Stores a piece of a tile by way of shared memory: the fence shows what the threads wrote to
    the engine that copies it, and the barrier is there for all of them to have written."""
    buffer.store(value)
    fence_async_shared()
    _barrier()
    tma.async_copy_shared_to_global(desc, [row, column], buffer)


@gluon.jit
def _consume(
    left, a, b, ready, empty, first_desc, second_desc, third_desc, out, pre_ready, pre_empty,
    order, dsquares_ptr, M, N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, GROUP: gl.constexpr, PIECES: gl.constexpr, KIND: gl.constexpr,
    WHO: gl.constexpr,
):  # fmt: skip
    """A consumer: the program's even tiles for WHO = 0, the odd ones for 1.

    first_desc, second_desc: what the epilogue stores, and third_desc: of SwiGLU act.
    """
    stages: gl.constexpr = b.type.shape[0]
    steps: gl.constexpr = (K + BK - 1) // BK
    piece: gl.constexpr = BN // PIECES
    own: gl.constexpr = WHO * out.type.shape[0] // 2  # its pieces in shared memory begin here
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    width: gl.constexpr = BN // 2 if KIND == SWIGLU else BN
    tiles = gl.cdiv(M, BM) * gl.cdiv(N, width)
    programs = gl.num_programs(0)
    step = WHO * steps
    turn = 0
    for tile in range(gl.program_id(0) + WHO * programs, tiles, 2 * programs):
        row, column = _place(tile, M, N, BM, width, GROUP)
        acc = gl.zeros((BM, BN), gl.float32, layout)
        # The tensor cores for one tile after the other. This also keeps the waits below in step: a
        # barrier tells only odd from even fills of its stage, and none may wait two fills ahead.
        mbarrier.wait(order.index(WHO), (turn & 1) ^ (1 - WHO))
        for k in range(steps):
            stage = step % stages
            mbarrier.wait(ready.index(stage), step // stages & 1)
            operand = b.index(stage)
            if KIND < GELU_GRADIENT:
                operand = operand.permute((1, 0))
            acc = warpgroup_mma(a.index(stage), operand, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            # the product before this one is done with its stage, in all warps
            _barrier()
            mbarrier.arrive(empty.index((step + stages - 1) % stages), count=1, pred=k > 0)
            step += 1
        mbarrier.arrive(order.index(1 - WHO), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        _barrier()
        mbarrier.arrive(empty.index((step + stages - 1) % stages), count=1)
        step += steps  # those of the other consumer
        parts = _halves(acc, BM, BN)
        if KIND == GELU:
            for i in gl.static_range(PIECES):
                rounded = _round(parts[i], left.dtype)
                tma.store_wait(1)  # of the two that are under way the one from this buffer
                _barrier()
                _put(first_desc, out.index(own), rounded, row, column + i * piece)
                u = rounded.to(gl.float32)
                phi, _ = _normal(u)
                tma.store_wait(1)
                _barrier()
                _put(
                    second_desc, out.index(own + 1), (u * phi).to(left.dtype), row,
                    column + i * piece,
                )  # fmt: skip
        elif KIND == SWIGLU:
            gate, value = _round(parts[0], left.dtype), _round(parts[1], left.dtype)
            tma.store_wait(0)  # of the last tile
            _barrier()
            _put(first_desc, out.index(own), gate, row, column)
            _put(second_desc, out.index(own + 1), value, row, column)
            opened = gate.to(gl.float32)
            act = opened * _sigmoid(opened) * value.to(gl.float32)
            tma.store_wait(1)  # the gate, which act takes the place of
            _barrier()
            _put(third_desc, out.index(own), act.to(left.dtype), row, column)
        else:
            if KIND == GATE_GRADIENT:
                lines = row + gl.arange(0, BM, gl.SliceLayout(1, parts[0].type.layout))
                slope = gl.load(dsquares_ptr + lines, mask=lines < M, other=0.0)[:, None]
            mbarrier.wait(pre_ready.index(WHO), turn & 1)
            # Results go where inputs lay: each warp writes over what it has itself read.
            for i in gl.static_range(PIECES):
                buffer = out.index(own + i)
                grad = _round(parts[i], left.dtype).to(gl.float32)
                u = buffer.load(grad.type.layout).to(gl.float32)
                if KIND == GELU_GRADIENT:
                    phi, bell = _normal(u)
                    d_u = grad * (phi + u * bell * 0.3989422804014327)
                else:
                    more = out.index(own + PIECES + i)
                    y = more.load(grad.type.layout).to(gl.float32)
                    if KIND == GATE_GRADIENT:
                        d_u, d_more = _gate_gradients(grad, y, u, slope)
                    else:
                        d_u, d_more = _swiglu_gradients(grad, u, y)
                    _put(second_desc, more, d_more.to(left.dtype), row, column + i * piece)
                _put(first_desc, buffer, d_u.to(left.dtype), row, column + i * piece)
            # the results have left shared memory: what the consumer's next tile reads may come
            tma.store_wait(0)
            _barrier()
            mbarrier.arrive(pre_empty.index(WHO), count=1)
        turn += 1  # noqa: SIM113
    tma.store_wait(0)  # shared memory must outlive what is copied from it


@gluon.jit
def _run(
    left, right, in_desc, more_desc, first_desc, second_desc, third_desc, dsquares_ptr, M,
    N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, PIECES: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Shared memory and barriers, and the three parts.

    ready: a stage's operands have come, counted in bytes; empty: the product has read them.
    order: the other consumer has handed all of its tile's products to the tensor cores.
    pre_ready, of a consumer: what its epilogue reads has come into its pieces of `out`; pre_empty:
    what the epilogue left there has been copied away. GELU and SwiGLU themselves wait for neither.
    """
    a = gl.allocate_shared_memory(left.dtype, [STAGES, BM, BK], left.layout)
    steps: gl.constexpr = [STAGES, BN, BK] if KIND < GELU_GRADIENT else [STAGES, BK, BN]
    b = gl.allocate_shared_memory(left.dtype, steps, right.layout)
    held: gl.constexpr = 4 * PIECES if KIND > GELU_GRADIENT else 4
    out = gl.allocate_shared_memory(left.dtype, [held, BM, BN // PIECES], first_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    pre_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    pre_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(pre_ready.index(i), count=1)
        mbarrier.init(pre_empty.index(i), count=1)
        mbarrier.init(order.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (left, a, b, ready, empty, first_desc, second_desc, third_desc, out,
                        pre_ready, pre_empty, order, dsquares_ptr, M, N, K, BM, BN, BK, GROUP,
                        PIECES, KIND, 0)),
            (_consume, (left, a, b, ready, empty, first_desc, second_desc, third_desc, out,
                        pre_ready, pre_empty, order, dsquares_ptr, M, N, K, BM, BN, BK, GROUP,
                        PIECES, KIND, 1)),
            (_load, (left, right, a, b, ready, empty, in_desc, more_desc, out, pre_ready,
                     pre_empty, M, N, K, BM, BN, BK, GROUP, PIECES, KIND)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@gluon.jit
def gelu_kernel(
    x_desc, w_desc, pre_desc, act_desc, M, N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    PIECES: gl.constexpr,
):  # fmt: skip
    """x (M, K), w (N, K), pre and act (M, N)."""
    _run(
        x_desc, w_desc, pre_desc, pre_desc, pre_desc, act_desc, act_desc, M, M, N, K, BM, BN, BK,
        GROUP, STAGES, PIECES, GELU,
    )  # fmt: skip


@gluon.jit
def gelu_backward_kernel(
    dy_desc, w_desc, pre_desc, d_pre_desc, M, N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    PIECES: gl.constexpr,
):  # fmt: skip
    """dy (M, K), w (K, N), pre and d_pre (M, N)."""
    _run(
        dy_desc, w_desc, pre_desc, pre_desc, d_pre_desc, d_pre_desc, d_pre_desc, M, M, N, K, BM, BN,
        BK, GROUP, STAGES, PIECES, GELU_GRADIENT,
    )  # fmt: skip


@gluon.jit
def swiglu_kernel(
    x_desc, gate_w_desc, value_w_desc, gate_desc, value_desc, act_desc, M, N: gl.constexpr,
    K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """x (M, K), weights (N, K), gate, value and act (M, N)."""
    _run(
        x_desc, gate_w_desc, value_w_desc, value_w_desc, gate_desc, value_desc, act_desc, M, M, N,
        K, BM, BN, BK, GROUP, STAGES, PIECES, SWIGLU,
    )  # fmt: skip


@gluon.jit
def swiglu_backward_kernel(
    dy_desc, w_desc, gate_desc, value_desc, d_gate_desc, d_value_desc, M, N: gl.constexpr,
    K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """dy (M, K), w (K, N), gate and value and their gradients (M, N)."""
    _run(
        dy_desc, w_desc, gate_desc, value_desc, d_gate_desc, d_value_desc, d_value_desc, M, M, N, K,
        BM, BN, BK, GROUP, STAGES, PIECES, SWIGLU_GRADIENT,
    )  # fmt: skip


@gluon.jit
def gate_kernel(
    dout_desc, w_desc, z_desc, y_desc, dz_desc, dx_desc, dsquares_ptr, M, N: gl.constexpr,
    K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """dout (M, K), w (K, N), z, y, dz and dx (M, N), dsquares (M,)."""
    _run(
        dout_desc, w_desc, z_desc, y_desc, dz_desc, dx_desc, dx_desc, dsquares_ptr, M, N, K, BM, BN,
        BK, GROUP, STAGES, PIECES, GATE_GRADIENT,
    )  # fmt: skip


def _dense(v: Tensor) -> Tensor:
    """v contiguous and from a whole 16 bytes on, as a tensor map needs it."""
    v = v.contiguous()
    return v if v.data_ptr() % 16 == 0 else v.clone()


def _described(v: Tensor, rows: int, columns: int) -> TensorDescriptor:
    dtype = gl.bfloat16 if v.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return TensorDescriptor.from_tensor(v, [rows, columns], layout)


def _launch(
    kernel: Any, group: int, left: Tensor, rights: list[Tensor], block: tuple[int, int],
    wide: list[Tensor], *more: Tensor, columns: int = COLUMNS, stages: int = STAGES,
) -> None:  # fmt: skip
    """left (M, K); rights, of which a step takes a `block` each; wide: all that is (M, N), of which
    a tile has `columns`."""
    M, N = wide[0].shape
    depth = min(DEPTH, *block)
    tiles = triton.cdiv(M, ROWS) * triton.cdiv(N, columns)
    kernel[(min(tiles, multiprocessors(left.device)),)](
        _described(left, ROWS, depth), *(_described(v, *block) for v in rights),
        *(_described(v, ROWS, COLUMNS // PIECES) for v in wide), *more, M, N, left.shape[1], ROWS,
        COLUMNS, depth, group, stages, PIECES, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def gelu(x_MD: Tensor, w_in_HD: Tensor) -> tuple[Tensor, Tensor]:
    """x w_in^T and gelu of it, (M, H)."""
    pre = x_MD.new_empty(x_MD.shape[0], w_in_HD.shape[0])
    act = torch.empty_like(pre)
    block = (COLUMNS, DEPTH)
    _launch(gelu_kernel, FORWARD_GROUP, _dense(x_MD), [_dense(w_in_HD)], block, [pre, act])
    return pre, act


def gelu_gradients(dy_MO: Tensor, w_out_OH: Tensor, pre_MH: Tensor) -> Tensor:
    """(dy w_out) gelu'(pre), (M, H)."""
    pre = _dense(pre_MH)
    d_pre = torch.empty_like(pre)
    block, w = (DEPTH, COLUMNS), [_dense(w_out_OH)]
    _launch(gelu_backward_kernel, BACKWARD_GROUP, _dense(dy_MO), w, block, [pre, d_pre])
    return d_pre


def swiglu(x_MD: Tensor, w_in_ED: Tensor) -> tuple[Tensor, Tensor]:
    """x w_in^T (M, 2 H), gates first, and silu(gate) value (M, H)."""
    pre = x_MD.new_empty(x_MD.shape[0], w_in_ED.shape[0])
    act = pre.new_empty(pre.shape[0], pre.shape[1] // 2)
    wide = [*pre.chunk(2, 1), act]
    half = COLUMNS // 2
    _launch(
        swiglu_kernel, FORWARD_GROUP, _dense(x_MD), list(_dense(w_in_ED).chunk(2)), (half, DEPTH),
        wide, columns=half,
    )  # fmt: skip
    return pre, act


def swiglu_gradients(dy_MO: Tensor, w_out_OH: Tensor, pre_ME: Tensor) -> Tensor:
    """Of gates and values, (M, 2 H), from that of silu(gate) value = dy w_out."""
    pre = _dense(pre_ME)
    d_pre = torch.empty_like(pre)
    _launch(
        swiglu_backward_kernel, BACKWARD_GROUP, _dense(dy_MO), [_dense(w_out_OH)],
        (GATE_DEPTH, COLUMNS), [*pre.chunk(2, 1), *d_pre.chunk(2, 1)], stages=GATE_STAGES,
    )  # fmt: skip
    return d_pre


def gate_gradients(
    dout_MD: Tensor, w_DI: Tensor, dsquares_M: Tensor, y_MI: Tensor, z_MI: Tensor, dz_MI: Tensor
) -> Tensor:
    """Of y = x silu(z), from the gradients of y w^T and of each row's sum of squares of y: writes
    dz and returns dx. Rows of z and dz lie whole 16 bytes apart and begin at such."""
    y = _dense(y_MI)
    dx = torch.empty_like(y)
    _launch(
        gate_kernel, BACKWARD_GROUP, _dense(dout_MD), [_dense(w_DI)], (GATE_DEPTH, COLUMNS),
        [z_MI, y, dz_MI, dx], dsquares_M, stages=GATE_STAGES,
    )  # fmt: skip
    return dx
