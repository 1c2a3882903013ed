"""The kernels of `gelu_mlp` for Hopper: GELU and its gradient in the epilogues of products.

1. `forward_kernel`: pre = x w_in^T, rounded, and gelu of the rounded numbers; both are stored.
2. `backward_kernel`: dy w_out, rounded, times gelu'(pre), which the epilogue reads.

With K of some hundred, as here, a tile's epilogue takes half as long as its product. So one program
a multiprocessor walks its tiles in three parts that run beside each other: a warp loads, and two
consumers, of four warps each, take tiles in turn. While one is in its epilogue the other has the
tensor cores. Tiles come and go by tensor maps (TMA), made on the host, which need no scratch
memory, count in 64 bits, give zeros outside and drop what is stored there: M, N and K need not be
multiples of a tile. Additions go in the order of K, so that runs agree bit for bit.

This is written in Gluon, where the parts of a program, shared memory and barriers are the author's
and not the compiler's. With M = 32768, D = 768 and H = 3072 on an H200 the two take 0.272 and 0.284
ms; in plain Triton it was 0.294 and 0.331 at best, and the separate form takes 0.312 and 0.386.
Gluon lies in `triton.experimental` and may change with any version: `gelu_mlp_triton` alone imports
this file, for the versions it was tested with, and has the separate form for all others.
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
STAGES = 5  # steps of operands in shared memory, which holds no sixth: 224 of 227 KiB
FORWARD_GROUP, BACKWARD_GROUP = 1, 8  # rows of tiles that are walked column by column
REGISTERS = 168  # a thread before consumers take 232 of them, and the loader keeps 40

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its names in Triton 3.6 and 3.7


@gluon.jit
def _normal(x):
    """`gelu_triton._normal`, operation by operation: the two forms must agree bit for bit."""
    z = gl.abs(x) * 0.7071067811865476
    t = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + 0.3275911 * z], dtype=gl.float32,
        is_pure=True, pack=1,
    )  # fmt: skip
    tail = 1.061405429 * t - 1.453152027
    tail = tail * t + 1.421413741
    tail = tail * t - 0.284496736
    tail = tail * t + 0.254829592
    bell = gl.exp2(z * z * -1.4426950408889634)
    half = 0.5 * t * tail * bell
    return gl.where(x < 0, half, 1.0 - half), bell


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
    nothing moves; an epilogue of half a tile at a time holds half as many registers."""
    return gl.split(gl.permute(gl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@gluon.jit
def _load(
    left, right, a, b, ready, empty, pre, out, pre_ready, pre_empty, M, N: gl.constexpr,
    K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
    BACKWARD: gl.constexpr,
):  # fmt: skip
    """The part that loads: operands of all tiles, step by step, as far ahead as there are stages,
    which is into the next tile while the last one's product is still under way."""
    stages: gl.constexpr = b.type.shape[0]
    half: gl.constexpr = BN // 2
    tiles = gl.cdiv(M, BM) * gl.cdiv(N, BN)
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = _place(tile, M, N, BM, BN, GROUP)
        for k in range(0, K, BK):
            stage = step % stages
            mbarrier.wait(empty.index(stage), (step // stages & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, left.block_type.nbytes + right.block_type.nbytes)
            tma.async_copy_global_to_shared(left, [row, k], bar, a.index(stage))
            if BACKWARD:
                tma.async_copy_global_to_shared(right, [k, column], bar, b.index(stage))
            else:
                tma.async_copy_global_to_shared(right, [column, k], bar, b.index(stage))
            step += 1
            if BACKWARD:  # noqa: SIM102
                # Amid the operands: by then the consumer's last epilogue is over, whose results lay
                # where pre comes to lie, and there is half a product left for it to come.
                if k == (K + BK - 1) // BK // 2 * BK:
                    who = turn % 2
                    parity = turn // 2 & 1
                    mbarrier.wait(pre_empty.index(who), parity ^ 1)
                    bar = pre_ready.index(who)
                    mbarrier.expect(bar, 2 * pre.block_type.nbytes)
                    for part in gl.static_range(2):
                        tma.async_copy_global_to_shared(
                            pre, [row, column + part * half], bar, out.index(2 * who + part)
                        )
        turn += 1  # noqa: SIM113


@gluon.jit
def _put(desc, buffer, value, row, column):
    """Stores half a tile by way of shared memory: the fence shows what the threads wrote to the
    engine that copies it, and the barrier is there for all of them to have written."""
    buffer.store(value)
    fence_async_shared()
    _barrier()
    tma.async_copy_shared_to_global(desc, [row, column], buffer)


@gluon.jit
def _consume(
    left, a, b, ready, empty, first_desc, second_desc, out, pre_ready, pre_empty, order, M,
    N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    GROUP: gl.constexpr, BACKWARD: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """A consumer: the program's even tiles for WHO = 0, the odd ones for 1.

    first_desc, second_desc: pre and act forwards, d_pre (twice) backwards.
    """
    stages: gl.constexpr = b.type.shape[0]
    steps: gl.constexpr = (K + BK - 1) // BK
    half: gl.constexpr = BN // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    tiles = gl.cdiv(M, BM) * gl.cdiv(N, BN)
    programs = gl.num_programs(0)
    step = WHO * steps
    turn = 0
    for tile in range(gl.program_id(0) + WHO * programs, tiles, 2 * programs):
        row, column = _place(tile, M, N, BM, BN, GROUP)
        acc = gl.zeros((BM, BN), gl.float32, layout)
        # The tensor cores for one tile after the other. This also keeps the waits below in step: a
        # barrier tells only odd from even fills of its stage, and none may wait two fills ahead.
        mbarrier.wait(order.index(WHO), (turn & 1) ^ (1 - WHO))
        for k in range(steps):
            stage = step % stages
            mbarrier.wait(ready.index(stage), step // stages & 1)
            operand = b.index(stage) if BACKWARD else b.index(stage).permute((1, 0))
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
        if BACKWARD:
            mbarrier.wait(pre_ready.index(WHO), turn & 1)
            for i in gl.static_range(2):
                buffer = out.index(2 * WHO + i)
                d_act = _round(parts[i], left.dtype).to(gl.float32)
                u = buffer.load(d_act.type.layout).to(gl.float32)
                phi, bell = _normal(u)
                d_u = d_act * (phi + u * bell * 0.3989422804014327)
                # where pre lay: each warp writes over what it has itself read
                _put(first_desc, buffer, d_u.to(left.dtype), row, column + i * half)
            # the results have left shared memory: pre of this consumer's next tile may come
            tma.store_wait(0)
            _barrier()
            mbarrier.arrive(pre_empty.index(WHO), count=1)
        else:
            for i in gl.static_range(2):
                rounded = _round(parts[i], left.dtype)
                tma.store_wait(1)  # of the two that are under way the one from this buffer
                _barrier()
                _put(first_desc, out.index(2 * WHO), rounded, row, column + i * half)
                u = rounded.to(gl.float32)
                phi, _ = _normal(u)
                tma.store_wait(1)
                _barrier()
                _put(
                    second_desc, out.index(2 * WHO + 1), (u * phi).to(left.dtype), row,
                    column + i * half,
                )  # fmt: skip
        turn += 1  # noqa: SIM113
    tma.store_wait(0)  # shared memory must outlive what is copied from it


@gluon.jit
def _run(
    left, right, pre, first_desc, second_desc, M, N: gl.constexpr, K: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """Shared memory and barriers, and the three parts.

    ready: a stage's operands have come, counted in bytes; empty: the product has read them.
    order: the other consumer has handed all of its tile's products to the tensor cores.
    pre_ready, of a consumer: pre has come into its two halves of `out`; pre_empty: what the
    epilogue left there has been copied away. Forwards nothing waits for either.
    """
    a = gl.allocate_shared_memory(left.dtype, [STAGES, BM, BK], left.layout)
    steps: gl.constexpr = [STAGES, BK, BN] if BACKWARD else [STAGES, BN, BK]
    b = gl.allocate_shared_memory(left.dtype, steps, right.layout)
    out = gl.allocate_shared_memory(left.dtype, [4, BM, BN // 2], first_desc.layout)
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
            (_consume, (left, a, b, ready, empty, first_desc, second_desc, out, pre_ready,
                        pre_empty, order, M, N, K, BM, BN, BK, GROUP, BACKWARD, 0)),
            (_consume, (left, a, b, ready, empty, first_desc, second_desc, out, pre_ready,
                        pre_empty, order, M, N, K, BM, BN, BK, GROUP, BACKWARD, 1)),
            (_load, (left, right, a, b, ready, empty, pre, out, pre_ready, pre_empty, M, N, K,
                     BM, BN, BK, GROUP, BACKWARD)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@gluon.jit
def forward_kernel(
    x_desc, w_desc, pre_desc, act_desc, M, N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """x (M, K), w (N, K), pre and act (M, N)."""
    _run(
        x_desc, w_desc, pre_desc, pre_desc, act_desc, M, N, K, BM, BN, BK, GROUP, STAGES, False
    )  # fmt: skip


@gluon.jit
def backward_kernel(
    dy_desc, w_desc, pre_desc, d_pre_desc, M, N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dy (M, K), w (K, N), pre and d_pre (M, N)."""
    _run(
        dy_desc, w_desc, pre_desc, d_pre_desc, d_pre_desc, M, N, K, BM, BN, BK, GROUP, STAGES, True
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
    kernel: Any, group: int, left: Tensor, right: Tensor, block: tuple[int, int], *wide: Tensor
) -> None:
    """left (M, K); right, of which a step takes a `block`; wide: two of (M, N)."""
    M, N = wide[0].shape
    tiles = triton.cdiv(M, ROWS) * triton.cdiv(N, COLUMNS)
    kernel[(min(tiles, multiprocessors(left.device)),)](
        _described(left, ROWS, DEPTH), _described(right, *block),
        *(_described(v, ROWS, COLUMNS // 2) for v in wide), M, N, left.shape[1], ROWS, COLUMNS,
        DEPTH, group, STAGES, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def forward(x_MD: Tensor, w_in_HD: Tensor) -> tuple[Tensor, Tensor]:
    """x w_in^T and gelu of it, (M, H)."""
    pre = x_MD.new_empty(x_MD.shape[0], w_in_HD.shape[0])
    act = torch.empty_like(pre)
    block = (COLUMNS, DEPTH)
    _launch(forward_kernel, FORWARD_GROUP, _dense(x_MD), _dense(w_in_HD), block, pre, act)
    return pre, act


def backward(dy_MO: Tensor, w_out_OH: Tensor, pre_MH: Tensor) -> Tensor:
    """(dy w_out) gelu'(pre), (M, H)."""
    pre = _dense(pre_MH)
    d_pre = torch.empty_like(pre)
    block = (DEPTH, COLUMNS)
    _launch(backward_kernel, BACKWARD_GROUP, _dense(dy_MO), _dense(w_out_OH), block, pre, d_pre)
    return d_pre
