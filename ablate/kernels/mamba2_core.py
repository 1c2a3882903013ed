"""Everything between the in-projection and the out-projection of a Mamba-2 layer, as one operation
(Dao and Gu, arXiv:2405.21060, section 7; the layout is that of the published checkpoints).

The projection's output holds, along its last axis, z (I), x (I), B (G N), C (G N) and dt (H), where
I = H P is the inner width; up to seven columns that follow them, as a projection has them whose
rows are padded to 16 bytes, are not read, and their gradient is zero. Then

    x, B, C = silu(conv1d(x, B, C))            causal, depthwise
    y       = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C, D)
    out     = rms_norm(y * silu(z)) * norm_weight         (or y * silu(z) without a norm weight)

The norm divides each position by one number, which commutes with the out-projection, and its weight
scales that projection's columns. So in training the core takes the projection too, and leaves the
division to `rms_norm`, which adds the residual:

    out, squares = (y * silu(z)) (projection * norm_weight)^T, sums of (y * silu(z))^2

That saves two passes over the inner width: no kernel norms, and the gate's gradient is made where
the product leaves the gradient of what it gates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.dispatch import ALIGN, compute_dtype, use_triton
from ablate.kernels.ssd import ssd, triton_supports


def check_width(width_E: int, n_heads: int, head_dim: int, n_groups: int, d_state: int) -> None:
    """Raises ValueError where a projection of this width is not that of so many heads."""
    needed = 2 * n_heads * head_dim + 2 * n_groups * d_state + n_heads
    if not needed <= width_E < needed + ALIGN:
        raise ValueError(
            f"mamba2_core: the last axis of zxbcdt is {width_E}, but {n_heads} heads of {head_dim} "
            f"with {n_groups} groups of state {d_state} take {needed}, and up to {ALIGN - 1} "
            "columns of padding"
        )


def mamba2_core_reference(
    zxbcdt_BLE: Tensor, conv_weight_CK: Tensor, conv_bias_C: Tensor | None, dt_bias_H: Tensor,
    A_log_H: Tensor, D_H: Tensor, norm_weight_I: Tensor | None, *, head_dim: int, n_groups: int,
    d_state: int, eps: float = 1e-5, norm_group_size: int | None = None,
    doc_start_BL: Tensor | None = None, projection_DI: Tensor | None = None,
    backend: str | None = "reference",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The operation as a composition of its parts, by default in their plain PyTorch forms.
    Arguments as in `mamba2_core`."""
    from ablate.kernels.conv1d import causal_conv1d
    from ablate.kernels.norm import gated_rms_norm

    n_heads, shared = A_log_H.shape[0], n_groups * d_state
    inner = n_heads * head_dim
    used = zxbcdt_BLE[..., : 2 * (inner + shared) + n_heads]
    z, xbc, dt = used.split((inner, inner + 2 * shared, n_heads), dim=-1)
    xbc = causal_conv1d(
        xbc, conv_weight_CK, conv_bias_C, doc_start_BL=doc_start_BL, backend=backend
    )
    assert isinstance(xbc, Tensor)
    x, B, C = xbc.split((inner, shared, shared), dim=-1)
    y = ssd(
        x.unflatten(-1, (n_heads, head_dim)),
        dt,
        -torch.exp(A_log_H.to(torch.promote_types(A_log_H.dtype, torch.float32))),
        B.unflatten(-1, (n_groups, d_state)),
        C.unflatten(-1, (n_groups, d_state)),
        D_H,
        dt_bias_H=dt_bias_H,
        dt_softplus=True,
        doc_start_BL=doc_start_BL,
        backend=backend,
    )
    assert isinstance(y, Tensor)
    y = y.flatten(2)
    if norm_weight_I is None or projection_DI is not None:
        y = y * F.silu(z)
        if projection_DI is None:
            return y
        weight = projection_DI if norm_weight_I is None else projection_DI * norm_weight_I
        squares = y.to(compute_dtype(y)).square().sum(-1, keepdim=True)
        return F.linear(y, weight.to(y.dtype)), squares
    return gated_rms_norm(y, z, norm_weight_I, eps=eps, group_size=norm_group_size, backend=backend)


def mamba2_core(
    zxbcdt_BLE: Tensor,
    conv_weight_CK: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor | None,
    *,
    head_dim: int,
    n_groups: int,
    d_state: int,
    eps: float = 1e-5,
    norm_group_size: int | None = None,
    doc_start_BL: Tensor | None = None,
    projection_DI: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The core of a Mamba-2 layer (module docstring); returns out_BLI in the projection's type.

    Args:
        zxbcdt_BLE: output of the in-projection, order z, x, B, C, dt.
        conv_weight_CK, conv_bias_C: depthwise taps of the C = I + 2 G N channels x, B, C.
        dt_bias_H, A_log_H, D_H: per head; the decay rate is -exp(A_log); D may be (H, P).
        norm_weight_I: weight of the gated RMSNorm, None for the gate alone.
        head_dim, n_groups, d_state: P, G, N.
        norm_group_size: width that shares one root mean square, None for all of I.
        doc_start_BL: first token of each position's document, resets convolution and state.
        projection_DI: also project, and leave the norm's division to the caller: returns out_BLD
            and the sums of squares over S equal parts of I, (B, L, S) in float32, of what is gated;
            S is for the backend to choose.
        backend: None chooses; "triton" or "reference" insist.

    Raises:
        ValueError: the width is not that of the heads, norm_group_size does not divide I or, with a
            projection, is not I, or the named backend cannot run the case.
    """
    check_width(zxbcdt_BLE.shape[-1], A_log_H.shape[0], head_dim, n_groups, d_state)
    inner = A_log_H.shape[0] * head_dim
    group = norm_group_size or inner
    if inner % group:
        raise ValueError(f"norm_group_size={norm_group_size} does not divide the width {inner}")
    if projection_DI is not None and group != inner:
        raise ValueError(f"norm_group_size={group}: several norms do not commute with a projection")
    supported = (
        triton_supports(zxbcdt_BLE, head_dim, d_state)
        and 2 <= conv_weight_CK.shape[1] <= 4
        and group <= 16384
        # float16 has no room for what a gate near zero leaves
        and not (projection_DI is not None and zxbcdt_BLE.dtype == torch.float16)
    )
    tensors = (
        zxbcdt_BLE, conv_weight_CK, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_weight_I,
    )  # fmt: skip
    if use_triton(backend, zxbcdt_BLE, supported=supported):
        from ablate.kernels.mamba2_core_triton import mamba2_core_triton

        out: Tensor | tuple[Tensor, Tensor] = mamba2_core_triton(
            *tensors, projection_DI, head_dim, n_groups, eps, group, doc_start_BL
        )
        return out
    return mamba2_core_reference(
        *tensors, head_dim=head_dim, n_groups=n_groups, d_state=d_state, eps=eps,
        norm_group_size=norm_group_size, doc_start_BL=doc_start_BL, projection_DI=projection_DI,
        backend=backend,
    )  # fmt: skip
