"""`swiglu` on a GPU: both halves of the projection are read in place, and their gradient is written
as one."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ablate.kernels.dispatch import define_op
from ablate.kernels.tiles_triton import sigmoid

NUMBERS = 4096  # of one program
WARPS = 8


@triton.jit
def _halves(x_ptr, rows, width: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gate, how far it opens and value of a tile; where these lie in x, where in y, and a mask."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < width)
    at = row * (2 * width) + column
    gate = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + at + width, mask=mask, other=0.0).to(tl.float32)
    return gate, sigmoid(gate), value, at, row * width + column, mask


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, rows, width: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    gate, opened, value, _, to, mask = _halves(x_ptr, rows, width, ROWS, BLOCK)
    tl.store(y_ptr + to, (gate * opened * value).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x_ptr, dy_ptr, dx_ptr, rows, width: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    gate, opened, value, at, to, mask = _halves(x_ptr, rows, width, ROWS, BLOCK)
    dy = tl.load(dy_ptr + to, mask=mask, other=0.0).to(tl.float32)
    silu = gate * opened
    dgate = dy * value * (opened + (silu - silu * opened))
    tl.store(dx_ptr + at, dgate.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + at + width, (dy * silu).to(dx_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: Any, x: Tensor, *tensors: Tensor) -> None:
    width = x.shape[-1] // 2
    rows = x.numel() // (2 * width)
    block = min(1024, max(64, width & -width))  # a power of two that divides most widths
    tile = NUMBERS // block
    kernel[(triton.cdiv(rows, tile), triton.cdiv(width, block))](
        x, *tensors, rows, width, tile, block, num_warps=WARPS
    )


def _empty(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _forward(x: Tensor) -> Tensor:
    y = _empty(x)
    _launch(forward_kernel, x.contiguous(), y)
    return y


def _backward(x: Tensor, dy: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    _launch(backward_kernel, x.contiguous(), dy.contiguous(), dx)
    return dx


_forward_op = define_op("swiglu_forward(Tensor x) -> Tensor", _forward, _empty)
_backward_op = define_op(
    "swiglu_backward(Tensor x, Tensor dy) -> Tensor",
    _backward,
    lambda x, dy: x.new_empty(x.shape),
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _forward_op(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _backward_op(*ctx.saved_tensors, *grads)


def swiglu_triton(x: Tensor) -> Tensor:
    """See `ablate.kernels.swiglu`."""
    y: Tensor = _SwiGLU.apply(x)
    return y
