"""State-space duality: the scan of Mamba-2 (Dao and Gu, arXiv:2405.21060, sections 3 and 6).

For every head, with a state of P x N numbers that starts at `initial_state` or zero,

    dt_t = softplus(dt_t + dt_bias)            (bias and softplus optional)
    h_t  = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
    y_t  = h_t C_t + D x_t

Legend: B batch, L length, H heads, P head dim, G groups (H % G == 0; the heads of a group share B
and C), N state. Chunks: c number, Q length.

`doc_start_BL` (int32) holds, for each position, the index within its row of the first token of its
document. The state is reset where doc_start[b, t] == t; a document that continues from an earlier
segment has doc_start < 0, and it alone sees `initial_state`. Without it nothing is reset.

RetNet's retention is this scan with dt = 1, A = log(decay) and one group per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.dispatch import compute_dtype, use_triton

CHUNK = 64  # tile of the chunked forms; the Triton kernels use the same


def step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """Of a scan, after bias and softplus, in the dtype of its arithmetic."""
    dt = dt.to(dtype)
    if bias is not None:
        dt = dt + bias.to(dtype)
    return F.softplus(dt) if softplus else dt


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
    b, length, n_heads, head_dim = x.shape
    if dt.shape != (b, length, n_heads):
        raise ValueError(
            f"ssd: dt has shape {tuple(dt.shape)}, it must be {(b, length, n_heads)} like x"
        )
    if A.shape != (n_heads,):
        raise ValueError(f"ssd: A has shape {tuple(A.shape)}, it must be ({n_heads},), one a head")
    if B.shape != C.shape or B.shape[:2] != (b, length):
        raise ValueError(
            f"ssd: B {tuple(B.shape)} and C {tuple(C.shape)} must both be (batch, length, groups, "
            f"state) with batch {b} and length {length}"
        )
    if n_heads % B.shape[2]:
        raise ValueError(f"ssd: {n_heads} heads cannot be shared out over {B.shape[2]} groups")
    if D is not None and D.shape not in ((n_heads,), (n_heads, head_dim)):
        raise ValueError(
            f"ssd: D has shape {tuple(D.shape)}, it must be ({n_heads},) or {(n_heads, head_dim)}"
        )


def _skip(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    """y + D x for (..., H, P) tensors and D of shape (H,) or (H, P)."""
    if D is None:
        return y
    D = D.to(y.dtype)
    return torch.addcmul(y, x, D if D.ndim == 2 else D[:, None])


def ssd_recurrent(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor,
    D_H: Tensor | None = None, *, dt_bias_H: Tensor | None = None, dt_softplus: bool = False,
    initial_state_BHPN: Tensor | None = None, return_final_state: bool = False,
    doc_start_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, one token at a time: the oracle of the other forms. Arguments as in `ssd`."""
    _check(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H)
    b, length, n_heads, head_dim = x_BLHP.shape
    dtype = compute_dtype(x_BLHP)
    repeat = n_heads // B_BLGN.shape[2]
    x = x_BLHP.to(dtype)
    dt = step_sizes(dt_BLH, dt_bias_H, dt_softplus, dtype)
    decay = torch.exp(dt * A_H.to(dtype))
    if doc_start_BL is not None:
        here = torch.arange(length, device=x.device)
        decay = decay.masked_fill((doc_start_BL == here)[..., None], 0.0)
    B = B_BLGN.to(dtype).repeat_interleave(repeat, dim=2)
    C = C_BLGN.to(dtype).repeat_interleave(repeat, dim=2)
    if initial_state_BHPN is None:
        state = x.new_zeros(b, n_heads, head_dim, B.shape[3])
    else:
        state = initial_state_BHPN.to(dtype)
    ys = []
    for t in range(length):
        update = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        state = decay[:, t, :, None, None] * state + update
        ys.append((state * C[:, t, :, None, :]).sum(-1))
    y = _skip(torch.stack(ys, dim=1), x, D_H).to(x_BLHP.dtype)
    return (y, state) if return_final_state else y


def running_sum(x: Tensor) -> Tensor:
    """Over the last axis; torch.cumsum has no form on CUDA that it promises to be deterministic."""
    if not x.is_cuda:
        return torch.cumsum(x, dim=-1)
    step = 1
    while step < x.shape[-1]:
        x = x + F.pad(x, (step, 0))[..., :-step]
        step *= 2
    return x


class _WithinChunk(torch.autograd.Function):
    """y_t = sum over s <= t of exp(cum_t - cum_s) BC[s, t] xdt_s, the quadratic form of a chunk.

    xdt: (B, c, G, H/G, P, Q); cum: (B, c, G, H/G, Q), never rising; BC: (B, c, G, Q, Q);
    bound: 0 where t may see s and -inf elsewhere, (Q, Q) or with (B, c, 1, 1) before.

    Its own backward, because the Q x Q tables are most of a CPU's work: autograd would pass over
    them twice as often. The exponents are cut at the bound, so that a cumulative sum which rounding
    lets rise by a bit does not grow, and excluded pairs never overflow.
    """

    @staticmethod
    def forward(ctx: Any, xdt: Tensor, cum: Tensor, BC: Tensor, bound: Tensor) -> Tensor:
        decay = cum[..., None, :] - cum[..., :, None]
        torch.minimum(decay, bound, out=decay).exp_()
        ctx.save_for_backward(xdt, decay, BC)
        return torch.matmul(xdt, decay * BC[:, :, :, None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        xdt, decay, BC = ctx.saved_tensors
        BC = BC[:, :, :, None]
        d_weight = torch.matmul(xdt.transpose(-1, -2), grad).mul_(decay)
        d_BC = d_weight.sum(3)
        # d exp(e) = exp(e) de, and what a pair gives to cum_t it takes from cum_s. A position with
        # itself would only cancel.
        d_exponent = d_weight.mul_(BC)
        d_exponent.diagonal(dim1=-2, dim2=-1).zero_()
        d_cum = d_exponent.sum(-2) - d_exponent.sum(-1)
        weight = torch.mul(decay, BC, out=d_exponent)
        return torch.matmul(grad, weight.transpose(-1, -2)), d_cum, d_BC, None


def ssd_chunked(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor,
    D_H: Tensor | None = None, *, dt_bias_H: Tensor | None = None, dt_softplus: bool = False,
    initial_state_BHPN: Tensor | None = None, return_final_state: bool = False,
    doc_start_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The quadratic form inside chunks, the recurrence between them (paper, section 6), in plain
    PyTorch that autograd differentiates. Arguments as in `ssd`.

    A sequence no longer than a chunk never builds a state. Every exponent is a sum of dt A over a
    span, at most zero, and excluded pairs are -inf before the exponential, so neither values nor
    gradients overflow.
    """
    _check(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H)
    b, length, n_heads, head_dim = x_BLHP.shape
    groups, n_state = B_BLGN.shape[2:]
    per_group = n_heads // groups
    dtype = compute_dtype(x_BLHP)
    chunk = min(length, CHUNK)
    n_chunks = -(-length // chunk)
    pad = n_chunks * chunk - length

    x = x_BLHP.to(dtype)
    dt = step_sizes(dt_BLH, dt_bias_H, dt_softplus, dtype)
    B, C = B_BLGN.to(dtype), C_BLGN.to(dtype)
    skip_x = x
    doc_start = doc_start_BL
    if pad:  # dt = 0 leaves the state as it is
        x, B, C = (F.pad(v, (0, 0, 0, 0, 0, pad)) for v in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
        if doc_start is not None:
            doc_start = torch.cat((doc_start, doc_start[:, -1:].expand(b, pad)), dim=1)

    # Heads before time, time last: (B, c, G, H/G, P, Q), so that a group's heads fold into one
    # matrix against the shared B and C.
    x = x.view(b, n_chunks, chunk, groups, per_group, head_dim).permute(0, 1, 3, 4, 5, 2)
    dt = dt.view(b, n_chunks, chunk, groups, per_group).permute(0, 1, 3, 4, 2)
    B = B.view(b, n_chunks, chunk, groups, n_state).transpose(2, 3)  # (B, c, G, Q, N)
    C = C.view(b, n_chunks, chunk, groups, n_state).transpose(2, 3)
    cum = running_sum(dt * A_H.to(dtype).view(groups, per_group, 1))  # (B, c, G, H/G, Q)
    xdt = x * dt[..., None, :]

    index = torch.arange(chunk, device=x.device)
    allowed = index[:, None] <= index
    if doc_start is not None:
        position = torch.arange(n_chunks * chunk, device=x.device).view(n_chunks, 1, 1, chunk)
        start = doc_start.view(b, n_chunks, 1, 1, chunk)
        allowed = allowed & (position[..., None] >= start[..., None, :])
    bound = torch.zeros(allowed.shape, dtype=dtype, device=x.device).masked_fill_(
        ~allowed, -torch.inf
    )
    with torch.autocast(x.device.type, enabled=False):
        BC = torch.matmul(B, C.transpose(-1, -2))  # (B, c, G, Q, Q)
        y = _WithinChunk.apply(xdt, cum, BC, bound)  # (B, c, G, H/G, P, Q)

    state: Tensor | None = None
    if n_chunks > 1 or initial_state_BHPN is not None or return_final_state:
        # What a chunk adds to the state at its end, what a position sees of the state before the
        # chunk, and what the chunk keeps of it.
        to_end = (cum[..., -1:] - cum).masked_fill(~allowed[..., -1], -torch.inf)
        to_end = torch.exp(to_end.clamp(max=0))  # clamp, as `minimum` halves a tie's gradient
        added = xdt * to_end[..., None, :]
        from_start = torch.exp(cum)
        if doc_start is not None:
            from_start = from_start * (start < position[..., :1])
        keep = from_start[..., -1]  # (B, c, G, H/G)
        fold = (b, n_chunks, groups, per_group * head_dim)
        added = torch.matmul(added.reshape(*fold, chunk), B)
        added = added.view(b, n_chunks, groups, per_group, head_dim, n_state)
        if initial_state_BHPN is None:
            state = torch.zeros_like(added[:, 0])
        else:
            state = initial_state_BHPN.to(dtype).view(b, groups, per_group, head_dim, n_state)
        entering = []
        for c in range(n_chunks):
            entering.append(state)
            state = torch.addcmul(added[:, c], state, keep[:, c, ..., None, None])
        if n_chunks > 1 or initial_state_BHPN is not None:
            seen = torch.matmul(
                torch.stack(entering, dim=1).reshape(*fold, n_state), C.transpose(-1, -2)
            )
            seen = seen.view(b, n_chunks, groups, per_group, head_dim, chunk)
            y = torch.addcmul(y, seen, from_start[..., None, :])

    y = y.permute(0, 1, 5, 2, 3, 4).reshape(b, n_chunks * chunk, n_heads, head_dim)
    y = _skip(y[:, :length], skip_x, D_H).to(x_BLHP.dtype)
    if not return_final_state:
        return y
    assert state is not None
    return y, state.reshape(b, n_heads, head_dim, n_state)


def triton_supports(data: Tensor, head_dim: int, d_state: int) -> bool:
    """Whether the Triton scan runs data of this type: head and state up to 128 wide, in float32 not
    both (the tiles do not fit)."""
    fits = head_dim <= 128 and d_state <= 128
    return fits and (data.dtype != torch.float32 or min(head_dim, d_state) <= 64)


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None = None,
    *,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state_BHPN: Tensor | None = None,
    return_final_state: bool = False,
    doc_start_BL: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's scan (module docstring).

    Args:
        x_BLHP: inputs, any floating type.
        dt_BLH: step sizes; they must be positive after bias and softplus.
        A_H: decay rates, negative.
        B_BLGN, C_BLGN: input and output maps of each group of heads.
        D_H: skip weights, (H,) or (H, P).
        initial_state_BHPN: state before the first token.
        return_final_state: also return the state after the last token.
        doc_start_BL: first token of each position's document.
        backend: None chooses; "triton" or "reference" (chunked PyTorch) insist.

    Returns:
        y_BLHP in x's type, or (y_BLHP, state_BHPN) with the state in float32 (float64 for float64).

    Raises:
        ValueError: shapes do not fit, or the named backend cannot run the case.
    """
    form: Callable[..., Tensor | tuple[Tensor, Tensor]] = ssd_chunked
    if use_triton(
        backend, x_BLHP, supported=triton_supports(x_BLHP, x_BLHP.shape[3], B_BLGN.shape[3])
    ):
        from ablate.kernels.ssd_triton import ssd_triton

        form = ssd_triton
    return form(
        x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, dt_bias_H=dt_bias_H, dt_softplus=dt_softplus,
        initial_state_BHPN=initial_state_BHPN, return_final_state=return_final_state,
        doc_start_BL=doc_start_BL,
    )  # fmt: skip


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor | None = None,
    *,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = False,
    state_BHPN: Tensor,
    backend: str | None = None,
) -> Tensor:
    """One token of the scan, for decoding: y_BHP; the state is updated in place."""
    supported = state_BHPN.dtype == torch.float32 and state_BHPN.is_contiguous()
    if use_triton(backend, x_BHP, supported=supported and B_BGN.shape[2] <= 2048):
        from ablate.kernels.step_triton import ssd_step_triton

        return ssd_step_triton(
            x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, dt_bias_H, dt_softplus, state_BHPN
        )
    n_heads = x_BHP.shape[1]
    repeat = n_heads // B_BGN.shape[1]
    dtype = compute_dtype(x_BHP)
    x = x_BHP.to(dtype)
    dt = step_sizes(dt_BH, dt_bias_H, dt_softplus, dtype)
    B = B_BGN.to(dtype).repeat_interleave(repeat, dim=1)
    C = C_BGN.to(dtype).repeat_interleave(repeat, dim=1)
    decay = torch.exp(dt * A_H.to(dtype))
    state = state_BHPN.to(dtype) * decay[..., None, None]
    state = torch.addcmul(state, (x * dt[..., None])[..., None], B[:, :, None, :])
    y = torch.matmul(state, C[..., None]).squeeze(-1)
    state_BHPN.copy_(state)
    return _skip(y, x, D_H).to(x_BHP.dtype)
