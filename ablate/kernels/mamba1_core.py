"""Everything between the in-projection and the out-projection of a Mamba-1 layer, as one operation
(Gu and Dao, arXiv:2312.00752, section 3; the layout is that of the published checkpoints).

The projection's output holds, along its last axis, x (I) and z (I), I the inner width. Then

    u         = silu(conv1d(x))                          causal, depthwise
    dt, B, C  = x_proj u                                 of R, N and N numbers
    out       = selective_scan(u, softplus(dt_proj dt + dt_bias), -exp(A_log), B, C, D) * silu(z)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.conv1d import causal_conv1d
from ablate.kernels.dispatch import use_triton
from ablate.kernels.selective_scan import MOST_STATE, selective_scan


def mamba1_core_reference(
    xz_BLE: Tensor, conv_weight_IK: Tensor, conv_bias_I: Tensor | None, x_proj_MI: Tensor,
    dt_proj_IR: Tensor, dt_bias_I: Tensor, A_log_IN: Tensor, D_I: Tensor, *,
    doc_start_BL: Tensor | None = None, backend: str | None = "reference",
) -> Tensor:  # fmt: skip
    """The operation as a composition of its parts, by default in their plain PyTorch forms.
    Arguments as in `mamba1_core`."""
    (_, rank), n_state = dt_proj_IR.shape, A_log_IN.shape[1]
    x, z = xz_BLE.chunk(2, dim=-1)
    u = causal_conv1d(x, conv_weight_IK, conv_bias_I, doc_start_BL=doc_start_BL, backend=backend)
    assert isinstance(u, Tensor)
    maps = F.linear(u, x_proj_MI.to(u.dtype))
    dt, B, C = maps.split((rank, n_state, n_state), dim=-1)
    y = selective_scan(
        u,
        F.linear(dt, dt_proj_IR.to(u.dtype)),
        -torch.exp(A_log_IN.to(torch.promote_types(A_log_IN.dtype, torch.float32))),
        B,
        C,
        D_I,
        z_BLD=z,
        delta_bias_D=dt_bias_I,
        delta_softplus=True,
        doc_start_BL=doc_start_BL,
        backend=backend,
    )
    assert isinstance(y, Tensor)
    return y


def mamba1_core(
    xz_BLE: Tensor,
    conv_weight_IK: Tensor,
    conv_bias_I: Tensor | None,
    x_proj_MI: Tensor,
    dt_proj_IR: Tensor,
    dt_bias_I: Tensor,
    A_log_IN: Tensor,
    D_I: Tensor,
    *,
    doc_start_BL: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The core of a Mamba-1 layer (module docstring); returns out_BLI in the projection's type.

    Args:
        xz_BLE: output of the in-projection, order x, z; E = 2 I.
        conv_weight_IK, conv_bias_I: depthwise taps.
        x_proj_MI: projection to dt, B, C; M = R + 2 N.
        dt_proj_IR, dt_bias_I: projection of dt to step sizes before softplus, and what is added.
        A_log_IN, D_I: the decay rate is -exp(A_log); D skips the scan.
        doc_start_BL: first token of each position's document, resets convolution and state.
        backend: None chooses; "triton" or "reference" insist.

    Raises:
        ValueError: widths do not belong together, or the named backend cannot run the case.
    """
    inner, rank = dt_proj_IR.shape
    n_state = A_log_IN.shape[1]
    if xz_BLE.shape[-1] != 2 * inner:
        raise ValueError(
            f"mamba1_core: the last axis of xz is {xz_BLE.shape[-1]}, but dt_proj has {inner} "
            f"channels, which take {2 * inner}"
        )
    if x_proj_MI.shape != (rank + 2 * n_state, inner):
        raise ValueError(
            f"mamba1_core: x_proj is {tuple(x_proj_MI.shape)}, but a rank of {rank} and {n_state} "
            f"numbers of state take {(rank + 2 * n_state, inner)}"
        )
    if conv_weight_IK.shape[0] != inner or A_log_IN.shape[0] != inner:
        raise ValueError(
            f"mamba1_core: conv_weight has {conv_weight_IK.shape[0]} channels and A_log "
            f"{A_log_IN.shape[0]}, but dt_proj has {inner}"
        )
    tensors = (
        xz_BLE, conv_weight_IK, conv_bias_I, x_proj_MI, dt_proj_IR, dt_bias_I, A_log_IN, D_I,
    )  # fmt: skip
    supported = 2 <= conv_weight_IK.shape[1] <= 4 and n_state <= MOST_STATE
    if use_triton(backend, xz_BLE, supported=supported):
        from ablate.kernels.mamba1_core_triton import mamba1_core_triton

        out: Tensor = mamba1_core_triton(*tensors, doc_start_BL)
        return out
    return mamba1_core_reference(*tensors, doc_start_BL=doc_start_BL, backend=backend)
