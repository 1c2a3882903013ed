"""Gated linear attention: a matrix state with one decay a key channel (Yang et al. 2023,
arXiv:2312.06635, sections 3 and 4).

For every head, with a state of K x V numbers that starts at `initial_state` or zero,

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
    o_t = scale S_t^T q_t

Legend: B batch, L length, H heads, K channels of a key, V channels of a value. Chunks: c number,
Q length.

`doc_start_BL` (int32) holds, for each position, the index within its row of the first token of its
document. The state is reset where doc_start[b, t] == t; a document that continues from an earlier
segment has doc_start < 0, and it alone sees `initial_state`. Without it nothing is reset.

The chunked forms need exp(sum of g over s+1..t) for every pair s <= t of a chunk. As a product of
exp(G_t) and exp(-G_s), with G the running sum, it overflows (the paper computes pairs in blocks of
16 one by one for that reason). Here pairs are sorted by the highest bit in which s and t differ.
Bit n gives blocks of 2^(n+1) tokens, s in the lower half of one and t in its upper half; with m the
first token of the upper half the decay is

    exp(sum of g over m..t) * exp(sum of g over s+1..m-1)

Both exponents are sums of what is at most zero: nothing overflows, nothing is divided, no two large
sums are subtracted, and log2(Q) matrix products take every pair. A token needs one of the two for
each bit. Both are products of g with matrices of 0 and 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.dispatch import compute_dtype, use_triton

CHUNK = 64  # tile of the Triton kernels, which the cost of a layer is stated for
CPU_CHUNK = 32  # of the plain form
FORGET = -1000.0  # a lower log decay is as good as -inf: exp of it is 0, also in float64


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> None:
    if k.shape != q.shape or g.shape != q.shape:
        raise ValueError(
            f"gla: k {tuple(k.shape)} and log_decay {tuple(g.shape)} must have the shape of q, "
            f"{tuple(q.shape)}"
        )
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"gla: v {tuple(v.shape)} must be (batch, length, heads, V) with the first three like "
            f"q, {tuple(q.shape[:3])}"
        )
    shape = (q.shape[0], *q.shape[2:], v.shape[3])
    if state is not None and state.shape != shape:
        raise ValueError(f"gla: initial_state has shape {tuple(state.shape)}, it must be {shape}")


def gla_recurrent(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHV: Tensor, log_decay_BLHK: Tensor, *,
    scale: float | None = None, initial_state_BHKV: Tensor | None = None,
    return_final_state: bool = False, doc_start_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, one token after the other: the oracle. Arguments as in `gla`."""
    _check(q_BLHK, k_BLHK, v_BLHV, log_decay_BLHK, initial_state_BHKV)
    dtype = compute_dtype(q_BLHK)
    batch, length, heads, width = q_BLHK.shape
    scale = width**-0.5 if scale is None else scale
    q, k, v = q_BLHK.to(dtype) * scale, k_BLHK.to(dtype), v_BLHV.to(dtype)
    decay = log_decay_BLHK.to(dtype).exp()
    if doc_start_BL is not None:
        here = torch.arange(length, device=q.device)
        decay = decay.masked_fill((doc_start_BL == here)[..., None, None], 0.0)
    state = q.new_zeros(batch, heads, width, v.shape[3])
    if initial_state_BHKV is not None:
        state = initial_state_BHKV.to(dtype)
    rows = []
    for t in range(length):
        state = decay[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None, :]
        rows.append((q[:, t, ..., None] * state).sum(-2))
    y = torch.stack(rows, dim=1).to(q_BLHK.dtype)
    return (y, state) if return_final_state else y


def _spans(chunk: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For the bits of an index in a chunk (a power of two), lowest first:

    sums (bits + 2, Q, Q): times g, the exponents of the module's docstring, for a token in an upper
        half of its own, in a lower half of the tokens after it; then for the whole chunk as an
        upper half (from its start to each token) and as a lower half (from each token to its end).
    upper (bits, Q, 1): whether a token lies in an upper half.
    pairs (bits, Q, Q): whether a pair differs in this bit first, the later token in the row.
    """
    bits = chunk.bit_length() - 1
    index = torch.arange(chunk, device=device)
    bit = torch.arange(bits, device=device)[:, None, None]
    t, r = index[:, None], index
    own = r <= t
    upper = (t >> bit) & 1 == 1
    apart = (t ^ r) >> bit
    sums = torch.cat(((apart == 0) & (own == upper), own[None], ~own[None]))
    return sums, upper, (apart == 1) & own


def gla_chunked(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHV: Tensor, log_decay_BLHK: Tensor, *,
    scale: float | None = None, initial_state_BHKV: Tensor | None = None,
    return_final_state: bool = False, doc_start_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Pairs inside chunks, the recurrence between them, in plain PyTorch that autograd
    differentiates. Arguments as in `gla`."""
    _check(q_BLHK, k_BLHK, v_BLHV, log_decay_BLHK, initial_state_BHKV)
    dtype = compute_dtype(q_BLHK)
    batch, length, heads, width = q_BLHK.shape
    scale = width**-0.5 if scale is None else scale
    chunk = min(CPU_CHUNK, 1 << (length - 1).bit_length())
    n_chunks = -(-length // chunk)
    pad = n_chunks * chunk - length

    def chunks(t: Tensor) -> Tensor:
        """(B, c, H, Q, channels); what is padded decays nothing and adds nothing."""
        t = F.pad(t.to(dtype), (0, 0, 0, 0, 0, pad)) if pad else t.to(dtype)
        return t.view(batch, n_chunks, chunk, heads, -1).transpose(2, 3)

    q, k, v = chunks(q_BLHK) * scale, chunks(k_BLHK), chunks(v_BLHV)
    g = chunks(log_decay_BLHK).clamp(min=FORGET)
    sums, upper, pairs = _spans(chunk, q.device)
    allowed: Tensor | None = None
    if doc_start_BL is not None:
        starts = torch.cat((doc_start_BL, doc_start_BL[:, -1:].expand(batch, pad)), dim=1)
        start = starts.view(batch, n_chunks, 1, chunk, 1)
        position = torch.arange(n_chunks * chunk, device=q.device).view(n_chunks, 1, chunk, 1)
        allowed = position.transpose(-1, -2) >= start
    with torch.autocast(q.device.type, enabled=False):
        decays = torch.matmul(sums.to(dtype), g.unsqueeze(3)).exp()  # (B, c, H, bits + 2, Q, K)
        halves = torch.where(upper, q.unsqueeze(3), k.unsqueeze(3)) * decays[:, :, :, :-2]
        scores = torch.matmul(halves, halves.transpose(-1, -2)) * pairs
        scores = scores.sum(3) + torch.diag_embed((q * k).sum(-1))  # (B, c, H, Q, Q)
        if allowed is not None:
            scores = scores * allowed
        y = torch.matmul(scores, v)

        state: Tensor | None = None
        if n_chunks > 1 or initial_state_BHKV is not None or return_final_state:
            seen, leaving = q * decays[:, :, :, -2], k * decays[:, :, :, -1]
            keep = decays[:, :, :, -2, -1, :, None]  # (B, c, H, K, 1)
            if doc_start_BL is not None:
                seen = seen * (start < position[:, :, :1])
                leaving = leaving * (position >= start[:, :, :, -1:])
                keep = keep * (start[:, :, :, -1:] < position[:, :, :1])
            added = torch.matmul(leaving.transpose(-1, -2), v)
            state = torch.zeros_like(added[:, 0])
            if initial_state_BHKV is not None:
                state = initial_state_BHKV.to(dtype)
            entering = []
            for c in range(n_chunks):
                entering.append(state)
                state = torch.addcmul(added[:, c], keep[:, c], state)
            y = y + torch.matmul(seen, torch.stack(entering, dim=1))
    y = y.transpose(2, 3).reshape(batch, n_chunks * chunk, heads, -1)[:, :length]
    y = y.to(q_BLHK.dtype)
    if not return_final_state:
        return y
    assert state is not None
    return y, state


def gla(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    v_BLHV: Tensor,
    log_decay_BLHK: Tensor,
    *,
    scale: float | None = None,
    initial_state_BHKV: Tensor | None = None,
    return_final_state: bool = False,
    doc_start_BL: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated linear attention (module docstring).

    Args:
        q_BLHK, k_BLHK, v_BLHV: queries, keys and values, any floating type.
        log_decay_BLHK: g, logarithms of the decays, at most zero; -inf forgets.
        scale: of the queries; None: 1 / sqrt(K).
        initial_state_BHKV: state before the first token.
        return_final_state: also return the state after the last token.
        doc_start_BL: int32, first token of each position's document.
        backend: None chooses; "triton" or "reference" (chunked PyTorch) insist.

    Returns:
        y_BLHV in q's type, or (y_BLHV, state_BHKV) with the state in float32 (float64 for float64).

    Raises:
        ValueError: shapes do not fit, or the named backend cannot run the case.
    """
    form = gla_chunked
    if use_triton(backend, q_BLHK, v_BLHV):
        from ablate.kernels.gla_triton import gla_triton

        _check(q_BLHK, k_BLHK, v_BLHV, log_decay_BLHK, initial_state_BHKV)
        form = gla_triton
    return form(
        q_BLHK, k_BLHK, v_BLHV, log_decay_BLHK, scale=scale, initial_state_BHKV=initial_state_BHKV,
        return_final_state=return_final_state, doc_start_BL=doc_start_BL,
    )  # fmt: skip


def gla_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    log_decay_BHK: Tensor,
    *,
    scale: float | None = None,
    state_BHKV: Tensor,
    backend: str | None = None,
) -> Tensor:
    """One token, for decoding: y_BHV; the state is updated in place."""
    scale = q_BHK.shape[-1] ** -0.5 if scale is None else scale
    supported = state_BHKV.dtype == torch.float32 and state_BHKV.is_contiguous()
    if use_triton(backend, q_BHK, v_BHV, supported=supported and q_BHK.shape[2] <= 2048):
        from ablate.kernels.step_triton import gla_step_triton

        return gla_step_triton(q_BHK, k_BHK, v_BHV, log_decay_BHK, scale, state_BHKV)
    dtype = compute_dtype(q_BHK)
    q, k, v, g = (t.to(dtype) for t in (q_BHK, k_BHK, v_BHV, log_decay_BHK))
    state = torch.addcmul(state_BHKV.to(dtype) * g.exp()[..., None], k[..., None], v[..., None, :])
    with torch.autocast(q.device.type, enabled=False):
        y = torch.matmul((q * scale)[..., None, :], state).squeeze(-2)
    state_BHKV.copy_(state)
    return y.to(q_BHK.dtype)
