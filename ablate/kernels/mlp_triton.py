"""`mlp` on a GPU: two of its six products leave their tiles through the activation or its gradient.

On Hopper with 16-bit inputs those are kernels of `products_gluon` (`ablate.kernels.hopper`).
Everywhere else the same operators do the separate form: torch's product, then the kernels of
`gelu_triton` or `swiglu_triton`. Roundings are the same, so that the two differ by the order of
additions within a product alone. torch.compile sees one operator for either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ablate.kernels import gelu_triton, swiglu_triton
from ablate.kernels.dispatch import define_op
from ablate.kernels.hopper import products
from ablate.kernels.linear import weight_gradient


def _forward(x: Tensor, w_in: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """x w_in^T and what the activation makes of it, (M, H)."""
    if kernels := products(x):
        pre, act = (kernels.swiglu if gated else kernels.gelu)(x, w_in)
        return pre, act
    pre = x @ w_in.T
    return pre, (swiglu_triton if gated else gelu_triton)._forward(pre)


def _backward(dy: Tensor, w_out: Tensor, pre: Tensor, gated: bool) -> Tensor:
    """The gradient of pre, where that of what the activation made of it is dy w_out."""
    if kernels := products(dy):
        gradients = kernels.swiglu_gradients if gated else kernels.gelu_gradients
        d_pre: Tensor = gradients(dy, w_out, pre)
        return d_pre
    return (swiglu_triton if gated else gelu_triton)._backward(pre, dy @ w_out)


def _fake_forward(x: Tensor, w_in: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    rows, width = x.shape[0], w_in.shape[0]
    return x.new_empty(rows, width), x.new_empty(rows, width // 2 if gated else width)


_forward_op = define_op(
    "mlp_forward(Tensor x, Tensor w_in, bool gated) -> (Tensor, Tensor)", _forward, _fake_forward
)
_backward_op = define_op(
    "mlp_backward(Tensor dy, Tensor w_out, Tensor pre, bool gated) -> Tensor",
    _backward,
    lambda dy, w_out, pre, gated: pre.new_empty(pre.shape),
)


class _MLP(torch.autograd.Function):
    """Weights of float32 are rounded to x's type, and have their gradients in float32 from the
    products themselves, as by `ablate.kernels.linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor, gated: bool) -> Any:
        ctx.gated = gated
        ctx.mixed = w_in.dtype != x.dtype
        w_in, w_out = w_in.to(x.dtype), w_out.to(x.dtype)
        pre, act = _forward_op(x, w_in, gated)
        ctx.save_for_backward(x, w_in, w_out, pre, act)
        return act @ w_out.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, w_in, w_out, pre, act = ctx.saved_tensors
        need_x, need_in, need_out, _ = ctx.needs_input_grad
        gradient = weight_gradient if ctx.mixed else _product
        dx = dw_in = dw_out = None
        if need_out:
            dw_out = gradient(dy, act)
        if need_x or need_in:
            d_pre = _backward_op(dy, w_out, pre, ctx.gated)
            if need_in:
                dw_in = gradient(d_pre, x)
            if need_x:
                dx = d_pre @ w_in
        return dx, dw_in, dw_out, None


def _product(dy: Tensor, x: Tensor) -> Tensor:
    return dy.T @ x


def mlp_triton(x: Tensor, w_in_ED: Tensor, w_out_OH: Tensor, gated: bool) -> Tensor:
    """See `ablate.kernels.mlp`."""
    y: Tensor = _MLP.apply(x.reshape(-1, x.shape[-1]), w_in_ED, w_out_OH, gated)
    return y.unflatten(0, x.shape[:-1]) if x.ndim > 1 else y[0]
