"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464, equation 10).

For every head, with a state of K x V numbers that starts at `initial_state` or zero,

    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,    a_t = exp(log_decay_t) <= 1
    o_t = scale S_t^T q_t

that is, the state forgets, then what it holds under the key k_t moves by beta_t towards v_t. With
log_decay = 0 this is the delta rule of DeltaNet (arXiv:2406.06484).

In a chunk that the state S enters, with E_t the decay from the chunk's start to t and D_ts that
from s to t, the corrections e_t = v_t - a_t S_{t-1}^T k_t solve a triangular system:

    e_t = v_t - E_t S^T k_t - sum over s < t of D_ts (k_t . k_s) beta_s e_s

so a chunk is a few matrix products (the WY form, arXiv:2406.06484 section 3), all in decays over
spans that end later than they begin: none is above one, and none is divided by another.

Legend: B batch, L length, H heads, K key width, V value width. Chunks: c number, Q length.

`doc_start_BL` (int32) holds, for each position, the index within its row of the first token of its
document. The state is reset where doc_start[b, t] == t; a document that continues from an earlier
segment has doc_start < 0, and it alone sees `initial_state`. Without it nothing is reset.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.dispatch import compute_dtype, use_triton
from ablate.kernels.ssd import running_sum

CHUNK = 64  # tile of the chunked forms; the Triton kernels use the same
NORM_EPS = 1e-6  # added to the squared norm of a query or key
# exp of it is nothing beside one, and 64 of it still leave a float32 sum its fourth decimal
STRONGEST = -64.0


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> None:
    b, length, n_heads, _ = q.shape
    if k.shape != q.shape:
        raise ValueError(
            f"gated_delta_rule: k has shape {tuple(k.shape)}, it must be {tuple(q.shape)} like q"
        )
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"gated_delta_rule: v has shape {tuple(v.shape)}, it must be (batch, length, heads, "
            f"values) with {(b, length, n_heads)} like q"
        )
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        if x.shape != (b, length, n_heads):
            raise ValueError(
                f"gated_delta_rule: {name} has shape {tuple(x.shape)}, it must be "
                f"{(b, length, n_heads)}, one number a token and head"
            )


def _prepare(
    q: Tensor, k: Tensor, scale: float | None, normalize_qk: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Queries, scaled, and keys in the dtype of the arithmetic."""
    q, k = q.to(dtype), k.to(dtype)
    if normalize_qk:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) for x in (q, k))
    return q * (q.shape[-1] ** -0.5 if scale is None else scale), k


def gated_delta_rule_recurrent(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHV: Tensor, log_decay_BLH: Tensor, beta_BLH: Tensor, *,
    scale: float | None = None, normalize_qk: bool = False,
    initial_state_BHKV: Tensor | None = None, return_final_state: bool = False,
    doc_start_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, one token at a time: the oracle of the other forms. Arguments as in
    `gated_delta_rule`."""
    _check(q_BLHK, k_BLHK, v_BLHV, log_decay_BLH, beta_BLH)
    b, length, n_heads, width = q_BLHK.shape
    dtype = compute_dtype(q_BLHK)
    q, k = _prepare(q_BLHK, k_BLHK, scale, normalize_qk, dtype)
    v, beta = v_BLHV.to(dtype), beta_BLH.to(dtype)
    decay = log_decay_BLH.to(dtype).exp()
    if doc_start_BL is not None:
        here = torch.arange(length, device=q.device)
        decay = decay.masked_fill((doc_start_BL == here)[..., None], 0.0)
    if initial_state_BHKV is None:
        state = q.new_zeros(b, n_heads, width, v.shape[3])
    else:
        state = initial_state_BHKV.to(dtype)
    outs = []
    for t in range(length):
        state = decay[:, t, :, None, None] * state
        error = v[:, t] - (state * k[:, t, :, :, None]).sum(-2)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None, :]
        outs.append((state * q[:, t, :, :, None]).sum(-2))
    o = torch.stack(outs, dim=1).to(q_BLHK.dtype)
    return (o, state) if return_final_state else o


def gated_delta_rule_chunked(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHV: Tensor, log_decay_BLH: Tensor, beta_BLH: Tensor, *,
    scale: float | None = None, normalize_qk: bool = False,
    initial_state_BHKV: Tensor | None = None, return_final_state: bool = False,
    doc_start_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Triangular systems within chunks, the recurrence between them (module docstring), in plain
    PyTorch that autograd differentiates. Arguments as in `gated_delta_rule`.

    A first chunk without a state never builds one. Excluded pairs are -inf before the exponential,
    so neither values nor gradients overflow.
    """
    _check(q_BLHK, k_BLHK, v_BLHV, log_decay_BLH, beta_BLH)
    b, length, n_heads, _ = q_BLHK.shape
    dtype = compute_dtype(q_BLHK)
    chunk = min(length, CHUNK)
    n_chunks = -(-length // chunk)
    pad = n_chunks * chunk - length

    def chunks(x: Tensor) -> Tensor:  # (B, L, H, ...) -> (B, H, c, Q, ...)
        if pad:  # keys and values of zero change nothing
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad))
        return x.unflatten(1, (n_chunks, chunk)).movedim(3, 1)

    q, k = (chunks(x) for x in _prepare(q_BLHK, k_BLHK, scale, normalize_qk, dtype))
    v, beta = chunks(v_BLHV.to(dtype)), chunks(beta_BLH.to(dtype))[..., None]
    cum = running_sum(chunks(log_decay_BLH.to(dtype).clamp(min=STRONGEST)))  # (B, H, c, Q)

    index = torch.arange(chunk, device=q.device)
    allowed = index[:, None] >= index
    from_start, keep = cum.exp(), cum[..., -1].exp()
    if doc_start_BL is not None:
        start = doc_start_BL
        if pad:
            start = torch.cat((start, start[:, -1:].expand(b, pad)), dim=1)
        start = start.view(b, 1, n_chunks, chunk)
        position = torch.arange(n_chunks * chunk, device=q.device).view(n_chunks, chunk)
        allowed = allowed & (position[:, None, :] >= start[..., :, None])
        seen = start < position[:, :1]
        from_start, keep = from_start * seen, keep * seen[..., -1]
    # clamped, as a sum that rounding lets rise by a bit must not grow; a token's span to itself is
    # nothing, whatever is added and taken away
    span = (cum[..., :, None] - cum[..., None, :]).clamp(max=0)
    span = span.masked_fill(index[:, None] == index, 0.0).masked_fill(~allowed, -torch.inf)
    decay = span.exp()  # (B, H, c, Q, Q), target before source

    state: Tensor | None = None
    with torch.autocast(q.device.type, enabled=False):
        within = torch.matmul(k, k.transpose(-1, -2)) * decay * beta.transpose(-1, -2)
        if initial_state_BHKV is not None:
            state = initial_state_BHKV.to(dtype)
        needs_state = n_chunks > 1 or state is not None
        right = torch.cat((v, k * from_start[..., None]), dim=-1) if needs_state else v
        right = torch.linalg.solve_triangular(within, right, upper=False, unitriangular=True)
        e, reads = right.split((v.shape[-1], right.shape[-1] - v.shape[-1]), dim=-1)
        writes = k * (decay[..., -1, :, None] * beta)
        if needs_state or return_final_state:
            entering, errors = [], []
            for c in range(n_chunks):
                error = e[:, :, c]
                if needs_state:
                    if state is None:
                        state = q.new_zeros(b, n_heads, q.shape[-1], v.shape[-1])
                    entering.append(state)
                    error = error - torch.matmul(reads[:, :, c], state)
                errors.append(error)
                added = torch.matmul(writes[:, :, c].transpose(-1, -2), error)
                if state is not None:
                    added = torch.addcmul(added, state, keep[:, :, c, None, None])
                state = added
            e = torch.stack(errors, dim=2)
        o = torch.matmul(torch.matmul(q, k.transpose(-1, -2)) * decay, beta * e)
        if needs_state:
            o = o + torch.matmul(q * from_start[..., None], torch.stack(entering, dim=2))
    o = o.movedim(1, 3).flatten(1, 2)[:, :length].to(q_BLHK.dtype)
    if not return_final_state:
        return o
    assert state is not None
    return o, state


def triton_supports(data: Tensor, key_width: int) -> bool:
    """Whether the Triton kernels run data of this type: keys up to 256 wide, in float32 up to 128
    (the tiles do not fit), values of any width."""
    return key_width <= (128 if data.dtype == torch.float32 else 256)


def gated_delta_rule(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    v_BLHV: Tensor,
    log_decay_BLH: Tensor,
    beta_BLH: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state_BHKV: Tensor | None = None,
    return_final_state: bool = False,
    doc_start_BL: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The gated delta rule (module docstring).

    Args:
        q_BLHK, k_BLHK, v_BLHV: queries, keys and values, any floating type.
        log_decay_BLH: log of the decay before each token, finite and at most 0.
        beta_BLH: step towards the value; 0 leaves the state alone, 1 replaces what it held under
            a key of length one, up to 2 keeps the recurrence from growing.
        scale: of the queries; K ** -0.5 where not given.
        normalize_qk: divide queries and keys by their length, sqrt(|x|^2 + 1e-6), before all else.
        initial_state_BHKV: state before the first token.
        return_final_state: also return the state after the last token.
        doc_start_BL: first token of each position's document.
        backend: None chooses; "triton" or "reference" (chunked PyTorch) insist.

    Returns:
        o_BLHV in q's type, or (o_BLHV, state_BHKV) with the state in float32 (float64 for float64).

    Raises:
        ValueError: shapes do not fit, or the named backend cannot run the case.
    """
    _check(q_BLHK, k_BLHK, v_BLHV, log_decay_BLH, beta_BLH)
    form: Callable[..., Tensor | tuple[Tensor, Tensor]] = gated_delta_rule_chunked
    supported = triton_supports(q_BLHK, q_BLHK.shape[3])
    if use_triton(backend, q_BLHK, v_BLHV, supported=supported):
        from ablate.kernels.gated_delta_rule_triton import gated_delta_rule_triton

        form = gated_delta_rule_triton
    return form(
        q_BLHK, k_BLHK, v_BLHV, log_decay_BLH, beta_BLH, scale=scale, normalize_qk=normalize_qk,
        initial_state_BHKV=initial_state_BHKV, return_final_state=return_final_state,
        doc_start_BL=doc_start_BL,
    )  # fmt: skip


def gated_delta_rule_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    log_decay_BH: Tensor,
    beta_BH: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    state_BHKV: Tensor,
    backend: str | None = None,
) -> Tensor:
    """One token, for decoding: o_BHV; the state is updated in place."""
    supported = state_BHKV.dtype == torch.float32 and state_BHKV.is_contiguous()
    if use_triton(backend, q_BHK, supported=supported and q_BHK.shape[2] <= 2048):
        from ablate.kernels.step_triton import gated_delta_rule_step_triton

        scale = q_BHK.shape[2] ** -0.5 if scale is None else scale
        eps = NORM_EPS if normalize_qk else 0.0
        return gated_delta_rule_step_triton(
            q_BHK, k_BHK, v_BHV, log_decay_BH, beta_BH, scale, eps, state_BHKV
        )
    dtype = compute_dtype(q_BHK)
    q, k = _prepare(q_BHK, k_BHK, scale, normalize_qk, dtype)
    state = state_BHKV.to(dtype) * log_decay_BH.to(dtype).exp()[..., None, None]
    error = v_BHV.to(dtype) - torch.matmul(k[..., None, :], state).squeeze(-2)
    update = beta_BH.to(dtype)[..., None] * error
    state = torch.addcmul(state, k[..., None], update[..., None, :])
    o = torch.matmul(q[..., None, :], state).squeeze(-2)
    state_BHKV.copy_(state)
    return o.to(q_BHK.dtype)
