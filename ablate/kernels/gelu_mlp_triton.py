"""`gelu_mlp` on a GPU: two of its six products leave their tiles through GELU or its gradient.

On Hopper with 16-bit inputs those are the kernels of `gelu_mlp_gluon`. That file is written in
Gluon, which is experimental in Triton and may change with any version of it, so it is imported here
alone, when it is first wanted, and for versions in TESTED alone. For any other version, GPU or
dtype, and in the interpreter, the same operators do the separate form: torch's product, then the
kernels of `gelu_triton`. Roundings are the same, so that the two differ by the order of additions
within a product alone. torch.compile sees one operator for either.
"""

from __future__ import annotations

import functools
import re
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from ablate.kernels import gelu_triton
from ablate.kernels.dispatch import INTERPRET, define_op
from ablate.kernels.linear import weight_gradient

TESTED = re.compile(r"3\.[67]\.\d+")  # releases: between them a version can be anything


@functools.cache
def _gluon() -> ModuleType | None:
    """The fused kernels, or None where this Triton is not known to compile them."""
    if not TESTED.fullmatch(triton.__version__):
        return None
    try:
        from ablate.kernels import gelu_mlp_gluon
    except Exception:  # whatever an experimental module raises, there is the other form
        return None
    return gelu_mlp_gluon


def _fused(v: Tensor) -> ModuleType | None:
    """Asked in the operators, where torch.compile does not look."""
    half = v.dtype in (torch.float16, torch.bfloat16)
    if INTERPRET or not v.is_cuda or not half:
        return None
    return _gluon() if torch.cuda.get_device_capability(v.device) == (9, 0) else None


def _forward(x: Tensor, w_in: Tensor) -> tuple[Tensor, Tensor]:
    """x w_in^T and gelu of it, (M, H)."""
    if kernels := _fused(x):
        pre, act = kernels.forward(x, w_in)
        return pre, act
    pre = x @ w_in.T
    return pre, gelu_triton._forward(pre)


def _backward(dy: Tensor, w_out: Tensor, pre: Tensor) -> Tensor:
    """(dy w_out) gelu'(pre), (M, H)."""
    if kernels := _fused(dy):
        d_pre: Tensor = kernels.backward(dy, w_out, pre)
        return d_pre
    return gelu_triton._backward(pre, dy @ w_out)


def _fake_forward(x: Tensor, w_in: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], w_in.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


_forward_op = define_op(
    "gelu_mlp_forward(Tensor x, Tensor w_in) -> (Tensor, Tensor)", _forward, _fake_forward
)
_backward_op = define_op(
    "gelu_mlp_backward(Tensor dy, Tensor w_out, Tensor pre) -> Tensor",
    _backward,
    lambda dy, w_out, pre: pre.new_empty(pre.shape),
)


class _GeluMLP(torch.autograd.Function):
    """Weights of float32 are rounded to x's type, and have their gradients in float32 from the
    products themselves, as by `ablate.kernels.linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor) -> Any:
        ctx.mixed = w_in.dtype != x.dtype
        w_in, w_out = w_in.to(x.dtype), w_out.to(x.dtype)
        pre, act = _forward_op(x, w_in)
        ctx.save_for_backward(x, w_in, w_out, pre, act)
        return act @ w_out.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, w_in, w_out, pre, act = ctx.saved_tensors
        need_x, need_in, need_out = ctx.needs_input_grad
        gradient = weight_gradient if ctx.mixed else _product
        dx = dw_in = dw_out = None
        if need_out:
            dw_out = gradient(dy, act)
        if need_x or need_in:
            d_pre = _backward_op(dy, w_out, pre)
            if need_in:
                dw_in = gradient(d_pre, x)
            if need_x:
                dx = d_pre @ w_in
        return dx, dw_in, dw_out


def _product(dy: Tensor, x: Tensor) -> Tensor:
    return dy.T @ x


def gelu_mlp_triton(x: Tensor, w_in_HD: Tensor, w_out_OH: Tensor) -> Tensor:
    """See `ablate.kernels.gelu_mlp`."""
    y: Tensor = _GeluMLP.apply(x.reshape(-1, x.shape[-1]), w_in_HD, w_out_OH)
    return y.unflatten(0, x.shape[:-1]) if x.ndim > 1 else y[0]
