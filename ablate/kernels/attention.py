"""Causal softmax attention with grouped queries, sliding windows and documents.

Full causal attention is torch's scaled_dot_product_attention. With a window or documents it is a
Triton kernel on CUDA; the PyTorch form takes blocks of queries, each against the keys it can see,
so that a window costs O(L * window) time and memory there too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from ablate.kernels.dispatch import use_triton
from ablate.kernels.rotary import Table, rotary, rotary_table

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


def _kernel_runs(q: torch.Tensor, scale: float | None) -> bool:
    return (
        q.shape[-1] <= 128
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (scale is None or scale > 0)
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
        scaled_dot_product_attention: neither documents nor a window shorter than L, unless torch
            is to be deterministic;
        the Triton kernel: otherwise, on CUDA, with P <= 128 (padded to a power of two from 16 on),
            a positive scale, in 16 bits;
        scaled_dot_product_attention with masks, by blocks of queries: otherwise.
    backend: None for these; "triton" insists on the kernel, "reference" on PyTorch.
    """
    heads, kv_heads = q_BLHP.shape[2], k_BLHP.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1")
    form, window = _form(q_BLHP, k_BLHP, v_BLHP, window, doc_start_BL, scale, backend)
    if form == "triton":
        from ablate.kernels.attention_triton import attention_triton

        return attention_triton(q_BLHP, k_BLHP, v_BLHP, window, doc_start_BL, scale)
    q, k, v = (t.transpose(1, 2) for t in (q_BLHP, k_BLHP, v_BLHP))
    gqa = heads != kv_heads
    if form == "sdpa":
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    else:
        y = _blocked(q, k, v, window, doc_start_BL, scale, gqa)
    return y.transpose(1, 2)


def _form(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    doc_start_BL: torch.Tensor | None,
    scale: float | None,
    backend: str | None,
) -> tuple[str, int | None]:
    """What runs ("sdpa", "triton" or "blocks"), and the window unless a whole sequence is in it."""
    if window is not None and window >= q.shape[1]:
        window = None
    full = window is None and doc_start_BL is None
    kernel = use_triton(backend, q, k, v, supported=_kernel_runs(q, scale))
    # cuDNN's backward pass is not deterministic, and FlashAttention's takes longer then.
    ours = not full or torch.are_deterministic_algorithms_enabled()
    ours = ours and q.dtype != torch.float32  # whose tiles have not passed on a GPU yet
    if kernel and (backend == "triton" or ours):
        return "triton", window
    return ("sdpa" if full else "blocks"), window


def attention_form(
    q_BLHP: torch.Tensor,
    k_BLHP: torch.Tensor,
    v_BLHP: torch.Tensor,
    *,
    window: int | None = None,
    doc_start_BL: torch.Tensor | None = None,
) -> str:
    """The implementation that `attention` takes for such tensors under the settings in force:
    "triton", "blocks", or what torch's scaled_dot_product_attention chooses, "cudnn_attention",
    "flash_attention", "efficient_attention" or "math"."""
    form, _ = _form(q_BLHP, k_BLHP, v_BLHP, window, doc_start_BL, None, None)
    if form != "sdpa":
        return form
    q, k, v = (t.transpose(1, 2) for t in (q_BLHP, k_BLHP, v_BLHP))
    gqa = q.shape[1] != k.shape[1]
    choice = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=gqa)
    return SDPBackend(choice).name.lower()


def attention_step(
    qkv_BE: torch.Tensor,
    positions_B: torch.Tensor,
    k_BTKP: torch.Tensor,
    v_BTKP: torch.Tensor,
    *,
    base: float | None = None,
    dim: int | None = None,
    table: Table | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """One token a sequence: rotates its query and key, keeps key and value, attends; (B, H, P).

    qkv_BE: (B, (H + 2 K) P), the fused projection: queries first, values last.
    positions_B: int64, the token's index in its sequence.
    k_BTKP, v_BTKP: the caches, (B, T, K, P), updated in place: position i lies in slot i modulo T,
        so that a cache of one window's size is a ring, which needs no order because keys carry
        their positions already. Keys and queries are taken in the caches' type.
    base, dim, table: as in `rotary`; base None: no rotation.
    scale: of the scores, P^-0.5 when None.
    """
    batch, slots, kv_heads, head_dim = k_BTKP.shape
    heads = qkv_BE.shape[1] // head_dim - 2 * kv_heads
    if heads < 1 or heads % kv_heads or qkv_BE.shape[1] % head_dim:
        raise ValueError(
            f"attention_step: a projection of {qkv_BE.shape[1]} channels does not fit a cache of "
            f"{kv_heads} heads of {head_dim}"
        )
    scale = head_dim**-0.5 if scale is None else scale
    supported = head_dim <= 256 and heads // kv_heads <= 64
    supported = supported and k_BTKP.is_contiguous() and v_BTKP.is_contiguous()
    if use_triton(backend, qkv_BE, k_BTKP, supported=supported):
        from ablate.kernels.step_triton import attention_step_triton

        if base is not None:
            table = table or rotary_table(
                positions_B[:, None], base, head_dim if dim is None else dim, torch.float32
            )
        return attention_step_triton(
            qkv_BE, None if base is None else table, positions_B, scale, k_BTKP, v_BTKP
        )
    qk, v = qkv_BE.unflatten(-1, (-1, head_dim)).split((heads + kv_heads, kv_heads), dim=1)
    if base is not None:
        qk = rotary(qk[:, None], positions_B[:, None], base=base, dim=dim, table=table)[:, 0]
    q, k = qk.to(k_BTKP.dtype).split((heads, kv_heads), dim=1)
    rows = torch.arange(batch, device=qkv_BE.device)
    k_BTKP[rows, positions_B % slots] = k
    v_BTKP[rows, positions_B % slots] = v.to(v_BTKP.dtype)
    visible_BT = torch.arange(slots, device=qkv_BE.device) <= positions_B[:, None]
    y = F.scaled_dot_product_attention(
        q.unsqueeze(2),
        k_BTKP.transpose(1, 2),
        v_BTKP.transpose(1, 2),
        attn_mask=visible_BT[:, None, None],
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return y.squeeze(2).to(qkv_BE.dtype)
