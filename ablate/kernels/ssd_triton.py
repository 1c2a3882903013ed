"""Triton kernels of the scan (`ablate.kernels.ssd` has the definition and the legend).

Everything works on chunks of Q = 64 tokens. Forward, three launches:

1. `_dt_kernel`: step sizes after bias and softplus, and the sums of dt A within each chunk, in
   units of log2 and with time last: later kernels read them in one piece and call exp2 alone.
2. `_state_kernel`: walks the chunks of one head in order with the state in registers and writes the
   state that enters each chunk. Short of parallel work it runs twice over segments of the sequence:
   first only their end states, then, started from the states before them, the whole.
3. `_scan_kernel`: one program per chunk and group computes C B^T once and loops over the heads.

Backward, four launches and a sum: `_state_kernel` in reverse over (dy, C) gives the gradient of the
state that leaves each chunk; `_dx_kernel` and `_bc_grad_kernel`, per chunk and group, loop over the
heads, so that the gradients of B C^T, B and C stay in registers and nothing needs atomics (in one
kernel they spill); `_dt_grad_kernel` undoes 1.

Sums over spans of dt A never leave a chunk, which keeps the gradient of dt and A free of the
cancellation of a sum over the whole sequence. Each result is a fixed order of additions: two runs
agree bit for bit.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ablate.kernels.dispatch import define_op
from ablate.kernels.sum_rows_triton import sum_rows
from ablate.kernels.tiles_triton import (
    LOG2E,
    away_from_zero,
    batch_unit,
    before_90,
    contiguous,
    dense_last,
    dense_rows,
    load_tile,
    precision,
    sigmoid,
    starts,
    store_tile,
)

Q = 64
BAND = tl.constexpr(16)  # rows of a product that one warp holds
COLUMNS = 64  # of a state, for one program of a kernel that splits them
ONE = 1
"""Bound of a loop over one head. With a bound that the compiler knows there is no loop, and in what
is left ptxas 12.8 loses descriptors of wgmma's operands, for narrow heads: the launch faults."""


@triton.jit
def _dt_kernel(
    dt_ptr, bias_ptr, A_ptr, dts_ptr, dt_stride_b, length, plane,
    DT_STRIDE_L: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, Q: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr,
):  # fmt: skip
    """dts[0] = dt, dts[1] = log2(e) * sums of dt A within the chunk, dts[2] = the weight with which
    a position enters the state after the chunk, without resets; each (B, H, padded L)."""
    c, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    padded = tl.num_programs(0) * Q
    rows = tl.arange(0, Q)
    heads = tl.program_id(2) * BH + tl.arange(0, BH)
    base = dt_ptr + b * dt_stride_b + (c * Q).to(tl.int64) * DT_STRIDE_L
    mask = (c * Q + rows[:, None] < length) & (heads[None, :] < H)
    dt = tl.load(base + rows[:, None] * DT_STRIDE_L + heads[None, :], mask=mask, other=0.0)
    dt = dt.to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + heads, mask=heads < H, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        # 1 + e loses a small e, so there log(1 + e) = 2 atanh(e / (2 + e)) as a series
        e = tl.exp(tl.minimum(dt, 20.0))
        z = e / (2.0 + e)
        zz = z * z
        series = 2.0 * z * (1.0 + zz * (1.0 / 3.0 + zz * (0.2 + zz / 7.0)))
        dt = tl.where(dt > 20.0, dt, tl.where(e < 0.3, series, tl.log(1.0 + e)))
    dt = tl.where(mask, dt, 0.0)
    rate = tl.load(A_ptr + heads, mask=heads < H, other=0.0).to(tl.float32)
    if LOG_A:
        rate = -tl.exp(rate)
    step = dt * (rate * LOG2E)[None, :]
    cum = tl.cumsum(step, axis=0)
    leaves = tl.exp2(tl.minimum(tl.sum(step, axis=0)[None, :] - cum, 0.0)) * dt
    out = dts_ptr + (b * H + heads[:, None]) * padded + c * Q + rows[None, :]
    tl.store(out, tl.trans(dt), mask=heads[:, None] < H)
    tl.store(out + plane, tl.trans(cum), mask=heads[:, None] < H)
    tl.store(out + 2 * plane.to(tl.int64), tl.trans(leaves), mask=heads[:, None] < H)


@triton.jit
def _state_kernel(
    x_ptr, b_ptr, dts_ptr, doc_ptr, first_ptr, states_ptr, segment_ptr, kept_ptr, last_ptr,
    x_stride_b, b_stride_b, length, plane, n_chunks, per_segment, n_segments,
    UNIT: tl.constexpr, X_STRIDE_L: tl.constexpr, B_STRIDE_L: tl.constexpr,
    H: tl.constexpr, PER_GROUP: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    REVERSE: tl.constexpr, HAS_DOC: tl.constexpr, HAS_FIRST: tl.constexpr, FULL: tl.constexpr,
    PASS: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state before each chunk (REVERSE: the gradient of the state after it), P x N.

    PASS 0: one segment, the whole sequence. PASS 1: the end state of each segment started from
    zero, and what it keeps of a state before it. PASS 2: all, from the results of PASS 1.
    """
    h = tl.program_id(1)
    b = (tl.program_id(2) // n_segments).to(tl.int64)
    segment = tl.program_id(2) % n_segments
    padded = n_chunks * Q
    rows, p = tl.arange(0, Q), tl.arange(0, BP)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    FULL_P: tl.constexpr = P == BP
    FULL_N: tl.constexpr = N % BN == 0
    tile = p[:, None] * N + n[None, :]
    inside = (p[:, None] < P) & (n[None, :] < N)
    x_ptr += b * x_stride_b * UNIT + h * P
    b_ptr += b * b_stride_b * UNIT + (h // PER_GROUP) * N
    dts_ptr += (b * H + h) * padded
    if HAS_DOC:
        doc_ptr += b * length

    state = tl.zeros((BP, BN), tl.float32)
    if HAS_FIRST:
        mine = inside & (segment == 0)
        state += tl.load(first_ptr + (b * H + h) * P * N + tile, mask=mine, other=0.0)
    if PASS == 2:
        for j in range(segment):
            at = (b * H + h) * n_segments + j
            kept = tl.load(kept_ptr + at)
            state = state * kept + tl.load(segment_ptr + at * P * N + tile, mask=inside, other=0.0)
    total = tl.full((), 1.0, tl.float32)
    begin = segment * per_segment
    end = tl.minimum(begin + per_segment, n_chunks)
    for i in tl.range(begin, end, num_stages=STAGES):
        c = n_chunks - 1 - i if REVERSE else i
        start = c * Q
        left = length - start
        wide = start.to(tl.int64)
        # Transposed as it comes: the product then takes what is weighted out of registers.
        xs = x_ptr + wide * X_STRIDE_L + rows[None, :] * X_STRIDE_L + p[:, None]
        if FULL and FULL_P:
            x = tl.load(xs)
        else:
            x = tl.load(xs, mask=(rows[None, :] < left) & (p[:, None] < P), other=0.0)
        m = load_tile(b_ptr + wide * B_STRIDE_L, rows, n, left, N, B_STRIDE_L, FULL, FULL_N)
        keep = tl.exp2(tl.load(dts_ptr + plane + start + Q - 1))
        if HAS_DOC:
            doc_last = tl.load(doc_ptr + tl.minimum(start + Q, length) - 1)
            keep = tl.where(doc_last < start, keep, 0.0)
        if REVERSE:
            weight = tl.exp2(tl.load(dts_ptr + plane + start + rows))
            if HAS_DOC:
                doc = tl.load(doc_ptr + start + rows, mask=rows < left, other=0)
                weight = tl.where(doc < start, weight, 0.0)
        else:
            # Out of one load: a scalar in it would send the product's operand through memory.
            weight = tl.load(dts_ptr + 2 * plane.to(tl.int64) + start + rows)
            if HAS_DOC:
                weight = tl.where(start + rows >= doc_last, weight, 0.0)
        if PASS != 1:
            out = states_ptr + ((b * n_chunks + c) * H + h) * (P * N)
            if FULL_P and FULL_N:
                tl.store(out + tile, state.to(states_ptr.dtype.element_ty))
            else:
                tl.store(out + tile, state.to(states_ptr.dtype.element_ty), mask=inside)
        weighted = (x.to(tl.float32) * weight[None, :]).to(x.dtype)
        state = tl.dot(weighted, m, state * keep, input_precision=PREC)
        total = total * keep
    if PASS == 1:
        at = (b * H + h) * n_segments + segment
        tl.store(segment_ptr + at * P * N + tile, state, mask=inside)
        tl.store(kept_ptr + at, total)
    elif segment == n_segments - 1:
        tl.store(last_ptr + (b * H + h) * P * N + tile, state, mask=inside)


@triton.jit(do_not_specialize=["one"])
def _scan_kernel(
    x_ptr, b_ptr, c_ptr, d_ptr, dts_ptr, doc_ptr, states_ptr, z_ptr, y_ptr, squares_ptr,
    x_stride_b, b_stride_b, c_stride_b, z_stride_b, length, plane, n_chunks, one,
    UNIT: tl.constexpr, X_STRIDE_L: tl.constexpr,
    B_STRIDE_L: tl.constexpr, C_STRIDE_L: tl.constexpr, Z_UNIT: tl.constexpr,
    Z_STRIDE_L: tl.constexpr, GATED: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    D_RANK: tl.constexpr, HAS_DOC: tl.constexpr, FULL: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y of one chunk and HEADS heads of one group. GATED: y silu(z), and the sum of its squares at
    each position."""
    SPLITS: tl.constexpr = H // G // HEADS
    chunk = tl.program_id(0) // SPLITS
    b = (tl.program_id(1) // G).to(tl.int64)
    group = tl.program_id(1) % G
    part = group * SPLITS + tl.program_id(0) % SPLITS
    head = part * HEADS
    padded = n_chunks * Q
    start = chunk * Q
    left = length - start
    wide = start.to(tl.int64)
    rows, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    FULL_P: tl.constexpr = P == BP
    FULL_N: tl.constexpr = N == BN
    b_ptr += b * b_stride_b * UNIT + wide * B_STRIDE_L + group * N
    c_ptr += b * c_stride_b * UNIT + wide * C_STRIDE_L + group * N
    x_ptr += b * x_stride_b * UNIT + wide * X_STRIDE_L
    y_ptr += (b * length + wide) * (H * P)
    dts_ptr += b * H * padded + start
    states_ptr += (b * n_chunks + chunk) * (H * P * N)
    if GATED:
        z_ptr += b * z_stride_b * Z_UNIT + wide * Z_STRIDE_L
        squares = tl.zeros([Q], tl.float32)

    B = load_tile(b_ptr, rows, n, left, N, B_STRIDE_L, FULL, FULL_N)
    C = load_tile(c_ptr, rows, n, left, N, C_STRIDE_L, FULL, FULL_N)
    allowed = rows[:, None] >= rows[None, :]
    if HAS_DOC:
        doc = tl.load(doc_ptr + b * length + start + rows, mask=rows < left, other=0)
        allowed = allowed & (start + rows[None, :] >= doc[:, None])
    # excluded pairs are zeroed here once; the decay below is cut at one, so it is always finite
    CB = tl.where(allowed, tl.dot(C, tl.trans(B), input_precision=PREC), 0.0)
    for h in tl.range(head, head + (one if HEADS == 1 else HEADS), num_stages=STAGES):
        x = load_tile(x_ptr + h * P, rows, p, left, P, X_STRIDE_L, FULL, FULL_P)
        state = load_tile(states_ptr + h * (P * N), p, n, P, N, N, FULL_P, FULL_N)
        dt = tl.load(dts_ptr + h * padded + rows)
        cum = tl.load(dts_ptr + plane + h * padded + rows)
        seen = tl.exp2(cum)
        if HAS_DOC:
            seen = tl.where(doc < start, seen, 0.0)
        y = tl.dot(C, tl.trans(state), input_precision=PREC) * seen[:, None]
        decay = tl.exp2(tl.minimum(cum[:, None] - cum[None, :], 0.0))
        weight = CB * decay * dt[None, :]
        y = tl.dot(weight.to(x.dtype), x, y, input_precision=PREC)
        if D_RANK == 1:
            y += tl.load(d_ptr + h).to(tl.float32) * x.to(tl.float32)
        if D_RANK == 2:
            d = tl.load(d_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)
            y += d[None, :] * x.to(tl.float32)
        if GATED:
            z = load_tile(z_ptr + h * P, rows, p, left, P, Z_STRIDE_L, FULL, FULL_P)
            z = away_from_zero(z.to(tl.float32))
            y *= z * sigmoid(z)
            squares += tl.sum(y * y, axis=1)
        store_tile(y_ptr + h * P, y.to(x.dtype), rows, p, left, P, H * P, FULL, FULL_P)
    if GATED:
        at = (b * length + wide + rows) * (G * SPLITS) + part
        tl.store(squares_ptr + at, squares, mask=rows < left)


@triton.jit(do_not_specialize=["one"])
def _dx_kernel(
    x_ptr, dy_ptr, b_ptr, c_ptr, d_ptr, dts_ptr, doc_ptr, dstates_ptr, dx_ptr,
    parts_ptr, x_stride_b, b_stride_b, c_stride_b, dx_stride_b, length, plane, n_chunks, one,
    UNIT: tl.constexpr, X_STRIDE_L: tl.constexpr,
    B_STRIDE_L: tl.constexpr, C_STRIDE_L: tl.constexpr, DX_UNIT: tl.constexpr,
    DX_STRIDE_L: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    D_RANK: tl.constexpr, HAS_DOC: tl.constexpr, FULL: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx of one chunk and HEADS heads of one group, and parts of the gradients of dt and D.

    Pair matrices are [s, t], source before target. Of the gradients of dt and D it leaves parts:
    (B, H, padded L, 4) of <x, gradient of dt x> from pairs that begin at a position, the same with
    the pair of the position with itself, that from the state, and <x, dy>; then, (BANDS, B, H,
    padded L), what pairs that end at a position contribute, by the band that they begin in. Four in
    one piece are one exchange between threads, and a band is one warp's.

    The pair of a position with itself spans no decay and stays out of the matrix: with fast decay
    it is all that there is, and what the others leave would drown in its rounding.
    """
    BANDS: tl.constexpr = Q // BAND
    SPLITS: tl.constexpr = H // G // HEADS
    chunk = tl.program_id(0) // SPLITS
    b = (tl.program_id(1) // G).to(tl.int64)
    group = tl.program_id(1) % G
    padded = n_chunks * Q
    start = chunk * Q
    left = length - start
    wide = start.to(tl.int64)
    rows, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    FULL_P: tl.constexpr = P == BP
    FULL_N: tl.constexpr = N == BN
    head = group * (H // G) + tl.program_id(0) % SPLITS * HEADS
    b_ptr += b * b_stride_b * UNIT + wide * B_STRIDE_L + group * N
    c_ptr += b * c_stride_b * UNIT + wide * C_STRIDE_L + group * N
    x_ptr += b * x_stride_b * UNIT + wide * X_STRIDE_L
    dy_ptr += (b * length + wide) * (H * P)
    dx_ptr += b * dx_stride_b * DX_UNIT + wide * DX_STRIDE_L
    dts_ptr += b * H * padded + start
    band = tl.arange(0, BANDS)
    ends_ptr = (
        parts_ptr
        + (4 + band[:, None]) * plane.to(tl.int64)
        + b * H * padded
        + start
        + rows[None, :]
    )
    parts_ptr += 4 * (b * H * padded + start)
    dstates_ptr += (b * n_chunks + chunk) * (H * P * N)

    B = load_tile(b_ptr, rows, n, left, N, B_STRIDE_L, FULL, FULL_N)
    C = load_tile(c_ptr, rows, n, left, N, C_STRIDE_L, FULL, FULL_N)
    pairs = tl.dot(B, tl.trans(C), input_precision=PREC)
    itself = tl.sum(tl.where(rows[:, None] == rows[None, :], pairs, 0.0), axis=1)
    allowed = rows[:, None] < rows[None, :]
    if HAS_DOC:
        doc = tl.load(doc_ptr + b * length + start + rows, mask=rows < left, other=0)
        doc_last = tl.load(doc_ptr + b * length + tl.minimum(start + Q, length) - 1)
        allowed = allowed & (start + rows[:, None] >= doc[None, :])
    pairs = tl.where(allowed, pairs, 0.0)
    for h in tl.range(head, head + (one if HEADS == 1 else HEADS), num_stages=STAGES):
        x = load_tile(x_ptr + h * P, rows, p, left, P, X_STRIDE_L, FULL, FULL_P)
        dy = load_tile(dy_ptr + h * P, rows, p, left, P, H * P, FULL, FULL_P)
        dstate = load_tile(dstates_ptr + h * (P * N), p, n, P, N, N, FULL_P, FULL_N)
        dt = tl.load(dts_ptr + h * padded + rows)
        cum = tl.load(dts_ptr + plane + h * padded + rows)
        cum_last = tl.load(dts_ptr + plane + h * padded + Q - 1)
        leaves = tl.exp2(tl.minimum(cum_last - cum, 0.0))
        if HAS_DOC:
            leaves = tl.where(start + rows >= doc_last, leaves, 0.0)
        decay = tl.exp2(tl.minimum(cum[None, :] - cum[:, None], 0.0))
        weight = pairs * decay
        stepped = weight * dt[:, None]

        xdy = tl.dot(x, tl.trans(dy), input_precision=PREC)
        flow = xdy * weight  # one number for both sums, which cancel outside of a pair's span
        begins = tl.sum(flow, axis=1)
        ends = tl.reshape(flow * dt[:, None], (BANDS, BAND, Q))
        tl.store(ends_ptr + h * padded, tl.sum(ends, axis=1))
        x32, dy32 = x.to(tl.float32), dy.to(tl.float32)
        dx = tl.dot(B, tl.trans(dstate), input_precision=PREC)
        leaving = tl.sum(dx * x32, axis=1) * leaves
        within = tl.dot(stepped.to(x.dtype), dy, input_precision=PREC)
        own = tl.sum(x32 * dy32, axis=1)
        four = tl.join(tl.join(begins, leaving), tl.join(begins + itself * own, own))
        at = 4 * (h * padded + rows)[:, None] + tl.arange(0, 4)[None, :]
        tl.store(parts_ptr + at, tl.reshape(four, (Q, 4)))
        same = (itself * dt)[:, None]
        if D_RANK == 1:
            same += tl.load(d_ptr + h).to(tl.float32)
        if D_RANK == 2:
            same += tl.load(d_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
        dx = dx * (leaves * dt)[:, None] + within + same * dy32
        store_tile(dx_ptr + h * P, dx.to(x.dtype), rows, p, left, P, DX_STRIDE_L, FULL, FULL_P)


@triton.jit(do_not_specialize=["one"])
def _bc_grad_kernel(
    x_ptr, dy_ptr, b_ptr, c_ptr, dts_ptr, doc_ptr, states_ptr, dstates_ptr,
    db_ptr, dc_ptr, parts_ptr, through_ptr,
    x_stride_b, b_stride_b, c_stride_b, db_stride_b, length, plane, n_chunks, one,
    UNIT: tl.constexpr, X_STRIDE_L: tl.constexpr,
    B_STRIDE_L: tl.constexpr, C_STRIDE_L: tl.constexpr, DB_UNIT: tl.constexpr,
    DB_STRIDE_L: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    HAS_DOC: tl.constexpr, FULL: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dB and dC of one chunk, group and BN columns of the state; for the gradient of dt, what came
    with these columns to each position (the parts after those of dx) and what they carry through
    the whole chunk, (columns / BN, B, c, H, BP): to be summed over BP."""
    BANDS: tl.constexpr = Q // BAND
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    chunk = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    b = (tl.program_id(1) // G).to(tl.int64)
    group = tl.program_id(1) % G
    padded = n_chunks * Q
    start = chunk * Q
    left = length - start
    wide = start.to(tl.int64)
    rows, p, n = tl.arange(0, Q), tl.arange(0, BP), block * BN + tl.arange(0, BN)
    FULL_P: tl.constexpr = P == BP
    FULL_N: tl.constexpr = N % BN == 0
    PER_GROUP: tl.constexpr = H // G
    b_ptr += b * b_stride_b * UNIT + wide * B_STRIDE_L + group * N
    c_ptr += b * c_stride_b * UNIT + wide * C_STRIDE_L + group * N
    x_ptr += b * x_stride_b * UNIT + wide * X_STRIDE_L
    dy_ptr += (b * length + wide) * (H * P)
    dts_ptr += b * H * padded + start
    parts_ptr += (4 + BANDS + block) * plane.to(tl.int64) + b * H * padded + start
    through_ptr += ((block * (tl.num_programs(1) // G) + b) * n_chunks + chunk) * (H * BP)
    states_ptr += (b * n_chunks + chunk) * (H * P * N)
    dstates_ptr += (b * n_chunks + chunk) * (H * P * N)

    C = load_tile(c_ptr, rows, n, left, N, C_STRIDE_L, FULL, FULL_N)
    if HAS_DOC:
        doc = tl.load(doc_ptr + b * length + start + rows, mask=rows < left, other=0)
        doc_last = tl.load(doc_ptr + b * length + tl.minimum(start + Q, length) - 1)
    allowed = rows[:, None] <= rows[None, :]
    if HAS_DOC:
        allowed = allowed & (start + rows[:, None] >= doc[None, :])
    dpairs = tl.zeros((Q, Q), tl.float32)
    dB = tl.zeros((Q, BN), tl.float32)
    dC = tl.zeros((Q, BN), tl.float32)
    first = group * PER_GROUP
    for h in tl.range(first, first + (one if PER_GROUP == 1 else PER_GROUP), num_stages=STAGES):
        x = load_tile(x_ptr + h * P, rows, p, left, P, X_STRIDE_L, FULL, FULL_P)
        dy = load_tile(dy_ptr + h * P, rows, p, left, P, H * P, FULL, FULL_P)
        state = load_tile(states_ptr + h * (P * N), p, n, P, N, N, FULL_P, FULL_N)
        dstate = load_tile(dstates_ptr + h * (P * N), p, n, P, N, N, FULL_P, FULL_N)
        dt = tl.load(dts_ptr + h * padded + rows)
        cum = tl.load(dts_ptr + plane + h * padded + rows)
        cum_last = tl.load(dts_ptr + plane + h * padded + Q - 1)
        seen = tl.exp2(cum)
        leaves = tl.exp2(tl.minimum(cum_last - cum, 0.0)) * dt
        keep = tl.exp2(cum_last)
        if HAS_DOC:
            seen = tl.where(doc < start, seen, 0.0)
            leaves = tl.where(start + rows >= doc_last, leaves, 0.0)
            keep = tl.where(doc_last < start, keep, 0.0)
        decay = tl.exp2(tl.minimum(cum[None, :] - cum[:, None], 0.0)) * dt[:, None]
        dpairs += tl.dot(x, tl.trans(dy), input_precision=PREC) * decay
        dB += tl.dot(x, dstate, input_precision=PREC) * leaves[:, None]
        dC_h = tl.dot(dy, state, input_precision=PREC) * seen[:, None]
        dC += dC_h
        came = tl.sum(dC_h * C.to(tl.float32), axis=1)
        tl.store(parts_ptr + h * padded + rows, came)
        # <state, dstate> as the trace of a product: elementwise it costs more registers than time
        both = tl.dot(state, tl.trans(dstate), input_precision=PREC)
        passed = tl.sum(tl.where(p[:, None] == p[None, :], both, 0.0), axis=1)
        tl.store(through_ptr + h * BP + p, passed * keep)
    pairs = tl.where(allowed, dpairs, 0.0).to(C.dtype)
    B = load_tile(b_ptr, rows, n, left, N, B_STRIDE_L, FULL, FULL_N)
    dB = tl.dot(pairs, C, dB, input_precision=PREC)
    dC = tl.dot(tl.trans(pairs), B, dC, input_precision=PREC)
    out = b * db_stride_b * DB_UNIT + wide * DB_STRIDE_L + group * N
    store_tile(db_ptr + out, dB.to(B.dtype), rows, n, left, N, DB_STRIDE_L, FULL, FULL_N)
    store_tile(dc_ptr + out, dC.to(B.dtype), rows, n, left, N, DB_STRIDE_L, FULL, FULL_N)


@triton.jit
def _dt_grad_kernel(
    parts_ptr, dts_ptr, through_ptr, A_ptr, ddt_ptr, sums_ptr, ddt_stride_b, length, plane,
    DDT_STRIDE_L: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, Q: tl.constexpr,
    BLOCKS: tl.constexpr, BP: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr,
    LOG_A: tl.constexpr,
):  # fmt: skip
    """Gradient of dt as given, and of A (or log(-A)), bias and D (H,) as sums over the chunk:
    (B * c, 3, H)."""
    BANDS: tl.constexpr = Q // BAND
    plane = plane.to(tl.int64)
    c, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n_chunks = tl.num_programs(0)
    padded = n_chunks * Q
    rows = tl.arange(0, Q)
    heads = tl.program_id(2) * BH + tl.arange(0, BH)
    at = (b * H + heads[:, None]) * padded + c * Q + rows[None, :]
    mask = (heads[:, None] < H) & (rows[None, :] >= 0)
    dt = tl.load(dts_ptr + at, mask=mask, other=0.0)
    ends = tl.zeros((BH, Q), tl.float32)
    for band in tl.static_range(BANDS):
        ends += tl.load(parts_ptr + (4 + band) * plane + at, mask=mask, other=0.0)
    ends -= tl.load(parts_ptr + 4 * at, mask=mask, other=0.0) * dt
    direct = tl.load(parts_ptr + 4 * at + 2, mask=mask, other=0.0)
    leaves = direct * dt
    direct += tl.load(parts_ptr + 4 * at + 1, mask=mask, other=0.0)
    A = tl.load(A_ptr + heads, mask=heads < H, other=0.0).to(tl.float32)
    if LOG_A:
        A = -tl.exp(A)
    passed = tl.zeros((BH,), tl.float32)
    for block in tl.static_range(BLOCKS):
        ends += tl.load(parts_ptr + (4 + BANDS + block) * plane + at, mask=mask, other=0.0)
        through = through_ptr + ((block * tl.num_programs(1) + b) * n_chunks + c) * (H * BP)
        through += heads[:, None] * BP + tl.arange(0, BP)[None, :]
        passed += tl.sum(tl.load(through, mask=heads[:, None] < H, other=0.0), axis=1)
    # a position's dt A lies in every span that begins before it and ends at it or later
    spans = tl.cumsum(ends, axis=1, reverse=True) + (tl.cumsum(leaves, axis=1) - leaves)
    spans += passed[:, None]
    ddt = direct + spans * A[:, None]
    if SOFTPLUS:  # its derivative, 1 - exp(-dt)
        small = dt * (1.0 - dt * (0.5 - dt / 6.0))
        ddt *= tl.where(dt < 0.03, small, 1.0 - tl.exp(-dt))
    valid = mask & (c * Q + rows[None, :] < length)
    ddt = tl.where(valid, ddt, 0.0)
    out = ddt_ptr + b * ddt_stride_b + (c * Q).to(tl.int64) * DDT_STRIDE_L
    out += tl.trans(rows[None, :] * DDT_STRIDE_L + heads[:, None])
    tl.store(out, tl.trans(ddt).to(ddt_ptr.dtype.element_ty), mask=tl.trans(valid))
    sums = sums_ptr + (b * n_chunks + c) * (3 * H) + heads
    dA = tl.sum(tl.where(valid, spans * dt, 0.0), axis=1)
    if LOG_A:
        dA *= A
    tl.store(sums, dA, mask=heads < H)
    tl.store(sums + H, tl.sum(ddt, axis=1), mask=heads < H)
    if HAS_D:
        own = tl.load(parts_ptr + 4 * at + 3, mask=mask, other=0.0)
        tl.store(sums + 2 * H, tl.sum(own, axis=1), mask=heads < H)


# (warps, software-pipelining stages, most registers a thread or None) by kernel and bytes per
# element, for sm_90. A limit lets one more program onto a multiprocessor.
CONFIGS: dict[tuple[str, int], tuple[int, int, int | None]] = {
    ("state", 2): (4, 4, None),
    ("scan", 2): (4, 3, None),
    ("gated_scan", 2): (4, 3, None),
    ("dx", 2): (4, 3, None),
    ("bc_grad", 2): (4, 3, None),
    ("state", 4): (4, 2, None),
    ("scan", 4): (4, 2, None),
    ("gated_scan", 4): (4, 2, None),
    ("dx", 4): (4, 1, None),
    ("bc_grad", 4): (8, 1, None),
}
# states of more than 64 by 128
WIDE: dict[tuple[str, int], tuple[int, int, int | None]] = {
    ("scan", 2): (8, 2, None),
    ("gated_scan", 2): (8, 2, None),
    ("dx", 2): (8, 2, None),
    ("bc_grad", 2): (8, 1, None),
}
# products hold their operands in registers, and less memory is shared
BEFORE_90: dict[tuple[str, int], tuple[int, int, int | None]] = {
    ("state", 2): (4, 3, None),
    ("bc_grad", 2): (8, 2, None),
}
STATE_PROGRAMS = 384  # programs that fill a large GPU; fewer, and the sequence is cut into segments
SCAN_PROGRAMS = 512


def config(kernel: str, size: int, area: int, hopper: bool) -> tuple[int, int, int | None]:
    """An entry of the tables; size: bytes per element, area: of a head's state."""
    key = kernel, size
    if area > 64 * 128 and key in WIDE:
        return WIDE[key]
    return CONFIGS[key] if hopper else BEFORE_90.get(key, CONFIGS[key])


def _options(kernel: str, x: Tensor, n_state: int) -> dict[str, Any]:
    area = _blocks(x.shape[3]) * _blocks(n_state)
    warps, stages, registers = config(kernel, x.element_size(), area, not before_90(x))
    return {"num_warps": warps, "STAGES": stages, "maxnreg": registers}


def _blocks(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _splits(per_group: int, programs: int) -> int:
    """Into how many equal parts the heads of a group go, so that the programs fill the GPU."""
    splits = 1
    while splits < per_group and (per_group % splits or programs * splits < SCAN_PROGRAMS):
        splits += 1
    return splits


def scan_parts(n_heads: int, groups: int, batch: int, length: int) -> int:
    """How many programs of `scan` share the heads of a chunk."""
    return groups * _splits(n_heads // groups, triton.cdiv(length, Q) * batch * groups)


def step_sizes(
    dt: Tensor, A: Tensor, bias: Tensor | None, softplus: bool, log_a: bool = False
) -> Tensor:
    """(3, B, H, padded L): dt, the sums of dt A within chunks in units of log2, and the weights of
    `_dt_kernel`; A may come as log(-A)."""
    b, length, n_heads = dt.shape
    n_chunks = triton.cdiv(length, Q)
    dts = dt.new_empty((3, b, n_heads, n_chunks * Q), dtype=torch.float32)
    block = min(8, triton.next_power_of_2(n_heads))
    _dt_kernel[(n_chunks, b, triton.cdiv(n_heads, block))](
        dt, bias, A, dts, dt.stride(0), length, dts[0].numel(),
        DT_STRIDE_L=dt.stride(1), H=n_heads, BH=block, Q=Q,
        HAS_BIAS=bias is not None, SOFTPLUS=softplus, LOG_A=log_a, num_warps=2,
    )  # fmt: skip
    return dts


def chunk_states(
    x: Tensor, m: Tensor, dts: Tensor, doc: Tensor | None, first: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The state before each chunk (B, c, H, P, N) in x's type and the last one in float32, for
    sources x (B, L, H, P) and maps m (B, L, G, N); in reverse the gradients, from dy and C."""
    b, length, n_heads, head_dim = x.shape
    groups, n_state = m.shape[2:]
    n_chunks = triton.cdiv(length, Q)
    states = x.new_empty((b, n_chunks, n_heads, head_dim, n_state))
    last = x.new_empty((b, n_heads, head_dim, n_state), dtype=torch.float32)
    block_n = min(COLUMNS, _blocks(n_state))
    n_tiles = triton.cdiv(n_state, block_n)
    segments = max(1, min(STATE_PROGRAMS // (n_tiles * n_heads * b), n_chunks // 8, 32))
    per_segment = triton.cdiv(n_chunks, segments)
    segments = triton.cdiv(n_chunks, per_segment)
    ends = kept = None
    if segments > 1:
        ends = last.new_empty((b, n_heads, segments, head_dim, n_state))
        kept = last.new_empty((b, n_heads, segments))
    unit = batch_unit(x, m)
    for number in (0,) if segments == 1 else (1, 2):
        _state_kernel[(n_tiles, n_heads, b * segments)](
            x, m, dts, doc, first, states, ends, kept, last,
            x.stride(0) // unit, m.stride(0) // unit, length, dts[0].numel(), n_chunks,
            per_segment, segments,
            UNIT=unit, X_STRIDE_L=x.stride(1), B_STRIDE_L=m.stride(1),
            H=n_heads, PER_GROUP=n_heads // groups, P=head_dim, N=n_state,
            BP=_blocks(head_dim), BN=block_n, Q=Q, REVERSE=reverse, HAS_DOC=doc is not None,
            HAS_FIRST=first is not None, FULL=length % Q == 0, PASS=number,
            PREC=precision(x.dtype), **_options("state", x, n_state),
        )  # fmt: skip
    return states, last


def scan(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dts: Tensor, doc: Tensor | None,
    states: Tensor, z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, H, P); with a gate z (B, L, I) y silu(z), and its sums of squares (B, L, S) over S
    equal parts of the width (empty without a gate)."""
    b, length, n_heads, head_dim = x.shape
    groups, n_state = B.shape[2:]
    n_chunks = states.shape[1]
    y = x.new_empty((b, length, n_heads, head_dim))
    n_parts = scan_parts(n_heads, groups, b, length)
    splits = n_parts // groups
    squares = x.new_empty(0 if z is None else (b, length, n_parts), dtype=torch.float32)
    gate = x if z is None else z
    unit, z_unit = batch_unit(x, B, C), batch_unit(gate)
    _scan_kernel[(n_chunks * splits, b * groups)](
        x, B, C, D, dts, doc, states, gate, y, squares,
        x.stride(0) // unit, B.stride(0) // unit, C.stride(0) // unit, gate.stride(0) // z_unit,
        length, dts[0].numel(), n_chunks, ONE,
        UNIT=unit, X_STRIDE_L=x.stride(1), B_STRIDE_L=B.stride(1), C_STRIDE_L=C.stride(1),
        Z_UNIT=z_unit, Z_STRIDE_L=gate.stride(1), GATED=z is not None,
        H=n_heads, G=groups, HEADS=n_heads // groups // splits, P=head_dim, N=n_state,
        BP=_blocks(head_dim), BN=_blocks(n_state), Q=Q,
        D_RANK=0 if D is None else D.ndim, HAS_DOC=doc is not None, FULL=length % Q == 0,
        PREC=precision(x.dtype), **_options("scan" if z is None else "gated_scan", x, n_state),
    )  # fmt: skip
    return y, squares


def gradients(
    x: Tensor, dy: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dts: Tensor,
    doc: Tensor | None, states: Tensor, dstates: Tensor, dx: Tensor, dB: Tensor, dC: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes dx, dB and dC, the last two with equal strides; returns of the gradient of dt the
    parts and what passes each chunk."""
    b, length, n_heads, head_dim = x.shape
    groups, n_state = B.shape[2:]
    n_chunks = states.shape[1]
    block_n = min(COLUMNS, _blocks(n_state))
    blocks = triton.cdiv(n_state, block_n)
    parts = dts.new_empty((4 + Q // BAND.value + blocks, *dts.shape[1:]))
    through = dts.new_empty((blocks, b * n_chunks, n_heads, _blocks(head_dim)))
    unit = batch_unit(x, B, C)
    strides = (x.stride(0) // unit, B.stride(0) // unit, C.stride(0) // unit)
    numbers = (length, dts[0].numel(), n_chunks, ONE)
    dx_unit, db_unit = batch_unit(dx), batch_unit(dB)
    constants = {
        "UNIT": unit, "X_STRIDE_L": x.stride(1), "B_STRIDE_L": B.stride(1),
        "C_STRIDE_L": C.stride(1), "H": n_heads, "G": groups, "P": head_dim, "N": n_state,
        "BP": _blocks(head_dim), "BN": _blocks(n_state), "Q": Q, "HAS_DOC": doc is not None,
        "FULL": length % Q == 0, "PREC": precision(x.dtype),
    }  # fmt: skip
    splits = _splits(n_heads // groups, n_chunks * b * groups)
    _dx_kernel[(n_chunks * splits, b * groups)](
        x, dy, B, C, D, dts, doc, dstates, dx, parts, *strides, dx.stride(0) // dx_unit, *numbers,
        **constants, DX_UNIT=dx_unit, DX_STRIDE_L=dx.stride(1),
        HEADS=n_heads // groups // splits,
        D_RANK=0 if D is None else D.ndim, **_options("dx", x, n_state),
    )  # fmt: skip
    options = _options("bc_grad", x, n_state)
    if n_state <= 16:  # 8 warps on float32 tiles this narrow read out of bounds (Triton 3.6)
        options["num_warps"] = 4
    _bc_grad_kernel[(n_chunks * blocks, b * groups)](
        x, dy, B, C, dts, doc, states, dstates, dB, dC, parts, through,
        *strides, dB.stride(0) // db_unit, *numbers,
        **constants | {"BN": block_n}, DB_UNIT=db_unit, DB_STRIDE_L=dB.stride(1), **options,
    )  # fmt: skip
    return parts, through


def step_size_gradients(
    parts: Tensor, through: Tensor, dts: Tensor, A: Tensor, ddt: Tensor, softplus: bool,
    has_d: bool, log_a: bool = False,
) -> Tensor:  # fmt: skip
    """Writes ddt (B, L, H) and returns (3, H): the gradients of A, of the bias and, if has_d, of
    D (H,)."""
    b, length, n_heads = ddt.shape
    blocks, n_chunks = through.shape[0], through.shape[1] // b
    sums = dts.new_empty((b * n_chunks, 3, n_heads))
    block = min(8, triton.next_power_of_2(n_heads))
    _dt_grad_kernel[(n_chunks, b, triton.cdiv(n_heads, block))](
        parts, dts, through, A, ddt, sums, ddt.stride(0), length, dts[0].numel(),
        DDT_STRIDE_L=ddt.stride(1), H=n_heads, BH=block, Q=Q, BLOCKS=blocks, BP=through.shape[3],
        SOFTPLUS=softplus, HAS_D=has_d, LOG_A=log_a, num_warps=2,
    )  # fmt: skip
    return sum_rows(sums.view(b * n_chunks, 3 * n_heads), torch.float32).view(3, n_heads)


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, first: Tensor | None, doc: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x, B, C = dense_rows(x), dense_rows(B), dense_rows(C)
    dts = step_sizes(dense_last(dt), A, dt_bias, softplus)
    states, last = chunk_states(x, B, dts, doc, first, reverse=False)
    return scan(x, B, C, D, dts, doc, states)[0], last, states, dts


def _forward_fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, first: Tensor | None, doc: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    b, length, n_heads, head_dim = x.shape
    n_chunks = (length + Q - 1) // Q
    state = (n_heads, head_dim, B.shape[3])
    return (
        x.new_empty(x.shape),
        x.new_empty((b, *state), dtype=torch.float32),
        x.new_empty((b, n_chunks, *state)),
        x.new_empty((3, b, n_heads, n_chunks * Q), dtype=torch.float32),
    )


def _backward(
    dy: Tensor, dlast: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, doc: Tensor | None, states: Tensor, dts: Tensor, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x, B, C, dy = dense_rows(x), dense_rows(B), dense_rows(C), dy.contiguous()
    dlast = contiguous(dlast)
    dstates, dfirst = chunk_states(dy, C, dts, doc, dlast, reverse=True)
    dx, dB, dC = (v.new_empty(v.shape) for v in (x, B, C))
    parts, through = gradients(x, dy, B, C, D, dts, doc, states, dstates, dx, dB, dC)
    ddt = dt.new_empty(dt.shape)
    sums = step_size_gradients(parts, through, dts, A, ddt, softplus, D is not None and D.ndim == 1)
    return dx, ddt, dB, dC, sums, skip_gradient(x, dy, D), dfirst


def skip_gradient(x: Tensor, dy: Tensor, D: Tensor | None) -> Tensor:
    """The gradient of D (H, P); empty for D (H,), whose is among the sums of
    `step_size_gradients`, and without D."""
    if D is None or D.ndim == 1:
        return x.new_empty(0, dtype=torch.float32)
    return torch.einsum("blhp,blhp->hp", x.float(), dy.float())


def _backward_fake(
    dy: Tensor, dlast: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, doc: Tensor | None, states: Tensor, dts: Tensor, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    b, _, n_heads, head_dim = x.shape
    return (
        x.new_empty(x.shape),
        dt.new_empty(dt.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        dts.new_empty((3, n_heads)),
        dts.new_empty(0) if D is None or D.ndim == 1 else dts.new_empty(D.shape),
        dts.new_empty((b, n_heads, head_dim, B.shape[3])),
    )


_forward_op = define_op(
    "ssd_forward(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
    "Tensor? first, Tensor? doc, bool softplus) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    several=True,
)
_backward_op = define_op(
    "ssd_backward(Tensor dy, Tensor? dlast, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? doc, Tensor states, Tensor dts, bool softplus) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    several=True,
)


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        dt_bias: Tensor | None, first: Tensor | None, doc: Tensor | None, softplus: bool,
        return_last: bool,
    ) -> Any:  # fmt: skip
        y, last, states, dts = _forward_op(x, dt, A, B, C, D, dt_bias, first, doc, softplus)
        ctx.save_for_backward(x, dt, A, B, C, D, doc, states, dts)
        ctx.softplus = softplus
        ctx.bias_dtype = None if dt_bias is None else dt_bias.dtype
        ctx.first_dtype = None if first is None else first.dtype
        return (y, last) if return_last else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, dt, A, B, C, D, doc, states, dts = ctx.saved_tensors
        dlast = grads[1] if len(grads) > 1 else None
        dx, ddt, dB, dC, sums, dD, dfirst = _backward_op(
            grads[0], dlast, x, dt, A, B, C, D, doc, states, dts, ctx.softplus
        )
        return (
            dx,
            ddt,
            sums[0].to(A.dtype),
            dB,
            dC,
            None if D is None else (sums[2] if D.ndim == 1 else dD).to(D.dtype),
            None if ctx.bias_dtype is None else sums[1].to(ctx.bias_dtype),
            None if ctx.first_dtype is None else dfirst.to(ctx.first_dtype),
            None,
            None,
            None,
        )


def ssd_triton(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None = None,
    *,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state_BHPN: Tensor | None = None,
    return_final_state: bool = False,
    doc_start_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ablate.kernels.ssd` on a GPU; x, B and C share one type, states between chunks keep it."""
    out: Tensor | tuple[Tensor, Tensor] = _SSD.apply(
        x_BLHP,
        dt_BLH,
        A_H.contiguous(),
        B_BLGN.to(x_BLHP.dtype),
        C_BLGN.to(x_BLHP.dtype),
        *map(contiguous, (D_H, dt_bias_H, initial_state_BHPN)),
        starts(doc_start_BL),
        dt_softplus,
        return_final_state,
    )
    return out
