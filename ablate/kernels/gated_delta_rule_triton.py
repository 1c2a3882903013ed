"""Triton kernels of the gated delta rule (`ablate.kernels.gated_delta_rule` has the definition).

Everything works on chunks of Q = 64 tokens. In a chunk, with decays D_ts from s to t and E_t from
the chunk's start to t, what the state S held wrong is the solution e of a triangular system:

    (I + A) e = x,    A_ts = D_ts (k_t . k_s) beta_s for s < t,    x_t = v_t - E_t S^T k_t

Forward, two launches:

1. `_prepare_kernel`, a program a chunk: with (I + A)^-1 = I - N it stores N, so that the identity
   is never rounded, and P_ts = scale D_ts (q_t . k_s) beta_s; then of each token the factors of
   its key and query. Lengths of keys and queries, if they are to be divided by, are such factors.
2. `_scan_kernel` walks the chunks of a head in order, a program a block of value channels, which
   never meet: e = x - N x, o = E S^T q + P e, S = decayed S + sum of k e^T. The state stands
   transposed in registers, channels first, as do x, e and o: then every product takes its left
   side from registers where the product before has left it.

Nothing but N and P is kept for the backward pass, three launches: `_scan_kernel` again, which now
writes e and the state that enters each chunk in place of o; `_reverse_kernel` walks the chunks
backward with the gradient of the state and writes that and the gradient of v; and
`_gradient_kernel`, a program a chunk, makes the other gradients of these.

Spans of decay never leave a chunk, nor do the sums that make their gradients. Each result is a
fixed order of additions: two runs agree bit for bit.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ablate.kernels.dispatch import define_op
from ablate.kernels.gated_delta_rule import NORM_EPS, STRONGEST
from ablate.kernels.tiles_triton import (
    LOG2E,
    batch_unit,
    contiguous,
    dense_last,
    dense_rows,
    load_tile,
    starts,
    store_tile,
)

# Of a chunk's tokens, a row of 64 numbers each: the sums of log decays within the chunk in units of
# log2; beta; what makes the query and the key as long as they are to be; the factors of the query
# that reads the entering state, of the key that does, of the key that adds to the leaving one, and
# the same with beta; and, equal for all, what is kept of the state.
CUM, BETA, RQ, RK, READ_Q, READ_K, LEAVE_K, WRITE_K, KEEP = (tl.constexpr(i * 64) for i in range(9))
FACTORS = tl.constexpr(9 * 64)
# Rows of what the gradients of decay and beta are sums of: of pairs, a token with itself, those
# that begin and those that end at a token; what the query and the key gave for what they read of
# the entering state; what the key gave to the leaving one; and, of value channels, the product of
# the entering state and the gradient of the leaving one. A part that knows nothing of beta of its
# source makes that one's gradient.
OWN, BEGIN, END, SEEN_Q, SEEN_K, LEAVES, THROUGH = (tl.constexpr(i * 64) for i in range(7))
PARTS = tl.constexpr(7 * 64)


@triton.jit
def _pairs(doc_ptr, start, rows, left, HAS_DOC: tl.constexpr):
    """Whether the target (first axis) may see the source (second), itself included."""
    allowed = rows[:, None] >= rows[None, :]
    if HAS_DOC:
        doc = tl.load(doc_ptr + rows, mask=rows < left, other=0)
        allowed = allowed & (start + rows[None, :] >= doc[:, None])
    return allowed


@triton.jit
def _solve(A, Q: tl.constexpr, PREC: tl.constexpr):
    """N = I - (I + A)^-1 for a strictly lower triangular A.

    Blocks of 16 by forward substitution, all at once; then blocks of 2b from blocks of b: if C
    stands below the diagonal blocks, N there is (I - N) C (I - N).
    """
    BLOCKS: tl.constexpr = Q // 16
    block = tl.arange(0, BLOCKS)
    diagonal = block[:, None, None, None] == block[None, None, :, None]
    A4 = tl.reshape(A, (BLOCKS, 16, BLOCKS, 16))
    small = tl.sum(tl.where(diagonal, A4, 0.0), axis=2)  # (block, row, column)
    row = tl.arange(0, 16)[None, :, None]
    N3 = small
    for i in range(2, 16):
        mine = tl.sum(tl.where(row == i, small, 0.0), axis=1)
        N3 = tl.where(row == i, N3 - tl.sum(mine[:, :, None] * N3, axis=1)[:, None, :], N3)
    N = tl.reshape(tl.where(diagonal, N3[:, :, None, :], 0.0), (Q, Q))
    at = tl.arange(0, Q)
    for level in tl.static_range(4, 4 + BLOCKS // 2):  # once or twice
        below = (at[:, None] >> level) == (at[None, :] >> level) + 1
        below = below & ((at[:, None] >> (level + 1)) == (at[None, :] >> (level + 1)))
        C = tl.where(below, A, 0.0)
        C -= tl.dot(N, C, input_precision=PREC)
        N += C - tl.dot(C, N, input_precision=PREC)
    return N


@triton.jit
def _prepare_kernel(
    q_ptr, k_ptr, decay_ptr, beta_ptr, doc_ptr, factors_ptr, pairs_ptr,
    q_stride_b, k_stride_b, decay_stride_b, beta_stride_b, length, scale, strongest, eps,
    UNIT: tl.constexpr, Q_STRIDE_L: tl.constexpr, K_STRIDE_L: tl.constexpr,
    DECAY_STRIDE_L: tl.constexpr, BETA_STRIDE_L: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, Q: tl.constexpr, NORMALIZE: tl.constexpr, HAS_DOC: tl.constexpr,
    FULL: tl.constexpr, PREC: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """The factors of a chunk's tokens, and its N and P."""
    c, h = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    n_chunks = tl.num_programs(0)
    start = c * Q
    left = length - start
    wide = start.to(tl.int64)
    rows, cols = tl.arange(0, Q), tl.arange(0, BK)
    FULL_K: tl.constexpr = K % BK == 0
    inside = rows < left
    decay_ptr += b * decay_stride_b + wide * DECAY_STRIDE_L + h
    beta_ptr += b * beta_stride_b + wide * BETA_STRIDE_L + h
    if HAS_DOC:
        doc_ptr += b * length + start
    q_ptr += b * q_stride_b * UNIT + wide * Q_STRIDE_L + h * K
    k_ptr += b * k_stride_b * UNIT + wide * K_STRIDE_L + h * K
    factors_ptr += ((b * H + h) * n_chunks + c) * FACTORS + rows
    pairs_ptr += ((b * H + h) * n_chunks + c) * (2 * Q * Q)

    kk = tl.zeros((Q, Q), tl.float32)
    qk = tl.zeros((Q, Q), tl.float32)
    qq = tl.zeros((Q, Q), tl.float32)
    for first in tl.range(0, K, BK, num_stages=1):
        k = load_tile(k_ptr + first, rows, cols, left, K - first, K_STRIDE_L, FULL, FULL_K)
        q = load_tile(q_ptr + first, rows, cols, left, K - first, Q_STRIDE_L, FULL, FULL_K)
        kk = tl.dot(k, tl.trans(k), kk, input_precision=PREC)
        qk = tl.dot(q, tl.trans(k), qk, input_precision=PREC)
        if NORMALIZE:
            qq = tl.dot(q, tl.trans(q), qq, input_precision=PREC)
    rq = tl.full((Q,), 1.0, tl.float32)
    rk = tl.full((Q,), 1.0, tl.float32)
    if NORMALIZE:
        own = rows[:, None] == rows[None, :]
        rq = 1.0 / tl.sqrt(tl.sum(tl.where(own, qq, 0.0), axis=1) + eps)
        rk = 1.0 / tl.sqrt(tl.sum(tl.where(own, kk, 0.0), axis=1) + eps)
    decay = tl.load(decay_ptr + rows * DECAY_STRIDE_L, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + rows * BETA_STRIDE_L, mask=inside, other=0.0).to(tl.float32)
    cum = tl.cumsum(tl.maximum(decay, strongest) * LOG2E, axis=0)
    total = tl.sum(tl.where(rows == Q - 1, cum, 0.0), axis=0)
    seen = tl.exp2(cum)
    leaves = tl.exp2(tl.minimum(total - cum, 0.0))
    keep = tl.exp2(total)
    if HAS_DOC:
        doc = tl.load(doc_ptr + rows, mask=inside, other=0)
        doc_last = tl.load(doc_ptr + tl.minimum(left, Q) - 1)
        seen = tl.where(doc < start, seen, 0.0)
        leaves = tl.where(start + rows >= doc_last, leaves, 0.0)
        keep = tl.where(doc_last < start, keep, 0.0)
    tl.store(factors_ptr + CUM, cum)
    tl.store(factors_ptr + BETA, beta)
    tl.store(factors_ptr + RQ, rq)
    tl.store(factors_ptr + RK, rk)
    tl.store(factors_ptr + READ_Q, seen * rq * scale)
    tl.store(factors_ptr + READ_K, seen * rk)
    tl.store(factors_ptr + LEAVE_K, leaves * rk)
    tl.store(factors_ptr + WRITE_K, leaves * rk * beta)
    tl.store(factors_ptr + KEEP, tl.zeros((Q,), tl.float32) + keep)

    allowed = _pairs(doc_ptr, start, rows, left, HAS_DOC)
    weight = tl.exp2(tl.minimum(cum[:, None] - cum[None, :], 0.0)) * (beta * rk)[None, :]
    weight = tl.where(allowed, weight, 0.0)
    at = rows[:, None] * Q + rows[None, :]
    P = qk * weight * (rq * scale)[:, None]
    tl.store(pairs_ptr + Q * Q + at, P.to(pairs_ptr.dtype.element_ty))
    A = tl.where(rows[:, None] > rows[None, :], kk * weight * rk[:, None], 0.0)
    tl.store(pairs_ptr + at, _solve(A, Q, SOLVE).to(pairs_ptr.dtype.element_ty))


@triton.jit
def _scan_kernel(
    q_ptr, k_ptr, v_ptr, factors_ptr, pairs_ptr, first_ptr, out_ptr, states_ptr,
    q_stride_b, k_stride_b, v_stride_b, length, n_chunks,
    UNIT: tl.constexpr, Q_STRIDE_L: tl.constexpr, K_STRIDE_L: tl.constexpr,
    V_STRIDE_L: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, Q: tl.constexpr, HAS_FIRST: tl.constexpr, OUTPUT: tl.constexpr,
    FULL: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of one head and BV value channels: with OUTPUT, o and the last state; else e and the state
    before each chunk, V x K."""
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    rows, cols = tl.arange(0, Q), tl.arange(0, BK)
    values = tl.program_id(0) * BV + tl.arange(0, BV)
    FULL_K: tl.constexpr = K == BK
    FULL_V: tl.constexpr = V % BV == 0
    q_ptr += b * q_stride_b * UNIT + h * K
    k_ptr += b * k_stride_b * UNIT + h * K
    v_ptr += b * v_stride_b * UNIT + h * V
    out_ptr += b * length * (H * V) + h * V
    factors_ptr += (b * H + h) * n_chunks * FACTORS
    pairs_ptr += (b * H + h) * n_chunks * (2 * Q * Q)
    if not OUTPUT:
        states_ptr += (b * n_chunks * H + h) * (K * V)
    square = rows[:, None] * Q + rows[None, :]
    turned = cols[None, :] * V + values[:, None]  # of the states that come and go, K x V
    inside = (cols[None, :] < K) & (values[:, None] < V)

    state = tl.zeros((BV, BK), tl.float32)
    if HAS_FIRST:
        state += tl.load(first_ptr + (b * H + h) * (K * V) + turned, mask=inside, other=0.0)
    for c in tl.range(0, n_chunks, num_stages=STAGES):
        start = c * Q
        left = length - start
        wide = start.to(tl.int64)
        factors = factors_ptr + wide // Q * FACTORS
        k = load_tile(k_ptr + wide * K_STRIDE_L, rows, cols, left, K, K_STRIDE_L, FULL, FULL_K)
        v = load_tile(v_ptr + wide * V_STRIDE_L, rows, values, left, V, V_STRIDE_L, FULL, FULL_V)
        N = tl.load(pairs_ptr + wide * (2 * Q) + square)
        held = state.to(k.dtype)
        if OUTPUT:
            q = load_tile(q_ptr + wide * Q_STRIDE_L, rows, cols, left, K, Q_STRIDE_L, FULL, FULL_K)
            P = tl.load(pairs_ptr + wide * (2 * Q) + Q * Q + square)
            read = tl.dot(held, tl.trans(q), input_precision=PREC)
            read = read * tl.load(factors + READ_Q + rows)[None, :]
        x = tl.dot(held, tl.trans(k), input_precision=PREC)
        if not OUTPUT:
            to = states_ptr + wide // Q * (H * K * V)
            store_tile(to, held, values, cols, V, K, K, FULL_V, FULL_K)
        x = tl.trans(v).to(tl.float32) - x * tl.load(factors + READ_K + rows)[None, :]
        e = x - tl.dot(x.to(k.dtype), tl.trans(N), input_precision=PREC)
        out = e
        if OUTPUT:
            out = tl.dot(e.to(k.dtype), tl.trans(P), read, input_precision=PREC)
        to = out_ptr + wide * (H * V)
        store_tile(to, tl.trans(out.to(k.dtype)), rows, values, left, V, H * V, FULL, FULL_V)
        e = e * tl.load(factors + WRITE_K + rows)[None, :]
        state = tl.dot(e.to(k.dtype), k, state * tl.load(factors + KEEP), input_precision=PREC)
    if OUTPUT:
        tl.store(states_ptr + (b * H + h) * (K * V) + turned, state, mask=inside)


@triton.jit
def _reverse_kernel(
    do_ptr, q_ptr, k_ptr, factors_ptr, pairs_ptr, dlast_ptr, dv_ptr, dstates_ptr,
    dfirst_ptr, q_stride_b, k_stride_b, length, n_chunks,
    UNIT: tl.constexpr, Q_STRIDE_L: tl.constexpr, K_STRIDE_L: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, Q: tl.constexpr,
    HAS_LAST: tl.constexpr, FULL: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of one head and BV value channels, from the last chunk to the first: dv, and the gradient of
    the state after each chunk, V x K."""
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    rows, cols = tl.arange(0, Q), tl.arange(0, BK)
    values = tl.program_id(0) * BV + tl.arange(0, BV)
    FULL_K: tl.constexpr = K == BK
    FULL_V: tl.constexpr = V % BV == 0
    q_ptr += b * q_stride_b * UNIT + h * K
    k_ptr += b * k_stride_b * UNIT + h * K
    do_ptr += b * length * (H * V) + h * V
    dv_ptr += b * length * (H * V) + h * V
    factors_ptr += (b * H + h) * n_chunks * FACTORS
    pairs_ptr += (b * H + h) * n_chunks * (2 * Q * Q)
    dstates_ptr += (b * n_chunks * H + h) * (K * V)
    square = rows[:, None] * Q + rows[None, :]
    turned = cols[None, :] * V + values[:, None]
    inside = (cols[None, :] < K) & (values[:, None] < V)

    dstate = tl.zeros((BV, BK), tl.float32)
    if HAS_LAST:
        dstate += tl.load(dlast_ptr + (b * H + h) * (K * V) + turned, mask=inside, other=0.0)
    for i in tl.range(0, n_chunks, num_stages=STAGES):
        c = n_chunks - 1 - i
        start = c * Q
        left = length - start
        wide = start.to(tl.int64)
        factors = factors_ptr + wide // Q * FACTORS
        k = load_tile(k_ptr + wide * K_STRIDE_L, rows, cols, left, K, K_STRIDE_L, FULL, FULL_K)
        do = load_tile(do_ptr + wide * (H * V), rows, values, left, V, H * V, FULL, FULL_V)
        N = tl.load(pairs_ptr + wide * (2 * Q) + square)
        P = tl.load(pairs_ptr + wide * (2 * Q) + Q * Q + square)
        q = load_tile(q_ptr + wide * Q_STRIDE_L, rows, cols, left, K, Q_STRIDE_L, FULL, FULL_K)
        held = dstate.to(k.dtype)
        de = tl.dot(held, tl.trans(k), input_precision=PREC)
        to = dstates_ptr + wide // Q * (H * K * V)
        store_tile(to, held, values, cols, V, K, K, FULL_V, FULL_K)
        de = de * tl.load(factors + WRITE_K + rows)[None, :]
        do = tl.trans(do)
        de = tl.dot(do, P, de, input_precision=PREC)
        dx = de - tl.dot(de.to(k.dtype), N, input_precision=PREC)
        to = dv_ptr + wide * (H * V)
        store_tile(to, tl.trans(dx.to(k.dtype)), rows, values, left, V, H * V, FULL, FULL_V)
        dstate = dstate * tl.load(factors + KEEP)
        do = do.to(tl.float32) * tl.load(factors + READ_Q + rows)[None, :]
        dstate = tl.dot(do.to(k.dtype), q, dstate, input_precision=PREC)
        dx = dx * -tl.load(factors + READ_K + rows)[None, :]
        dstate = tl.dot(dx.to(k.dtype), k, dstate, input_precision=PREC)
    tl.store(dfirst_ptr + (b * H + h) * (K * V) + turned, dstate, mask=inside)


@triton.jit
def _add_keys(
    reads, writes, through, dv_ptr, e_ptr, states_ptr, dstates_ptr, first, rows, cols, values, left,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, FULL: tl.constexpr, FULL_K: tl.constexpr,
    FULL_V: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds, of the value channels from `first`, what the keys are given as they read the entering
    state and as they write to the leaving one, both (K, Q), and the product of the entering state
    and the gradient of the leaving one."""
    dv = load_tile(dv_ptr + first, rows, values, left, V - first, H * V, FULL, FULL_V)
    e = load_tile(e_ptr + first, rows, values, left, V - first, H * V, FULL, FULL_V)
    state = load_tile(states_ptr + first * K, values, cols, V - first, K, K, FULL_V, FULL_K)
    dstate = load_tile(dstates_ptr + first * K, values, cols, V - first, K, K, FULL_V, FULL_K)
    reads = tl.dot(tl.trans(state), tl.trans(dv), reads, input_precision=PREC)
    writes = tl.dot(tl.trans(dstate), tl.trans(e), writes, input_precision=PREC)
    through += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1)
    return reads, writes, through


@triton.jit
def _gradient_kernel(
    do_ptr, dv_ptr, e_ptr, q_ptr, k_ptr, doc_ptr, factors_ptr, states_ptr, dstates_ptr,
    dq_ptr, dk_ptr, parts_ptr, q_stride_b, k_stride_b, length, scale,
    UNIT: tl.constexpr, Q_STRIDE_L: tl.constexpr, K_STRIDE_L: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, Q: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_DOC: tl.constexpr, FULL: tl.constexpr, PREC: tl.constexpr,
    TWICE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, dk and the parts of the gradients of decay and beta in one chunk of one head, for BK of
    the key's channels; NORMALIZE only where these are all.

    dq stands tokens first and dk channels first: so the matrices of pairs (target, source), which
    would need to be turned in registers to stand on a product's left, stand on its right. TWICE
    passes over the value channels again, where the registers do not hold all sums at once.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    c, h, block = tl.program_id(0), tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
    b = tl.program_id(2).to(tl.int64)
    n_chunks = tl.num_programs(0)
    start = c * Q
    left = length - start
    wide = start.to(tl.int64)
    rows, all_cols, values = tl.arange(0, Q), tl.arange(0, BK), tl.arange(0, BV)
    cols = block * BK + all_cols
    FULL_K: tl.constexpr = K % BK == 0
    FULL_V: tl.constexpr = V % BV == 0
    q_ptr += b * q_stride_b * UNIT + wide * Q_STRIDE_L + h * K
    k_ptr += b * k_stride_b * UNIT + wide * K_STRIDE_L + h * K
    at = (b * length + wide) * (H * V) + h * V
    do_ptr += at
    dv_ptr += at
    e_ptr += at
    at = ((b * n_chunks + c) * H + h) * (K * V)
    states_ptr += at
    dstates_ptr += at
    at = (b * length + wide) * (H * K) + h * K
    dq_ptr += at
    dk_ptr += at
    at = (b * H + h) * n_chunks + c
    factors_ptr += at * FACTORS
    parts_ptr += (at * BLOCKS + block) * PARTS
    if HAS_DOC:
        doc_ptr += b * length + start

    dP = tl.zeros((Q, Q), tl.float32)
    dA = tl.zeros((Q, Q), tl.float32)
    dq = tl.zeros((Q, BK), tl.float32)
    dk = tl.zeros((BK, Q), tl.float32)
    writes = tl.zeros((BK, Q), tl.float32)
    through = tl.zeros((BV,), tl.float32)
    for first in tl.range(0, V, BV, num_stages=STAGES):
        do = load_tile(do_ptr + first, rows, values, left, V - first, H * V, FULL, FULL_V)
        dv = load_tile(dv_ptr + first, rows, values, left, V - first, H * V, FULL, FULL_V)
        e = load_tile(e_ptr + first, rows, values, left, V - first, H * V, FULL, FULL_V)
        state = load_tile(states_ptr + first * K, values, cols, V - first, K, K, FULL_V, FULL_K)
        dP = tl.dot(do, tl.trans(e), dP, input_precision=PREC)
        dA = tl.dot(dv, tl.trans(e), dA, input_precision=PREC)
        dq = tl.dot(do, state, dq, input_precision=PREC)
        if not TWICE:
            dk, writes, through = _add_keys(
                dk, writes, through, dv_ptr, e_ptr, states_ptr, dstates_ptr, first, rows, cols,
                values, left, H, K, V, FULL, FULL_K, FULL_V, PREC,
            )  # fmt: skip

    q = load_tile(q_ptr, rows, cols, left, K, Q_STRIDE_L, FULL, FULL_K)
    k = load_tile(k_ptr, rows, cols, left, K, K_STRIDE_L, FULL, FULL_K)
    kk = tl.dot(k, tl.trans(k), input_precision=PREC)
    qk = tl.dot(q, tl.trans(k), input_precision=PREC)
    for step in tl.range(1, BLOCKS, num_stages=1):
        others = (block + step) % BLOCKS * BK + all_cols
        other = load_tile(k_ptr, rows, others, left, K, K_STRIDE_L, FULL, FULL_K)
        kk = tl.dot(other, tl.trans(other), kk, input_precision=PREC)
        other_q = load_tile(q_ptr, rows, others, left, K, Q_STRIDE_L, FULL, FULL_K)
        qk = tl.dot(other_q, tl.trans(other), qk, input_precision=PREC)
    beta = tl.load(factors_ptr + BETA + rows)
    rq = tl.load(factors_ptr + RQ + rows)
    rk = tl.load(factors_ptr + RK + rows)
    cum = tl.load(factors_ptr + CUM + rows)
    weight = tl.exp2(tl.minimum(cum[:, None] - cum[None, :], 0.0)) * rk[None, :]
    weight = tl.where(_pairs(doc_ptr, start, rows, left, HAS_DOC), weight, 0.0)
    before = rows[:, None] > rows[None, :]
    # Of the products of keys with keys and of queries with keys, but for beta of the source; and
    # what a pair gives to its span of decay, which a pair of a token with itself has not.
    dA = tl.where(before, -dA * weight, 0.0) * rk[:, None]
    dP = dP * weight * (rq * scale)[:, None]
    qk *= dP
    own = tl.where(rows[:, None] == rows[None, :], qk, 0.0)
    tl.store(parts_ptr + OWN + rows, tl.sum(own, axis=0))
    spans = tl.where(before, qk, 0.0) + dA * kk
    tl.store(parts_ptr + BEGIN + rows, tl.sum(spans, axis=0))
    tl.store(parts_ptr + END + rows, tl.sum(spans * beta[None, :], axis=1))
    dA = (dA * beta[None, :]).to(k.dtype)
    dP = (dP * beta[None, :]).to(k.dtype)

    q32 = load_tile(q_ptr, rows, cols, left, K, Q_STRIDE_L, FULL, FULL_K).to(tl.float32)
    dq *= tl.load(factors_ptr + READ_Q + rows)[:, None]
    tl.store(parts_ptr + SEEN_Q + rows, tl.sum(dq * q32, axis=1))
    dq = tl.dot(dP, k, dq, input_precision=PREC)
    if NORMALIZE:  # x / |x| does not change along x
        dq -= q32 * (tl.sum(dq * q32, axis=1) * rq * rq)[:, None]
    store_tile(dq_ptr, dq, rows, cols, left, K, H * K, FULL, FULL_K)

    if TWICE:
        for first in tl.range(0, V, BV, num_stages=STAGES):
            dk, writes, through = _add_keys(
                dk, writes, through, dv_ptr, e_ptr, states_ptr, dstates_ptr, first, rows, cols,
                values, left, H, K, V, FULL, FULL_K, FULL_V, PREC,
            )  # fmt: skip
    tl.store(parts_ptr + THROUGH + values, through)
    k32 = tl.trans(load_tile(k_ptr, rows, cols, left, K, K_STRIDE_L, FULL, FULL_K)).to(tl.float32)
    dk *= -tl.load(factors_ptr + READ_K + rows)[None, :]
    tl.store(parts_ptr + SEEN_K + rows, tl.sum(dk * k32, axis=0))
    writes *= tl.load(factors_ptr + LEAVE_K + rows)[None, :]
    tl.store(parts_ptr + LEAVES + rows, tl.sum(writes * k32, axis=0))
    dk += writes * beta[None, :]
    dk = tl.dot(tl.trans(q), dP, dk, input_precision=PREC)
    dk = tl.dot(tl.trans(k), dA, dk, input_precision=PREC)
    dk = tl.dot(tl.trans(k), tl.trans(dA), dk, input_precision=PREC)
    if NORMALIZE:
        dk -= k32 * (tl.sum(dk * k32, axis=0) * rk * rk)[None, :]
    store_tile(dk_ptr, tl.trans(dk), rows, cols, left, K, H * K, FULL, FULL_K)


@triton.jit
def _project_kernel(
    x_ptr, dx_ptr, r_ptr, x_stride_b, length,
    UNIT: tl.constexpr, X_STRIDE_L: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, BL: tl.constexpr, Q: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Takes from dx, in place, what lies along x; r is one over the length of x."""
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * BL
    left = length - start
    wide = start.to(tl.int64)
    rows, cols = tl.arange(0, BL), tl.arange(0, BK)
    FULL_K: tl.constexpr = K == BK
    x_ptr += b * x_stride_b * UNIT + wide * X_STRIDE_L + h * K
    dx_ptr += (b * length + wide) * (H * K) + h * K
    r_ptr += ((b * H + h) * tl.cdiv(length, Q) + start // Q) * FACTORS + start % Q
    x = load_tile(x_ptr, rows, cols, left, K, X_STRIDE_L, FULL, FULL_K).to(tl.float32)
    dx = load_tile(dx_ptr, rows, cols, left, K, H * K, FULL, FULL_K).to(tl.float32)
    r = tl.load(r_ptr + rows)
    dx -= x * (tl.sum(dx * x, axis=1) * r * r)[:, None]
    store_tile(dx_ptr, dx, rows, cols, left, K, H * K, FULL, FULL_K)


@triton.jit
def _sum_parts_kernel(
    parts_ptr, factors_ptr, doc_ptr, ddecay_ptr, dbeta_ptr, length,
    H: tl.constexpr, BH: tl.constexpr, BLOCKS: tl.constexpr, BV: tl.constexpr, Q: tl.constexpr,
    HAS_DOC: tl.constexpr,
):  # fmt: skip
    """The gradients of decay and beta in a chunk of BH heads."""
    c, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n_chunks = tl.num_programs(0)
    rows, values = tl.arange(0, Q)[None, :], tl.arange(0, BV)[None, :]
    heads = (tl.program_id(2) * BH + tl.arange(0, BH))[:, None]
    mask = (heads < H) & (rows >= 0)
    wide = (heads < H) & (values >= 0)
    at = (b * H + heads) * n_chunks + c
    factors = factors_ptr + at * FACTORS
    parts = parts_ptr + at * (BLOCKS * PARTS)
    beta = tl.load(factors + BETA + rows, mask=mask, other=0.0)
    begins = tl.load(parts + BEGIN + rows, mask=mask, other=0.0)
    dbeta = tl.load(parts + OWN + rows, mask=mask, other=0.0) + begins
    ends = tl.load(parts + END + rows, mask=mask, other=0.0) - begins * beta
    leaves = tl.zeros((BH, Q), tl.float32)
    through = tl.zeros((BH, BV), tl.float32)
    for block in tl.static_range(BLOCKS):  # of the key's channels
        ends += tl.load(parts + block * PARTS + SEEN_Q + rows, mask=mask, other=0.0)
        ends += tl.load(parts + block * PARTS + SEEN_K + rows, mask=mask, other=0.0)
        leaves += tl.load(parts + block * PARTS + LEAVES + rows, mask=mask, other=0.0)
        through += tl.load(parts + block * PARTS + THROUGH + values, mask=wide, other=0.0)
    dbeta += leaves
    leaves *= beta
    kept = tl.load(factors + KEEP, mask=heads < H, other=0.0)
    # a token's decay lies in every span that begins before it and ends at it or later
    ddecay = tl.cumsum(ends, axis=1, reverse=True) + (tl.cumsum(leaves, axis=1) - leaves)
    ddecay += tl.sum(through, axis=1)[:, None] * kept
    inside = mask & (c * Q + rows < length)
    if HAS_DOC:
        doc = tl.load(doc_ptr + b * length + c * Q + rows, mask=c * Q + rows < length, other=0)
        ddecay = tl.where(doc == c * Q + rows, 0.0, ddecay)
    to = (b * length + c * Q + rows) * H + heads
    tl.store(ddecay_ptr + to, ddecay, mask=inside)
    tl.store(dbeta_ptr + to, dbeta, mask=inside)


@dataclass(frozen=True)
class Config:
    """Warps of a program, value channels of a block (of the gradients at most 64), software-
    pipelining stages and the precision of products of float32; key channels of a block, of the
    gradients and of the preparation; and whether the gradients pass over the values twice."""

    warps: int
    values: int = 64
    stages: int = 2
    precision: str = "ieee"
    keys: int = 256
    twice: bool = False


# Kernel and widest key -> options, with which 16-bit data spill no registers. sm_90 multiplies what
# lies in shared memory; the tables of the other architectures keep within 99 kB and have chunks of
# 32, as their operands lie in registers. Products of float32 in three parts of tf32 take three
# times the registers, so the gradients are plain; narrow ones keep to 4 warps, as in `ssd_triton`.
HOPPER = {
    ("prepare", 256): Config(4),
    ("scan", 128): Config(4),
    ("scan", 256): Config(8, values=32),
    ("reverse", 128): Config(4),
    ("reverse", 256): Config(8, values=32, stages=1),
    ("gradient", 256): Config(8, keys=128),
}
OTHER = {
    ("prepare", 256): Config(4, keys=128),
    ("scan", 128): Config(4),
    ("scan", 256): Config(8, values=32),
    ("reverse", 128): Config(4, values=32),
    ("reverse", 256): Config(8, values=32),
    ("gradient", 256): Config(8, values=32, keys=128, twice=True),
}
SINGLE = {
    ("prepare", 128): Config(4, precision="tf32x3", keys=32),
    ("scan", 64): Config(4, values=16, stages=1, precision="tf32x3"),
    ("scan", 128): Config(8, values=16, stages=1, precision="tf32x3"),
    ("reverse", 64): Config(4, values=16, stages=1, precision="tf32x3"),
    ("reverse", 128): Config(8, values=16, stages=1, precision="tf32x3"),
    ("gradient", 128): Config(8, values=16, stages=1, keys=32, twice=True),
}


def table(x: Tensor) -> dict[tuple[str, int], Config]:
    """The launch options for data like x; in the interpreter those of sm_90."""
    if x.element_size() == 4:
        return SINGLE
    hopper = not x.is_cuda or torch.cuda.get_device_capability(x.device) == (9, 0)
    return HOPPER if hopper else OTHER


def chunk(x: Tensor) -> int:
    """Tokens of a chunk for data like x."""
    return 64 if table(x) is HOPPER else 32


def config(kernel: str, q: Tensor, values: int) -> Config:
    """The launch options of a kernel for queries like q and values of this width."""
    width = q.shape[3]
    options = table(q)
    found = options[min(key for key in options if key[0] == kernel and key[1] >= width)]
    return dataclasses.replace(
        found, values=min(found.values, _block(values)), keys=min(found.keys, _block(width))
    )


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def prepare(
    q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, doc: Tensor | None, scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Factors of the tokens (B, H, c, 9, 64), float32, and the matrices N and P (B, H, c, 2, Q, Q)
    in q's type."""
    b, length, n_heads, width = q.shape
    Q = chunk(q)
    n_chunks = triton.cdiv(length, Q)
    factors = q.new_empty((b, n_heads, n_chunks, 9, 64), dtype=torch.float32)
    pairs = q.new_empty((b, n_heads, n_chunks, 2, Q, Q))
    options = config("prepare", q, 16)
    unit = batch_unit(q, k)
    _prepare_kernel[(n_chunks, n_heads, b)](
        q, k, log_decay, beta, doc, factors, pairs,
        q.stride(0) // unit, k.stride(0) // unit, log_decay.stride(0), beta.stride(0), length,
        scale, STRONGEST, NORM_EPS,
        UNIT=unit, Q_STRIDE_L=q.stride(1), K_STRIDE_L=k.stride(1),
        DECAY_STRIDE_L=log_decay.stride(1), BETA_STRIDE_L=beta.stride(1), H=n_heads, K=width,
        BK=options.keys, Q=Q, NORMALIZE=normalize, HAS_DOC=doc is not None,
        FULL=length % Q == 0, PREC=options.precision,
        # of blocks of N, which 16-bit data round to fewer bits than tf32 has
        SOLVE="tf32x3" if q.dtype == torch.float32 else "tf32", num_warps=options.warps,
    )  # fmt: skip
    return factors, pairs


def scan(
    q: Tensor, k: Tensor, v: Tensor, factors: Tensor, pairs: Tensor,
    first: Tensor | None, output: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (B, L, H, V) and the last state (B, H, K, V), or, without `output`, e (B, L, H, V) and the
    states before each chunk (B, c, H, V, K) in v's type."""
    b, length, n_heads, width = k.shape
    values = v.shape[3]
    n_chunks, Q = pairs.shape[2], pairs.shape[4]
    out = v.new_empty((b, length, n_heads, values))
    if output:
        states = v.new_empty((b, n_heads, width, values), dtype=torch.float32)
    else:
        states = v.new_empty((b, n_chunks, n_heads, values, width))
    options = config("scan", q, values)
    unit = batch_unit(q, k, v)
    _scan_kernel[(triton.cdiv(values, options.values), n_heads, b)](
        q, k, v, factors, pairs, first, out, states,
        q.stride(0) // unit, k.stride(0) // unit, v.stride(0) // unit, length, n_chunks,
        UNIT=unit, Q_STRIDE_L=q.stride(1), K_STRIDE_L=k.stride(1), V_STRIDE_L=v.stride(1),
        H=n_heads, K=width, V=values, BK=_block(width), BV=options.values, Q=Q,
        HAS_FIRST=first is not None, OUTPUT=output, FULL=length % Q == 0,
        PREC=options.precision, STAGES=options.stages, num_warps=options.warps,
    )  # fmt: skip
    return out, states


def reverse(
    do: Tensor, q: Tensor, k: Tensor, factors: Tensor, pairs: Tensor,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dv (B, L, H, V), the gradients of the states after each chunk (B, c, H, V, K) in its type,
    and that of the first state (B, H, K, V) in float32; do is dense."""
    b, length, n_heads, values = do.shape
    width = k.shape[3]
    n_chunks, Q = pairs.shape[2], pairs.shape[4]
    dv = do.new_empty(do.shape)
    dstates = do.new_empty((b, n_chunks, n_heads, values, width))
    dfirst = do.new_empty((b, n_heads, width, values), dtype=torch.float32)
    options = config("reverse", q, values)
    unit = batch_unit(q, k)
    _reverse_kernel[(triton.cdiv(values, options.values), n_heads, b)](
        do, q, k, factors, pairs, dlast, dv, dstates, dfirst,
        q.stride(0) // unit, k.stride(0) // unit, length, n_chunks,
        UNIT=unit, Q_STRIDE_L=q.stride(1), K_STRIDE_L=k.stride(1), H=n_heads, K=width, V=values,
        BK=_block(width), BV=options.values, Q=Q, HAS_LAST=dlast is not None,
        FULL=length % Q == 0, PREC=options.precision, STAGES=options.stages,
        num_warps=options.warps,
    )  # fmt: skip
    return dv, dstates, dfirst


def gradients(
    do: Tensor, dv: Tensor, e: Tensor, q: Tensor, k: Tensor, doc: Tensor | None, factors: Tensor,
    states: Tensor, dstates: Tensor, scale: float, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq and dk (B, L, H, K) in q's type, and the gradients of decay and beta (B, L, H) in
    float32."""
    b, length, n_heads, width = q.shape
    values = do.shape[3]
    n_chunks, Q = states.shape[1], chunk(q)
    dq, dk = (q.new_empty(q.shape) for _ in range(2))
    ddecay, dbeta = (factors.new_empty((b, length, n_heads)) for _ in range(2))
    options = config("gradient", q, values)
    blocks = triton.cdiv(width, options.keys)
    parts = factors.new_empty((b, n_heads, n_chunks, blocks, 7, 64))
    unit = batch_unit(q, k)
    _gradient_kernel[(n_chunks, n_heads * blocks, b)](
        do, dv, e, q, k, doc, factors, states, dstates, dq, dk, parts,
        q.stride(0) // unit, k.stride(0) // unit, length, scale,
        UNIT=unit, Q_STRIDE_L=q.stride(1), K_STRIDE_L=k.stride(1), H=n_heads, K=width, V=values,
        BK=options.keys, BV=options.values, Q=Q, NORMALIZE=normalize and blocks == 1,
        HAS_DOC=doc is not None, FULL=length % Q == 0, PREC=options.precision,
        TWICE=options.twice, STAGES=options.stages, num_warps=options.warps,
    )  # fmt: skip
    if normalize and blocks > 1:
        for x, dx, r in ((q, dq, factors[0, 0, 0, 2]), (k, dk, factors[0, 0, 0, 3])):
            _project_kernel[(n_chunks * (Q // 16), n_heads, b)](
                x, dx, r, x.stride(0) // unit, length,
                UNIT=unit, X_STRIDE_L=x.stride(1), H=n_heads, K=width, BK=_block(width), BL=16,
                Q=Q, FULL=length % Q == 0, num_warps=4,
            )  # fmt: skip
    block = min(8, triton.next_power_of_2(n_heads))
    _sum_parts_kernel[(n_chunks, b, triton.cdiv(n_heads, block))](
        parts, factors, doc, ddecay, dbeta, length,
        H=n_heads, BH=block, BLOCKS=blocks, BV=options.values, Q=Q, HAS_DOC=doc is not None,
        num_warps=2,
    )  # fmt: skip
    return dq, dk, ddecay, dbeta


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, first: Tensor | None,
    doc: Tensor | None, scale: float, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    log_decay, beta = dense_last(log_decay), dense_last(beta)
    factors, pairs = prepare(q, k, log_decay, beta, doc, scale, normalize)
    return (*scan(q, k, v, factors, pairs, first, True), factors, pairs)


def _forward_fake(q, k, v, *_):
    b, length, n_heads, width = q.shape
    Q = chunk(q)
    n_chunks = (length + Q - 1) // Q
    return (
        q.new_empty(v.shape),
        q.new_empty((b, n_heads, width, v.shape[3]), dtype=torch.float32),
        q.new_empty((b, n_heads, n_chunks, 9, 64), dtype=torch.float32),
        q.new_empty((b, n_heads, n_chunks, 2, Q, Q)),
    )


def _backward(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None,
    doc: Tensor | None, factors: Tensor, pairs: Tensor, scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, do = dense_rows(q), dense_rows(k), dense_rows(v), do.contiguous()
    dlast = contiguous(dlast)
    e, states = scan(q, k, v, factors, pairs, first, False)
    dv, dstates, dfirst = reverse(do, q, k, factors, pairs, dlast)
    dq, dk, ddecay, dbeta = gradients(
        do, dv, e, q, k, doc, factors, states, dstates, scale, normalize
    )
    return dq, dk, dv, ddecay, dbeta, dfirst


def _backward_fake(do, dlast, q, k, v, first, doc, factors, *_):
    b, length, n_heads, width = q.shape
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        factors.new_empty((b, length, n_heads)),
        factors.new_empty((b, length, n_heads)),
        factors.new_empty((b, n_heads, width, v.shape[3])),
    )


_forward_op = define_op(
    "gated_delta_rule_forward(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, "
    "Tensor? first, Tensor? doc, float scale, bool normalize) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    several=True,
)
_backward_op = define_op(
    "gated_delta_rule_backward(Tensor do, Tensor? dlast, Tensor q, Tensor k, Tensor v, "
    "Tensor? first, Tensor? doc, Tensor factors, Tensor pairs, float scale, "
    "bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    several=True,
)


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
        first: Tensor | None, doc: Tensor | None, scale: float, normalize: bool,
    ) -> Any:  # fmt: skip
        o, last, factors, pairs = _forward_op(
            q, k, v, log_decay, beta, first, doc, scale, normalize
        )
        ctx.save_for_backward(q, k, v, first, doc, factors, pairs)
        ctx.scale, ctx.normalize = scale, normalize
        ctx.dtypes = log_decay.dtype, beta.dtype
        ctx.first_dtype = None if first is None else first.dtype
        ctx.set_materialize_grads(False)
        return o, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        q, k, v, first, doc, factors, pairs = ctx.saved_tensors
        do = torch.zeros_like(v) if grads[0] is None else grads[0]
        dq, dk, dv, ddecay, dbeta, dfirst = _backward_op(
            do, grads[1], q, k, v, first, doc, factors, pairs, ctx.scale, ctx.normalize
        )
        ddecay, dbeta = ddecay.to(ctx.dtypes[0]), dbeta.to(ctx.dtypes[1])
        dfirst = None if ctx.first_dtype is None else dfirst.to(ctx.first_dtype)
        return dq, dk, dv, ddecay, dbeta, dfirst, None, None, None


def gated_delta_rule_triton(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHV: Tensor, log_decay_BLH: Tensor, beta_BLH: Tensor, *,
    scale: float | None = None, normalize_qk: bool = False,
    initial_state_BHKV: Tensor | None = None, return_final_state: bool = False,
    doc_start_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`ablate.kernels.gated_delta_rule` on a GPU; q, k and v share one type, rows are read in
    place, and states between chunks have that type."""
    k, v = k_BLHK.to(q_BLHK.dtype), v_BLHV.to(q_BLHK.dtype)
    scale = q_BLHK.shape[3] ** -0.5 if scale is None else scale
    first, doc = contiguous(initial_state_BHKV), starts(doc_start_BL)
    o, last = _GatedDeltaRule.apply(
        q_BLHK, k, v, log_decay_BLH, beta_BLH, first, doc, scale, normalize_qk
    )
    return (o, last) if return_final_state else o
