"""Triton kernels of Mamba-1's scan (`ablate.kernels.selective_scan` has the definition).

No two channels share a decay, so there is no matrix product in it: the scan is a walk over time
with the state in registers, bound by exponentials and by the issue of instructions. A program owns
a few channels with all their states, four states of a channel in a thread (more would leave a GPU
short of threads, fewer would spend more on the sums over states), and takes T tokens at a time:

- What belongs to a channel and a token (softplus, gates, gradients of the inputs) is computed on
  tiles (T, channels) that all threads share out. Tiles become T rows, one in each thread that needs
  it, by one exchange through shared memory; sums over states return the same way.
- Decay and state update are one multiplication, exp2 and a multiply-add for each number of state.
- The backward pass starts each T tokens from a state that the forward pass saved, rebuilds the
  states in registers and walks back. Gradients of B and C, sums over channels, leave a partial sum
  for each program, and a last kernel adds those in order: no atomics, two runs agree bit for bit.

Short of channels, the sequence is cut into segments: a first pass finds what each segment adds to
the state, the second starts from there. What a segment keeps of the state follows from the sum of
its step sizes alone. Decays are multiplied, never divided.
"""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: RUF005  (a kernel's tuples grow by +, it knows no starred expression)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ablate.kernels.dispatch import define_op
from ablate.kernels.sum_rows_triton import sum_rows
from ablate.kernels.tiles_triton import (
    LOG2E,
    contiguous,
    dense_last,
    sigmoid,
    starts,
    wants_gradients,
)


@dataclass(frozen=True)
class Config:
    """Warps of a program, tokens of a tile (4 or 8), and a limit on a thread's registers."""

    warps: int
    tokens: int
    registers: int | None = None


# One table for every architecture: the kernels hold at most 16 kB of shared memory.
FORWARD = Config(warps=4, tokens=8)
BACKWARD = Config(warps=4, tokens=8, registers=168)  # three programs fit on a multiprocessor
BACKWARD_NARROW = Config(warps=4, tokens=4)  # up to 8 states: more channels in a thread
SPAN = 8  # tokens between saved states, a multiple of the tokens of a tile
WARPS = 1536  # that fill a large GPU; with less than half of it the sequence is cut into segments


@triton.jit
def _split(x, ROWS: tl.constexpr, T: tl.constexpr):
    """The columns of (ROWS, T), T 4 or 8."""
    if T == 4:
        even, odd = tl.split(tl.reshape(x, (ROWS, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return x0, x1, x2, x3
    else:
        even, odd = tl.split(tl.reshape(x, (ROWS, 4, 2)))
        x0, x2, x4, x6 = _split(even, ROWS, 4)
        x1, x3, x5, x7 = _split(odd, ROWS, 4)
        return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _split_pair(x, y, ROWS: tl.constexpr, T: tl.constexpr):
    """The columns of two tiles (T, ROWS). Of one alone, Triton would exchange what was loaded and
    repeat in every thread what follows the conversion to float32."""
    x, y = tl.split(tl.permute(tl.join(x, y), (1, 0, 2)))
    return _split(x, ROWS, T), _split(y, ROWS, T)


@triton.jit
def _stack(x, T: tl.constexpr):
    """T tensors of one shape as the last axes (2, 2) or (2, 2, 2) of one."""
    if T == 4:
        return tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))
    else:
        even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
        odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
        return tl.join(even, odd)


@triton.jit
def _sum_last(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums over the last axis of (ROWS, WIDTH), a power of two. By halves, so that the axis comes
    into one thread in one exchange; a reduction across threads would take one for each halving of
    each row."""
    for k in tl.static_range(1, 12):
        if WIDTH >> k > 0:
            a, b = tl.split(tl.reshape(x, (ROWS, WIDTH >> k, 2)))
            x = a + b
    return tl.reshape(x, (ROWS,))


@triton.jit
def _sum_channels(x, BD: tl.constexpr, BN: tl.constexpr, T: tl.constexpr):
    """T times (BD, BN), summed over channels: (T, BN)."""
    stacked = tl.permute(tl.reshape(_stack(x, T), (BD, BN, T)), (2, 1, 0))
    return tl.reshape(_sum_last(stacked, T * BN, BD), (T, BN))


@triton.jit
def _quads(x, BD: tl.constexpr, BN: tl.constexpr):
    """Sums over the four states of a thread: (BD, BN / 4)."""
    return tl.sum(tl.reshape(x, (BD, BN // 4, 4)), axis=2)


@triton.jit
def _sum_states(x, BD: tl.constexpr, BN: tl.constexpr, T: tl.constexpr):
    """T times (BD, BN / 4), summed over states: (T, BD)."""
    stacked = tl.permute(tl.reshape(_stack(x, T), (BD, BN // 4, T)), (2, 0, 1))
    return tl.reshape(_sum_last(stacked, T * BD, BN // 4), (T, BD))


@triton.jit
def _load(ptr, rows, cols, left, width, ROW: tl.constexpr, FULL_T: tl.constexpr,
          FULL_D: tl.constexpr):  # fmt: skip
    """A tile of a row-major matrix, zero outside."""
    ptrs = ptr + rows[:, None] * ROW + cols[None, :]
    if FULL_T and FULL_D:
        x = tl.load(ptrs)
    elif FULL_T:
        x = tl.load(ptrs, mask=cols[None, :] < width, other=0.0)
    else:
        x = tl.load(ptrs, mask=(rows[:, None] < left) & (cols[None, :] < width), other=0.0)
    return x


@triton.jit
def _store(ptr, x, rows, cols, left, width, ROW: tl.constexpr):
    mask = (rows[:, None] < left) & (cols[None, :] < width)
    tl.store(ptr + rows[:, None] * ROW + cols[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _map(ptr, at, n, inside, N: tl.constexpr, FULL: tl.constexpr):
    """Row `at` of B or C."""
    if FULL:
        row = tl.load(ptr + at * N + n)
    else:
        row = tl.load(ptr + at * N + n, mask=inside & (n < N), other=0.0)
    return row[None, :]


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) and its derivative, exact to a few units in the last place everywhere."""
    e = tl.exp(-tl.abs(x))
    # 1 + e would lose a small e: log(1 + e) = 2 atanh(e / (2 + e)), whose argument is at most 1/3
    s = e / (2.0 + e)
    ss = s * s
    series = 1.0 / 7.0 + ss * (1.0 / 9.0 + ss * (1.0 / 11.0 + ss / 13.0))
    series = 1.0 + ss * (1.0 / 3.0 + ss * (0.2 + ss * series))
    return tl.maximum(x, 0.0) + 2.0 * s * series, tl.where(x > 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def _channel(ptr, cols, width, FULL: tl.constexpr):
    """A number of each channel in float32, read at each use: it takes no registers meanwhile."""
    row = tl.load(ptr + cols) if FULL else tl.load(ptr + cols, mask=cols < width, other=0.0)
    return row.to(tl.float32)[None, :]


@triton.jit
def _step_size(raw, bias_ptr, rows, cols, left, width, FULL_T: tl.constexpr, FULL_D: tl.constexpr,
               HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):  # fmt: skip
    """dt after bias and softplus, zero outside, which leaves a state as it is; and its derivative
    by what is in memory."""
    dt = raw.to(tl.float32)
    if HAS_BIAS:
        dt += _channel(bias_ptr, cols, width, FULL_D)
    slope = tl.full(dt.shape, 1.0, tl.float32)
    if SOFTPLUS:
        dt, slope = _softplus(dt)
    if not (FULL_T and FULL_D):
        inside = (rows[:, None] < left) & (cols[None, :] < width)
        dt = tl.where(inside, dt, 0.0)
        slope = tl.where(inside, slope, 0.0)
    return dt, slope


@triton.jit
def _decay(dt, A, doc_ptr, start, j: tl.constexpr, left, HAS_DOC: tl.constexpr):
    """exp(dt A) for A in units of log2; zero where a document begins."""
    exponent = dt[:, None] * A
    if HAS_DOC:
        first = tl.load(doc_ptr + start + j, mask=j < left, other=-1)
        exponent += tl.where(first == start + j, float("-inf"), 0.0)
    return tl.exp2(exponent)


@triton.jit
def _kept(A, sums_ptr, doc_ptr, at, first, last, cols, width, HAS_DOC: tl.constexpr):
    """What a segment of the tokens first to last keeps of the state before it."""
    dt = tl.load(sums_ptr + at * width + cols, mask=cols < width, other=0.0)
    kept = tl.exp2(dt[:, None] * A)
    if HAS_DOC:
        kept = tl.where(tl.load(doc_ptr + last) < first, kept, 0.0)
    return kept


@triton.jit
def _forward_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, first_ptr, doc_ptr,
    y_ptr, saved_ptr, last_ptr, ends_ptr, sums_ptr,
    u_batch, dt_batch, z_batch, length, per_segment, n_segments,
    UNIT: tl.constexpr, U_ROW: tl.constexpr, DT_ROW: tl.constexpr, Z_ROW: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, T: tl.constexpr, SPAN: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_DOC: tl.constexpr, SAVE: tl.constexpr, FULL: tl.constexpr,
    PASS: tl.constexpr,
):  # fmt: skip
    """y, the states before every SPAN tokens (SAVE) and the last one.

    PASS 0: one segment, the whole sequence. PASS 1: what each segment adds to the state, and the
    sum of its step sizes. PASS 2: all, from the results of PASS 1.
    """
    segment = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n, t = tl.arange(0, BN), tl.arange(0, T)
    FULL_D: tl.constexpr = D % BD == 0
    FULL_N: tl.constexpr = N == BN
    inside = (d[:, None] < D) & (n[None, :] < N)
    tile = d[:, None] * N + n[None, :]
    n_spans = tl.cdiv(length, SPAN)
    u_ptr += b * u_batch * UNIT
    dt_ptr += b * dt_batch * UNIT
    B_ptr += b * length * N
    C_ptr += b * length * N
    if HAS_Z:
        z_ptr += b * z_batch * UNIT
    if HAS_DOC:
        doc_ptr += b * length
    y_ptr += b * length * D
    if SAVE:
        saved_ptr += b * n_spans * (D * N)

    A = tl.load(A_ptr + tile, mask=inside, other=0.0).to(tl.float32) * LOG2E
    h = tl.zeros((BD, BN), tl.float32)
    if PASS != 1 and HAS_FIRST:
        h += tl.load(first_ptr + b * (D * N) + tile, mask=inside, other=0.0).to(tl.float32)
    if PASS == 2:
        for s in range(segment):
            at = b * n_segments + s
            begin = s * per_segment
            kept = _kept(A, sums_ptr, doc_ptr, at, begin, begin + per_segment - 1, d, D, HAS_DOC)
            h = h * kept + tl.load(ends_ptr + at * (D * N) + tile, mask=inside, other=0.0)
    total = tl.zeros((T, BD), tl.float32)
    begin = segment * per_segment
    n_tiles = tl.cdiv(tl.minimum(per_segment, length - begin), T)
    # the tiles of the next turn are on their way while this one is computed
    wide = begin.to(tl.int64)
    left = length - begin
    next_dt = _load(dt_ptr + wide * DT_ROW, t, d, left, D, DT_ROW, FULL, FULL_D)
    next_u = _load(u_ptr + wide * U_ROW, t, d, left, D, U_ROW, FULL, FULL_D)
    if HAS_Z and PASS != 1:
        next_z = _load(z_ptr + wide * Z_ROW, t, d, left, D, Z_ROW, FULL, FULL_D)
    for i in range(n_tiles):
        start = begin + i * T
        left = length - start
        wide = start.to(tl.int64)
        dt, _ = _step_size(next_dt, bias_ptr, t, d, left, D, FULL, FULL_D, HAS_BIAS, SOFTPLUS)
        u = next_u.to(tl.float32)
        after = begin + tl.minimum(i + 1, n_tiles - 1) * T
        far = after.to(tl.int64)
        next_dt = _load(dt_ptr + far * DT_ROW, t, d, length - after, D, DT_ROW, FULL, FULL_D)
        next_u = _load(u_ptr + far * U_ROW, t, d, length - after, D, U_ROW, FULL, FULL_D)
        if HAS_Z and PASS != 1:
            z = next_z.to(tl.float32)
            next_z = _load(z_ptr + far * Z_ROW, t, d, length - after, D, Z_ROW, FULL, FULL_D)
        B, C = B_ptr + wide * N, C_ptr + wide * N
        Bs = ()
        Cs = ()
        for j in tl.static_range(T):
            Bs = Bs + (_map(B, j, n, j < left, N, FULL and FULL_N),)
            if PASS != 1:
                Cs = Cs + (_map(C, j, n, j < left, N, FULL and FULL_N),)
        if PASS == 1:
            total += dt
        elif SAVE:
            out = saved_ptr + (start // SPAN).to(tl.int64) * (D * N) + tile
            mine = inside & (start % SPAN == 0)
            tl.store(out, h.to(saved_ptr.dtype.element_ty), mask=mine)
        dts, inflow = _split_pair(dt, dt * u, BD, T)
        ys = ()
        for j in tl.static_range(T):
            decay = _decay(dts[j], A, doc_ptr, start, j, left, HAS_DOC)
            h = decay * h + inflow[j][:, None] * Bs[j]
            if PASS != 1:
                ys = ys + (_quads(h * Cs[j], BD, BN),)
        if PASS != 1:
            y = _sum_states(ys, BD, BN, T)
            if HAS_D:
                y += _channel(D_ptr, d, D, FULL_D) * u
            if HAS_Z:
                y *= z * sigmoid(z)
            _store(y_ptr + wide * D, y, t, d, left, D, D)
    if PASS == 1:
        at = b * n_segments + segment
        tl.store(ends_ptr + at * (D * N) + tile, h, mask=inside)
        tl.store(sums_ptr + at * D + d, tl.sum(total, axis=0), mask=d < D)
    elif segment == n_segments - 1:
        tl.store(last_ptr + b * (D * N) + tile, h, mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr, dlast_ptr, u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, doc_ptr,
    saved_ptr, du_ptr, ddt_ptr, dz_ptr, dBC_ptr, dA_ptr, dD_ptr, dfirst_ptr, ends_ptr, sums_ptr,
    dy_batch, u_batch, dt_batch, z_batch, dz_batch, length, per_segment, n_segments,
    plane,
    UNIT: tl.constexpr, DY_ROW: tl.constexpr, U_ROW: tl.constexpr, DT_ROW: tl.constexpr,
    Z_ROW: tl.constexpr, DZ_ROW: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, T: tl.constexpr, SPAN: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_LAST: tl.constexpr, HAS_DOC: tl.constexpr, FULL: tl.constexpr,
    PASS: tl.constexpr,
):  # fmt: skip
    """Gradients, walking back in time; `PASS` as in the forward kernel.

    dBC: (programs, 2, B, L, N), shares of the gradients of B and C. dA: (B, segments, D, N), dD:
    (B, segments, 2, D), of D and of the bias.
    """
    segment = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n, t = tl.arange(0, BN), tl.arange(0, T)
    FULL_D: tl.constexpr = D % BD == 0
    FULL_N: tl.constexpr = N == BN
    inside = (d[:, None] < D) & (n[None, :] < N)
    tile = d[:, None] * N + n[None, :]
    n_spans = tl.cdiv(length, SPAN)
    dy_ptr += b * dy_batch * UNIT
    u_ptr += b * u_batch * UNIT
    dt_ptr += b * dt_batch * UNIT
    if HAS_Z:
        z_ptr += b * z_batch * UNIT
        dz_ptr += b * dz_batch * UNIT
    if HAS_DOC:
        doc_ptr += b * length
    dBC_ptr += tl.program_id(0).to(tl.int64) * 2 * plane

    A = tl.load(A_ptr + tile, mask=inside, other=0.0).to(tl.float32) * LOG2E
    # g: the gradient of the state, from the tokens after it
    g = tl.zeros((BD, BN), tl.float32)
    if PASS != 1 and HAS_LAST:
        g += tl.load(dlast_ptr + b * (D * N) + tile, mask=inside, other=0.0).to(tl.float32)
    if PASS == 2:
        for i in range(n_segments - 1 - segment):
            s = n_segments - 1 - i
            at = b * n_segments + s
            begin = s * per_segment
            end = tl.minimum(begin + per_segment, length)
            kept = _kept(A, sums_ptr, doc_ptr, at, begin, end - 1, d, D, HAS_DOC)
            g = g * kept + tl.load(ends_ptr + at * (D * N) + tile, mask=inside, other=0.0)
    total = tl.zeros((T, BD), tl.float32)
    dbias = tl.zeros((T, BD), tl.float32)
    dskip = tl.zeros((T, BD), tl.float32)
    dA = tl.zeros((BD, BN), tl.float32)
    begin = segment * per_segment
    n_tiles = tl.cdiv(tl.minimum(per_segment, length - begin), T)
    # as in the forward kernel, the tiles of the next turn are on their way
    start = begin + (n_tiles - 1) * T
    wide = start.to(tl.int64)
    left = length - start
    next_dt = _load(dt_ptr + wide * DT_ROW, t, d, left, D, DT_ROW, FULL, FULL_D)
    next_dy = _load(dy_ptr + wide * DY_ROW, t, d, left, D, DY_ROW, FULL, FULL_D)
    if HAS_Z:
        next_z = _load(z_ptr + wide * Z_ROW, t, d, left, D, Z_ROW, FULL, FULL_D)
    for i in range(n_tiles):
        start = begin + (n_tiles - 1 - i) * T
        left = length - start
        wide = start.to(tl.int64)
        token = b * length + start
        dt, slope = _step_size(next_dt, bias_ptr, t, d, left, D, FULL, FULL_D, HAS_BIAS, SOFTPLUS)
        dy = next_dy.to(tl.float32)
        after = tl.maximum(start - T, begin)
        far = after.to(tl.int64)
        next_dt = _load(dt_ptr + far * DT_ROW, t, d, length - after, D, DT_ROW, FULL, FULL_D)
        next_dy = _load(dy_ptr + far * DY_ROW, t, d, length - after, D, DY_ROW, FULL, FULL_D)
        if HAS_Z:
            z = next_z.to(tl.float32)
            next_z = _load(z_ptr + far * Z_ROW, t, d, length - after, D, Z_ROW, FULL, FULL_D)
            gate = sigmoid(z)
            dgate = dy * (gate * (1.0 + z * (1.0 - gate)))
            dy *= z * gate
        B, C = B_ptr + token * N, C_ptr + token * N
        dts, dys = _split_pair(dt, dy, BD, T)
        if PASS == 1:
            total += dt
            for j in tl.static_range(T - 1, -1, -1):
                dh = g + dys[j][:, None] * _map(C, j, n, j < left, N, FULL and FULL_N)
                g = _decay(dts[j], A, doc_ptr, start, j, left, HAS_DOC) * dh
        else:
            # the states of this tile, from the one saved before it
            span = start // SPAN
            h = tl.load(saved_ptr + (b * n_spans + span) * (D * N) + tile, mask=inside, other=0.0)
            h = h.to(tl.float32)
            if SPAN > T:
                for k in range((start - span * SPAN) // T):
                    early = span * SPAN + k * T
                    at = early.to(tl.int64)
                    raw = _load(dt_ptr + at * DT_ROW, t, d, T, D, DT_ROW, True, FULL_D)
                    e, _ = _step_size(raw, bias_ptr, t, d, T, D, True, FULL_D, HAS_BIAS, SOFTPLUS)
                    u = _load(u_ptr + at * U_ROW, t, d, T, D, U_ROW, True, FULL_D).to(tl.float32)
                    es, inflow = _split_pair(e, e * u, BD, T)
                    for j in tl.static_range(T):
                        decay = _decay(es[j], A, doc_ptr, early, j, T, HAS_DOC)
                        B_row = _map(B_ptr + (b * length + early) * N, j, n, True, N, FULL_N)
                        h = decay * h + inflow[j][:, None] * B_row
            u = _load(u_ptr + wide * U_ROW, t, d, left, D, U_ROW, FULL, FULL_D).to(tl.float32)
            inflow = _split(tl.trans(dt * u), BD, T)
            states = (h,)
            for j in tl.static_range(T):
                decay = _decay(dts[j], A, doc_ptr, start, j, left, HAS_DOC)
                h = decay * h + inflow[j][:, None] * _map(B, j, n, j < left, N, FULL and FULL_N)
                states = states + (h,)
            ys = ()
            dCs = ()
            for j in tl.static_range(T):
                dCs = dCs + (dys[j][:, None] * states[j + 1],)
                if HAS_Z:
                    row = _map(C, j, n, j < left, N, FULL and FULL_N)
                    ys = ys + (_quads(states[j + 1] * row, BD, BN),)
            out = dBC_ptr + token * N
            _store(out + plane, _sum_channels(dCs, BD, BN, T), t, n, left, N, N)
            if HAS_Z:
                y = _sum_states(ys, BD, BN, T)
                if HAS_D:
                    y += _channel(D_ptr, d, D, FULL_D) * u
                _store(dz_ptr + wide * DZ_ROW, dgate * y, t, d, left, D, DZ_ROW)

            dinflows = ()
            dexponents = ()
            dBs = ()
            for j in tl.static_range(T - 1, -1, -1):
                dh = g + dys[j][:, None] * _map(C, j, n, j < left, N, FULL and FULL_N)
                dBs = (dh * inflow[j][:, None],) + dBs
                row = _map(B, j, n, j < left, N, FULL and FULL_N)
                dinflows = (_quads(dh * row, BD, BN),) + dinflows
                g = _decay(dts[j], A, doc_ptr, start, j, left, HAS_DOC) * dh
                dexponent = g * states[j]
                dA += dexponent * dts[j][:, None]
                dexponents = (_quads(dexponent * A, BD, BN),) + dexponents
            _store(out, _sum_channels(dBs, BD, BN, T), t, n, left, N, N)
            dinflow = _sum_states(dinflows, BD, BN, T)
            ddt = slope * (dinflow * u + _sum_states(dexponents, BD, BN, T) * 0.6931471805599453)
            du = dinflow * dt
            if HAS_D:
                du += _channel(D_ptr, d, D, FULL_D) * dy
                dskip += dy * u
            if HAS_BIAS:
                dbias += ddt
            _store(du_ptr + token * D, du, t, d, left, D, D)
            _store(ddt_ptr + token * D, ddt, t, d, left, D, D)
    at = b * n_segments + segment
    if PASS == 1:
        tl.store(ends_ptr + at * (D * N) + tile, g, mask=inside)
        tl.store(sums_ptr + at * D + d, tl.sum(total, axis=0), mask=d < D)
    else:
        tl.store(dA_ptr + at * (D * N) + tile, dA, mask=inside)
        out = dD_ptr + at * (2 * D) + d
        if HAS_D:
            tl.store(out, tl.sum(dskip, axis=0), mask=d < D)
        if HAS_BIAS:
            tl.store(out + D, tl.sum(dbias, axis=0), mask=d < D)
        if segment == 0:
            tl.store(dfirst_ptr + b * (D * N) + tile, g, mask=inside)


@triton.jit
def _sum_kernel(parts_ptr, dB_ptr, dC_ptr, n_parts, plane, BLOCK: tl.constexpr):
    """dB and dC from the programs' shares (n_parts, 2, plane), added in order."""
    which = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < plane
    total = tl.zeros((BLOCK,), tl.float32)
    parts_ptr += which.to(tl.int64) * plane + at
    for _ in range(n_parts):
        total += tl.load(parts_ptr, mask=inside, other=0.0)
        parts_ptr = parts_ptr + plane + plane  # 2 * plane might not fit 32 bits
    if which == 0:
        tl.store(dB_ptr + at, total.to(dB_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(dC_ptr + at, total.to(dC_ptr.dtype.element_ty), mask=inside)


def _unit(*tensors: Tensor | None) -> int:
    """The power of two up to 16 that divides every batch stride, which wide loads need to know."""
    return math.gcd(16, *(v.stride(0) for v in tensors if v is not None))


def _strides(unit: int, *tensors: Tensor | None) -> list[int]:
    return [0 if v is None else v.stride(0) // unit for v in tensors]


def _row(v: Tensor | None) -> int:
    return 0 if v is None else v.stride(1)


def backward_config(n_state: int) -> Config:
    return BACKWARD if n_state > 8 else BACKWARD_NARROW


def _segments(length: int, warps: int) -> int:
    """Parts of the sequence, so that programs of so many warps in all fill the GPU."""
    return 1 if warps >= WARPS // 2 else max(1, min(WARPS // warps, length // 128))


def _plan(batch: int, length: int, width: int, n_state: int, config: Config) -> Any:
    """Channels of a block, padded states, blocks, tokens of a segment, segments."""
    states = max(4, triton.next_power_of_2(n_state))
    channels = max(1, 128 * config.warps // states)
    blocks = triton.cdiv(width, channels)
    segments = _segments(length, batch * blocks * config.warps)
    per_segment = triton.cdiv(triton.cdiv(length, segments), SPAN) * SPAN
    return channels, states, blocks, per_segment, triton.cdiv(length, per_segment)


def _forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, first: Tensor | None, doc: Tensor | None, softplus: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (B, L, D), the last state (B, D, N) and, with `save`, the states before each span."""
    config = FORWARD
    batch, length, width = u.shape
    n_state = A.shape[1]
    block, states, blocks, per_segment, segments = _plan(batch, length, width, n_state, config)
    y, last, saved = _results(u, n_state, save)
    ends = sums = None
    if segments > 1:
        ends = last.new_empty((batch, segments, width, n_state))
        sums = last.new_empty((batch, segments, width))
    unit = _unit(u, dt, z)
    for number in (0,) if segments == 1 else (1, 2):
        _forward_kernel[(blocks, segments, batch)](
            u, dt, A, B, C, D, z, bias, first, doc, y, saved, last, ends, sums,
            *_strides(unit, u, dt, z), length, per_segment, segments,
            UNIT=unit, U_ROW=_row(u), DT_ROW=_row(dt),
            Z_ROW=_row(z), D=width, N=n_state, BD=block, BN=states, T=config.tokens, SPAN=SPAN,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=bias is not None,
            SOFTPLUS=softplus, HAS_FIRST=first is not None, HAS_DOC=doc is not None, SAVE=save,
            FULL=length % config.tokens == 0, PASS=number,
            num_warps=config.warps, maxnreg=config.registers,
        )  # fmt: skip
    return y, last, saved


def _results(u: Tensor, n_state: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = u.shape
    spans = (length + SPAN - 1) // SPAN if save else 0
    # float16 has not the range of a state
    dtype = torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float32
    return (
        u.new_empty(u.shape),
        u.new_empty((batch, width, n_state), dtype=torch.float32),
        u.new_empty((batch, spans, width, n_state), dtype=dtype),
    )


def _backward(
    dy: Tensor, dlast: Tensor | None, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, bias: Tensor | None, doc: Tensor | None, saved: Tensor,
    softplus: bool, dz: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Writes dz (B, L, D), which may have wider rows; returns the gradients of u, dt, B and C in
    their types, of A, of D and bias (2, D), and of the first state, the last three in float32."""
    config = backward_config(A.shape[1])
    batch, length, width = u.shape
    n_state = A.shape[1]
    block, states, blocks, per_segment, segments = _plan(batch, length, width, n_state, config)
    dy, dlast = dense_last(dy), contiguous(dlast)
    du, ddt = u.new_empty(u.shape), dt.new_empty(dt.shape)
    dB, dC = B.new_empty(B.shape), C.new_empty(C.shape)
    dfirst = u.new_empty((batch, width, n_state), dtype=torch.float32)
    dA = dfirst.new_empty((batch * segments, width * n_state))
    dD = dfirst.new_empty((batch * segments, 2 * width))
    parts = dfirst.new_empty((blocks, 2, batch, length, n_state))
    plane = batch * length * n_state
    ends = sums = None
    if segments > 1:
        ends = dfirst.new_empty((batch, segments, width, n_state))
        sums = dfirst.new_empty((batch, segments, width))
    unit = _unit(dy, u, dt, z, dz)
    for number in (0,) if segments == 1 else (1, 2):
        _backward_kernel[(blocks, segments, batch)](
            dy, dlast, u, dt, A, B, C, D, z, bias, doc, saved, du, ddt, dz, parts, dA, dD, dfirst,
            ends, sums, *_strides(unit, dy, u, dt, z, dz), length, per_segment, segments, plane,
            UNIT=unit, DY_ROW=_row(dy), U_ROW=_row(u), DT_ROW=_row(dt),
            Z_ROW=_row(z), DZ_ROW=_row(dz), D=width, N=n_state, BD=block, BN=states,
            T=config.tokens, SPAN=SPAN,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=bias is not None,
            SOFTPLUS=softplus, HAS_LAST=dlast is not None, HAS_DOC=doc is not None,
            FULL=length % config.tokens == 0, PASS=number,
            num_warps=config.warps, maxnreg=config.registers,
        )  # fmt: skip
    _sum_kernel[(triton.cdiv(plane, 1024), 2)](
        parts, dB, dC, blocks, plane, BLOCK=1024, num_warps=4
    )
    sum_A = sum_rows(dA, torch.float32).view(width, n_state)
    sum_D = sum_rows(dD, torch.float32).view(2, width)
    return du, ddt, dB, dC, sum_A, sum_D, dfirst


def _backward_fake(dy, dlast, u, dt, A, B, C, *_):
    batch, _, width = u.shape
    n_state = A.shape[1]
    return (
        u.new_empty(u.shape),
        dt.new_empty(dt.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        u.new_empty((width, n_state), dtype=torch.float32),
        u.new_empty((2, width), dtype=torch.float32),
        u.new_empty((batch, width, n_state), dtype=torch.float32),
    )


forward_op = define_op(
    "selective_scan_forward(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? bias, Tensor? first, Tensor? doc, bool softplus, bool save) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    lambda u, dt, A, *rest: _results(u, A.shape[1], rest[-1]),
)
backward_op = define_op(
    "selective_scan_backward(Tensor dy, Tensor? dlast, Tensor u, Tensor dt, Tensor A, Tensor B, "
    "Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? doc, Tensor saved, bool softplus, "
    "Tensor(a!)? dz) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    several=True,
)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        z: Tensor | None, bias: Tensor | None, first: Tensor | None, doc: Tensor | None,
        softplus: bool, save: bool,
    ) -> Any:  # fmt: skip
        y, last, saved = forward_op(u, dt, A, B, C, D, z, bias, first, doc, softplus, save)
        ctx.save_for_backward(u, dt, A, B, C, D, z, bias, doc, saved)
        ctx.softplus = softplus
        ctx.first_dtype = None if first is None else first.dtype
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        u, dt, A, B, C, D, z, bias, doc, saved = ctx.saved_tensors
        dy = torch.zeros_like(u) if grads[0] is None else grads[0]
        dz = None if z is None else z.new_empty(z.shape)
        du, ddt, dB, dC, dA, dD, dfirst = backward_op(
            dy, grads[1], u, dt, A, B, C, D, z, bias, doc, saved, ctx.softplus, dz
        )
        dskip = None if D is None else dD[0].to(D.dtype)
        dbias = None if bias is None else dD[1].to(bias.dtype)
        dfirst = None if ctx.first_dtype is None else dfirst.to(ctx.first_dtype)
        return du, ddt, dA.to(A.dtype), dB, dC, dskip, dz, dbias, dfirst, None, None, None


def selective_scan_triton(
    u_BLD: Tensor, delta_BLD: Tensor, A_DN: Tensor, B_BLN: Tensor, C_BLN: Tensor,
    D_D: Tensor | None = None, *, z_BLD: Tensor | None = None, delta_bias_D: Tensor | None = None,
    delta_softplus: bool = False, initial_state_BDN: Tensor | None = None,
    return_final_state: bool = False, doc_start_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`ablate.kernels.selective_scan` on a GPU; rows of u, delta, z, B and C are read in place."""
    # B and C are small, and every program reads them: in float32, once for all
    B, C = (v.to(torch.float32).contiguous() for v in (B_BLN, C_BLN))
    u, delta = dense_last(u_BLD), dense_last(delta_BLD)
    z = None if z_BLD is None else dense_last(z_BLD)
    leaves = (u, delta, B, C, A_DN, D_D, z, delta_bias_D, initial_state_BDN)
    save = wants_gradients(*leaves)
    y, last = _SelectiveScan.apply(
        u, delta, A_DN.contiguous(), B, C, contiguous(D_D), z, contiguous(delta_bias_D),
        contiguous(initial_state_BDN), starts(doc_start_BL), delta_softplus, save,
    )  # fmt: skip
    return (y, last) if return_final_state else y
