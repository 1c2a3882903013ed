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
    form, window = _form(q_BLHP, window, doc_start_BL)
    q, k, v = (t.transpose(1, 2) for t in (q_BLHP, k_BLHP, v_BLHP))
    gqa = heads != kv_heads
    if form == "sdpa":
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    elif form == "flex":
        y = _flex(q, k, v, window, doc_start_BL, scale, gqa)
    else:
        y = _blocked(q, k, v, window, doc_start_BL, scale, gqa)
    return y.transpose(1, 2)


def _form(
    q_BLHP: torch.Tensor, window: int | None, doc_start_BL: torch.Tensor | None
) -> tuple[str, int | None]:
    """What runs ("sdpa", "flex" or "blocks"), and the window unless all of a sequence is in it."""
    if window is not None and window >= q_BLHP.shape[1]:
        window = None
    if window is None and doc_start_BL is None:
        return "sdpa", None
    trains = doc_start_BL is not None or torch.is_grad_enabled()
    flex = q_BLHP.is_cuda and q_BLHP.dtype != torch.float64 and trains
    return ("flex" if flex else "blocks"), window


def attention_form(
    q_BLHP: torch.Tensor,
    k_BLHP: torch.Tensor,
    v_BLHP: torch.Tensor,
    *,
    window: int | None = None,
    doc_start_BL: torch.Tensor | None = None,
) -> str:
    """The implementation that `attention` takes for such tensors under the settings in force:
    "flex", "blocks", or what torch's scaled_dot_product_attention chooses, "cudnn_attention",
    "flash_attention", "efficient_attention" or "math"."""
    form, _ = _form(q_BLHP, window, doc_start_BL)
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
    supported = all(t.dtype != torch.float64 and t.numel() > 0 for t in (qkv_BE, k_BTKP))
    supported = supported and head_dim <= 256 and heads // kv_heads <= 64
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
