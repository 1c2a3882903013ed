"""Causal softmax attention with grouped queries, sliding windows and documents.

Full causal attention is torch's scaled_dot_product_attention. With a window or documents the CPU
form takes blocks of queries, each against the keys it can see, so that a window costs
O(L * window) time and memory; on CUDA it is FlexAttention with a block mask in training, whose rows
have one length. A window without documents is taken in blocks wherever no gradient is wanted:
evaluation meets hundreds of lengths, and for each FlexAttention would be compiled again and an
L x L mask be made.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
import torch.nn.functional as F

from ablate.kernels.dispatch import use_triton

QUERY_BLOCK = 256


def _visible(
    query_Q: torch.Tensor,
    key_K: torch.Tensor,
    window: int | None,
    doc_start_BQ: torch.Tensor | None,
) -> torch.Tensor:
    """Bool mask (Q, K), or (B, 1, Q, K) with documents."""
    mask = key_K <= query_Q.unsqueeze(-1)
    if window is not None:
        mask = mask & (key_K > query_Q.unsqueeze(-1) - window)
    if doc_start_BQ is not None:
        mask = (mask & (key_K >= doc_start_BQ.unsqueeze(-1))).unsqueeze(1)
    return mask


def attention_reference(
    q_BLHP: torch.Tensor,
    k_BLHP: torch.Tensor,
    v_BLHP: torch.Tensor,
    *,
    window: int | None = None,
    doc_start_BL: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The definition with all scores in memory; see `attention`."""
    repeat = q_BLHP.shape[2] // k_BLHP.shape[2]
    k, v = (t.repeat_interleave(repeat, 2) for t in (k_BLHP, v_BLHP))
    scale = q_BLHP.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhp,bkhp->bhqk", q_BLHP * scale, k)
    index = torch.arange(q_BLHP.shape[1], device=q_BLHP.device)
    scores = scores.masked_fill(~_visible(index, index, window, doc_start_BL), float("-inf"))
    return torch.einsum("bhqk,bkhp->bqhp", scores.softmax(-1), v)


def _blocked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    doc_start_BL: torch.Tensor | None,
    scale: float | None,
    gqa: bool,
) -> torch.Tensor:
    """(B, H, L, P) tensors; one call of SDPA per block of queries."""
    length = q.shape[2]
    if gqa and q.is_cuda:  # with a mask and shared heads, SDPA would hold all scores
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        gqa = False
    block = QUERY_BLOCK if window is None else max(QUERY_BLOCK, min(window, 1024))
    outputs = []
    for start in range(0, length, block):
        end = min(length, start + block)
        first = 0 if window is None else max(0, start - window + 1)
        query = torch.arange(start, end, device=q.device)
        key = torch.arange(first, end, device=q.device)
        starts = None if doc_start_BL is None else doc_start_BL[:, start:end]
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, first:end],
                v[:, :, first:end],
                attn_mask=_visible(query, key, window, starts),
                scale=scale,
                enable_gqa=gqa,
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


@functools.lru_cache(maxsize=64)
def _window_block_mask(length: int, window: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (k > q - window)

    return create_block_mask(visible, None, None, length, length, device=device)


def _document_block_mask(doc_start_BL: torch.Tensor, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = doc_start_BL.shape

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        mask = (k <= q) & (k >= doc_start_BL[b, q])
        return mask if window is None else mask & (k > q - window)

    make = create_block_mask if torch.compiler.is_compiling() else _compiled_mask_maker()
    return make(visible, batch, None, length, length, device=doc_start_BL.device)


_MASKS: dict[tuple[int, int | None], tuple[Any, int, Any]] = {}


def _shared_document_mask(doc_start_BL: torch.Tensor, window: int | None) -> Any:
    """The block mask of this tensor, made once for all layers of a step.

    Inside torch.compile the compiler shares it, and inside a graph capture it must be made by the
    graph itself, because a replay sees other documents in the same tensor.
    """
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return _document_block_mask(doc_start_BL, window)
    key = (id(doc_start_BL), window)
    reference, version, mask = _MASKS.get(key, (None, -1, None))
    if reference is None or reference() is not doc_start_BL or version != doc_start_BL._version:
        for old in [k for k, (ref, _, _) in _MASKS.items() if ref() is None]:
            del _MASKS[old]
        mask = _document_block_mask(doc_start_BL, window)
        _MASKS[key] = (weakref.ref(doc_start_BL), doc_start_BL._version, mask)
    return mask


@functools.cache
def _compiled_mask_maker() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    doc_start_BL: torch.Tensor | None,
    scale: float | None,
    gqa: bool,
) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if doc_start_BL is None:
        assert window is not None
        mask = _window_block_mask(q.shape[2], window, q.device)
    else:
        mask = _shared_document_mask(doc_start_BL, window)
    run = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    y: torch.Tensor = run(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa)
    return y


def attention(
    q_BLHP: torch.Tensor,
    k_BLHP: torch.Tensor,
    v_BLHP: torch.Tensor,
    *,
    window: int | None = None,
    doc_start_BL: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention; returns (B, L, H, P) in q's dtype.

    q_BLHP: (B, L, H, P); k_BLHP, v_BLHP: (B, L, H_kv, P) with H_kv a divisor of H.
    window: w keys including the query's own, key j visible to query i iff i-w < j <= i.
    doc_start_BL: int32 (B, L); keys before the query's document are not visible.
    scale: of the scores, P^-0.5 when None.
    """
    heads, kv_heads = q_BLHP.shape[2], k_BLHP.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1")
    length, documents = q_BLHP.shape[1], doc_start_BL is not None
    q, k, v = (t.transpose(1, 2) for t in (q_BLHP, k_BLHP, v_BLHP))
    gqa = heads != kv_heads
    if window is not None and window >= length:
        window = None
    if window is None and not documents:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    elif q.is_cuda and q.dtype != torch.float64 and (documents or torch.is_grad_enabled()):
        y = _flex(q, k, v, window, doc_start_BL, scale, gqa)
    else:
        y = _blocked(q, k, v, window, doc_start_BL, scale, gqa)
    return y.transpose(1, 2)


def attention_step(
    q_BHP: torch.Tensor,
    k_BTHP: torch.Tensor,
    v_BTHP: torch.Tensor,
    *,
    position_B: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """One query a sequence against a cache of T slots; returns (B, H, P).

    k_BTHP, v_BTHP: (B, T, H_kv, P), the current token's key and value among them.
    position_B: index of each query's token; the first position + 1 slots are visible to it (None:
        all), at most T. A ring buffer of a window's size needs no order, because keys carry their
        positions already.
    backend: None chooses; "triton" or "reference" insist.
    """
    batch, heads, width = q_BHP.shape
    slots = k_BTHP.shape[1]
    scale = width**-0.5 if scale is None else scale
    if use_triton(backend, q_BHP, k_BTHP, supported=_step_supported(q_BHP, k_BTHP)):
        from ablate.kernels.attention_triton import attention_step_triton

        if position_B is None:
            position_B = torch.full((batch,), slots - 1, device=q_BHP.device)
        return attention_step_triton(q_BHP, k_BTHP, v_BTHP, position_B, scale)
    mask = None
    if position_B is not None:
        mask = torch.arange(slots, device=q_BHP.device) <= position_B[:, None]
    y = F.scaled_dot_product_attention(
        q_BHP.unsqueeze(2),
        k_BTHP.transpose(1, 2),
        v_BTHP.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None, None, :],
        scale=scale,
        enable_gqa=heads != k_BTHP.shape[2],
    )
    return y.squeeze(2)


def _step_supported(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Heads of 16 to 256 numbers, a power of two, in the cache's type."""
    width = q.shape[-1]
    fits = 16 <= width <= 256 and width & (width - 1) == 0 and k.numel() > 0
    return fits and q.dtype == k.dtype and q.dtype != torch.float64
