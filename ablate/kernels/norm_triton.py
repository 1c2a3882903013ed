"""Triton kernels of `rms_norm` (with the residual addition), `gated_rms_norm` and what there is in
its place where the norm is left to the next layer (`ablate.kernels.mamba2_core`).

Forward: one tile of rows a program. Backward: a fixed number of programs walk over the rows, hold
their share of the weight gradient in registers and write it for a second, ordered sum. Nothing but
the inputs is kept for the backward pass: the row's scale is cheaper to compute than to read.
"""

# mypy: disallow-untyped-defs=False

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
    away_from_zero,
    contiguous,
    dense_last,
    multiprocessors,
    reciprocal,
    sigmoid,
)


@dataclass(frozen=True)
class Config:
    """Rows of one tile, warps, programs a multiprocessor (backward) and load pipeline depth."""

    rows: int
    warps: int
    programs: int = 1
    stages: int = 1


def forward_config(block: int) -> Config:
    """Static choice by the (padded) width of a row."""
    if block <= 256:
        return Config(rows=8, warps=4)
    if block <= 1024:
        return Config(rows=2, warps=4)
    return Config(rows=1, warps=4 if block <= 4096 else 8 if block <= 8192 else 16)


def gated_forward_config(block: int) -> Config:
    """Static choice by the (padded) width of a group."""
    return Config(rows=1, warps=2) if 1024 < block <= 2048 else forward_config(block)


def backward_config(block: int) -> Config:
    """Static choice by the (padded) width of a row."""
    if block <= 256:
        return Config(rows=8, warps=4, programs=4)
    if block <= 512:
        return Config(rows=1, warps=1, programs=16, stages=2)
    if block <= 1024:
        return Config(rows=2, warps=4, programs=4, stages=2)
    warps = 4 if block <= 2048 else 8 if block <= 8192 else 16
    return Config(rows=1, warps=warps, programs=4 if block <= 2048 else 2)


def gated_backward_config(block: int) -> Config:
    """Static choice by the larger block of a row: few warps, as a row is bound by its exchanges."""
    if block <= 256:
        return Config(rows=8, warps=4, programs=4)
    if block <= 2048:
        return Config(rows=1, warps=max(1, block // 512), programs=4, stages=3)
    return Config(rows=1, warps=8 if block <= 8192 else 16, programs=2)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def gated_forward_kernel(
    x_ptr, z_ptr, w_ptr, y_ptr, rows, x_row, z_row, eps, width: tl.constexpr,
    X_ALIGN: tl.constexpr, Z_ALIGN: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    GATE_AFTER: tl.constexpr, NORM: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < GROUP
    column += tl.program_id(1) * GROUP
    mask = (row < rows)[:, None] & inside[None, :]
    x_offset = (row * x_row * X_ALIGN)[:, None] + column[None, :]
    z_offset = (row * z_row * Z_ALIGN)[:, None] + column[None, :]
    x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + z_offset, mask=mask, other=0.0).to(tl.float32)
    gate = z * sigmoid(z)
    y = x
    if not GATE_AFTER:
        y = x * gate
    if NORM:
        scale = tl.rsqrt(tl.sum(y * y, 1) / GROUP + eps)
        y = y * scale[:, None]
    if HAS_WEIGHT:
        w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
        y = y * w[None, :]
    if GATE_AFTER:
        y = y * gate
    out = y_ptr + (row * width)[:, None] + column[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_load(x_ptr, z_ptr, dy_ptr, row, x_row, z_row, dy_row, column, mask):
    x = tl.load(x_ptr + (row * x_row)[:, None] + column[None, :], mask=mask, other=0.0)
    z = tl.load(z_ptr + (row * z_row)[:, None] + column[None, :], mask=mask, other=0.0)
    dy = tl.load(dy_ptr + (row * dy_row)[:, None] + column[None, :], mask=mask, other=0.0)
    return x.to(tl.float32), z.to(tl.float32), dy.to(tl.float32)


@triton.jit
def _gated_terms(x, z, dy, w, GATE_AFTER: tl.constexpr):
    """SiLU and its slope, what is normalised, what of dy the norm's output sees, and that times w,
    the gradient of the norm without its weight."""
    gate = sigmoid(z)
    silu = z * gate
    slope = gate + silu * (1.0 - gate)
    if GATE_AFTER:
        u = x
        seen = dy * silu
    else:
        u = x * silu
        seen = dy
    return silu, slope, u, seen, seen * w[None, :]


@triton.jit
def _gated_store(
    dx_ptr, dz_ptr, row, width: tl.constexpr, dz_row, column, mask, x, dy, w, silu, slope, u, dn,
    scale, pull, NORM: tl.constexpr, GATE_AFTER: tl.constexpr,
):  # fmt: skip
    """Writes dx and dz; returns u normalised. pull: what each unit of u takes from its gradient."""
    du = dn
    if NORM:
        du = scale[:, None] * dn - u * pull[:, None]
        u *= scale[:, None]
    if GATE_AFTER:
        dx = du
        dz = dy * w[None, :] * u * slope
    else:
        dx = du * silu
        dz = du * x * slope
    to = (row * width)[:, None] + column[None, :]
    tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    to = (row * dz_row)[:, None] + column[None, :]
    tl.store(dz_ptr + to, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    return u


@triton.jit
def gated_backward_kernel(
    x_ptr, z_ptr, w_ptr, dy_ptr, dx_ptr, dz_ptr, partial_ptr, rows, x_row, z_row, dy_row, dz_row,
    eps, width: tl.constexpr, X_ALIGN: tl.constexpr, Z_ALIGN: tl.constexpr,
    DY_ALIGN: tl.constexpr, DZ_ALIGN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, GATE_AFTER: tl.constexpr, NORM: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A row is BLOCK columns and, of a width that is no power of two, TAIL more: 1536 in one block
    of 2048 would leave a quarter of the lanes idle."""
    head = tl.arange(0, BLOCK)
    inside = head < GROUP
    head += tl.program_id(1) * GROUP
    w = tl.full([BLOCK], 1.0, tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + head, mask=inside, other=0.0).to(tl.float32)
    if TAIL > 0:
        tail = BLOCK + tl.arange(0, TAIL)
        tail_inside = tail < GROUP
        tail += tl.program_id(1) * GROUP
        tail_w = tl.full([TAIL], 1.0, tl.float32)
        tail_dw = tl.zeros([TAIL], tl.float32)
        if HAS_WEIGHT:
            tail_w = tl.load(w_ptr + tail, mask=tail_inside, other=0.0).to(tl.float32)
    x_row *= X_ALIGN
    z_row *= Z_ALIGN
    dy_row *= DY_ALIGN
    dz_row *= DZ_ALIGN
    stride = tl.num_programs(0) * ROWS
    for start in tl.range(tl.program_id(0) * ROWS, rows, stride, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        x, z, dy = _gated_load(x_ptr, z_ptr, dy_ptr, row, x_row, z_row, dy_row, head, mask)
        if TAIL > 0:
            tail_mask = (row < rows)[:, None] & tail_inside[None, :]
            tail_x, tail_z, tail_dy = _gated_load(
                x_ptr, z_ptr, dy_ptr, row, x_row, z_row, dy_row, tail, tail_mask)  # fmt: skip
        silu, slope, u, seen, dn = _gated_terms(x, z, dy, w, GATE_AFTER)
        if TAIL > 0:
            tail_silu, tail_slope, tail_u, tail_seen, tail_dn = _gated_terms(
                tail_x, tail_z, tail_dy, tail_w, GATE_AFTER)  # fmt: skip
        scale = tl.full([ROWS], 1.0, tl.float32)
        pull = tl.zeros([ROWS], tl.float32)
        if NORM:
            squares, dot = tl.reduce((u * u, dn * u), 1, _add_pairs)
            if TAIL > 0:
                more, dot_more = tl.reduce((tail_u * tail_u, tail_dn * tail_u), 1, _add_pairs)
                squares += more
                dot += dot_more
            scale = tl.rsqrt(squares / GROUP + eps)
            pull = scale * scale * scale * dot / GROUP
        u = _gated_store(
            dx_ptr, dz_ptr, row, width, dz_row, head, mask, x, dy, w, silu, slope, u, dn, scale,
            pull, NORM, GATE_AFTER)  # fmt: skip
        dw += tl.sum(seen * u, 0)
        if TAIL > 0:
            tail_u = _gated_store(
                dx_ptr, dz_ptr, row, width, dz_row, tail, tail_mask, tail_x, tail_dy, tail_w,
                tail_silu, tail_slope, tail_u, tail_dn, scale, pull, NORM, GATE_AFTER)  # fmt: skip
            tail_dw += tl.sum(tail_seen * tail_u, 0)
    if HAS_WEIGHT:
        out = partial_ptr + tl.program_id(0) * width
        tl.store(out + head, dw, mask=inside)
        if TAIL > 0:
            tl.store(out + tail, tail_dw, mask=tail_inside)


@triton.jit
def _row_scale(squares_ptr, row, rows, of, eps, PARTS: tl.constexpr):
    """1 / rms of rows of `of` numbers from the sums of squares of their parts."""
    part = tl.arange(0, triton.next_power_of_2(PARTS))
    mask = (row < rows)[:, None] & (part < PARTS)[None, :]
    squares = tl.load(squares_ptr + row[:, None] * PARTS + part[None, :], mask=mask, other=0.0)
    return tl.rsqrt(tl.sum(squares, 1) / of + eps)


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, w_ptr, squares_ptr, y_ptr, total_ptr, rows, x_row, residual_row, of, eps,
    X_ALIGN: tl.constexpr, R_ALIGN: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, PARTS: tl.constexpr, width: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < width
    mask = (row < rows)[:, None] & inside[None, :]
    out = (row * width)[:, None] + column[None, :]
    x_offset = (row * x_row * X_ALIGN)[:, None] + column[None, :]
    x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(tl.float32)
    if PARTS:
        x *= _row_scale(squares_ptr, row, rows, of, eps, PARTS)[:, None]
    if HAS_RESIDUAL:
        r_offset = (row * residual_row * R_ALIGN)[:, None] + column[None, :]
        x += tl.load(residual_ptr + r_offset, mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out, total, mask=mask)
        x = total.to(tl.float32)  # the norm of what is stored, as the backward pass will see it
    scale = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    y = x * scale[:, None]
    if HAS_WEIGHT:
        w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
        y = y * w[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    total_ptr, w_ptr, dy_ptr, dtotal_ptr, x_ptr, squares_ptr, dx_ptr, dresidual_ptr, dsquares_ptr,
    partial_ptr, rows, total_row, dy_row, dtotal_row, x_row, of, eps,
    T_ALIGN: tl.constexpr, DY_ALIGN: tl.constexpr, DT_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr,
    HAS_DTOTAL: tl.constexpr, TWO_OUTPUTS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    PARTS: tl.constexpr, width: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.full([BLOCK], 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    stride = tl.num_programs(0) * ROWS
    for start in tl.range(tl.program_id(0) * ROWS, rows, stride, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        t_offset = (row * total_row * T_ALIGN)[:, None] + column[None, :]
        dy_offset = (row * dy_row * DY_ALIGN)[:, None] + column[None, :]
        x = tl.load(total_ptr + t_offset, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + dy_offset, mask=mask, other=0.0)
        x = x.to(tl.float32)
        dy = dy.to(tl.float32)
        dn = dy * w[None, :]
        squares, dot = tl.reduce((x * x, dn * x), 1, _add_pairs)
        scale = tl.rsqrt(squares / width + eps)
        dw += tl.sum(dy * x * scale[:, None], 0)
        pull = scale * dot / width
        dx = scale[:, None] * (dn - x * scale[:, None] * pull[:, None])
        if HAS_DTOTAL:
            dt_offset = (row * dtotal_row * DT_ALIGN)[:, None] + column[None, :]
            dx += tl.load(dtotal_ptr + dt_offset, mask=mask, other=0.0).to(tl.float32)
        out = (row * width)[:, None] + column[None, :]
        if TWO_OUTPUTS:
            tl.store(dresidual_ptr + out, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if PARTS:
            x_offset = (row * x_row * X_ALIGN)[:, None] + column[None, :]
            added = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(tl.float32)
            inverse = _row_scale(squares_ptr, row, rows, of, eps, PARTS)
            slope = -0.5 / of * inverse * inverse * inverse
            tl.store(dsquares_ptr + row, slope * tl.sum(dx * added, 1), mask=row < rows)
            dx *= inverse[:, None]
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        tl.store(partial_ptr + tl.program_id(0) * width + column, dw, mask=inside)


@triton.jit
def gate_backward_kernel(
    y_ptr, z_ptr, dy_ptr, dsquares_ptr, dx_ptr, dz_ptr, rows, z_row, dz_row, width: tl.constexpr,
    Z_ALIGN: tl.constexpr, DZ_ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of y = x silu(z), from the gradients of y and of the sum of its squares in each row. x is not
    needed: y takes its place in dz, as silu'(z) / silu(z) = 1 / z + 1 - sigmoid(z)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = (row * width)[:, None] + column[None, :]
    z_at = (row * z_row * Z_ALIGN)[:, None] + column[None, :]
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z = away_from_zero(tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32))
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dy += 2.0 * tl.load(dsquares_ptr + row, mask=row < rows, other=0.0)[:, None] * y
    gate = sigmoid(z)
    dx = dy * (z * gate)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    dz = dy * (y * reciprocal(z) + y * (1.0 - gate))
    dz_at = (row * dz_row * DZ_ALIGN)[:, None] + column[None, :]
    tl.store(dz_ptr + dz_at, dz.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_columns_kernel(
    m_ptr, s_ptr, out_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (m * s[None, :]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_columns_backward_kernel(
    m_ptr, s_ptr, dout_ptr, dm_ptr, partial_ptr, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    mask = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * width + column[None, :]
    m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dm_ptr + at, (dout * s[None, :]).to(dm_ptr.dtype.element_ty), mask=mask)
    share = tl.sum(dout * m, 0)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * width + column, share, mask=inside)


def _rows(t: Tensor) -> Tensor:
    """(rows, width) with unit stride along the width; a view wherever one exists."""
    return dense_last(t.reshape(-1, t.shape[-1]))


def _stride(t: Tensor) -> tuple[int, int]:
    """Row stride divided by its alignment, and the alignment (a power of two up to 16)."""
    align = math.gcd(t.stride(0), 16)
    return t.stride(0) // align, align


def _programs(rows: int, config: Config, device: torch.device) -> int:
    return min(triton.cdiv(rows, config.rows), config.programs * multiprocessors(device))


def head_and_tail(width: int) -> tuple[int, int]:
    """Two powers of two that cover a width: one where it is nearly one, else the largest below and
    what covers the rest."""
    block: int = triton.next_power_of_2(width)
    rest: int = triton.next_power_of_2(max(1, width - block // 2))
    return (block // 2, rest) if width > 256 and rest <= block // 4 else (block, 0)


def gated_forward(
    x: Tensor, z: Tensor, weight: Tensor | None, eps: float, group: int, gate_after: bool,
    normed: bool = True,
) -> Tensor:  # fmt: skip
    rows, width = x.shape
    block = triton.next_power_of_2(group)
    config = gated_forward_config(block)
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    (x_row, x_align), (z_row, z_align) = _stride(x), _stride(z)
    gated_forward_kernel[(triton.cdiv(rows, config.rows), width // group)](
        x, z, x if weight is None else weight, y, rows, x_row, z_row, eps, width,
        X_ALIGN=x_align, Z_ALIGN=z_align, HAS_WEIGHT=weight is not None, GATE_AFTER=gate_after,
        NORM=normed, GROUP=group, BLOCK=block, ROWS=config.rows, num_warps=config.warps,
    )  # fmt: skip
    return y


def gated_gradients(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor | None, dz: Tensor, eps: float, group: int,
    gate_after: bool, normed: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes dz, which may have wider rows; returns dx and the weight's gradient (empty without a
    weight)."""
    rows, width = x.shape
    block, tail = head_and_tail(group)
    config = gated_backward_config(block)
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    programs = _programs(rows, config, x.device)
    partial = torch.empty(
        programs if weight is not None else 0, width, dtype=torch.float32, device=x.device
    )
    (x_row, x_align), (z_row, z_align) = _stride(x), _stride(z)
    (dy_row, dy_align), (dz_row, dz_align) = _stride(dy), _stride(dz)
    gated_backward_kernel[(programs, width // group)](
        x, z, x if weight is None else weight, dy, dx, dz, partial, rows, x_row, z_row, dy_row,
        dz_row, eps, width, X_ALIGN=x_align, Z_ALIGN=z_align, DY_ALIGN=dy_align, DZ_ALIGN=dz_align,
        HAS_WEIGHT=weight is not None, GATE_AFTER=gate_after, NORM=normed, GROUP=group, BLOCK=block,
        TAIL=tail, ROWS=config.rows, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return dx, x.new_empty(0) if weight is None else sum_rows(partial, weight.dtype)


COLUMN_ROWS, COLUMN_BLOCK, COLUMN_WARPS = 32, 64, 4


def gate_tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program with 4 warps: long pieces of a row, unless they end far outside
    of it."""
    return (4, 512) if width % 512 == 0 or width > 2048 else (8, 256)


def gate_gradients(dy: Tensor, dsquares: Tensor, y: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    """Of y = x silu(z) and the sum of squares of each row: writes dz, which may have wider rows as
    z may, and returns dx. y, dy: dense (M, I); dsquares: (M,)."""
    rows, width = y.shape
    dx = torch.empty(rows, width, dtype=y.dtype, device=y.device)
    (z_row, z_align), (dz_row, dz_align) = _stride(z), _stride(dz)
    tile, block = gate_tile(width)
    gate_backward_kernel[(triton.cdiv(rows, tile), triton.cdiv(width, block))](
        y, z, dy, dsquares, dx, dz, rows, z_row, dz_row, width, Z_ALIGN=z_align, DZ_ALIGN=dz_align,
        ROWS=tile, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return dx


def _scale_columns(m: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(m.shape, dtype=dtype, device=m.device)
    grid = triton.cdiv(m.shape[0], COLUMN_ROWS), triton.cdiv(m.shape[1], COLUMN_BLOCK)
    scale_columns_kernel[grid](
        m, s, out, *m.shape, ROWS=COLUMN_ROWS, BLOCK=COLUMN_BLOCK, num_warps=COLUMN_WARPS
    )
    return out


def _scale_columns_backward(dout: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    dm = torch.empty_like(m)
    grid = triton.cdiv(m.shape[0], COLUMN_ROWS), triton.cdiv(m.shape[1], COLUMN_BLOCK)
    partial = torch.empty(grid[0], m.shape[1], dtype=torch.float32, device=m.device)
    scale_columns_backward_kernel[grid](
        m, s, dout, dm, partial, *m.shape,
        ROWS=COLUMN_ROWS, BLOCK=COLUMN_BLOCK, num_warps=COLUMN_WARPS,
    )  # fmt: skip
    return dm, sum_rows(partial, s.dtype)


def _gated_backward(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor | None, eps: float, group: int,
    gate_after: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dz and the weight's gradient (empty without a weight)."""
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dx, d_weight = gated_gradients(dy, x, z, weight, dz, eps, group, gate_after)
    return dx, dz, d_weight


def _norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, squares: Tensor | None, of: int,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and x + residual (empty without a residual)."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    config = forward_config(block)
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    total = _empty_total(x, residual)
    (x_row, x_align), (r_row, r_align) = _stride(x), _stride(x if residual is None else residual)
    forward_kernel[(triton.cdiv(rows, config.rows),)](
        x, x if residual is None else residual, x if weight is None else weight, squares, y, total,
        rows, x_row, r_row, of, eps, X_ALIGN=x_align, R_ALIGN=r_align,
        HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, PARTS=_parts(squares),
        width=width, BLOCK=block, ROWS=config.rows, num_warps=config.warps,
    )  # fmt: skip
    return y, total


def _parts(squares: Tensor | None) -> int:
    return 0 if squares is None else squares.shape[-1]


def _empty_total(x: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return x.new_empty(0)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _two_gradients(
    dtype: torch.dtype, residual_dtype: torch.dtype | None, squares: Tensor | None
) -> bool:
    """Whether x and the residual have a gradient each."""
    return residual_dtype is not None and (residual_dtype != dtype or squares is not None)


def _norm_backward(
    dy: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor | None, x: Tensor | None,
    squares: Tensor | None, of: int, eps: float, dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient in x's dtype, in the residual's dtype (empty when it is that of x or there is no
    residual), the weight's gradient (empty without a weight) and that of each row's sum of squares
    (empty without them)."""
    rows, width = total.shape
    block = triton.next_power_of_2(width)
    config = backward_config(block)
    two = _two_gradients(dtype, residual_dtype, squares)
    dx = torch.empty(rows, width, dtype=dtype, device=total.device)
    d_residual = torch.empty(
        (rows, width) if two else 0, dtype=residual_dtype or dtype, device=total.device
    )
    programs = _programs(rows, config, total.device)
    partial = torch.empty(
        programs if weight is not None else 0, width, dtype=torch.float32, device=total.device
    )
    other = dy if d_total is None else d_total
    added = dy if x is None else x
    d_squares = partial.new_empty(0 if squares is None else rows)
    (t_row, t_align), (dy_row, dy_align), (dt_row, dt_align), (x_row, x_align) = map(
        _stride, (total, dy, other, added)
    )
    backward_kernel[(programs,)](
        total, total if weight is None else weight, dy, other, added, squares, dx, d_residual,
        d_squares, partial, rows, t_row, dy_row, dt_row, x_row, of, eps, T_ALIGN=t_align,
        DY_ALIGN=dy_align, DT_ALIGN=dt_align, X_ALIGN=x_align, HAS_DTOTAL=d_total is not None,
        TWO_OUTPUTS=two, HAS_WEIGHT=weight is not None, PARTS=_parts(squares), width=width,
        BLOCK=block, ROWS=config.rows, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    d_weight = total.new_empty(0) if weight is None else sum_rows(partial, weight.dtype)
    return dx, d_residual, d_weight, d_squares


def _fake_gated_backward(dy, x, z, weight, *_):
    d_weight = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), z.new_empty(z.shape), d_weight


def _fake_norm_backward(
    dy, d_total, total, weight, x, squares, of, eps, dtype, residual_dtype
):  # fmt: skip
    two = _two_gradients(dtype, residual_dtype, squares)
    d_residual = total.new_empty(total.shape if two else (0,), dtype=residual_dtype or dtype)
    d_weight = total.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    d_squares = total.new_empty(0 if squares is None else total.shape[0], dtype=torch.float32)
    return total.new_empty(total.shape, dtype=dtype), d_residual, d_weight, d_squares


_gated_forward_op = define_op(
    "gated_rms_norm_forward(Tensor x, Tensor z, Tensor? weight, float eps, int group,"
    " bool gate_after) -> Tensor",
    gated_forward,
    lambda x, *_: x.new_empty(x.shape),
)
_gated_backward_op = define_op(
    "gated_rms_norm_backward(Tensor dy, Tensor x, Tensor z, Tensor? weight, float eps, int group,"
    " bool gate_after) -> (Tensor, Tensor, Tensor)",
    _gated_backward,
    _fake_gated_backward,
)
_norm_forward_op = define_op(
    "rms_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? squares, int of,"
    " float eps) -> (Tensor, Tensor)",
    _norm_forward,
    lambda x, residual, *_: (x.new_empty(x.shape), _empty_total(x, residual)),
)
_norm_backward_op = define_op(
    "rms_norm_backward(Tensor dy, Tensor? d_total, Tensor total, Tensor? weight, Tensor? x,"
    " Tensor? squares, int of, float eps, ScalarType dtype, ScalarType? residual_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_backward,
    _fake_norm_backward,
)
scale_columns = define_op(
    "scale_columns(Tensor m, Tensor s, ScalarType dtype) -> Tensor",
    _scale_columns,
    lambda m, s, dtype: m.new_empty(m.shape, dtype=dtype),
)
"""matrix * scale in another type: what a norm's weight makes of the projection after it."""

scale_columns_gradients = define_op(
    "scale_columns_backward(Tensor dout, Tensor m, Tensor s) -> (Tensor, Tensor)",
    _scale_columns_backward,
    lambda dout, m, s: (m.new_empty(m.shape), s.new_empty(s.shape)),
)


class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, weight: Tensor | None, eps: float, group: int,
        gate_after: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, z, weight)
        ctx.options = (eps, group, gate_after)
        y: Tensor = _gated_forward_op(x, z, weight, eps, group, gate_after)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, z, weight = ctx.saved_tensors
        dx, dz, d_weight = _gated_backward_op(_rows(grads[0]), x, z, weight, *ctx.options)
        return dx, dz, None if weight is None else d_weight, None, None, None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y: Tensor = _norm_forward_op(x, None, weight, None, 1, eps)[0]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx, _, d_weight, _ = _norm_backward_op(
            _rows(grads[0]), None, x, weight, None, None, 1, ctx.eps, x.dtype, None
        )
        return dx, None if weight is None else d_weight, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, squares: Tensor | None,
        of: int, eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, total = _norm_forward_op(x, residual, weight, squares, of, eps)
        ctx.save_for_backward(total, weight, None if squares is None else x, squares)
        ctx.options = (of, eps, x.dtype, residual.dtype)
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total, weight, x, squares = ctx.saved_tensors
        dy, d_total = grads
        dx, d_residual, d_weight, d_squares = _norm_backward_op(
            _rows(dy), _rows(d_total), total, weight, x, squares, *ctx.options
        )
        _, _, dtype, residual_dtype = ctx.options
        if not _two_gradients(dtype, residual_dtype, squares):
            d_residual = dx
        d_squares = None if squares is None else d_squares[:, None].expand(squares.shape)
        return dx, d_residual, None if weight is None else d_weight, d_squares, None, None


def gated_rms_norm_triton(
    x: Tensor, z: Tensor, weight: Tensor | None, eps: float, group: int, gate_after: bool
) -> Tensor:
    """See `ablate.kernels.gated_rms_norm`."""
    y: Tensor = _GatedRmsNorm.apply(_rows(x), _rows(z), contiguous(weight), eps, group, gate_after)
    return y.view(x.shape)


def rms_norm_triton(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, squares: Tensor | None,
    of: int,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """See `ablate.kernels.rms_norm`."""
    weight = contiguous(weight)
    if residual is None:
        y: Tensor = _RmsNorm.apply(_rows(x), weight, eps)
        return y.view(x.shape)
    if squares is not None:
        squares = squares.reshape(-1, squares.shape[-1]).contiguous()
    y, total = _AddRmsNorm.apply(_rows(x), _rows(residual), weight, squares, of, eps)
    return y.view(x.shape), total.view(x.shape)
