"""`rotary_qkv` on a GPU: one kernel reads the fused projection and writes rotated queries, rotated
keys and values; backwards it reads their gradients and writes the projection's, nothing in between.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ablate.kernels.dispatch import define_op
from ablate.kernels.tiles_triton import dense_last

ROWS = 64  # tokens of one program, of one head


@triton.jit
def _move_head(
    src, dst, cos_ptr, sin_ptr, src_row, dst_row, length, SIGN: tl.constexpr, P: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One head of ROWS tokens from src to dst, rotated forwards, backwards or (SIGN 0) as it is."""
    HALF: tl.constexpr = P // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)
    mask = (row < length)[:, None] & (i < HALF)[None, :]
    wide = row.to(tl.int64)
    at = (wide * src_row)[:, None] + i[None, :]
    a = tl.load(src + at, mask=mask)
    b = tl.load(src + at + HALF, mask=mask)
    to = (wide * dst_row)[:, None] + i[None, :]
    if SIGN != 0:
        angle = row[:, None] * HALF + i[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask)
        sin = tl.load(sin_ptr + angle, mask=mask) * SIGN
        a32 = a.to(tl.float32)
        b32 = b.to(tl.float32)
        a = (a32 * cos - b32 * sin).to(dst.dtype.element_ty)
        b = (b32 * cos + a32 * sin).to(dst.dtype.element_ty)
    tl.store(dst + to, a, mask=mask)
    tl.store(dst + to + HALF, b, mask=mask)


@triton.jit
def qkv_kernel(
    q_ptr, k_ptr, v_ptr, to_q_ptr, to_k_ptr, to_v_ptr, cos_ptr, sin_ptr, length, table_batch,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    to_q_batch, to_q_row, to_q_head, to_k_batch, to_k_row, to_k_head,
    to_v_batch, to_v_row, to_v_head,
    SIGN: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    cos_ptr += b * table_batch
    sin_ptr += b * table_batch
    if h < H:
        _move_head(q_ptr + b * q_batch + h * q_head, to_q_ptr + b * to_q_batch + h * to_q_head,
                   cos_ptr, sin_ptr, q_row, to_q_row, length, SIGN, P, BLOCK, ROWS)  # fmt: skip
    elif h < H + KV:
        h -= H
        _move_head(k_ptr + b * k_batch + h * k_head, to_k_ptr + b * to_k_batch + h * to_k_head,
                   cos_ptr, sin_ptr, k_row, to_k_row, length, SIGN, P, BLOCK, ROWS)  # fmt: skip
    else:
        h -= H + KV
        _move_head(v_ptr + b * v_batch + h * v_head, to_v_ptr + b * to_v_batch + h * to_v_head,
                   cos_ptr, sin_ptr, v_row, to_v_row, length, 0, P, BLOCK, ROWS)  # fmt: skip


def _split(qkv: Tensor, n_heads: int, n_kv_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    heads = qkv.unflatten(-1, (n_heads + 2 * n_kv_heads, head_dim))
    return heads.split((n_heads, n_kv_heads, n_kv_heads), dim=2)


def _move(sources: Any, targets: Any, cos: Tensor, sin: Tensor, sign: int) -> None:
    """From three (B, L, heads, P) to three of the same shapes, of any strides but a dense P."""
    b, length, n_heads, head_dim = sources[0].shape
    kv = sources[1].shape[2]
    strides = [t.stride(i) for t in (*sources, *targets) for i in range(3)]
    qkv_kernel[(triton.cdiv(length, ROWS), n_heads + 2 * kv, b)](
        *sources, *targets, cos, sin, length, 0 if cos.shape[0] == 1 else length * head_dim // 2,
        *strides, SIGN=sign, H=n_heads, KV=kv, P=head_dim,
        BLOCK=triton.next_power_of_2(head_dim // 2), ROWS=ROWS, num_warps=4,
    )  # fmt: skip


def _forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _forward_fake(qkv, cos, sin, n_heads, n_kv_heads, head_dim)
    _move(_split(qkv, n_heads, n_kv_heads, head_dim), (q, k, v), cos, sin, 1)
    return q, k, v


def _forward_fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, length = qkv.shape[:2]
    q = qkv.new_empty((b, length, n_heads, head_dim))
    k, v = (qkv.new_empty((b, length, n_kv_heads, head_dim)) for _ in range(2))
    return q, k, v


def _backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    grads = [dense_last(t) for t in (dq, dk, dv)]
    dqkv = _backward_fake(dq, dk, dv, cos, sin)
    _move(grads, _split(dqkv, dq.shape[2], dk.shape[2], dq.shape[3]), cos, sin, -1)
    return dqkv


def _backward_fake(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    b, length, n_heads, head_dim = dq.shape
    return dq.new_empty((b, length, (n_heads + 2 * dk.shape[2]) * head_dim))


_forward_op = define_op(
    "rotary_qkv_forward(Tensor qkv, Tensor cos, Tensor sin, int n_heads, int n_kv_heads, "
    "int head_dim) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define_op(
    "rotary_qkv_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor",
    _backward,
    _backward_fake,
)


class _RotaryQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int,
        head_dim: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(cos, sin)
        q, k, v = _forward_op(qkv, cos, sin, n_heads, n_kv_heads, head_dim)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _backward_op(*grads, *ctx.saved_tensors), None, None, None, None, None


def rotary_qkv_triton(
    qkv_BLE: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ablate.kernels.rotary_qkv`; cos and sin (B or 1, L, 1, P / 2) in float32."""
    out: tuple[Tensor, Tensor, Tensor] = _RotaryQKV.apply(
        dense_last(qkv_BLE), cos.contiguous(), sin.contiguous(), n_heads, n_kv_heads, head_dim
    )
    return out
