"""RMS normalisation: plain, fused with the residual addition, and gated per group.

RMSNorm is arXiv:1910.07467; the gated form is Mamba-2's (arXiv:2405.21060, section 7).
All arithmetic is float32 (float64 for float64 inputs), whatever the dtype of the data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.dispatch import compute_dtype, use_triton


def rms_norm_reference(
    x: Tensor, weight_D: Tensor | None, *, eps: float = 1e-5, residual: Tensor | None = None,
    squares_xS: Tensor | None = None, squares_of: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, differentiated by autograd; see `rms_norm`."""
    total = x
    if squares_xS is not None:
        mean = squares_xS.to(compute_dtype(x)).sum(-1, keepdim=True) / squares_of
        total = x.to(compute_dtype(x)) * torch.rsqrt(mean + eps)
    if residual is not None:
        total = (total + residual).to(torch.promote_types(x.dtype, residual.dtype))
    wide = total.to(compute_dtype(total))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight_D is not None:
        y = y * weight_D
    y = y.to(x.dtype)
    return y if residual is None else (y, total)


def rms_norm(
    x: Tensor,
    weight_D: Tensor | None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    squares_xS: Tensor | None = None,
    squares_of: int = 1,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / rms(x) * weight over the last dimension.

    x: (..., D); weight_D: (D,) or None for no weight; residual: like x, of any float dtype.
    squares_xS: sums of squares, float32, over S parts of rows of `squares_of` numbers, by whose
        root mean square x is divided first: the norm of what x is a linear map of. With a residual
        only.
    Returns y in x's dtype; with a residual, (y, residual_out) where residual_out = x + residual in
    the promoted dtype and y = norm(residual_out). Raises ValueError for squares without a residual.
    """
    if squares_xS is not None and residual is None:
        raise ValueError("squares_xS needs a residual: x / rms is only ever added to one")
    if use_triton(backend, x, supported=x.shape[-1] <= 16384):
        from ablate.kernels.norm_triton import rms_norm_triton

        return rms_norm_triton(x, weight_D, eps, residual, squares_xS, squares_of)
    return rms_norm_reference(
        x, weight_D, eps=eps, residual=residual, squares_xS=squares_xS, squares_of=squares_of
    )


def gated_rms_norm_reference(
    x_BLD: Tensor, z_BLD: Tensor, weight_D: Tensor | None, *, eps: float = 1e-5,
    group_size: int | None = None, norm_before_gate: bool = False,
) -> Tensor:  # fmt: skip
    """The definition, differentiated by autograd; see `gated_rms_norm`."""
    group = group_size or x_BLD.shape[-1]
    x = x_BLD.to(compute_dtype(x_BLD))
    gate = F.silu(z_BLD.to(x.dtype))
    y = x if norm_before_gate else x * gate
    grouped = y.unflatten(-1, (-1, group))
    y = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight_D is not None:
        y = y * weight_D
    return (y * gate if norm_before_gate else y).to(x_BLD.dtype)


def gated_rms_norm(
    x_BLD: Tensor,
    z_BLD: Tensor,
    weight_D: Tensor | None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mamba-2's output norm: norm(x * silu(z)) * weight, or norm(x) * weight * silu(z).

    x_BLD, z_BLD: (..., D), any leading dimensions, last one contiguous; weight_D: (D,) or None.
    group_size: width of one normalisation group, a divisor of D (None: all of D).
    norm_before_gate: False is norm(x * silu(z)) as Mamba-2 trains it, True the other order.
    """
    width = x_BLD.shape[-1]
    group = group_size or width
    if width % group:
        raise ValueError(f"group_size={group_size} does not divide the width {width}")
    if use_triton(backend, x_BLD, supported=group <= 16384):
        from ablate.kernels.norm_triton import gated_rms_norm_triton

        return gated_rms_norm_triton(x_BLD, z_BLD, weight_D, eps, group, norm_before_gate)
    return gated_rms_norm_reference(
        x_BLD, z_BLD, weight_D, eps=eps, group_size=group, norm_before_gate=norm_before_gate
    )
