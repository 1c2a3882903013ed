"""Triton kernels of `causal_conv1d`: channels last, one pass forward and one pass backward.

A program owns a strip of channels and a segment of time and walks down the segment with its last
inputs in registers, so that every element is read once (plus three rows at a segment's edge). The
backward pass rebuilds what SiLU needs, carries the three unfinished rows of dx in registers and
writes its share of the weight gradient for a second, ordered sum. Four taps are computed always;
fewer taps have zero weights in front.
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
from ablate.kernels.sum_rows_triton import sum_rows
from ablate.kernels.tiles_triton import batch_unit, contiguous, dense_last, sigmoid, starts


@dataclass(frozen=True)
class Config:
    """Channels and time steps of one program, warps, and the depth of the load pipeline."""

    channels: int
    segment: int
    warps: int
    stages: int


# One table for every architecture: the kernels are bound by memory and hold 17 kB of shared memory
# at most.
FORWARD = Config(channels=128, segment=32, warps=1, stages=4)
BACKWARD = Config(channels=256, segment=256, warps=2, stages=3)


@triton.jit
def _seen(source, start):
    """Input `source` belongs to the document that began at `start`."""
    return (source >= start) | ((source < 0) & (start < 0))


@triton.jit
def _mix(x0, x1, x2, x3, w0, w1, w2, w3, bias):
    return bias + w3 * x0 + w2 * x1 + w1 * x2 + w0 * x3


@triton.jit
def _taps(w_ptr, b_ptr, channel, inside, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Weights of the inputs 3, 2, 1 and 0 steps back, zero where there are fewer taps; the bias."""
    base = w_ptr + channel * TAPS
    w3 = tl.load(base + (TAPS - 1), mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(base + (TAPS - 2), mask=inside, other=0.0).to(tl.float32)
    w1 = tl.zeros_like(w3)
    w0 = tl.zeros_like(w3)
    if TAPS > 2:
        w1 = tl.load(base + (TAPS - 3), mask=inside, other=0.0).to(tl.float32)
    if TAPS > 3:
        w0 = tl.load(base + (TAPS - 4), mask=inside, other=0.0).to(tl.float32)
    bias = tl.zeros_like(w3)
    if HAS_BIAS:
        bias = tl.load(b_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, bias


@triton.jit
def _before(
    x_ptr, state_ptr, t, x_row, channel, inside, width,
    TAPS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Input at t, which may lie before the sequence: then from the state, or zero."""
    at = t.to(tl.int64) * x_row + channel
    x = tl.load(x_ptr + at, mask=inside & (t >= 0), other=0.0).to(tl.float32)
    if HAS_STATE:
        row = t + (TAPS - 1)
        mask = inside & (t < 0) & (row >= 0)
        x += tl.load(state_ptr + row * width + channel, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _three_before(
    x_ptr, state_ptr, first, X_ROW: tl.constexpr, channel, inside, WIDTH: tl.constexpr,
    TAPS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The inputs one, two and three rows before the first."""
    x1 = tl.zeros(channel.shape, tl.float32)
    x2 = x1
    x3 = x1
    if HAS_STATE or first > 0:
        x1 = _before(x_ptr, state_ptr, first - 1, X_ROW, channel, inside, WIDTH, TAPS, HAS_STATE)
        x2 = _before(x_ptr, state_ptr, first - 2, X_ROW, channel, inside, WIDTH, TAPS, HAS_STATE)
        x3 = _before(x_ptr, state_ptr, first - 3, X_ROW, channel, inside, WIDTH, TAPS, HAS_STATE)
    return x1, x2, x3


@triton.jit
def _load_row(x_ptr, t, length, inside, FREE: tl.constexpr, WHOLE: tl.constexpr):
    if FREE and WHOLE:
        return tl.load(x_ptr).to(tl.float32)
    elif FREE:
        return tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.load(x_ptr, mask=inside & (t < length), other=0.0).to(tl.float32)


@triton.jit
def _load_rows(
    x_ptr, t, length, X_ROW: tl.constexpr, inside, FREE: tl.constexpr, WHOLE: tl.constexpr
):
    """Four rows from t on, all asked for before one is used. FREE: none lies after the end; WHOLE:
    all channels are inside."""
    a = _load_row(x_ptr, t, length, inside, FREE, WHOLE)
    b = _load_row(x_ptr + X_ROW, t + 1, length, inside, FREE, WHOLE)
    c = _load_row(x_ptr + 2 * X_ROW, t + 2, length, inside, FREE, WHOLE)
    d = _load_row(x_ptr + 3 * X_ROW, t + 3, length, inside, FREE, WHOLE)
    return a, b, c, d


@triton.jit
def _forward_row(
    y_ptr, doc_ptr, x0, x1, x2, x3, w0, w1, w2, w3, bias, t, length, inside,
    SILU: tl.constexpr, DOCS: tl.constexpr, FREE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    if DOCS:
        start = tl.load(doc_ptr + t, mask=t < length, other=0)
        x1 = tl.where(_seen(t - 1, start), x1, 0.0)
        x2 = tl.where(_seen(t - 2, start), x2, 0.0)
        x3 = tl.where(_seen(t - 3, start), x3, 0.0)
    y = _mix(x0, x1, x2, x3, w0, w1, w2, w3, bias)
    if SILU:
        y *= sigmoid(y)
    y = y.to(y_ptr.dtype.element_ty)
    if FREE and WHOLE:
        tl.store(y_ptr, y)
    elif FREE:
        tl.store(y_ptr, y, mask=inside)
    else:
        tl.store(y_ptr, y, mask=inside & (t < length))


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, b_ptr, state_ptr, doc_ptr, y_ptr, length, x_batch,
    UNIT: tl.constexpr, X_ROW: tl.constexpr, WIDTH: tl.constexpr,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    DOCS: tl.constexpr, FREE: tl.constexpr,
    CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    STRIPS: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    WHOLE: tl.constexpr = WIDTH % CHANNELS == 0
    segments = tl.cdiv(length, SEGMENT)
    pid = tl.program_id(0)
    first = (pid // STRIPS) % segments * SEGMENT
    batch = (pid // STRIPS // segments).to(tl.int64)
    channel = pid % STRIPS * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < WIDTH
    origin = x_ptr + batch * x_batch * UNIT
    x_ptr = origin + first.to(tl.int64) * X_ROW + channel
    y_ptr += (batch * length + first) * WIDTH + channel
    state_ptr += batch * (TAPS - 1) * WIDTH
    doc_ptr += batch * length
    w0, w1, w2, w3, bias = _taps(w_ptr, b_ptr, channel, inside, TAPS, HAS_BIAS)
    x1, x2, x3 = _three_before(
        origin, state_ptr, first, X_ROW, channel, inside, WIDTH, TAPS, HAS_STATE
    )
    for i in tl.range(0, SEGMENT, 4, num_stages=STAGES):
        t = first + i
        a, b, c, d = _load_rows(x_ptr + i * X_ROW, t, length, X_ROW, inside, FREE, WHOLE)
        y = y_ptr + i * WIDTH
        _forward_row(y, doc_ptr, a, x1, x2, x3, w0, w1, w2, w3, bias, t, length, inside,
                     SILU, DOCS, FREE, WHOLE)  # fmt: skip
        _forward_row(y + WIDTH, doc_ptr, b, a, x1, x2, w0, w1, w2, w3, bias, t + 1, length,
                     inside, SILU, DOCS, FREE, WHOLE)  # fmt: skip
        _forward_row(y + 2 * WIDTH, doc_ptr, c, b, a, x1, w0, w1, w2, w3, bias, t + 2, length,
                     inside, SILU, DOCS, FREE, WHOLE)  # fmt: skip
        _forward_row(y + 3 * WIDTH, doc_ptr, d, c, b, a, w0, w1, w2, w3, bias, t + 3, length,
                     inside, SILU, DOCS, FREE, WHOLE)  # fmt: skip
        x1 = d
        x2 = c
        x3 = b


@triton.jit
def _backward_row(
    dx_ptr, dstate_ptr, doc_ptr, x0, x1, x2, x3, dy, w0, w1, w2, w3, bias,
    p1, p2, p3, g0, g1, g2, g3, gb, t, first, last, length, WIDTH: tl.constexpr, channel, inside,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr, DOCS: tl.constexpr,
    COUNT: tl.constexpr, FREE: tl.constexpr, WHOLE: tl.constexpr,
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
        gate = sigmoid(pre)
        silu = gate * pre
        d = dy * (gate + (silu - gate * silu))
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
    mask = row >= first
    if not FREE:
        mask = mask & (row < last)
    if not WHOLE:
        mask = inside & mask
    tl.store(dx_ptr, out.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_STATE:
        state_row = row + (TAPS - 1)
        mask = inside & (row < 0) & (state_row >= 0)
        tl.store(
            dstate_ptr + state_row * WIDTH + channel, out.to(dstate_ptr.dtype.element_ty), mask=mask
        )
    return p1, p2, p3, g0, g1, g2, g3, gb


@triton.jit
def _backward_rows(
    x_ptr, dy_ptr, dx_ptr, dstate_ptr, doc_ptr, x1, x2, x3, w0, w1, w2, w3, bias,
    p1, p2, p3, g0, g1, g2, g3, gb, i, first, last, length,
    X_ROW: tl.constexpr, DY_ROW: tl.constexpr, DX_ROW: tl.constexpr, WIDTH: tl.constexpr,
    channel, inside, TAPS: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr,
    DOCS: tl.constexpr, COUNT: tl.constexpr, FREE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    t = first + i
    a, b, c, d = _load_rows(x_ptr + i * X_ROW, t, length, X_ROW, inside, FREE, WHOLE)
    e, f, g, h = _load_rows(dy_ptr + i * DY_ROW, t, length, DY_ROW, inside, FREE, WHOLE)
    dx = dx_ptr + (i - 3) * DX_ROW
    p1, p2, p3, g0, g1, g2, g3, gb = _backward_row(
        dx, dstate_ptr, doc_ptr, a, x1, x2, x3, e, w0, w1, w2, w3, bias,
        p1, p2, p3, g0, g1, g2, g3, gb, t, first, last, length, WIDTH, channel, inside,
        TAPS, SILU, HAS_STATE, DOCS, COUNT, FREE, WHOLE)  # fmt: skip
    p1, p2, p3, g0, g1, g2, g3, gb = _backward_row(
        dx + DX_ROW, dstate_ptr, doc_ptr, b, a, x1, x2, f, w0, w1, w2, w3, bias,
        p1, p2, p3, g0, g1, g2, g3, gb, t + 1, first, last, length, WIDTH, channel, inside,
        TAPS, SILU, HAS_STATE, DOCS, COUNT, FREE, WHOLE)  # fmt: skip
    p1, p2, p3, g0, g1, g2, g3, gb = _backward_row(
        dx + 2 * DX_ROW, dstate_ptr, doc_ptr, c, b, a, x1, g, w0, w1, w2, w3, bias,
        p1, p2, p3, g0, g1, g2, g3, gb, t + 2, first, last, length, WIDTH, channel, inside,
        TAPS, SILU, HAS_STATE, DOCS, COUNT, FREE, WHOLE)  # fmt: skip
    p1, p2, p3, g0, g1, g2, g3, gb = _backward_row(
        dx + 3 * DX_ROW, dstate_ptr, doc_ptr, d, c, b, a, h, w0, w1, w2, w3, bias,
        p1, p2, p3, g0, g1, g2, g3, gb, t + 3, first, last, length, WIDTH, channel, inside,
        TAPS, SILU, HAS_STATE, DOCS, COUNT, FREE, WHOLE)  # fmt: skip
    return d, c, b, p1, p2, p3, g0, g1, g2, g3, gb


@triton.jit
def backward_kernel(
    x_ptr, w_ptr, b_ptr, state_ptr, doc_ptr, dy_ptr, dx_ptr, dstate_ptr, partial_ptr,
    length, x_batch, dy_batch, dx_batch,
    UNIT: tl.constexpr, X_ROW: tl.constexpr, DY_ROW: tl.constexpr, DX_ROW: tl.constexpr,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr, DOCS: tl.constexpr, FREE: tl.constexpr,
    CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    STRIPS: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    WHOLE: tl.constexpr = WIDTH % CHANNELS == 0
    segments = tl.cdiv(length, SEGMENT)
    pid = tl.program_id(0)
    first = (pid // STRIPS) % segments * SEGMENT
    batch = (pid // STRIPS // segments).to(tl.int64)
    channel = pid % STRIPS * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < WIDTH
    wide = first.to(tl.int64)
    origin = x_ptr + batch * x_batch * UNIT
    x_ptr = origin + wide * X_ROW + channel
    dy_ptr += batch * dy_batch * UNIT + wide * DY_ROW + channel
    dx_ptr += batch * dx_batch * UNIT + wide * DX_ROW + channel
    state_ptr += batch * (TAPS - 1) * WIDTH
    dstate_ptr += batch * (TAPS - 1) * WIDTH
    doc_ptr += batch * length
    w0, w1, w2, w3, bias = _taps(w_ptr, b_ptr, channel, inside, TAPS, HAS_BIAS)
    x1, x2, x3 = _three_before(
        origin, state_ptr, first, X_ROW, channel, inside, WIDTH, TAPS, HAS_STATE
    )
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
            p1, p2, p3, g0, g1, g2, g3, gb, i, first, last, length, X_ROW, DY_ROW, DX_ROW, WIDTH,
            channel, inside, TAPS, SILU, HAS_STATE, DOCS, True, FREE, WHOLE)  # fmt: skip
    # three rows of the next segment finish our last three rows of dx
    _backward_rows(
        x_ptr, dy_ptr, dx_ptr, dstate_ptr, doc_ptr, x1, x2, x3, w0, w1, w2, w3, bias,
        p1, p2, p3, g0, g1, g2, g3, gb, SEGMENT, first, last, length, X_ROW, DY_ROW, DX_ROW,
        WIDTH, channel, inside, TAPS, SILU, HAS_STATE, DOCS, False, False, WHOLE)  # fmt: skip
    out = partial_ptr + (pid // STRIPS).to(tl.int64) * (5 * WIDTH) + channel
    tl.store(out, g0, mask=inside)
    tl.store(out + WIDTH, g1, mask=inside)
    tl.store(out + 2 * WIDTH, g2, mask=inside)
    tl.store(out + 3 * WIDTH, g3, mask=inside)
    tl.store(out + 4 * WIDTH, gb, mask=inside)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None,
    doc: Tensor | None,
) -> Tensor:  # fmt: skip
    config = FORWARD
    batch, length, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    unit = batch_unit(x)
    programs = batch * triton.cdiv(length, config.segment) * triton.cdiv(width, config.channels)
    forward_kernel[(programs,)](
        x, weight, x if bias is None else bias, x if state is None else state,
        x if doc is None else doc, y, length, x.stride(0) // unit,
        UNIT=unit, X_ROW=x.stride(1), WIDTH=width, TAPS=weight.shape[1], SILU=silu,
        HAS_BIAS=bias is not None, HAS_STATE=state is not None, DOCS=doc is not None,
        FREE=length % config.segment == 0,
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
    unit = batch_unit(x, dy, dx)
    backward_kernel[(blocks * triton.cdiv(width, config.channels),)](
        x, weight, x if bias is None else bias, x if state is None else state,
        x if doc is None else doc, dy, dx, d_state, partial, length,
        x.stride(0) // unit, dy.stride(0) // unit, dx.stride(0) // unit,
        UNIT=unit, X_ROW=x.stride(1), DY_ROW=dy.stride(1), DX_ROW=dx.stride(1), WIDTH=width,
        TAPS=taps, SILU=silu, HAS_BIAS=bias is not None, HAS_STATE=state is not None,
        DOCS=doc is not None, FREE=length % config.segment == 0,
        CHANNELS=config.channels, SEGMENT=config.segment,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return sum_rows(partial, torch.float32).view(5, width), d_state


def parameter_gradients(
    sums: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Those of the weight (D, K) and the bias, in their types, of the sums from `gradients`."""
    d_weight = sums[4 - weight.shape[1] : 4].t().to(weight.dtype)
    return d_weight, None if bias is None else sums[4].to(bias.dtype)


def _fake_gradients(dy, x, weight, bias, silu, state, doc, dx):
    width = x.shape[2]
    d_state = x.new_empty((len(x), weight.shape[1] - 1, width) if state is not None else (0,))
    return x.new_empty((5, width), dtype=torch.float32), d_state


forward_op = define_op(
    "conv1d_forward(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? state, Tensor? doc)"
    " -> Tensor",
    forward,
    lambda x, *_: x.new_empty(x.shape),
)
gradients_op = define_op(
    "conv1d_gradients(Tensor dy, Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? state,"
    " Tensor? doc, Tensor(a!) dx) -> (Tensor, Tensor)",
    gradients,
    _fake_gradients,
)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None,
        doc: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, bias, state, doc)
        ctx.silu = silu
        y: Tensor = forward_op(x, weight, bias, silu, state, doc)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, state, doc = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        sums, d_state = gradients_op(grads[0], x, weight, bias, ctx.silu, state, doc, dx)
        d_parameters = parameter_gradients(sums, weight, bias)
        return dx, *d_parameters, None, None if state is None else d_state, None


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
