"""One token of each operation on a GPU, for decoding: state and caches are updated in place.

A decoding step reads every weight and every cache once, so its floor is memory: the kernels here
read a state or a cached key once, and there are few of them, because one of a small model is
shorter than the pause before the next.

Attention is FlashDecoding's (Dao, Haziza, Massa and Sizov 2023): the visible keys of a sequence are
shared out over SPLITS programs, each keeps its own maximum, sum and weighted values, and a second
kernel adds them in a fixed order. How many keys are visible is read on the device, so one CUDA
graph serves all positions.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ablate.kernels.dispatch import INTERPRET, define_op
from ablate.kernels.tiles_triton import LOG2E, contiguous, dense_last, sigmoid

MOST_SPLITS = 64


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


# --- convolution ----------------------------------------------------------------------------------


@triton.jit
def conv_kernel(
    x_ptr, w_ptr, b_ptr, state_ptr, y_ptr, x_row, width,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = d < width
    b = tl.program_id(1).to(tl.int64)
    state_ptr += b * (TAPS - 1) * width
    x = tl.load(x_ptr + b * x_row + d, mask=mask, other=0.0)
    y = x.to(tl.float32) * tl.load(w_ptr + d * TAPS + TAPS - 1, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(b_ptr + d, mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(TAPS - 1):
        old = tl.load(state_ptr + k * width + d, mask=mask, other=0.0)
        weight = tl.load(w_ptr + d * TAPS + k, mask=mask, other=0.0)
        y += old.to(tl.float32) * weight.to(tl.float32)
        if k > 0:  # the same thread has read the place before
            tl.store(state_ptr + (k - 1) * width + d, old, mask=mask)
    tl.store(state_ptr + (TAPS - 2) * width + d, x.to(state_ptr.dtype.element_ty), mask=mask)
    if SILU:
        y *= sigmoid(y)
    tl.store(y_ptr + b * width + d, y.to(y_ptr.dtype.element_ty), mask=mask)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor) -> Tensor:
    batch, width = x.shape
    y = x.new_empty((batch, width))
    block = 256
    conv_kernel[(triton.cdiv(width, block), batch)](
        x, weight, bias, state, y, x.stride(0), width, TAPS=weight.shape[1], SILU=silu,
        HAS_BIAS=bias is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return y


_conv_op = define_op(
    "conv1d_step(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor(a!) state) -> Tensor",
    _conv,
    lambda x, weight, bias, silu, state: x.new_empty(x.shape),
)


def causal_conv1d_step_triton(
    x_BD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, silu: bool, state_BKD: Tensor
) -> Tensor:
    """See `ablate.kernels.causal_conv1d_step`; the state must be contiguous."""
    weight, bias = weight_DK.contiguous(), contiguous(bias_D)
    return _conv_op(dense_last(x_BD), weight, bias, silu, state_BKD)


# --- Mamba-2 --------------------------------------------------------------------------------------


@triton.jit
def ssd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, state_ptr, y_ptr,
    x_row, dt_row, B_row, C_row, x_head, B_group, C_group, groups_of,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
    SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BN)
    g = h // groups_of
    dt = tl.load(dt_ptr + b * dt_row + h).to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + h).to(tl.float32)
    if SOFTPLUS:
        dt = _softplus(dt)
    decay = tl.exp(dt * tl.load(A_ptr + h).to(tl.float32))
    x = tl.load(x_ptr + b * x_row + h * x_head + p, mask=p < P, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + b * B_row + g * B_group + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + b * C_row + g * C_group + n, mask=n < N, other=0.0).to(tl.float32)
    at = state_ptr + (b * tl.num_programs(1) + h) * (P * N) + p[:, None] * N + n[None, :]
    mask = (p < P)[:, None] & (n < N)[None, :]
    state = tl.load(at, mask=mask, other=0.0) * decay + (x * dt)[:, None] * B[None, :]
    tl.store(at, state, mask=mask)
    y = tl.sum(state * C[None, :], 1)
    if SKIP == 1:
        y += x * tl.load(D_ptr + h).to(tl.float32)
    if SKIP == 2:
        y += x * tl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    y_ptr += (b * tl.num_programs(1) + h) * P
    tl.store(y_ptr + p, y.to(y_ptr.dtype.element_ty), mask=p < P)


def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    softplus: bool, state: Tensor,
) -> Tensor:  # fmt: skip
    batch, heads, head_dim = x.shape
    groups, d_state = B.shape[1:]
    y = x.new_empty((batch, heads, head_dim))
    block = triton.next_power_of_2(d_state)
    rows = min(triton.next_power_of_2(head_dim), max(1, 2048 // block))  # 8 KB of state a program
    ssd_kernel[(triton.cdiv(head_dim, rows), heads, batch)](
        x, dt, A, B, C, D, bias, state, y, x.stride(0), dt.stride(0), B.stride(0), C.stride(0),
        x.stride(1), B.stride(1), C.stride(1), heads // groups, P=head_dim, N=d_state, BN=block,
        ROWS=rows, SKIP=0 if D is None else D.ndim, HAS_BIAS=bias is not None, SOFTPLUS=softplus,
        num_warps=4,
    )  # fmt: skip
    return y


_ssd_op = define_op(
    "ssd_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? bias, "
    "bool softplus, Tensor(a!) state) -> Tensor",
    _ssd,
    lambda x, dt, A, B, C, D, bias, softplus, state: x.new_empty(x.shape),
)


def ssd_step_triton(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D: Tensor | None,
    dt_bias_H: Tensor | None, dt_softplus: bool, state_BHPN: Tensor,
) -> Tensor:  # fmt: skip
    """See `ablate.kernels.ssd_step`; the state must be contiguous."""
    x, dt, B, C = map(dense_last, (x_BHP, dt_BH, B_BGN, C_BGN))
    A, D, bias = map(contiguous, (A_H, D, dt_bias_H))
    return _ssd_op(x, dt, A, B, C, D, bias, dt_softplus, state_BHPN)


# --- Mamba-1 --------------------------------------------------------------------------------------


@triton.jit
def scan_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, state_ptr, y_ptr,
    u_row, dt_row, B_row, C_row, z_row, width, A_row,
    N: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
    SKIP: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BN)
    inside = d < width
    mask = inside[:, None] & (n < N)[None, :]
    dt = tl.load(dt_ptr + b * dt_row + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + d, mask=inside, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = _softplus(dt)
    u = tl.load(u_ptr + b * u_row + d, mask=inside, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + d[:, None] * A_row + n[None, :], mask=mask, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + b * B_row + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + b * C_row + n, mask=n < N, other=0.0).to(tl.float32)
    at = state_ptr + b * width * N + d[:, None] * N + n[None, :]
    state = tl.load(at, mask=mask, other=0.0)
    state = state * tl.exp(dt[:, None] * A) + (dt * u)[:, None] * B[None, :]
    tl.store(at, state, mask=mask)
    y = tl.sum(state * C[None, :], 1)
    if SKIP:
        y += u * tl.load(D_ptr + d, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        z = tl.load(z_ptr + b * z_row + d, mask=inside, other=0.0).to(tl.float32)
        y *= z * sigmoid(z)
    tl.store(y_ptr + b * width + d, y.to(y_ptr.dtype.element_ty), mask=inside)


def _scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool, state: Tensor,
) -> Tensor:  # fmt: skip
    batch, width = u.shape
    d_state = A.shape[1]
    y = u.new_empty((batch, width))
    block = triton.next_power_of_2(d_state)
    rows = max(1, 1024 // block)
    scan_kernel[(triton.cdiv(width, rows), batch)](
        u, dt, A, B, C, D, z, bias, state, y, u.stride(0), dt.stride(0), B.stride(0), C.stride(0),
        0 if z is None else z.stride(0), width, A.stride(0), N=d_state, BN=block, ROWS=rows,
        SKIP=D is not None, GATE=z is not None, HAS_BIAS=bias is not None, SOFTPLUS=softplus,
        num_warps=4,
    )  # fmt: skip
    return y


_scan_op = define_op(
    "selective_scan_step(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? bias, bool softplus, Tensor(a!) state) -> Tensor",
    _scan,
    lambda u, dt, A, B, C, D, z, bias, softplus, state: u.new_empty(u.shape),
)


def selective_scan_step_triton(
    u_BD: Tensor, delta_BD: Tensor, A_DN: Tensor, B_BN: Tensor, C_BN: Tensor, D_D: Tensor | None,
    z_BD: Tensor | None, delta_bias_D: Tensor | None, delta_softplus: bool, state_BDN: Tensor,
) -> Tensor:  # fmt: skip
    """See `ablate.kernels.selective_scan_step`; the state must be contiguous."""
    u, dt, A, B, C = map(dense_last, (u_BD, delta_BD, A_DN, B_BN, C_BN))
    z = None if z_BD is None else dense_last(z_BD)
    D, bias = map(contiguous, (D_D, delta_bias_D))
    return _scan_op(u, dt, A, B, C, D, z, bias, delta_softplus, state_BDN)


# --- gated DeltaNet -------------------------------------------------------------------------------


@triton.jit
def _unit(ptr, i, mask, factor, EPS: tl.constexpr):
    """A vector times `factor`; EPS > 0: made as long as one before."""
    x = tl.load(ptr + i, mask=mask, other=0.0).to(tl.float32)
    if EPS > 0:
        factor = factor / tl.sqrt(tl.sum(x * x, 0) + EPS)
    return x * factor


@triton.jit
def delta_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, y_ptr,
    q_row, k_row, v_row, g_row, beta_row, q_head, k_head, v_head, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, COLS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, BK)
    j = tl.program_id(0) * COLS + tl.arange(0, COLS)
    decay = tl.exp(tl.load(g_ptr + b * g_row + h).to(tl.float32))
    beta = tl.load(beta_ptr + b * beta_row + h).to(tl.float32)
    q = _unit(q_ptr + b * q_row + h * q_head, i, i < K, scale, EPS)
    k = _unit(k_ptr + b * k_row + h * k_head, i, i < K, 1.0, EPS)
    v = tl.load(v_ptr + b * v_row + h * v_head + j, mask=j < V, other=0.0).to(tl.float32)
    at = state_ptr + (b * tl.num_programs(1) + h) * (K * V) + i[:, None] * V + j[None, :]
    mask = (i < K)[:, None] & (j < V)[None, :]
    state = tl.load(at, mask=mask, other=0.0) * decay
    wrong = v - tl.sum(k[:, None] * state, 0)
    state += k[:, None] * (beta * wrong)[None, :]
    tl.store(at, state, mask=mask)
    y = tl.sum(q[:, None] * state, 0)
    y_ptr += (b * tl.num_programs(1) + h) * V
    tl.store(y_ptr + j, y.to(y_ptr.dtype.element_ty), mask=j < V)


def _state_block(keys: int, values: int) -> tuple[int, int]:
    """Rows and columns of a state (keys, values) that a program updates: all rows, 8 KB of it."""
    rows = triton.next_power_of_2(keys)
    return rows, min(triton.next_power_of_2(values), max(1, 2048 // rows))


def _delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, eps: float,
    state: Tensor,
) -> Tensor:  # fmt: skip
    batch, heads, width = q.shape
    values = v.shape[2]
    y = q.new_empty(v.shape)
    block, cols = _state_block(width, values)
    delta_kernel[(triton.cdiv(values, cols), heads, batch)](
        q, k, v, g, beta, state, y, *(t.stride(0) for t in (q, k, v, g, beta)),
        *(t.stride(1) for t in (q, k, v)), scale, K=width, V=values, BK=block, COLS=cols,
        EPS=eps, num_warps=4,
    )  # fmt: skip
    return y


_delta_op = define_op(
    "gated_delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, "
    "float eps, Tensor(a!) state) -> Tensor",
    _delta,
    lambda q, k, v, g, beta, scale, eps, state: q.new_empty(v.shape),
)


def gated_delta_rule_step_triton(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BH: Tensor, beta_BH: Tensor,
    scale: float, eps: float, state_BHKV: Tensor,
) -> Tensor:  # fmt: skip
    """See `ablate.kernels.gated_delta_rule_step`; the state must be contiguous. eps: of the length
    that keys and queries are divided by; 0: they are not."""
    dense = map(dense_last, (q_BHK, k_BHK, v_BHV, log_decay_BH, beta_BH))
    return _delta_op(*dense, scale, eps, state_BHKV)


# --- gated linear attention -----------------------------------------------------------------------


@triton.jit
def gla_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, state_ptr, y_ptr,
    q_row, k_row, v_row, g_row, q_head, k_head, v_head, g_head, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, BK)
    j = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = i < K
    q = tl.load(q_ptr + b * q_row + h * q_head + i, mask=inside, other=0.0).to(tl.float32) * scale
    k = tl.load(k_ptr + b * k_row + h * k_head + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + b * g_row + h * g_head + i, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + b * v_row + h * v_head + j, mask=j < V, other=0.0).to(tl.float32)
    at = state_ptr + (b * tl.num_programs(1) + h) * (K * V) + i[:, None] * V + j[None, :]
    mask = inside[:, None] & (j < V)[None, :]
    state = tl.load(at, mask=mask, other=0.0) * tl.exp(g)[:, None] + k[:, None] * v[None, :]
    tl.store(at, state, mask=mask)
    y = tl.sum(q[:, None] * state, 0)
    y_ptr += (b * tl.num_programs(1) + h) * V
    tl.store(y_ptr + j, y.to(y_ptr.dtype.element_ty), mask=j < V)


def _gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor) -> Tensor:
    batch, heads, width = q.shape
    values = v.shape[2]
    y = q.new_empty(v.shape)
    block, cols = _state_block(width, values)
    gla_kernel[(triton.cdiv(values, cols), heads, batch)](
        q, k, v, g, state, y, *(t.stride(0) for t in (q, k, v, g)),
        *(t.stride(1) for t in (q, k, v, g)), scale, K=width, V=values, BK=block, COLS=cols,
        num_warps=4,
    )  # fmt: skip
    return y


_gla_op = define_op(
    "gla_step(Tensor q, Tensor k, Tensor v, Tensor g, float scale, Tensor(a!) state) -> Tensor",
    _gla,
    lambda q, k, v, g, scale, state: q.new_empty(v.shape),
)


def gla_step_triton(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BHK: Tensor, scale: float,
    state_BHKV: Tensor,
) -> Tensor:  # fmt: skip
    """See `ablate.kernels.gla_step`; the state must be contiguous."""
    dense = map(dense_last, (q_BHK, k_BHK, v_BHV, log_decay_BHK))
    return _gla_op(*dense, scale, state_BHKV)


# --- attention ------------------------------------------------------------------------------------


@triton.jit
def _rotated(
    ptr, row, cos_ptr, sin_ptr, inside,
    P: tl.constexpr, DIM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Heads (ROWS, P) at ptr + row, the first DIM channels rotated by this token's angles."""
    p = tl.arange(0, BP)[None, :]
    x = tl.load(ptr + row[:, None] + p, mask=inside[:, None] & (p < P), other=0.0)
    if DIM:  # no early return: Triton 3.6 compiles what follows one, and there are no tables
        HALF: tl.constexpr = DIM // 2
        turned = p < DIM
        partner = tl.where(p < HALF, p + HALF, p - HALF)
        other = tl.load(ptr + row[:, None] + partner, mask=inside[:, None] & turned, other=0.0)
        angle = tl.where(p < HALF, p, p - HALF)
        cos = tl.load(cos_ptr + angle, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
        y = x.to(tl.float32) * cos + other.to(tl.float32) * tl.where(p < HALF, -sin, sin)
        x = y.to(x.dtype)
    return x


@triton.jit
def attention_kernel(
    qkv_ptr, cos_ptr, sin_ptr, position_ptr, k_ptr, v_ptr, part_ptr, sum_ptr, y_ptr,
    qkv_row, table_row, slots, factor,
    H: tl.constexpr, KV: tl.constexpr, P: tl.constexpr, DIM: tl.constexpr, BP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    kv = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    GROUP: tl.constexpr = H // KV
    qkv_ptr += b * qkv_row
    if DIM:
        cos_ptr += b * table_row
        sin_ptr += b * table_row
    row = tl.arange(0, ROWS)
    p = tl.arange(0, BP)
    ours = row < GROUP
    cache = k_ptr.dtype.element_ty
    q = _rotated(qkv_ptr, (kv * GROUP + row) * P, cos_ptr, sin_ptr, ours, P, DIM, BP).to(cache)
    position = tl.load(position_ptr + b)
    slot = (position % slots).to(tl.int32)
    visible = tl.minimum(position + 1, slots).to(tl.int32)
    blocks = tl.cdiv(visible, BLOCK)
    each = tl.cdiv(blocks, SPLITS)
    begin = split * each
    end = tl.minimum(begin + each, blocks)
    # The new token's key and value, of which one program is the writer; it takes them from here,
    # since what it stores need not be seen by its other threads yet.
    one = tl.arange(0, 1)
    new_k = _rotated(qkv_ptr + (H + kv) * P, one, cos_ptr, sin_ptr, one == 0, P, DIM, BP).to(cache)
    new_v = _rotated(qkv_ptr + (H + KV + kv) * P, one, cos_ptr, sin_ptr, one == 0, P, 0, BP)
    new_v = new_v.to(cache)
    base = (b * slots * KV + kv) * P
    k_ptr += base
    v_ptr += base
    acc = tl.zeros((ROWS, BP), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    for block in range(begin, end):
        t = block * BLOCK + tl.arange(0, BLOCK)
        at = t.to(tl.int64)[:, None] * (KV * P) + p[None, :]
        mask = (t < visible)[:, None] & (p < P)[None, :]
        fresh = (t == slot)[:, None]
        k = tl.where(fresh, new_k, tl.load(k_ptr + at, mask=mask, other=0.0))
        s = tl.dot(q, tl.trans(k), input_precision=PREC) * factor
        s = tl.where((t < visible)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        w = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(w, 1)
        v = tl.where(fresh, new_v, tl.load(v_ptr + at, mask=mask, other=0.0))
        acc = tl.dot(w.to(cache), v, acc * shrink[:, None], input_precision=PREC)
        top = higher
    if (slot // BLOCK >= begin) & (slot // BLOCK < end):
        at = one[:, None].to(tl.int64) + slot.to(tl.int64) * (KV * P) + p[None, :]
        tl.store(k_ptr + at, new_k, mask=(p < P)[None, :])
        tl.store(v_ptr + at, new_v, mask=(p < P)[None, :])
    head = b * H + kv * GROUP + row
    mask = ours[:, None] & (p < P)[None, :]
    if SPLITS == 1:
        y = (acc / total[:, None]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + head[:, None] * P + p[None, :], y, mask=mask)
    else:
        place = head * SPLITS + split
        tl.store(part_ptr + place[:, None] * P + p[None, :], acc, mask=mask)
        tl.store(sum_ptr + place * 2, top, mask=ours)
        tl.store(sum_ptr + place * 2 + 1, total, mask=ours)


@triton.jit
def combine_kernel(
    part_ptr, sum_ptr, y_ptr, P: tl.constexpr, BP: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    p = tl.arange(0, BP)
    top = tl.load(sum_ptr + (head * SPLITS + split) * 2)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(sum_ptr + (head * SPLITS + split) * 2 + 1), 0)
    at = (head * SPLITS + split)[:, None] * P + p[None, :]
    part = tl.load(part_ptr + at, mask=(p < P)[None, :], other=0.0)
    y = tl.sum(part * weight[:, None], 0) / total
    tl.store(y_ptr + head * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)


def splits(programs: int, blocks: int, processors: int) -> int:
    """Programs that share a sequence's keys: a power of two, about four programs a processor in
    all, and not more than there are blocks of keys."""
    wanted = min(MOST_SPLITS, blocks, 4 * processors // programs)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


def attention_options(head_dim: int, group: int, itemsize: int, hopper: bool) -> dict[str, Any]:
    """Tile and launch options: 16 KB of keys and as much of values a stage; half in float32,
    whose products take three times the registers."""
    width = max(16, triton.next_power_of_2(head_dim))
    rows = max(16, triton.next_power_of_2(group))
    tile = 16384 if itemsize == 2 else 8192
    return {
        "BP": width,
        "ROWS": rows,
        "BLOCK": max(16, min(64, tile // (width * itemsize))),
        "PREC": "tf32x3" if itemsize == 4 else "ieee",
        "num_warps": 8 if itemsize == 4 else 4,
        "num_stages": 3 if hopper else 2,
    }


def _attention(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor, scale: float,
    k: Tensor, v: Tensor,
) -> Tensor:  # fmt: skip
    batch, slots, kv, head_dim = k.shape
    heads = qkv.shape[1] // head_dim - 2 * kv
    y = qkv.new_empty((batch, heads, head_dim))
    properties = None if INTERPRET else torch.cuda.get_device_properties(qkv.device)
    options = attention_options(
        head_dim, heads // kv, k.itemsize, properties is not None and properties.major >= 9
    )
    processors = 4 if properties is None else properties.multi_processor_count
    n = splits(batch * kv, triton.cdiv(slots, options["BLOCK"]), processors)
    part = sums = y
    if n > 1:
        part = torch.empty((batch, heads, n, head_dim), dtype=torch.float32, device=y.device)
        sums = torch.empty((batch, heads, n, 2), dtype=torch.float32, device=y.device)
    half = 0 if cos is None else cos.shape[-1]
    attention_kernel[(n, kv, batch)](
        qkv, cos, sin, positions, k, v, part, sums, y, qkv.stride(0),
        half if cos is not None and cos.shape[0] > 1 else 0, slots, scale * LOG2E.value,
        H=heads, KV=kv, P=head_dim, DIM=2 * half, SPLITS=n, **options,
    )  # fmt: skip
    if n > 1:
        combine_kernel[(batch * heads,)](
            part, sums, y, P=head_dim, BP=options["BP"], SPLITS=n, num_warps=4
        )
    return y


_attention_op = define_op(
    "attention_step(Tensor qkv, Tensor? cos, Tensor? sin, Tensor positions, float scale, "
    "Tensor(a!) k, Tensor(b!) v) -> Tensor",
    _attention,
    lambda qkv, cos, sin, positions, scale, k, v: qkv.new_empty(
        (qkv.shape[0], qkv.shape[1] // k.shape[3] - 2 * k.shape[2], k.shape[3])
    ),
)


def attention_step_triton(
    qkv_BE: Tensor, table: tuple[Tensor, Tensor] | None, positions_B: Tensor, scale: float,
    k_BTKP: Tensor, v_BTKP: Tensor,
) -> Tensor:  # fmt: skip
    """See `ablate.kernels.attention_step`; both caches must be contiguous. table: cosines and
    sines (B or 1, ..., dim / 2) in float32, None for no rotation."""
    cos, sin = (None, None) if table is None else (t.contiguous() for t in table)
    return _attention_op(
        dense_last(qkv_BE), cos, sin, positions_B.contiguous(), scale, k_BTKP, v_BTKP
    )
