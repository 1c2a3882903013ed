"""Triton kernels of gated linear attention (`ablate.kernels.gla` has the definition, the legend and
the way decays between pairs are found without overflow).

Everything works on chunks of Q = 64 tokens (32 in float32) and on blocks of keys and of values, so
that widths which are no powers of two cost nothing. Forward:

1. `_spans_kernel`: the matrices of 0 and 1 whose products with log decays are exponents. Both
   factors are exact in bfloat16, log decays of more bits in pieces.
2. `_pairs_kernel`, per chunk and head: the scores of all pairs, the queries decayed from the start
   of the chunk, the keys decayed to its end, and what the chunk keeps of the state. Where a chunk
   forgets little one product does for all pairs, else one for each bit. Documents and the scale of
   the queries end here: what follows is matrix products.
3. `_state_kernel`: walks the chunks of one head in order with a block of the state in registers and
   writes the state that enters each chunk. Short of parallel work it runs twice over segments of
   the sequence: first only their end states, then, started from the states before them, the whole.
4. `_mix_kernel`: y = decayed queries times the state + scores times the values.

Only the inputs are kept. Backward: 1 and 2 again; `_state_kernel` in reverse over (decayed queries,
dy) gives the gradient of the state that leaves each chunk; `_mix_kernel` that of values and scores;
3 again; `_passed_kernel` what comes to queries, keys and decays through the states, `_grad_kernel`
the rest of it. The gradient of an exponent goes back through the product that made it, within its
chunk, so that of the decays is free of the cancellation of a sum over the sequence. Nothing needs
atomics: two runs agree bit for bit.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ablate.kernels.dispatch import define_op
from ablate.kernels.gla import CHUNK, FORGET
from ablate.kernels.tiles_triton import (
    LOG2E,
    batch_unit,
    before_90,
    contiguous,
    dense_rows,
    load_tile,
    precision,
    starts,
    store_tile,
)


@dataclass(frozen=True)
class Config:
    """Keys and values of a block, warps of a program, stages of its pipelined loads."""

    keys: int
    values: int
    warps: int
    stages: int


CHUNKS = {2: CHUNK, 4: 32}  # tokens of a chunk by bytes per element
# By kernel and bytes per element, for sm_90; within the shared memory of every architecture. Pairs
# fetch nothing ahead: Triton 3.6 and 3.7 read a block again, for its parts, after they have begun
# to overwrite it with the next one. The gradient has 2 warps, which is too few for wgmma: of so
# many of them ptxas 12.8 loses addresses, and with 4 or 8 warps results are wrong, or it faults.
CONFIGS = {
    ("pairs", 2): Config(32, 0, 4, 1),
    ("state", 2): Config(64, 64, 4, 2),
    ("mix", 2): Config(64, 128, 4, 2),
    ("dmix", 2): Config(64, 64, 4, 2),
    ("passed", 2): Config(64, 64, 4, 2),
    ("grad", 2): Config(16, 0, 2, 1),
    ("pairs", 4): Config(32, 0, 4, 1),
    ("state", 4): Config(32, 64, 4, 2),
    ("mix", 4): Config(64, 64, 4, 2),
    ("dmix", 4): Config(32, 32, 4, 2),
    ("passed", 4): Config(32, 32, 4, 2),
    ("grad", 4): Config(16, 0, 4, 1),
}
# where the same would spill
BEFORE_90 = {("pairs", 2): Config(16, 0, 4, 1), ("grad", 2): Config(16, 0, 4, 1)}
PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # of 8 bits
STATE_PROGRAMS = 384  # programs that fill a large GPU; fewer, and the sequence is cut into segments
SEGMENT_CHUNKS = 8  # chunks of a segment, or more


@triton.jit
def _spans_kernel(spans_ptr, Q: tl.constexpr, BITS: tl.constexpr):
    """Matrices of 0 and 1 whose products with log decays are exponents (BITS + 2, Q, Q): for each
    bit of an index, of a token in an upper half those of the half up to itself, of a token in a
    lower half those of the half after itself; then so for the chunk as an upper and a lower half.

    Read from memory they cost a load; made where they are used, they would hold registers and be
    stored number by number.
    """
    bit = tl.program_id(0)
    rows = tl.arange(0, Q)
    t, r = rows[:, None], rows[None, :]
    chunk = bit >= BITS
    upper = tl.where(chunk, bit == BITS, ((t >> bit) & 1) == 1)
    inside = chunk | (((t ^ r) >> bit) == 0)
    ones = tl.where(inside & ((r <= t) == upper), 1.0, 0.0)
    tl.store(spans_ptr + bit * Q * Q + t * Q + r, ones.to(tl.bfloat16))


@triton.jit
def _sums(spans, x, acc, PIECES: tl.constexpr):
    """acc + spans x, of which spans are 0 or 1, to PIECES times the 8 bits of bfloat16."""
    piece = x.to(tl.bfloat16)
    acc = tl.dot(spans, piece, acc)
    for _ in tl.static_range(1, PIECES):
        x = x.to(tl.float32) - piece.to(tl.float32)
        piece = x.to(tl.bfloat16)
        acc = tl.dot(spans, piece, acc)
    return acc


@triton.jit
def _decay(spans, g, PIECES: tl.constexpr):
    """exp of sums of g, which are at most zero."""
    zero = tl.zeros(g.shape, tl.float32)
    return tl.exp2(_sums(spans, g, zero, PIECES) * LOG2E)


@triton.jit
def _pairs_kernel(
    q_ptr, k_ptr, g_ptr, spans_ptr, doc_ptr, scores_ptr, seen_ptr, leaving_ptr, keep_ptr,
    q_batch, k_batch, g_batch, length, n_chunks, scale,
    UNIT: tl.constexpr, Q_ROW: tl.constexpr, K_ROW: tl.constexpr, G_ROW: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr,
    FORGET: tl.constexpr, SAFE: tl.constexpr, HAS_DOC: tl.constexpr, FULL: tl.constexpr,
    PREC: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """scores (Q, Q) of one chunk and head, [t, s]; queries decayed from the start of the chunk
    where they see the state, keys decayed to its end where they reach it, and what it keeps."""
    chunk = tl.program_id(0)
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    start = chunk * Q
    left = length - start
    wide = start.to(tl.int64)
    rows = tl.arange(0, Q)
    t, r = rows[:, None], rows[None, :]
    FULL_K: tl.constexpr = K % BK == 0
    q_ptr += b * q_batch * UNIT + wide * Q_ROW + h * K
    k_ptr += b * k_batch * UNIT + wide * K_ROW + h * K
    g_ptr += b * g_batch * UNIT + wide * G_ROW + h * K
    seen_ptr += ((b * length + wide) * H + h) * K
    leaving_ptr += ((b * length + wide) * H + h) * K
    at = (b * n_chunks + chunk) * H + h

    spans = spans_ptr + t * Q + r
    allowed = r <= t
    if HAS_DOC:
        doc = tl.load(doc_ptr + b * length + start + rows, mask=rows < left, other=0)
        doc_last = tl.load(doc_ptr + b * length + tl.minimum(start + Q, length) - 1)
        allowed = allowed & (start + r >= doc[:, None])
    scores = tl.zeros((Q, Q), tl.float32)
    for first in tl.range(0, K, BK, num_stages=STAGES):
        cols = first + tl.arange(0, BK)
        g = load_tile(g_ptr, rows, cols, left, K, G_ROW, FULL, FULL_K)
        g = tl.maximum(g.to(tl.float32), FORGET).to(g.dtype)
        q = load_tile(q_ptr, rows, cols, left, K, Q_ROW, FULL, FULL_K)
        k = load_tile(k_ptr, rows, cols, left, K, K_ROW, FULL, FULL_K)
        keep = tl.exp2(tl.sum(g.to(tl.float32), axis=0) * LOG2E)
        after = _decay(tl.load(spans + (BITS + 1) * Q * Q), g, PIECES)
        late = (k.to(tl.float32) * after).to(q.dtype)
        before = _decay(tl.load(spans + BITS * Q * Q), g, PIECES) * scale
        seen = q.to(tl.float32) * before
        kept, visible, leaving = keep, seen, late
        if HAS_DOC:
            kept = tl.where(doc_last < start, keep, 0.0)
            visible = tl.where((doc < start)[:, None], seen, 0.0)
            leaving = tl.where((start + rows >= doc_last)[:, None], late, 0.0)
        tl.store(keep_ptr + at * K + cols, kept, mask=cols < K)
        store_tile(seen_ptr, visible, rows, cols, left, K, H * K, FULL, FULL_K)
        store_tile(leaving_ptr, leaving, rows, cols, left, K, H * K, FULL, FULL_K)
        if tl.min(keep) > SAFE:
            early = (seen / keep[None, :]).to(q.dtype)
            scores = tl.dot(early, tl.trans(late), scores, input_precision=PREC)
        else:
            own = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * scale
            scores += tl.where(t == r, own[:, None], 0.0)
            for bit in tl.range(BITS, num_stages=2):
                half = rows >> bit
                upper = (half & 1) == 1
                decay = _decay(tl.load(spans + bit * Q * Q), g, PIECES)
                decay *= tl.where(upper, scale, 1.0)[:, None]
                x = (tl.where(upper[:, None], q, k).to(tl.float32) * decay).to(q.dtype)
                products = tl.dot(x, tl.trans(x), input_precision=PREC)
                scores += tl.where((half ^ 1)[:, None] == half[None, :], products, 0.0)
    scores = tl.where(allowed, scores, 0.0)
    tl.store(scores_ptr + at * (Q * Q) + t * Q + r, scores.to(scores_ptr.dtype.element_ty))


@triton.jit
def _state_kernel(
    x_ptr, m_ptr, keep_ptr, first_ptr, states_ptr, segment_ptr, kept_ptr, last_ptr,
    m_batch, length, n_chunks, per_segment, n_segments,
    UNIT: tl.constexpr, M_ROW: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    Q: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, FULL: tl.constexpr,
    PASS: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state before each chunk (REVERSE: the gradient of the state after it), K x V, from
    sources x (B, L, H, K) and m (B, L, H, V).

    PASS 0: one segment, the whole sequence. PASS 1: the end state of each segment started from
    zero, and what it keeps of a state before it. PASS 2: all, from the results of PASS 1.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    h = tl.program_id(1) % H
    b = (tl.program_id(1) // H).to(tl.int64)
    segment = tl.program_id(2)
    rows = tl.arange(0, Q)
    k = tl.program_id(0) // TILES * BK + tl.arange(0, BK)
    v = tl.program_id(0) % TILES * BV + tl.arange(0, BV)
    FULL_K: tl.constexpr = K % BK == 0
    FULL_V: tl.constexpr = V % BV == 0
    tile = k[:, None] * V + v[None, :]
    inside = (k[:, None] < K) & (v[None, :] < V)
    x_ptr += (b * length * H + h) * K
    m_ptr += b * m_batch * UNIT + h * V

    state = tl.zeros((BK, BV), tl.float32)
    if HAS_FIRST:
        mine = inside & (segment == 0)
        first = tl.load(first_ptr + (b * H + h) * K * V + tile, mask=mine, other=0.0)
        state += first.to(tl.float32)
    if PASS == 2:
        for j in range(segment):
            at = (b * H + h) * n_segments + j
            kept = tl.load(kept_ptr + at * K + k, mask=k < K, other=0.0)
            added = tl.load(segment_ptr + at * K * V + tile, mask=inside, other=0.0)
            state = state * kept[:, None] + added
    total = tl.full((BK,), 1.0, tl.float32)
    begin = segment * per_segment
    end = tl.minimum(begin + per_segment, n_chunks)
    for i in tl.range(begin, end, num_stages=STAGES):
        c = n_chunks - 1 - i if REVERSE else i
        start = c * Q
        left = length - start
        wide = start.to(tl.int64)
        x = load_tile(x_ptr + wide * (H * K), rows, k, left, K, H * K, FULL, FULL_K)
        m = load_tile(m_ptr + wide * M_ROW, rows, v, left, V, M_ROW, FULL, FULL_V)
        at = (b * n_chunks + c) * H + h
        keep = tl.load(keep_ptr + at * K + k, mask=k < K, other=0.0)
        if PASS != 1:
            store_tile(states_ptr + at * (K * V), state, k, v, K, V, V, FULL_K, FULL_V)
        state = tl.dot(tl.trans(x), m, state * keep[:, None], input_precision=PREC)
        total *= keep
    if PASS == 1:
        at = (b * H + h) * n_segments + segment
        tl.store(segment_ptr + at * K * V + tile, state, mask=inside)
        tl.store(kept_ptr + at * K + k, total, mask=k < K)
    elif segment == n_segments - 1:
        tl.store(last_ptr + (b * H + h) * K * V + tile, state, mask=inside)


@triton.jit
def _mix_kernel(
    x_ptr, states_ptr, scores_ptr, m_ptr, v_ptr, doc_ptr, y_ptr, dscores_ptr,
    m_batch, v_batch, length, n_chunks,
    UNIT: tl.constexpr, M_ROW: tl.constexpr, V_ROW: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    Q: tl.constexpr, BACKWARD: tl.constexpr, HAS_DOC: tl.constexpr, FULL: tl.constexpr,
    PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = x S + scores m for one chunk and head, of one block of values.

    BACKWARD: of all values, y = x S + scores^T m, which is dv for m = dy; and the gradient of
    scores, m v^T, symmetric: [t, s] and [s, t] are that of the pair.
    """
    TILES: tl.constexpr = 1 if BACKWARD else (V + BV - 1) // BV
    chunk = tl.program_id(0) // TILES
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    start = chunk * Q
    left = length - start
    wide = start.to(tl.int64)
    rows = tl.arange(0, Q)
    t, r = rows[:, None], rows[None, :]
    FULL_K: tl.constexpr = K % BK == 0
    FULL_V: tl.constexpr = V % BV == 0
    at = (b * n_chunks + chunk) * H + h
    x_ptr += ((b * length + wide) * H + h) * K
    y_ptr += ((b * length + wide) * H + h) * V
    m_ptr += b * m_batch * UNIT + wide * M_ROW + h * V
    states_ptr += at * (K * V)
    if BACKWARD:
        v_ptr += b * v_batch * UNIT + wide * V_ROW + h * V

    scores = tl.load(scores_ptr + at * (Q * Q) + t * Q + r)
    if BACKWARD:
        scores = tl.trans(scores)
    dscores = tl.zeros((Q, Q), tl.float32)
    STEPS: tl.constexpr = (V + BV - 1) // BV if BACKWARD else 1
    for step in range(STEPS):
        n = (tl.program_id(0) % TILES + step) * BV + tl.arange(0, BV)
        m = load_tile(m_ptr, rows, n, left, V, M_ROW, FULL, FULL_V)
        y = tl.dot(scores, m, input_precision=PREC)
        for k_begin in tl.range(0, K, BK, num_stages=STAGES):
            k = k_begin + tl.arange(0, BK)
            x = load_tile(x_ptr, rows, k, left, K, H * K, FULL, FULL_K)
            state = load_tile(states_ptr, k, n, K, V, V, FULL_K, FULL_V)
            y = tl.dot(x, state, y, input_precision=PREC)
        store_tile(y_ptr, y, rows, n, left, V, H * V, FULL, FULL_V)
        if BACKWARD:
            v = load_tile(v_ptr, rows, n, left, V, V_ROW, FULL, FULL_V)
            dscores = tl.dot(m, tl.trans(v), dscores, input_precision=PREC)
    if BACKWARD:
        if HAS_DOC:
            doc = tl.load(doc_ptr + b * length + start + rows, mask=rows < left, other=0)
            dscores = tl.where(start + r >= doc[:, None], dscores, 0.0)
        half = dscores.to(dscores_ptr.dtype.element_ty)
        out = dscores_ptr + at * (Q * Q) + t * Q + r
        tl.store(out, tl.where(r <= t, half, tl.trans(half)))


@triton.jit
def _passed_kernel(
    v_ptr, dy_ptr, states_ptr, dstates_ptr, dseen_ptr, dleaving_ptr, through_ptr,
    v_batch, length, n_chunks,
    UNIT: tl.constexpr, V_ROW: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    Q: tl.constexpr, FULL: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What passes between chunks, for one chunk, head and block of keys: the gradients of decayed
    queries and keys, and <state before, gradient of the state after> of each key, (B, c, H, K)."""
    TILES: tl.constexpr = (K + BK - 1) // BK
    chunk = tl.program_id(0) // TILES
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    start = chunk * Q
    left = length - start
    wide = start.to(tl.int64)
    rows = tl.arange(0, Q)
    k = tl.program_id(0) % TILES * BK + tl.arange(0, BK)
    FULL_K: tl.constexpr = K % BK == 0
    FULL_V: tl.constexpr = V % BV == 0
    at = (b * n_chunks + chunk) * H + h
    row = (b * length + wide) * H + h
    v_ptr += b * v_batch * UNIT + wide * V_ROW + h * V
    dy_ptr += row * V
    states_ptr += at * (K * V)
    dstates_ptr += at * (K * V)

    dseen = tl.zeros((Q, BK), tl.float32)
    dleaving = tl.zeros((Q, BK), tl.float32)
    through = tl.zeros((BK,), tl.float32)
    for begin in tl.range(0, V, BV, num_stages=STAGES):
        n = begin + tl.arange(0, BV)
        dy = load_tile(dy_ptr, rows, n, left, V, H * V, FULL, FULL_V)
        v = load_tile(v_ptr, rows, n, left, V, V_ROW, FULL, FULL_V)
        state = load_tile(states_ptr, k, n, K, V, V, FULL_K, FULL_V)
        dstate = load_tile(dstates_ptr, k, n, K, V, V, FULL_K, FULL_V)
        dseen = tl.dot(dy, tl.trans(state), dseen, input_precision=PREC)
        dleaving = tl.dot(v, tl.trans(dstate), dleaving, input_precision=PREC)
        through += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1)
    store_tile(dseen_ptr + row * K, dseen, rows, k, left, K, H * K, FULL, FULL_K)
    store_tile(dleaving_ptr + row * K, dleaving, rows, k, left, K, H * K, FULL, FULL_K)
    tl.store(through_ptr + at * K + k, through, mask=k < K)


@triton.jit
def _grad_kernel(
    q_ptr, k_ptr, g_ptr, spans_ptr, doc_ptr, dscores_ptr, dseen_ptr, dleaving_ptr, through_ptr,
    dq_ptr, dk_ptr, dg_ptr, q_batch, k_batch, g_batch, length, n_chunks, scale,
    UNIT: tl.constexpr, Q_ROW: tl.constexpr, K_ROW: tl.constexpr, G_ROW: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr,
    FORGET: tl.constexpr, SAFE: tl.constexpr, HAS_DOC: tl.constexpr, FULL: tl.constexpr,
    PREC: tl.constexpr, PIECES: tl.constexpr, DPIECES: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg of one chunk, head and block of keys."""
    TILES: tl.constexpr = (K + BK - 1) // BK
    chunk = tl.program_id(0) // TILES
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    start = chunk * Q
    left = length - start
    wide = start.to(tl.int64)
    rows = tl.arange(0, Q)
    t, r = rows[:, None], rows[None, :]
    cols = tl.program_id(0) % TILES * BK + tl.arange(0, BK)
    FULL_K: tl.constexpr = K % BK == 0
    at = (b * n_chunks + chunk) * H + h
    out = ((b * length + wide) * H + h) * K
    q_ptr += b * q_batch * UNIT + wide * Q_ROW + h * K
    k_ptr += b * k_batch * UNIT + wide * K_ROW + h * K
    g_ptr += b * g_batch * UNIT + wide * G_ROW + h * K

    g = load_tile(g_ptr, rows, cols, left, K, G_ROW, FULL, FULL_K)
    g = tl.maximum(g.to(tl.float32), FORGET).to(g.dtype)
    q = load_tile(q_ptr, rows, cols, left, K, Q_ROW, FULL, FULL_K)
    k = load_tile(k_ptr, rows, cols, left, K, K_ROW, FULL, FULL_K)
    through = tl.load(through_ptr + at * K + cols, mask=cols < K, other=0.0)
    keep = tl.exp2(tl.sum(g.to(tl.float32), axis=0) * LOG2E)
    spans = spans_ptr + t * Q + r
    until, beyond = tl.load(spans + BITS * Q * Q), tl.load(spans + (BITS + 1) * Q * Q)
    before, after = _decay(until, g, PIECES) * scale, _decay(beyond, g, PIECES)
    dq = load_tile(dseen_ptr + out, rows, cols, left, K, H * K, FULL, FULL_K).to(tl.float32)
    dk = load_tile(dleaving_ptr + out, rows, cols, left, K, H * K, FULL, FULL_K).to(tl.float32)
    dq *= before
    dk *= after
    if HAS_DOC:
        doc = tl.load(doc_ptr + b * length + start + rows, mask=rows < left, other=0)
        doc_last = tl.load(doc_ptr + b * length + tl.minimum(start + Q, length) - 1)
        dq = tl.where((doc < start)[:, None], dq, 0.0)
        dk = tl.where((start + rows >= doc_last)[:, None], dk, 0.0)
        through = tl.where(doc_last < start, through, 0.0)
    # exponents: of the whole chunk, of its parts up to a token and after a token
    dg = tl.zeros((Q, BK), tl.float32) + (keep * through)[None, :]
    dg = _sums(tl.trans(until), q.to(tl.float32) * dq, dg, DPIECES)
    dg = _sums(tl.trans(beyond), k.to(tl.float32) * dk, dg, DPIECES)
    dscores_ptr += at * (Q * Q)
    if tl.min(keep) > SAFE:
        dscores = tl.load(dscores_ptr + t * Q + r)
        pairs = tl.where(r <= t, dscores, 0.0).to(q.dtype)
        before /= keep[None, :]
        early = (q.to(tl.float32) * before).to(q.dtype)
        late = (k.to(tl.float32) * after).to(q.dtype)
        dearly = tl.dot(pairs, late, input_precision=PREC)
        dlate = tl.dot(tl.trans(pairs), early, input_precision=PREC)
        dq += dearly * before
        dk += dlate * after
        # with the rounded factors, so that pairs on one side of a decay cancel in its sum
        dafter = late.to(tl.float32) * dlate - early.to(tl.float32) * dearly
        dg = _sums(tl.trans(beyond), dafter, dg, DPIECES)
    else:
        own = tl.load(dscores_ptr + rows * (Q + 1)).to(tl.float32) * scale
        dq += own[:, None] * k.to(tl.float32)
        dk += own[:, None] * q.to(tl.float32)
        for bit in tl.range(BITS, num_stages=1):
            half = rows >> bit
            upper = (half & 1) == 1
            span = tl.load(spans + bit * Q * Q)
            decay = _decay(span, g, PIECES) * tl.where(upper, scale, 1.0)[:, None]
            dscores = tl.load(dscores_ptr + t * Q + r)
            weight = tl.where((half ^ 1)[:, None] == half[None, :], dscores, 0.0).to(q.dtype)
            x = tl.where(upper[:, None], q, k)
            # one product serves the two tokens of a pair
            decayed = (x.to(tl.float32) * decay).to(q.dtype)
            dx = tl.dot(weight, decayed, input_precision=PREC) * decay
            dq += tl.where(upper[:, None], dx, 0.0)
            dk += tl.where(upper[:, None], 0.0, dx)
            dg = _sums(tl.trans(span), x.to(tl.float32) * dx, dg, DPIECES)
    store_tile(dq_ptr + out, dq, rows, cols, left, K, H * K, FULL, FULL_K)
    store_tile(dk_ptr + out, dk, rows, cols, left, K, H * K, FULL, FULL_K)
    store_tile(dg_ptr + out, dg, rows, cols, left, K, H * K, FULL, FULL_K)


def _block(width: int, limit: int) -> int:
    """A block of up to `limit`, which divides the width if a block of 32 or more does."""
    block = max(16, min(limit, triton.next_power_of_2(width)))
    while block > 32 and width % block:
        block //= 2
    return block


def _safe(dtype: torch.dtype) -> float:
    """What a chunk must keep of the state for products with its inverse: an exponent of 8 bits has
    room for it, that of float16 has not."""
    return 1.0 if dtype == torch.float16 else 2.0**-72


def _config(kernel: str, data: Tensor) -> Config:
    key = (kernel, data.element_size())
    return BEFORE_90.get(key, CONFIGS[key]) if before_90(data) else CONFIGS[key]


def _spans(like: Tensor) -> Tensor:
    chunk = CHUNKS[like.element_size()]
    bits = chunk.bit_length() - 1
    spans = like.new_empty((bits + 2, chunk, chunk), dtype=torch.bfloat16)
    _spans_kernel[(bits + 2,)](spans, Q=chunk, BITS=bits, num_warps=4)
    return spans


def _pairs(
    q: Tensor, k: Tensor, g: Tensor, spans: Tensor, doc: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scores (B, c, H, Q, Q), decayed queries and keys (B, L, H, K), kept shares (B, c, H, K)."""
    b, length, heads, width = q.shape
    chunk = CHUNKS[q.element_size()]
    n_chunks = triton.cdiv(length, chunk)
    scores = q.new_empty((b, n_chunks, heads, chunk, chunk))
    seen, leaving = (q.new_empty((b, length, heads, width)) for _ in range(2))
    keep = q.new_empty((b, n_chunks, heads, width), dtype=torch.float32)
    config = _config("pairs", q)
    unit = batch_unit(q, k, g)
    _pairs_kernel[(n_chunks, b * heads)](
        q, k, g, spans, doc, scores, seen, leaving, keep,
        q.stride(0) // unit, k.stride(0) // unit, g.stride(0) // unit, length, n_chunks, scale,
        UNIT=unit, Q_ROW=q.stride(1), K_ROW=k.stride(1), G_ROW=g.stride(1),
        H=heads, K=width, BK=_block(width, config.keys), Q=chunk, BITS=chunk.bit_length() - 1,
        FORGET=FORGET, SAFE=_safe(q.dtype), HAS_DOC=doc is not None, FULL=length % chunk == 0,
        PREC=precision(q.dtype), PIECES=PIECES[g.dtype], STAGES=config.stages,
        num_warps=config.warps,
    )  # fmt: skip
    return scores, seen, leaving, keep


def _states(
    x: Tensor, m: Tensor, keep: Tensor, first: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The state before each chunk (B, c, H, K, V) in x's type and the last one in float32, from
    decayed keys and values; in reverse the gradients, from decayed queries and dy."""
    b, length, heads, width = x.shape
    values = m.shape[3]
    chunk = CHUNKS[x.element_size()]
    n_chunks = keep.shape[1]
    config = _config("state", x)
    bk, bv = _block(width, config.keys), _block(values, config.values)
    states = x.new_empty((b, n_chunks, heads, width, values))
    last = x.new_empty((b, heads, width, values), dtype=torch.float32)
    tiles = triton.cdiv(width, bk) * triton.cdiv(values, bv)
    segments = max(1, min(STATE_PROGRAMS // (tiles * heads * b), n_chunks // SEGMENT_CHUNKS, 32))
    per_segment = triton.cdiv(n_chunks, segments)
    segments = triton.cdiv(n_chunks, per_segment)
    ends = kept = None
    if segments > 1:
        ends = last.new_empty((b, heads, segments, width, values))
        kept = last.new_empty((b, heads, segments, width))
    unit = batch_unit(m)
    for number in (0,) if segments == 1 else (1, 2):
        _state_kernel[(tiles, b * heads, segments)](
            x, m, keep, first, states, ends, kept, last,
            m.stride(0) // unit, length, n_chunks, per_segment, segments,
            UNIT=unit, M_ROW=m.stride(1), H=heads, K=width, V=values, BK=bk, BV=bv, Q=chunk,
            REVERSE=reverse, HAS_FIRST=first is not None, FULL=length % chunk == 0, PASS=number,
            PREC=precision(x.dtype), STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip
    return states, last


def _mix(
    x: Tensor, states: Tensor, scores: Tensor, m: Tensor, v: Tensor | None = None,
    doc: Tensor | None = None, dscores: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y (B, L, H, V); with v the gradient of values, and that of scores into dscores."""
    b, length, heads, width = x.shape
    values = m.shape[3]
    chunk, n_chunks = scores.shape[-1], states.shape[1]
    config = _config("mix" if v is None else "dmix", x)
    bv = _block(values, config.values)
    y = x.new_empty((b, length, heads, values))
    other = m if v is None else v
    unit = batch_unit(m, other)
    tiles = triton.cdiv(values, bv) if v is None else 1
    _mix_kernel[(n_chunks * tiles, b * heads)](
        x, states, scores, m, v, doc, y, dscores,
        m.stride(0) // unit, other.stride(0) // unit, length, n_chunks,
        UNIT=unit, M_ROW=m.stride(1), V_ROW=other.stride(1), H=heads, K=width, V=values,
        BK=_block(width, config.keys), BV=bv, Q=chunk, BACKWARD=v is not None,
        HAS_DOC=doc is not None, FULL=length % chunk == 0, PREC=precision(x.dtype),
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return y


def _passed(
    v: Tensor, dy: Tensor, states: Tensor, dstates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of decayed queries and keys (B, L, H, K), of what chunks keep (B, c, H, K)."""
    b, length, heads, values = v.shape
    chunk = CHUNKS[v.element_size()]
    n_chunks, width = states.shape[1], states.shape[3]
    # float16 has not the range
    dtype = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    dseen, dleaving = (v.new_empty((b, length, heads, width), dtype=dtype) for _ in range(2))
    through = v.new_empty((b, n_chunks, heads, width), dtype=torch.float32)
    config = _config("passed", v)
    bk = _block(width, config.keys)
    unit = batch_unit(v)
    _passed_kernel[(n_chunks * triton.cdiv(width, bk), b * heads)](
        v, dy, states, dstates, dseen, dleaving, through, v.stride(0) // unit, length, n_chunks,
        UNIT=unit, V_ROW=v.stride(1), H=heads, K=width, V=values, BK=bk,
        BV=_block(values, config.values), Q=chunk, FULL=length % chunk == 0,
        PREC=precision(v.dtype), STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return dseen, dleaving, through


def _grad(
    q: Tensor, k: Tensor, g: Tensor, spans: Tensor, doc: Tensor | None, dscores: Tensor,
    dseen: Tensor, dleaving: Tensor, through: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    b, length, heads, width = q.shape
    chunk, n_chunks = dscores.shape[-1], through.shape[1]
    dq, dk, dg = (t.new_empty(t.shape) for t in (q, k, g))
    config = _config("grad", q)
    bk = _block(width, config.keys)
    unit = batch_unit(q, k, g)
    _grad_kernel[(n_chunks * triton.cdiv(width, bk), b * heads)](
        q, k, g, spans, doc, dscores, dseen, dleaving, through, dq, dk, dg,
        q.stride(0) // unit, k.stride(0) // unit, g.stride(0) // unit, length, n_chunks, scale,
        UNIT=unit, Q_ROW=q.stride(1), K_ROW=k.stride(1), G_ROW=g.stride(1),
        H=heads, K=width, BK=bk, Q=chunk, BITS=chunk.bit_length() - 1,
        FORGET=FORGET, SAFE=_safe(q.dtype), HAS_DOC=doc is not None, FULL=length % chunk == 0,
        PREC=precision(q.dtype), PIECES=PIECES[g.dtype],
        DPIECES=3 if q.dtype == torch.float32 else 2, num_warps=config.warps,
    )  # fmt: skip
    return dq, dk, dg


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, first: Tensor | None, doc: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v, g = dense_rows(q), dense_rows(k), dense_rows(v), dense_rows(g)
    spans = _spans(q)
    scores, seen, leaving, keep = _pairs(q, k, g, spans, doc, scale)
    states, last = _states(leaving, v, keep, first, reverse=False)
    return _mix(seen, states, scores, v), last


def _forward_fake(q, k, v, *_):
    b, _, heads, width = q.shape
    last = q.new_empty((b, heads, width, v.shape[3]), dtype=torch.float32)
    return q.new_empty(v.shape), last


def _backward(
    dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor,
    first: Tensor | None, doc: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, g = dense_rows(q), dense_rows(k), dense_rows(v), dense_rows(g)
    dy, dlast = dy.contiguous(), contiguous(dlast)
    spans = _spans(q)
    scores, seen, leaving, keep = _pairs(q, k, g, spans, doc, scale)
    dstates, dfirst = _states(seen, dy, keep, dlast, reverse=True)
    dscores = torch.empty_like(scores)
    dv = _mix(leaving, dstates, scores, dy, v, doc, dscores)
    states, _ = _states(leaving, v, keep, first, reverse=False)
    passed = _passed(v, dy, states, dstates)
    dq, dk, dg = _grad(q, k, g, spans, doc, dscores, *passed, scale)
    return dq, dk, dv, dg, dfirst


def _backward_fake(dy, dlast, q, k, v, g, *_):
    b, _, heads, width = q.shape
    dfirst = q.new_empty((b, heads, width, v.shape[3]), dtype=torch.float32)
    dq, dk, dv, dg = (t.new_empty(t.shape) for t in (q, k, v, g))
    return dq, dk, dv, dg, dfirst


_forward_op = define_op(
    "gla_forward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? first, Tensor? doc, float scale) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    several=True,
)
_backward_op = define_op(
    "gla_backward(Tensor dy, Tensor? dlast, Tensor q, Tensor k, Tensor v, Tensor g, "
    "Tensor? first, Tensor? doc, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    several=True,
)


class _GLA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, first: Tensor | None,
        doc: Tensor | None, scale: float,
    ) -> Any:  # fmt: skip
        y, last = _forward_op(q, k, v, g, first, doc, scale)
        ctx.save_for_backward(q, k, v, g, first, doc)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        q, k, v, g, first, doc = ctx.saved_tensors
        dy = torch.zeros_like(v) if grads[0] is None else grads[0]
        dq, dk, dv, dg, dfirst = _backward_op(dy, grads[1], q, k, v, g, first, doc, ctx.scale)
        dfirst = None if first is None else dfirst.to(first.dtype)
        return dq, dk, dv, dg, dfirst, None, None


def gla_triton(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHV: Tensor, log_decay_BLHK: Tensor, *,
    scale: float | None = None, initial_state_BHKV: Tensor | None = None,
    return_final_state: bool = False, doc_start_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`ablate.kernels.gla` on a GPU. Queries, keys and values share one type, and states between
    chunks keep it; log decays keep theirs."""
    k, v = k_BLHK.to(q_BLHK.dtype), v_BLHV.to(q_BLHK.dtype)
    scale = q_BLHK.shape[3] ** -0.5 if scale is None else scale
    first, doc = contiguous(initial_state_BHKV), starts(doc_start_BL)
    y, last = _GLA.apply(q_BLHK, k, v, log_decay_BLHK, first, doc, scale)
    return (y, last) if return_final_state else y
