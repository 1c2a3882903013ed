"""Causal attention with a sliding window and documents on a GPU (`ablate.kernels.attention`).

FlashAttention-2 (arXiv:2307.08691) over the tiles that the window and the documents leave:

1. `forward_kernel`: one program per tile of queries walks the keys it can see with a running
   maximum and sum, and keeps for each query the logarithm of its sum (in units of log2).
2. `query_grad_kernel`: the same walk for dq; first it makes delta = sum(y * dy) of its queries.
3. `key_grad_kernel`: one program per tile of keys walks the queries that see it, head by head of
   its group, so that dk and dv stay in registers and nothing needs atomics.

A tile inside the visible band needs no mask: each walk first takes the few tiles on the band's
edges, then the others without one. What a query sees is lower <= key <= query with
lower = max(query - window + 1, start of its document); what sees a key is key <= query < upper.
Every result is a fixed order of additions: two runs agree bit for bit.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ablate.kernels.dispatch import define_op
from ablate.kernels.tiles_triton import LOG2E, dense_last, precision, starts

PAD = 128  # rows of the per-query sums are padded to whole tiles of this many queries


@triton.jit
def _tile(ptr, first, row, length, ROWS: tl.constexpr, P: tl.constexpr, FULL: tl.constexpr):
    """Rows `first`, ... of a matrix (L, P) whose rows lie `row` apart, zeros after the last."""
    rows = tl.arange(0, ROWS)
    at = ptr + first.to(tl.int64) * row + (rows[:, None] * row + tl.arange(0, P)[None, :])
    if FULL:
        return tl.load(at)
    return tl.load(at, mask=(first + rows < length)[:, None], other=0.0)


@triton.jit
def _put(ptr, value, first, row, length, ROWS: tl.constexpr, P: tl.constexpr, FULL: tl.constexpr):
    rows = tl.arange(0, ROWS)
    at = ptr + first.to(tl.int64) * row + (rows[:, None] * row + tl.arange(0, P)[None, :])
    value = value.to(ptr.dtype.element_ty)
    if FULL:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=(first + rows < length)[:, None])


@triton.jit
def _place(tiles, LONGEST_LAST: tl.constexpr, H: tl.constexpr, KV: tl.constexpr):
    """(tile, head, batch) of this program. The heads of a group, which share their keys, are
    neighbours, and the tiles of a group follow each other: what they read is in the cache. Tiles
    with most to do come first."""
    pid = tl.program_id(0)
    group: tl.constexpr = H // KV
    tile = pid // group % tiles
    if LONGEST_LAST:
        tile = tiles - 1 - tile
    rest = pid // group // tiles
    return tile, rest % KV * group + pid % group, (rest // KV).to(tl.int64)


@triton.jit
def _lower(doc_ptr, b, query, window, length, DOCS: tl.constexpr):
    """First key that each query sees."""
    lower = tl.maximum(query - window + 1, 0)
    if DOCS:
        lower = tl.maximum(lower, tl.load(doc_ptr + b * length + tl.minimum(query, length - 1)))
    return lower


@triton.jit
def _key_walk(lower, first, length, BM: tl.constexpr, BN: tl.constexpr):
    """Of a tile of queries from `first` on: the first tile of keys, how many lie on the left edge,
    the first after the tiles that need no mask, and how many lie on both edges."""
    begin = tl.min(lower) // BN * BN
    inner_end = (first + 1) // BN * BN
    inner = tl.minimum(tl.cdiv(tl.max(lower), BN) * BN, inner_end)
    left = (inner - begin) // BN
    right = tl.cdiv(tl.minimum(first + BM, length) - inner_end, BN)
    return begin, left, inner, inner_end, left + right


@triton.jit
def _forward_step(
    acc, total, top, q, k_ptr, v_ptr, key, query, lower, k_row, v_row, length, factor,
    BN: tl.constexpr, P: tl.constexpr, MASK: tl.constexpr, FULL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    k = _tile(k_ptr, key, k_row, length, BN, P, FULL)
    s = tl.dot(q, tl.trans(k), input_precision=PREC)
    if MASK:
        j = key + tl.arange(0, BN)[None, :]
        s = tl.where((j <= query[:, None]) & (j >= lower[:, None]), s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    v = _tile(v_ptr, key, v_row, length, BN, P, FULL)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PREC)
    return acc, total, higher


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, doc_ptr, y_ptr, sum_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    length, padded, window, factor,
    H: tl.constexpr, KV: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DOCS: tl.constexpr, FULL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    tile, h, b = _place(tl.cdiv(length, BM), True, H, KV)
    first = tile * BM
    k_ptr += b * k_batch + (h // (H // KV)).to(tl.int64) * k_head
    v_ptr += b * v_batch + (h // (H // KV)).to(tl.int64) * v_head
    q = _tile(q_ptr + b * q_batch + h.to(tl.int64) * q_head, first, q_row, length, BM, P, FULL)
    query = first + tl.arange(0, BM)
    lower = _lower(doc_ptr, b, query, window, length, DOCS)
    begin, left, inner, inner_end, edges = _key_walk(lower, first, length, BM, BN)
    acc = tl.zeros((BM, P), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    # finite, so that a row that sees nothing of its first tile stays free of inf - inf
    top = tl.full((BM,), -1e30, tl.float32)
    for t in range(edges):
        key = tl.where(t < left, begin, inner_end - left * BN) + t * BN
        acc, total, top = _forward_step(
            acc, total, top, q, k_ptr, v_ptr, key, query, lower, k_row, v_row, length, factor,
            BN, P, True, FULL, PREC)  # fmt: skip
    for t in range((inner_end - inner) // BN):
        key = inner + t * BN
        acc, total, top = _forward_step(
            acc, total, top, q, k_ptr, v_ptr, key, query, lower, k_row, v_row, length, factor,
            BN, P, False, True, PREC)  # fmt: skip
    total = tl.where(query < length, total, 1.0)  # rows after the last may see nothing
    y_ptr += b * length * (H * P) + h * P
    _put(y_ptr, acc / total[:, None], first, H * P, length, BM, P, FULL)
    # of rows after the last: what makes their weights zero
    log_sum = tl.where(query < length, top + tl.log2(total), float("inf"))
    tl.store(sum_ptr + (b * H + h) * padded + query, log_sum)


@triton.jit
def _query_grad_step(
    dq, q, dy, log_sum, delta, k_ptr, v_ptr, key, query, lower, k_row, v_row, length, factor,
    BN: tl.constexpr, P: tl.constexpr, MASK: tl.constexpr, FULL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    k = _tile(k_ptr, key, k_row, length, BN, P, FULL)
    v = _tile(v_ptr, key, v_row, length, BN, P, FULL)
    s = tl.dot(q, tl.trans(k), input_precision=PREC)
    dp = tl.dot(dy, tl.trans(v), input_precision=PREC)
    p = tl.exp2(s * factor - log_sum[:, None])
    if MASK:
        j = key + tl.arange(0, BN)[None, :]
        p = tl.where((j <= query[:, None]) & (j >= lower[:, None]), p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PREC)


@triton.jit
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, doc_ptr, y_ptr, dy_ptr, sum_ptr, delta_ptr, dq_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dy_batch, dy_row, dy_head, length, padded, window, factor, scale,
    H: tl.constexpr, KV: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DOCS: tl.constexpr, FULL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    tile, h, b = _place(tl.cdiv(length, BM), True, H, KV)
    first = tile * BM
    k_ptr += b * k_batch + (h // (H // KV)).to(tl.int64) * k_head
    v_ptr += b * v_batch + (h // (H // KV)).to(tl.int64) * v_head
    dy_ptr += b * dy_batch + h.to(tl.int64) * dy_head
    out = b * length * (H * P) + h * P
    query = first + tl.arange(0, BM)
    y = _tile(y_ptr + out, first, H * P, length, BM, P, FULL)
    dy = _tile(dy_ptr, first, dy_row, length, BM, P, FULL)
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    at = (b * H + h) * padded + query
    tl.store(delta_ptr + at, delta)
    log_sum = tl.load(sum_ptr + at)
    q = _tile(q_ptr + b * q_batch + h.to(tl.int64) * q_head, first, q_row, length, BM, P, FULL)
    lower = _lower(doc_ptr, b, query, window, length, DOCS)
    begin, left, inner, inner_end, edges = _key_walk(lower, first, length, BM, BN)
    dq = tl.zeros((BM, P), tl.float32)
    for t in range(edges):
        key = tl.where(t < left, begin, inner_end - left * BN) + t * BN
        dq = _query_grad_step(
            dq, q, dy, log_sum, delta, k_ptr, v_ptr, key, query, lower, k_row, v_row, length,
            factor, BN, P, True, FULL, PREC)  # fmt: skip
    for t in range((inner_end - inner) // BN):
        key = inner + t * BN
        dq = _query_grad_step(
            dq, q, dy, log_sum, delta, k_ptr, v_ptr, key, query, lower, k_row, v_row, length,
            factor, BN, P, False, True, PREC)  # fmt: skip
    _put(dq_ptr + out, dq * scale, first, H * P, length, BM, P, FULL)


@triton.jit
def _key_grad_step(
    dk, dv, k, v, q_ptr, dy_ptr, sum_ptr, delta_ptr, query, key, upper, q_row, dy_row, length,
    factor,
    BM: tl.constexpr, P: tl.constexpr, MASK: tl.constexpr, FULL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Everything transposed, (keys, queries), so that the weights are a product's left operand as
    they leave the registers."""
    i = query + tl.arange(0, BM)
    q = _tile(q_ptr, query, q_row, length, BM, P, FULL)
    log_sum = tl.load(sum_ptr + i)
    s = tl.dot(k, tl.trans(q), input_precision=PREC)
    p = tl.exp2(s * factor - log_sum[None, :])
    if MASK:
        p = tl.where((i[None, :] >= key[:, None]) & (i[None, :] < upper[:, None]), p, 0.0)
    dy = _tile(dy_ptr, query, dy_row, length, BM, P, FULL)
    dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision=PREC)
    dp = tl.dot(v, tl.trans(dy), input_precision=PREC)
    delta = tl.load(delta_ptr + i)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PREC)
    return dk, dv


@triton.jit
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr, end_ptr, dy_ptr, sum_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dy_batch, dy_row, dy_head, length, padded, window, factor, scale,
    H: tl.constexpr, KV: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DOCS: tl.constexpr, FULL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    tile, kv, b = _place(tl.cdiv(length, BN), False, KV, KV)
    first = tile * BN
    key = first + tl.arange(0, BN)
    wide = kv.to(tl.int64)
    k = _tile(k_ptr + b * k_batch + wide * k_head, first, k_row, length, BN, P, FULL)
    v = _tile(v_ptr + b * v_batch + wide * v_head, first, v_row, length, BN, P, FULL)
    upper = tl.minimum(key + window, length)
    if DOCS:
        upper = tl.minimum(upper, tl.load(end_ptr + b * length + tl.minimum(key, length - 1)))
    # tiles of queries: on the diagonal, inside, on the edge where the last of them leave
    begin = first // BM * BM
    end = tl.max(upper)
    inner = tl.cdiv(first + BN - 1, BM) * BM
    inner_end = tl.maximum(tl.min(upper) // BM * BM, inner)
    left = tl.cdiv(tl.minimum(inner, end) - begin, BM)
    edges = left + tl.cdiv(tl.maximum(end - inner_end, 0), BM)
    dk = tl.zeros((BN, P), tl.float32)
    dv = tl.zeros((BN, P), tl.float32)
    for g in range(H // KV):
        h = kv * (H // KV) + g
        q = q_ptr + b * q_batch + h.to(tl.int64) * q_head
        dy = dy_ptr + b * dy_batch + h.to(tl.int64) * dy_head
        rows = (b * H + h) * padded
        # constants moved out of the loops would not fit the registers
        for t in tl.range(edges, disable_licm=True):
            query = tl.where(t < left, begin, inner_end - left * BM) + t * BM
            dk, dv = _key_grad_step(
                dk, dv, k, v, q, dy, sum_ptr + rows, delta_ptr + rows, query, key, upper, q_row,
                dy_row, length, factor, BM, P, True, FULL, PREC)  # fmt: skip
        for t in tl.range((inner_end - inner) // BM, disable_licm=True):
            query = inner + t * BM
            dk, dv = _key_grad_step(
                dk, dv, k, v, q, dy, sum_ptr + rows, delta_ptr + rows, query, key, upper, q_row,
                dy_row, length, factor, BM, P, False, True, PREC)  # fmt: skip
    out = b * length * (KV * P) + kv * P
    _put(dk_ptr + out, dk * scale, first, KV * P, length, BN, P, FULL)
    _put(dv_ptr + out, dv, first, KV * P, length, BN, P, FULL)


@dataclass(frozen=True)
class Config:
    """queries, keys: of a tile; at most PAD queries, a divisor of it. `key_grad` takes no more than
    the others, which write the sums that it reads, up to the end of their last tile."""

    queries: int
    keys: int
    warps: int
    stages: int


# (heads of up to 64 channels, of up to 128), on Hopper and on others, whose mma.sync holds
# operands in registers and whose shared memory may be 99 KB.
CONFIGS = {
    ("forward", True): (Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
    ("query_grad", True): (Config(64, 64, 4, 3), Config(64, 64, 4, 2)),
    ("key_grad", True): (Config(64, 64, 4, 3), Config(64, 64, 4, 2)),
    ("forward", False): (Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
    ("query_grad", False): (Config(64, 32, 4, 2), Config(64, 32, 4, 2)),
    ("key_grad", False): (Config(32, 64, 4, 2), Config(32, 64, 8, 2)),
}
WIDE = {  # float32
    "forward": (Config(32, 32, 4, 1), Config(32, 16, 4, 1)),
    "query_grad": (Config(32, 32, 4, 1), Config(16, 32, 4, 1)),
    "key_grad": (Config(32, 32, 4, 1), Config(16, 16, 4, 1)),
}


def config(kernel: str, head_dim: int, dtype: torch.dtype, hopper: bool) -> Config:
    narrow, wide = WIDE[kernel] if dtype == torch.float32 else CONFIGS[kernel, hopper]
    return narrow if head_dim <= 64 else wide


def _hopper(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.get_device_capability(t.device)[0] >= 9


def _padded(length: int) -> int:
    return (length + PAD - 1) // PAD * PAD


def _strides(*tensors: Tensor) -> list[int]:
    return [t.stride(axis) for t in tensors for axis in range(3)]


def _constants(q: Tensor, k: Tensor, doc: Tensor | None, c: Config) -> dict[str, Any]:
    return {
        "H": q.shape[2], "KV": k.shape[2], "P": q.shape[3], "BM": c.queries, "BN": c.keys,
        "DOCS": doc is not None, "FULL": q.shape[1] % PAD == 0,
        "PREC": precision(q.dtype),
        "num_warps": c.warps, "num_stages": c.stages,
    }  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, doc: Tensor | None, window: int, scale: float,
    use: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, H, P), and log2 of each query's sum of exponentials (B, H, padded L)."""
    q, k, v = map(dense_last, (q, k, v))
    b, length, heads, head_dim = q.shape
    y, sums = _forward_fake(q, k, v, doc, window, scale)
    c = use or config("forward", head_dim, q.dtype, _hopper(q))
    forward_kernel[(triton.cdiv(length, c.queries) * heads * b,)](
        q, k, v, doc, y, sums, *_strides(q, k, v), length, sums.shape[2], window,
        scale * LOG2E.value, **_constants(q, k, doc, c),
    )  # fmt: skip
    return y, sums


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, doc: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    b, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, heads, _padded(length)), dtype=torch.float32)


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, doc: Tensor | None, y: Tensor, sums: Tensor,
    window: int, scale: float, use: tuple[Config, Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, dy = map(dense_last, (q, k, v, dy))
    b, length, heads, head_dim = q.shape
    dq, dk, dv = _backward_fake(dy, q, k, v, doc, y, sums, window, scale)
    delta = torch.empty_like(sums)
    numbers = (*_strides(q, k, v, dy), length, sums.shape[2], window, scale * LOG2E.value, scale)
    hopper = _hopper(q)
    own = [config(name, head_dim, q.dtype, hopper) for name in ("query_grad", "key_grad")]
    for_query, for_key = use or own
    query_grad_kernel[(triton.cdiv(length, for_query.queries) * heads * b,)](
        q, k, v, doc, y, dy, sums, delta, dq, *numbers, **_constants(q, k, doc, for_query)
    )
    end = None
    if doc is not None:  # starts never fall, so the first query that does not see a key is this
        keys = torch.arange(length, dtype=torch.int32, device=doc.device).expand(b, length)
        end = torch.searchsorted(doc, keys.contiguous(), right=True, out_int32=True)
    key_grad_kernel[(triton.cdiv(length, for_key.keys) * k.shape[2] * b,)](
        q, k, v, end, dy, sums, delta, dk, dv, *numbers, **_constants(q, k, doc, for_key)
    )
    return dq, dk, dv


def _backward_fake(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, doc: Tensor | None, y: Tensor, sums: Tensor,
    window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_forward_op = define_op(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? doc, int window, float scale)"
    " -> (Tensor, Tensor)",
    forward,
    _forward_fake,
)
_backward_op = define_op(
    "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? doc, Tensor y, "
    "Tensor sums, int window, float scale) -> (Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, doc: Tensor | None, window: int, scale: float
    ) -> Tensor:
        y, sums = _forward_op(q, k, v, doc, window, scale)
        ctx.save_for_backward(q, k, v, doc, y, sums)
        ctx.numbers = window, scale
        out: Tensor = y
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *_backward_op(*grads, *ctx.saved_tensors, *ctx.numbers), None, None, None


def attention_triton(
    q_BLHP: Tensor,
    k_BLHP: Tensor,
    v_BLHP: Tensor,
    window: int | None,
    doc_start_BL: Tensor | None,
    scale: float | None,
) -> Tensor:
    """See `ablate.kernels.attention`, which tells the cases; k and v are taken in q's type.

    Reads (B, L, heads, P) by strides wherever P is dense. Document starts must not fall along a
    row.
    """
    length, head_dim = q_BLHP.shape[1], q_BLHP.shape[3]
    missing = max(16, triton.next_power_of_2(head_dim)) - head_dim
    q, k, v = (t.to(q_BLHP.dtype) for t in (q_BLHP, k_BLHP, v_BLHP))
    if missing:  # zero channels change no score
        q, k, v = (F.pad(t, (0, missing)) for t in (q, k, v))
    y: Tensor = _Attention.apply(
        q,
        k,
        v,
        starts(doc_start_BL),
        length if window is None else min(window, length),
        head_dim**-0.5 if scale is None else scale,
    )
    return y[..., :head_dim] if missing else y
