"""The gradient of a projection's weight in float32, whatever the type of the product."""

from __future__ import annotations

import torch
from torch import Tensor

from ablate.kernels.dispatch import define_op


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    rows, columns = dy.flatten(0, -2), x.flatten(0, -2)
    if dy.is_cuda and dy.dtype != torch.float32:
        return torch.mm(rows.t(), columns, out_dtype=torch.float32)
    return torch.mm(rows.t().float(), columns.float())


_op = define_op(
    "weight_gradient(Tensor dy, Tensor x) -> Tensor",
    _weight_gradient,
    lambda dy, x: dy.new_empty((dy.shape[-1], x.shape[-1]), dtype=torch.float32),
)


def weight_gradient(dy_xE: Tensor, x_xD: Tensor) -> Tensor:
    """sum over rows of dy x^T, (E, D) in float32, as the product accumulates it."""
    out: Tensor = _op(dy_xE, x_xD)
    return out
