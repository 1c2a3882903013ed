"""Causal depthwise convolution over time, channels last, with SiLU, document resets and a state.

    y[b,t,d] = act(bias[d] + sum_k weight[d,k] * x[b, t-(K-1)+k, d])

Inputs from before the sequence come from `initial_state_BDK` (zeros when None), inputs from before
the token's document count as zero. This is the short convolution of Mamba (arXiv:2312.00752,
section 3.4) and Mamba-2; `weight_DK[:, K-1]` multiplies the current token, as in nn.Conv1d.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.dispatch import compute_dtype, use_triton


def _check(x_BLD: Tensor, weight_DK: Tensor, activation: str | None) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f"activation={activation!r} is unknown; use 'silu' or None")
    if weight_DK.shape[0] != x_BLD.shape[-1]:
        raise ValueError(
            f"weight has {weight_DK.shape[0]} channels where x has {x_BLD.shape[-1]}; "
            "they must be equal"
        )


def _padded(x_BLD: Tensor, state: Tensor | None, taps: int) -> Tensor:
    """x with the K-1 inputs before it in front: (B, K-1+L, D)."""
    if state is None:
        return F.pad(x_BLD, (0, 0, taps - 1, 0))
    return torch.cat([state.to(x_BLD.dtype), x_BLD], dim=1)


def _seen(source: Tensor, doc_start: Tensor) -> Tensor:
    """(..., 1) bool: inputs at these places are seen from a document that began there.

    A document that continues (doc_start < 0) sees all of the initial state, whose foreign inputs
    `final_state` has already set to zero.
    """
    return ((source >= doc_start) | ((source < 0) & (doc_start < 0))).unsqueeze(-1)


def _visible(doc_start_BL: Tensor, back: int) -> Tensor:
    """(B, L, 1) bool: the input `back` steps ago belongs to the token's own document."""
    source_L = torch.arange(doc_start_BL.shape[1], device=doc_start_BL.device) - back
    return _seen(source_L, doc_start_BL)


def final_state(
    x_BLD: Tensor,
    taps: int,
    initial_state_BDK: Tensor | None = None,
    doc_start_BL: Tensor | None = None,
) -> Tensor:
    """The last K-1 inputs (B, K-1, D), inputs of earlier documents set to zero."""
    length = x_BLD.shape[1]
    tail = _padded(x_BLD[:, max(0, length - taps + 1) :], initial_state_BDK, taps)
    tail = tail[:, tail.shape[1] - (taps - 1) :]
    if doc_start_BL is not None and length > 0:
        source_K = torch.arange(length - taps + 1, length, device=x_BLD.device)
        tail = tail * _seen(source_K, doc_start_BL[:, -1:]).to(tail.dtype)
    return tail


class _Conv(torch.autograd.Function):
    """K fused multiply-adds over shifted views; keeps x only and rebuilds what SiLU needs."""

    @staticmethod
    def forward(
        ctx: Any, padded: Tensor, weight_DK: Tensor, bias_D: Tensor | None, silu: bool,
        doc_start_BL: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(padded, weight_DK, bias_D, doc_start_BL)
        ctx.silu = silu
        pre = _Conv.pre_activation(padded, weight_DK, bias_D, doc_start_BL)
        return F.silu(pre, inplace=True) if silu else pre

    @staticmethod
    def pre_activation(
        padded: Tensor, weight_DK: Tensor, bias_D: Tensor | None, doc_start_BL: Tensor | None
    ) -> Tensor:
        taps = weight_DK.shape[1]
        length = padded.shape[1] - taps + 1
        pre = padded[:, taps - 1 :] * weight_DK[:, taps - 1]
        if bias_D is not None:
            pre += bias_D
        for back in range(1, taps):
            k = taps - 1 - back
            shifted = padded[:, k : k + length]
            if doc_start_BL is not None:
                shifted = shifted * _visible(doc_start_BL, back)
            pre.addcmul_(shifted, weight_DK[:, k])
        return pre

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        padded, weight_DK, bias_D, doc_start_BL = ctx.saved_tensors
        taps = weight_DK.shape[1]
        length = padded.shape[1] - taps + 1
        if ctx.silu:
            pre = _Conv.pre_activation(padded, weight_DK, bias_D, doc_start_BL)
            grad = torch.ops.aten.silu_backward(grad, pre)
        d_padded = torch.zeros_like(padded)
        d_weight = torch.empty_like(weight_DK)
        for k in range(taps):
            seen = grad
            if doc_start_BL is not None and k < taps - 1:
                seen = grad * _visible(doc_start_BL, taps - 1 - k)
            window = slice(k, k + length)
            d_padded[:, window].addcmul_(seen, weight_DK[:, k])
            d_weight[:, k] = (seen * padded[:, window]).sum((0, 1))
        d_bias = None if bias_D is None else grad.sum((0, 1))
        return d_padded, d_weight, d_bias, None, None


def causal_conv1d_reference(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None = None, *,
    activation: str | None = "silu", initial_state_BDK: Tensor | None = None,
    return_final_state: bool = False, doc_start_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, token by token; see `causal_conv1d`. Slow, for tests."""
    _check(x_BLD, weight_DK, activation)
    taps = weight_DK.shape[1]
    padded = _padded(x_BLD, initial_state_BDK, taps)
    rows = []
    for t in range(x_BLD.shape[1]):
        window_BKD = padded[:, t : t + taps]
        if doc_start_BL is not None:
            source_K = torch.arange(t - taps + 1, t + 1, device=x_BLD.device)
            window_BKD = window_BKD * _seen(source_K, doc_start_BL[:, t : t + 1])
        rows.append((window_BKD * weight_DK.t()).sum(1))
    y = torch.stack(rows, 1) if rows else torch.zeros_like(x_BLD)
    y = y if bias_D is None else y + bias_D
    y = F.silu(y) if activation == "silu" else y
    if return_final_state:
        return y, final_state(x_BLD, taps, initial_state_BDK, doc_start_BL)
    return y


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state_BDK: Tensor | None = None,
    return_final_state: bool = False,
    doc_start_BL: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution, bias and SiLU in one pass.

    x_BLD: (B, L, D), any strides; weight_DK: (D, K); bias_D: (D,) or None.
    activation: "silu" or None.
    initial_state_BDK: (B, K-1, D), the last K-1 inputs before the sequence, oldest first.
    doc_start_BL: int32 (B, L), index within the row of the first token of each token's document;
        a negative value means that the document began earlier, and it alone sees the state.
    Returns y_BLD in x's dtype, and with `return_final_state` also the last K-1 inputs.
    Differentiable in x, weight, bias and the initial state. Arithmetic in float32 on a GPU.
    """
    _check(x_BLD, weight_DK, activation)
    taps = weight_DK.shape[1]
    if use_triton(backend, x_BLD, supported=2 <= taps <= 4):
        from ablate.kernels.conv1d_triton import causal_conv1d_triton

        y = causal_conv1d_triton(
            x_BLD, weight_DK, bias_D, activation == "silu", initial_state_BDK, doc_start_BL
        )
    else:
        weight = weight_DK.to(x_BLD.dtype)
        bias = None if bias_D is None else bias_D.to(x_BLD.dtype)
        padded = _padded(x_BLD, initial_state_BDK, taps)
        y = _Conv.apply(padded, weight, bias, activation == "silu", doc_start_BL)
    if return_final_state:
        return y, final_state(x_BLD, taps, initial_state_BDK, doc_start_BL)
    return y


def causal_conv1d_step(
    x_BD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = "silu",
    state_BKD: Tensor,
    backend: str | None = None,
) -> Tensor:
    """One token: y_BD; the state, the last K-1 inputs (B, K-1, D), is updated in place."""
    _check(x_BD, weight_DK, activation)
    supported = 2 <= weight_DK.shape[1] <= 8 and state_BKD.is_contiguous()
    if use_triton(backend, x_BD, supported=supported):
        from ablate.kernels.step_triton import causal_conv1d_step_triton

        return causal_conv1d_step_triton(x_BD, weight_DK, bias_D, activation == "silu", state_BKD)
    dtype = compute_dtype(x_BD)
    window_BKD = torch.cat([state_BKD.to(x_BD.dtype), x_BD.unsqueeze(1)], dim=1)
    y_BD = (window_BKD.to(dtype) * weight_DK.t().to(dtype)).sum(1)
    y_BD = y_BD if bias_D is None else y_BD + bias_D.to(dtype)
    state_BKD.copy_(window_BKD[:, 1:])
    return (F.silu(y_BD) if activation == "silu" else y_BD).to(x_BD.dtype)
