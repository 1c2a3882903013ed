"""Projections whose float32 weights have their gradients in float32 under autocast."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.dispatch import define_op


def float32_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b of matrices of 16 bits as it is accumulated, in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    with torch.autocast(a.device.type, enabled=False):  # where a backward pass runs within one
        return torch.mm(a.float(), b.float(), out=out)


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return float32_product(dy.flatten(0, -2).t(), x.flatten(0, -2))


_op = define_op(
    "weight_gradient(Tensor dy, Tensor x) -> Tensor",
    _weight_gradient,
    lambda dy, x: dy.new_empty((dy.shape[-1], x.shape[-1]), dtype=torch.float32),
)


def weight_gradient(dy_xE: Tensor, x_xD: Tensor) -> Tensor:
    """sum over rows of dy x^T, (E, D) in float32, as the product accumulates it."""
    out: Tensor = _op(dy_xE, x_xD)
    return out


def linear(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """x weight^T + bias, under autocast in its type.

    There the gradient of a float32 weight comes out of its product in float32. Autocast's own is
    rounded to the lower type and widened again, which takes a pass over it besides.
    """
    mixed = x.is_cuda and weight_ED.dtype == torch.float32 and torch.is_autocast_enabled("cuda")
    if mixed and bias_E is None and torch.is_grad_enabled():
        out: Tensor = MixedLinear.apply(x.to(torch.get_autocast_dtype("cuda")), weight_ED)
        return out
    return F.linear(x, weight_ED, bias_E)


class MixedLinear(torch.autograd.Function):
    """x weight^T in x's type, with the weight's gradient in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        low = weight.to(x.dtype)
        ctx.save_for_backward(x, low)
        return F.linear(x, low)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, low = ctx.saved_tensors
        (dy,) = grads
        need_x, need_weight = ctx.needs_input_grad
        dx = dy @ low if need_x else None
        return dx, weight_gradient(dy, x) if need_weight else None
