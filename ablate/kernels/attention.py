"""Causal softmax attention with grouped queries, sliding windows and documents.

Full causal attention is torch's scaled_dot_product_attention. With a window or documents it is a
Triton kernel on CUDA; the PyTorch form takes blocks of queries, each against the keys it can see,
so that a window costs O(L * window) time and memory there too.
"""

from __future__ import annotations

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


def _kernel_runs(q: torch.Tensor, scale: float | None) -> bool:
    return (
        q.shape[-1] <= 128
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (scale is None or scale > 0)
        and q.numel() > 0
    )


def attention(
    q_BLHP: torch.Tensor,
    k_BLHP: torch.Tensor,
    v_BLHP: torch.Tensor,
    *,
    window: int | None = None,
    doc_start_BL: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Causal attention; returns (B, L, H, P) in q's dtype.

    q_BLHP: (B, L, H, P); k_BLHP, v_BLHP: (B, L, H_kv, P) with H_kv a divisor of H.
    window: w keys including the query's own, key j visible to query i iff i-w < j <= i.
    doc_start_BL: int32 (B, L); keys before the query's document are not visible. Starts never fall
        along a row; negative for a document that began earlier.
    scale: of the scores, P^-0.5 when None.

    What runs:
        scaled_dot_product_attention: neither documents nor a window shorter than L;
        the Triton kernel: otherwise, on CUDA, with P <= 128 (padded to a power of two from 16 on),
            a positive scale and any type but float64;
        scaled_dot_product_attention with masks, by blocks of queries: otherwise.
    backend: None for these; "triton" insists on the kernel, "reference" on PyTorch.
    """
    heads, kv_heads = q_BLHP.shape[2], k_BLHP.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1")
    length = q_BLHP.shape[1]
    if window is not None and window >= length:
        window = None
    full = window is None and doc_start_BL is None
    kernel = use_triton(backend, q_BLHP, k_BLHP, v_BLHP, supported=_kernel_runs(q_BLHP, scale))
    if kernel and (backend == "triton" or not full):
        from ablate.kernels.attention_triton import attention_triton

        return attention_triton(q_BLHP, k_BLHP, v_BLHP, window, doc_start_BL, scale)
    q, k, v = (t.transpose(1, 2) for t in (q_BLHP, k_BLHP, v_BLHP))
    gqa = heads != kv_heads
    if full:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    else:
        y = _blocked(q, k, v, window, doc_start_BL, scale, gqa)
    return y.transpose(1, 2)


def attention_step(
    q_BHP: torch.Tensor,
    k_BTHP: torch.Tensor,
    v_BTHP: torch.Tensor,
    *,
    valid_BT: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """One query a sequence against a cache of T slots; returns (B, H, P).

    k_BTHP, v_BTHP: (B, T, H_kv, P), the current token's key and value among them.
    valid_BT: bool (B, T) or (1, T), the slots that are visible (None: all). A ring buffer of a
        window's size needs no order, because keys carry their positions already.
    """
    mask = None if valid_BT is None else valid_BT[:, None, None, :]
    y = F.scaled_dot_product_attention(
        q_BHP.unsqueeze(2),
        k_BTHP.transpose(1, 2),
        v_BTHP.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=q_BHP.shape[1] != k_BTHP.shape[2],
    )
    return y.squeeze(2)
