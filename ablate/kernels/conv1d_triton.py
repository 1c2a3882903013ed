"""Triton kernels of `causal_conv1d`: channels last, one pass forward and one pass backward.

A program owns a strip of channels and a segment of time and walks down the segment with its last
inputs in registers, so that every element is read once (plus three rows at a segment's edge). The
backward pass rebuilds what SiLU needs, carries the three unfinished rows of dx in registers and
writes its share of the weight gradient for a second, ordered sum. Four taps are computed always;
fewer taps have zero weights in front.
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
from ablate.kernels.tiles_triton import contiguous, dense_last, starts


@dataclass(frozen=True)
class Config:
    """Channels and time steps of one program, warps, and the depth of the load pipeline."""

    channels: int
    segment: int
    warps: int
    stages: int


# One table for every architecture: the kernels are bound by memory and hold a few kB of shared
# memory at most.
FORWARD = Config(channels=256, segment=32, warps=2, stages=3)
BACKWARD = Config(channels=256, segment=128, warps=2, stages=3)


@triton.jit
def _seen(source, start):
    """Input `source` belongs to the document that began at `start`."""
    return (source >= start) | ((source < 0) & (start < 0))


@triton.jit
def _mix(x0, x1, x2, x3, w0, w1, w2, w3, bias):
    return bias + w3 * x0 + w2 * x1 + w1 * x2 + w0 * x3


@triton.jit
def _taps(w_ptr, channel, inside, TAPS: tl.constexpr):
    """Weights of the inputs 3, 2, 1 and 0 steps back; zero where there are fewer taps."""
    base = w_ptr + channel * TAPS
    w3 = tl.load(base + (TAPS - 1), mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(base + (TAPS - 2), mask=inside, other=0.0).to(tl.float32)
    w1 = tl.zeros_like(w3)
    w0 = tl.zeros_like(w3)
    if TAPS > 2:
        w1 = tl.load(base + (TAPS - 3), mask=inside, other=0.0).to(tl.float32)
    if TAPS > 3:
        w0 = tl.load(base + (TAPS - 4), mask=inside, other=0.0).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def _before(
    x_ptr, state_ptr, t, x_row, channel, inside, width,
    TAPS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Input at t, which may lie before the sequence: then from the state, or zero."""
    x = tl.load(x_ptr + t * x_row + channel, mask=inside & (t >= 0), other=0.0).to(tl.float32)
    if HAS_STATE:
        row = t + (TAPS - 1)
        mask = inside & (t < 0) & (row >= 0)
        x += tl.load(state_ptr + row * width + channel, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _forward_row(
    y_ptr, doc_ptr, x0, x1, x2, x3, w0, w1, w2, w3, bias, t, length, width, channel, inside,
    SILU: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    if DOCS:
        start = tl.load(doc_ptr + t, mask=t < length, other=0)
        x1 = tl.where(_seen(t - 1, start), x1, 0.0)
        x2 = tl.where(_seen(t - 2, start), x2, 0.0)
        x3 = tl.where(_seen(t - 3, start), x3, 0.0)
    y = _mix(x0, x1, x2, x3, w0, w1, w2, w3, bias)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + channel, y.to(y_ptr.dtype.element_ty), mask=inside & (t < length))


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, b_ptr, state_ptr, doc_ptr, y_ptr,
    length, x_batch, x_row, width: tl.constexpr,
    ALIGN: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr, DOCS: tl.constexpr,
    CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    strips: tl.constexpr = (width + CHANNELS - 1) // CHANNELS
    segments = tl.cdiv(length, SEGMENT)
    pid = tl.program_id(0)
    first = (pid // strips) % segments * SEGMENT
    batch = (pid // strips // segments).to(tl.int64)
    channel = pid % strips * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    # strides arrive divided by their common alignment, so that the compiler knows it
    x_row = x_row * ALIGN
    x_ptr += batch * (x_batch * ALIGN) + first.to(tl.int64) * x_row
    y_ptr += (batch * length + first) * width
    state_ptr += batch * (TAPS - 1) * width
    doc_ptr += batch * length
    w0, w1, w2, w3 = _taps(w_ptr, channel, inside, TAPS)
    bias = tl.zeros_like(w0)
    if HAS_BIAS:
        bias = tl.load(b_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.zeros_like(w0)
    x2 = tl.zeros_like(w0)
    x3 = tl.zeros_like(w0)
    if HAS_STATE or first > 0:
        origin = x_ptr - first.to(tl.int64) * x_row
        x3 = _before(origin, state_ptr, first - 3, x_row, channel, inside, width, TAPS, HAS_STATE)
        x2 = _before(origin, state_ptr, first - 2, x_row, channel, inside, width, TAPS, HAS_STATE)
        x1 = _before(origin, state_ptr, first - 1, x_row, channel, inside, width, TAPS, HAS_STATE)
    for i in tl.range(0, SEGMENT, 4, num_stages=STAGES):
        t = first + i
        row = x_ptr + i * x_row + channel
        a = tl.load(row, mask=inside & (t < length), other=0.0)
        b = tl.load(row + x_row, mask=inside & (t + 1 < length), other=0.0)
        c = tl.load(row + 2 * x_row, mask=inside & (t + 2 < length), other=0.0)
        d = tl.load(row + 3 * x_row, mask=inside & (t + 3 < length), other=0.0)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        c = c.to(tl.float32)
        d = d.to(tl.float32)
        y = y_ptr + i * width
        _forward_row(y, doc_ptr, a, x1, x2, x3, w0, w1, w2, w3, bias, t, length, width,
                     channel, inside, SILU, DOCS)  # fmt: skip
        _forward_row(y + width, doc_ptr, b, a, x1, x2, w0, w1, w2, w3, bias, t + 1, length, width,
                     channel, inside, SILU, DOCS)  # fmt: skip
        _forward_row(y + 2 * width, doc_ptr, c, b, a, x1, w0, w1, w2, w3, bias, t + 2, length,
                     width, channel, inside, SILU, DOCS)  # fmt: skip
        _forward_row(y + 3 * width, doc_ptr, d, c, b, a, w0, w1, w2, w3, bias, t + 3, length,
                     width, channel, inside, SILU, DOCS)  # fmt: skip
        x1 = d
        x2 = c
        x3 = b


@triton.jit
def _backward_row(
    dx_ptr, dstate_ptr, doc_ptr, x0, x1, x2, x3, dy, w0, w1, w2, w3, bias,
    p1, p2, p3, g0, g1, g2, g3, gb, t, first, last, length, width, channel, inside,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr, DOCS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """One more row: finishes row t-3 of dx, adds to the weight sums where the row is our own."""
    if DOCS:
        start = tl.load(doc_ptr + t, mask=t < length, other=0)
        s1 = _seen(t - 1, start)
        s2 = _seen(t - 2, start)
        s3 = _seen(t - 3, start)
        x1 = tl.where(s1, x1, 0.0)
        x2 = tl.where(s2, x2, 0.0)
        x3 = tl.where(s3, x3, 0.0)
    d = dy
    if SILU:
        pre = _mix(x0, x1, x2, x3, w0, w1, w2, w3, bias)
        gate = 1.0 / (1.0 + tl.exp(-pre))
        d = dy * (gate + pre * gate * (1.0 - gate))
    if COUNT:
        g3 += d * x0
        g2 += d * x1
        g1 += d * x2
        g0 += d * x3
        gb += d
    d1 = d
    d2 = d
    d3 = d
    if DOCS:
        d1 = tl.where(s1, d, 0.0)
        d2 = tl.where(s2, d, 0.0)
        d3 = tl.where(s3, d, 0.0)
    out = p3 + w0 * d3
    p3 = p2 + w1 * d2
    p2 = p1 + w2 * d1
    p1 = w3 * d
    row = t - 3
    mask = inside & (row >= first) & (row < last)
    tl.store(dx_ptr + channel, out.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_STATE:
        state_row = row + (TAPS - 1)
        mask = inside & (row < 0) & (state_row >= 0)
        tl.store(
            dstate_ptr + state_row * width + channel, out.to(dstate_ptr.dtype.element_ty), mask=mask
        )
    return p1, p2, p3, g0, g1, g2, g3, gb


@triton.jit
def _backward_rows(
    x_ptr, dy_ptr, dx_ptr, dstate_ptr, doc_ptr, x1, x2, x3, w0, w1, w2, w3, bias,
    p1, p2, p3, g0, g1, g2, g3, gb, i, first, last, length, x_row, dy_row, dx_row,
    width: tl.constexpr, channel, inside,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr, DOCS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    t = first + i
    row = x_ptr + i * x_row + channel
    dy = dy_ptr + i * dy_row + channel
    a = tl.load(row, mask=inside & (t < length), other=0.0)
    b = tl.load(row + x_row, mask=inside & (t + 1 < length), other=0.0)
    c = tl.load(row + 2 * x_row, mask=inside & (t + 2 < length), other=0.0)
    d = tl.load(row + 3 * x_row, mask=inside & (t + 3 < length), other=0.0)
    e = tl.load(dy, mask=inside & (t < length), other=0.0)
    f = tl.load(dy + dy_row, mask=inside & (t + 1 < length), other=0.0)
    g = tl.load(dy + 2 * dy_row, mask=inside & (t + 2 < length), other=0.0)
    h = tl.load(dy + 3 * dy_row, mask=inside & (t + 3 < length), other=0.0)
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    c = c.to(tl.float32)
    d = d.to(tl.float32)
    dx = dx_ptr + (i - 3) * dx_row
    p1, p2, p3, g0, g1, g2, g3, gb = _backward_row(
        dx, dstate_ptr, doc_ptr, a, x1, x2, x3, e.to(tl.float32), w0, w1, w2, w3, bias,
        p1, p2, p3, g0, g1, g2, g3, gb, t, first, last, length, width, channel, inside,
        TAPS, SILU, HAS_STATE, DOCS, COUNT)  # fmt: skip
    p1, p2, p3, g0, g1, g2, g3, gb = _backward_row(
        dx + dx_row, dstate_ptr, doc_ptr, b, a, x1, x2, f.to(tl.float32), w0, w1, w2, w3, bias,
        p1, p2, p3, g0, g1, g2, g3, gb, t + 1, first, last, length, width, channel, inside,
        TAPS, SILU, HAS_STATE, DOCS, COUNT)  # fmt: skip
    p1, p2, p3, g0, g1, g2, g3, gb = _backward_row(
        dx + 2 * dx_row, dstate_ptr, doc_ptr, c, b, a, x1, g.to(tl.float32), w0, w1, w2, w3, bias,
        p1, p2, p3, g0, g1, g2, g3, gb, t + 2, first, last, length, width, channel, inside,
        TAPS, SILU, HAS_STATE, DOCS, COUNT)  # fmt: skip
    p1, p2, p3, g0, g1, g2, g3, gb = _backward_row(
        dx + 3 * dx_row, dstate_ptr, doc_ptr, d, c, b, a, h.to(tl.float32), w0, w1, w2, w3, bias,
        p1, p2, p3, g0, g1, g2, g3, gb, t + 3, first, last, length, width, channel, inside,
        TAPS, SILU, HAS_STATE, DOCS, COUNT)  # fmt: skip
    return d, c, b, p1, p2, p3, g0, g1, g2, g3, gb


@triton.jit
def backward_kernel(
    x_ptr, w_ptr, b_ptr, state_ptr, doc_ptr, dy_ptr, dx_ptr, dstate_ptr, partial_ptr,
    length, x_batch, x_row, dy_batch, dy_row, dx_batch, dx_row, width: tl.constexpr,
    ALIGN: tl.constexpr, DY_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr, TAPS: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, DOCS: tl.constexpr,
    CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    strips: tl.constexpr = (width + CHANNELS - 1) // CHANNELS
    segments = tl.cdiv(length, SEGMENT)
    pid = tl.program_id(0)
    first = (pid // strips) % segments * SEGMENT
    batch = (pid // strips // segments).to(tl.int64)
    channel = pid % strips * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    x_row = x_row * ALIGN
    dy_row = dy_row * DY_ALIGN
    x_ptr += batch * (x_batch * ALIGN) + first.to(tl.int64) * x_row
    dy_ptr += batch * (dy_batch * DY_ALIGN) + first.to(tl.int64) * dy_row
    dx_row = dx_row * DX_ALIGN
    dx_ptr += batch * (dx_batch * DX_ALIGN) + first.to(tl.int64) * dx_row
    state_ptr += batch * (TAPS - 1) * width
    dstate_ptr += batch * (TAPS - 1) * width
    doc_ptr += batch * length
    w0, w1, w2, w3 = _taps(w_ptr, channel, inside, TAPS)
    bias = tl.zeros_like(w0)
    if HAS_BIAS:
        bias = tl.load(b_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.zeros_like(w0)
    x2 = tl.zeros_like(w0)
    x3 = tl.zeros_like(w0)
    if HAS_STATE or first > 0:
        origin = x_ptr - first.to(tl.int64) * x_row
        x3 = _before(origin, state_ptr, first - 3, x_row, channel, inside, width, TAPS, HAS_STATE)
        x2 = _before(origin, state_ptr, first - 2, x_row, channel, inside, width, TAPS, HAS_STATE)
        x1 = _before(origin, state_ptr, first - 1, x_row, channel, inside, width, TAPS, HAS_STATE)
    p1 = tl.zeros_like(w0)
    p2 = tl.zeros_like(w0)
    p3 = tl.zeros_like(w0)
    g0 = tl.zeros_like(w0)
    g1 = tl.zeros_like(w0)
    g2 = tl.zeros_like(w0)
    g3 = tl.zeros_like(w0)
    gb = tl.zeros_like(w0)
    last = tl.minimum(first + SEGMENT, length)
    for i in tl.range(0, SEGMENT, 4, num_stages=STAGES):
        x1, x2, x3, p1, p2, p3, g0, g1, g2, g3, gb = _backward_rows(
            x_ptr, dy_ptr, dx_ptr, dstate_ptr, doc_ptr, x1, x2, x3, w0, w1, w2, w3, bias,
            p1, p2, p3, g0, g1, g2, g3, gb, i, first, last, length, x_row, dy_row, dx_row, width,
            channel, inside, TAPS, SILU, HAS_STATE, DOCS, True)  # fmt: skip
    # three rows of the next segment finish our last three rows of dx
    _backward_rows(
        x_ptr, dy_ptr, dx_ptr, dstate_ptr, doc_ptr, x1, x2, x3, w0, w1, w2, w3, bias,
        p1, p2, p3, g0, g1, g2, g3, gb, SEGMENT, first, last, length, x_row, dy_row, dx_row,
        width, channel, inside, TAPS, SILU, HAS_STATE, DOCS, False)  # fmt: skip
    out = partial_ptr + (pid // strips).to(tl.int64) * (5 * width) + channel
    tl.store(out, g0, mask=inside)
    tl.store(out + width, g1, mask=inside)
    tl.store(out + 2 * width, g2, mask=inside)
    tl.store(out + 3 * width, g3, mask=inside)
    tl.store(out + 4 * width, gb, mask=inside)


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Batch and row stride divided by the power of two that both share, and that power."""
    batch, row = t.stride(0), t.stride(1)
    align = math.gcd(batch, row, 16)
    return batch // align, row // align, align


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None,
    doc: Tensor | None,
) -> Tensor:  # fmt: skip
    config = FORWARD
    batch, length, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_batch, x_row, align = _strides(x)
    programs = batch * triton.cdiv(length, config.segment) * triton.cdiv(width, config.channels)
    forward_kernel[(programs,)](
        x, weight, x if bias is None else bias, x if state is None else state,
        x if doc is None else doc, y, length, x_batch, x_row, width,
        ALIGN=align, TAPS=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None,
        HAS_STATE=state is not None, DOCS=doc is not None,
        CHANNELS=config.channels, SEGMENT=config.segment, STAGES=config.stages,
        num_warps=config.warps,
    )  # fmt: skip
    return y


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None,
    doc: Tensor | None, dx: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes dx (B, L, D), which may have wider rows; returns the sums (5, D) float32 of the four
    taps and the bias, and the state's gradient (empty without a state)."""
    config = BACKWARD
    batch, length, width = x.shape
    taps = weight.shape[1]
    dy = dense_last(dy)
    d_state = x.new_empty((batch, taps - 1, width) if state is not None else (0,))
    blocks = batch * triton.cdiv(length, config.segment)
    partial = torch.empty(blocks, 5 * width, dtype=torch.float32, device=x.device)
    x_batch, x_row, align = _strides(x)
    dy_batch, dy_row, dy_align = _strides(dy)
    dx_batch, dx_row, dx_align = _strides(dx)
    backward_kernel[(blocks * triton.cdiv(width, config.channels),)](
        x, weight, x if bias is None else bias, x if state is None else state,
        x if doc is None else doc, dy, dx, d_state, partial, length, x_batch, x_row, dy_batch,
        dy_row, dx_batch, dx_row, width, ALIGN=align, DY_ALIGN=dy_align, DX_ALIGN=dx_align,
        TAPS=taps, SILU=silu, HAS_BIAS=bias is not None, HAS_STATE=state is not None,
        DOCS=doc is not None, CHANNELS=config.channels, SEGMENT=config.segment,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return sum_rows(partial, torch.float32).view(5, width), d_state


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None,
    doc: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, and what `gradients` returns."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, *gradients(dy, x, weight, bias, silu, state, doc, dx)


def _fake_backward(dy, x, weight, bias, silu, state, doc):
    width = x.shape[2]
    d_state = x.new_empty((len(x), weight.shape[1] - 1, width) if state is not None else (0,))
    return x.new_empty(x.shape), x.new_empty((5, width), dtype=torch.float32), d_state


_forward_op = define_op(
    "conv1d_forward(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? state, Tensor? doc)"
    " -> Tensor",
    forward,
    lambda x, *_: x.new_empty(x.shape),
)
_backward_op = define_op(
    "conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? state,"
    " Tensor? doc) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None,
        doc: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, bias, state, doc)
        ctx.silu = silu
        y: Tensor = _forward_op(x, weight, bias, silu, state, doc)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, state, doc = ctx.saved_tensors
        dx, sums, d_state = _backward_op(grads[0], x, weight, bias, ctx.silu, state, doc)
        d_weight = sums[4 - weight.shape[1] : 4].t().to(weight.dtype)
        d_bias = None if bias is None else sums[4].to(bias.dtype)
        return dx, d_weight, d_bias, None, None if state is None else d_state, None


def causal_conv1d_triton(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, silu: bool,
    initial_state_BDK: Tensor | None, doc_start_BL: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `ablate.kernels.causal_conv1d`; two to four taps, float32, bfloat16 or float16."""
    if initial_state_BDK is not None:
        initial_state_BDK = initial_state_BDK.to(x_BLD.dtype).contiguous()
    y: Tensor = _CausalConv1d.apply(
        dense_last(x_BLD), weight_DK.contiguous(), contiguous(bias_D), silu, initial_state_BDK,
        starts(doc_start_BL),
    )  # fmt: skip
    return y
