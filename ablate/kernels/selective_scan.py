"""Mamba-1's selective scan (arXiv:2312.00752, algorithm 2).

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,    y_t = C_t . h_t + D u_t,    y *= silu(z)

with a state of N per channel. The training form walks chunks of time, keeps only the states at
their borders and rebuilds the rest in the backward pass; decays are multiplied, never divided.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.dispatch import compute_dtype, use_triton
from ablate.kernels.ssd import step_sizes

CHUNK_ELEMENTS = 1 << 20  # states of one chunk: 4 MB of float32
MOST_STATE = 128  # numbers of state that the Triton kernels take


def _finish(y_BLD: Tensor, u_BLD: Tensor, D_D: Tensor | None, z_BLD: Tensor | None) -> Tensor:
    if D_D is not None:
        y_BLD = y_BLD + u_BLD.to(y_BLD.dtype) * D_D.to(y_BLD.dtype)
    if z_BLD is not None:
        y_BLD = y_BLD * F.silu(z_BLD.to(y_BLD.dtype))
    return y_BLD.to(u_BLD.dtype)


def selective_scan_recurrent(
    u_BLD: Tensor, delta_BLD: Tensor, A_DN: Tensor, B_BLN: Tensor, C_BLN: Tensor,
    D_D: Tensor | None = None, *, z_BLD: Tensor | None = None, delta_bias_D: Tensor | None = None,
    delta_softplus: bool = False, initial_state_BDN: Tensor | None = None,
    return_final_state: bool = False, doc_start_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, one token after the other; see `selective_scan`. The oracle."""
    dtype = compute_dtype(u_BLD)
    batch, length, width = u_BLD.shape
    delta = step_sizes(delta_BLD, delta_bias_D, delta_softplus, dtype)
    A, B, C, u = A_DN.to(dtype), B_BLN.to(dtype), C_BLN.to(dtype), u_BLD.to(dtype)
    h = u.new_zeros(batch, width, A.shape[1])
    if initial_state_BDN is not None:
        h = initial_state_BDN.to(dtype)
    rows = []
    for t in range(length):
        if doc_start_BL is not None:
            h = torch.where((doc_start_BL[:, t] == t)[:, None, None], torch.zeros_like(h), h)
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * u[:, t, :, None] * B[:, t, None, :]
        rows.append((h * C[:, t, None, :]).sum(-1))
    y = _finish(torch.stack(rows, 1), u_BLD, D_D, z_BLD)
    return (y, h) if return_final_state else y


class _Scan(torch.autograd.Function):
    """y and the last state from time-major inputs, all of one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,  # (L, B, D)
        delta: Tensor,  # (L, B, D)
        A: Tensor,  # (D, N)
        B: Tensor,  # (L, B, N)
        C: Tensor,  # (L, B, N)
        state: Tensor,  # (B, D, N)
        keep: Tensor | None,  # (L, B), 0 where a document begins
    ) -> tuple[Tensor, Tensor]:
        length = u.shape[0]
        chunk = max(1, min(length, CHUNK_ELEMENTS // max(1, state.numel())))
        y = torch.empty_like(u)
        borders = []
        h = state
        for start in range(0, length, chunk):
            rows = slice(start, min(length, start + chunk))
            borders.append(h)
            states, _ = _Scan.states(u[rows], delta[rows], A, B[rows], h, _rows(keep, rows))
            y[rows] = torch.matmul(states, C[rows].unsqueeze(-1)).squeeze(-1)
            h = states[-1].clone()
        ctx.save_for_backward(u, delta, A, B, C, keep, *borders)
        ctx.chunk = chunk
        return y, h

    @staticmethod
    def states(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, h: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """All states (T, B, D, N) of one chunk, and the decays that made them."""
        decay = (delta.unsqueeze(-1) * A).exp_()
        if keep is not None:
            decay *= keep[:, :, None, None]
        states = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
        for t in range(states.shape[0]):
            states[t].addcmul_(decay[t], h)
            h = states[t]
        return states, decay

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        d_y, d_last = grads
        u, delta, A, B, C, keep, *borders = ctx.saved_tensors
        d_u, d_delta = torch.empty_like(u), torch.empty_like(u)
        d_B, d_C = torch.empty_like(B), torch.empty_like(C)
        d_A = torch.zeros_like(A)
        carry = d_last
        for number in reversed(range(len(borders))):
            rows = slice(number * ctx.chunk, min(u.shape[0], (number + 1) * ctx.chunk))
            u_c, delta_c, B_c, d_y_c = u[rows], delta[rows], B[rows], d_y[rows].contiguous()
            border = borders[number]
            states, decay = _Scan.states(u_c, delta_c, A, B_c, border, _rows(keep, rows))
            d_C[rows] = torch.matmul(d_y_c.unsqueeze(2), states).squeeze(2)
            # d_h[t] = d_y[t] C[t] + decay[t+1] d_h[t+1]
            d_h = d_y_c.unsqueeze(-1) * C[rows].unsqueeze(2)
            d_h[-1] += carry
            for t in range(d_h.shape[0] - 2, -1, -1):
                d_h[t].addcmul_(decay[t + 1], d_h[t + 1])
            carry = decay[0] * d_h[0]
            d_input = torch.matmul(d_h, B_c.unsqueeze(-1)).squeeze(-1)  # of delta * u
            d_B[rows] = torch.matmul((delta_c * u_c).unsqueeze(2), d_h).squeeze(2)
            # of delta A, the exponent: d_h[t] * decay[t] * h[t-1]
            d_exponent = d_h.mul_(decay)
            d_exponent[1:] *= states[:-1]
            d_exponent[0] *= border
            d_u[rows] = d_input * delta_c
            d_delta[rows] = d_input * u_c + (d_exponent * A).sum(-1)
            d_A += (d_exponent * delta_c.unsqueeze(-1)).sum((0, 1))
        return d_u, d_delta, d_A, d_B, d_C, carry, None


def _rows(t: Tensor | None, rows: slice) -> Tensor | None:
    return None if t is None else t[rows]


def selective_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None = None,
    *,
    z_BLD: Tensor | None = None,
    delta_bias_D: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state_BDN: Tensor | None = None,
    return_final_state: bool = False,
    doc_start_BL: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-1's scan with optional skip D, gate silu(z), state and document resets.

    u_BLD, delta_BLD, z_BLD: (B, L, D); A_DN: (D, N), negative; B_BLN, C_BLN: (B, L, N); D_D: (D,).
    delta_bias_D is added to delta, then softplus if `delta_softplus`.
    doc_start_BL: int32 (B, L); the state is cleared at t where doc_start[b, t] == t, so that a
        document that began earlier (negative) alone sees `initial_state_BDN` (B, D, N).
    backend: None chooses; "triton" or "reference" (chunked PyTorch) insist.
    Returns y_BLD in u's dtype; with `return_final_state` also the last state, float32.
    """
    if use_triton(backend, u_BLD, supported=A_DN.shape[1] <= MOST_STATE):
        from ablate.kernels.selective_scan_triton import selective_scan_triton

        return selective_scan_triton(
            u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD=z_BLD, delta_bias_D=delta_bias_D,
            delta_softplus=delta_softplus, initial_state_BDN=initial_state_BDN,
            return_final_state=return_final_state, doc_start_BL=doc_start_BL,
        )  # fmt: skip
    dtype = compute_dtype(u_BLD)
    batch, length, width = u_BLD.shape
    delta = step_sizes(delta_BLD, delta_bias_D, delta_softplus, dtype)
    if initial_state_BDN is None:
        initial_state_BDN = torch.zeros(
            batch, width, A_DN.shape[1], dtype=dtype, device=u_BLD.device
        )
    keep = None
    if doc_start_BL is not None:
        index = torch.arange(length, device=u_BLD.device)
        keep = (doc_start_BL != index).t().to(dtype)
    u, delta, B, C = (
        t.to(dtype).transpose(0, 1).contiguous() for t in (u_BLD, delta, B_BLN, C_BLN)
    )
    y, last = _Scan.apply(u, delta, A_DN.to(dtype), B, C, initial_state_BDN.to(dtype), keep)
    y = _finish(y.transpose(0, 1), u_BLD, D_D, z_BLD)
    return (y, last) if return_final_state else y


def selective_scan_step(
    u_BD: Tensor,
    delta_BD: Tensor,
    A_DN: Tensor,
    B_BN: Tensor,
    C_BN: Tensor,
    D_D: Tensor | None = None,
    *,
    z_BD: Tensor | None = None,
    delta_bias_D: Tensor | None = None,
    delta_softplus: bool = False,
    state_BDN: Tensor,
    backend: str | None = None,
) -> Tensor:
    """One token: y_BD; the state (B, D, N) is updated in place."""
    supported = state_BDN.dtype == torch.float32 and state_BDN.is_contiguous()
    if use_triton(backend, u_BD, supported=supported and A_DN.shape[1] <= MOST_STATE):
        from ablate.kernels.step_triton import selective_scan_step_triton

        return selective_scan_step_triton(
            u_BD, delta_BD, A_DN, B_BN, C_BN, D_D, z_BD, delta_bias_D, delta_softplus, state_BDN
        )
    dtype = compute_dtype(u_BD)
    delta = step_sizes(delta_BD, delta_bias_D, delta_softplus, dtype).unsqueeze(-1)
    inflow = delta * u_BD.to(dtype).unsqueeze(-1) * B_BN.to(dtype).unsqueeze(1)
    state = torch.exp(delta * A_DN.to(dtype)) * state_BDN.to(dtype) + inflow
    y = (state * C_BN.to(dtype).unsqueeze(1)).sum(-1)
    state_BDN.copy_(state)
    return _finish(y, u_BD, D_D, z_BD)
