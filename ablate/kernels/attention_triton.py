"""`attention_step` on a GPU: the slots of a cache are shared out over programs.

A decoded token has fewer heads than a GPU has multiprocessors, and the cache is nearly all there is
to read. So a program takes a part of the slots of one key head, with all query heads that share it,
and a second kernel joins the parts by their maxima. Slots beyond a row's tokens are not read. (The
idea is that of Flash-Decoding, Dao et al. 2023, pytorch.org/blog/flash-decoding.)
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512  # about four for each multiprocessor of a large GPU
MOST_PARTS = 64
WARPS, STAGES = 4, 2


@triton.jit
def part_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, out_ptr, top_ptr, total_ptr, scale, slots, part, k_batch,
    k_row, v_batch, v_row, KV: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part's sum of values, weighted by 2 ** (score - top), its top and the sum of the weights.

    scale: of the scores, in units of log 2. GROUP query heads are padded to ROWS.
    """
    s = tl.program_id(0)
    b = (tl.program_id(1) // KV).to(tl.int64)
    h = tl.program_id(1) % KV
    i = tl.arange(0, ROWS)
    p = tl.arange(0, P)
    row = (b * KV + h) * GROUP + i
    own = i < GROUP
    q = tl.load(q_ptr + row[:, None] * P + p[None, :], mask=own[:, None], other=0.0)
    k_ptr += b * k_batch + h * P
    v_ptr += b * v_batch + h * P
    first = s * part
    last = tl.minimum(tl.load(position_ptr + b).to(tl.int32) + 1, slots)
    last = tl.minimum(first + part, last)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, P), tl.float32)
    for start in range(first, last, BLOCK):
        t = start + tl.arange(0, BLOCK)
        seen = t < last
        wide = t.to(tl.int64)
        k = tl.load(k_ptr + (wide * k_row)[None, :] + p[:, None], mask=seen[None, :], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        kept = tl.exp2(top - higher)
        v = tl.load(v_ptr + (wide * v_row)[:, None] + p[None, :], mask=seen[:, None], other=0.0)
        out = out * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total = total * kept + tl.sum(weight, 1)
        top = higher
    at = row * tl.num_programs(0) + s
    tl.store(top_ptr + at, top, mask=own)
    tl.store(total_ptr + at, total, mask=own)
    tl.store(out_ptr + at[:, None] * P + p[None, :], out, mask=own[:, None])


@triton.jit
def join_kernel(out_ptr, top_ptr, total_ptr, y_ptr, parts, PARTS: tl.constexpr, P: tl.constexpr):
    """One head's parts together; `parts` of them, padded to PARTS."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, PARTS)
    p = tl.arange(0, P)
    at = row * parts + s
    there = s < parts
    top = tl.load(top_ptr + at, mask=there, other=float("-inf"))
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(total_ptr + at, mask=there, other=0.0), 0)
    out = tl.load(out_ptr + at[:, None] * P + p[None, :], mask=there[:, None], other=0.0)
    y = tl.sum(weight[:, None] * out, 0) / total
    tl.store(y_ptr + row * P + p, y.to(y_ptr.dtype.element_ty))


def block(width: int, bytes_each: int) -> int:
    """Slots that are read at a time: few enough for the registers, and twice for shared memory."""
    return max(16, min(64, 32768 // (width * bytes_each**2)))


def rows_of(group: int) -> int:
    """Query heads of a group, padded to what a matrix product takes."""
    return max(16, 1 << (group - 1).bit_length())


def parts_of(rows: int, slots: int, step: int) -> tuple[int, int]:
    """(number of parts, slots of a part) for so many key heads of all sequences together."""
    wanted = max(1, min(PROGRAMS // rows, -(-slots // (4 * step)), MOST_PARTS))
    part = -(-slots // (wanted * step)) * step
    return -(-slots // part), part


def attention_step_triton(
    q_BHP: Tensor, k_BTHP: Tensor, v_BTHP: Tensor, position_B: Tensor, scale: float
) -> Tensor:
    """See `ablate.kernels.attention_step`."""
    batch, heads, width = q_BHP.shape
    slots, kv = k_BTHP.shape[1:3]
    if k_BTHP.stride()[2:] != (width, 1) or v_BTHP.stride()[2:] != (width, 1):
        k_BTHP, v_BTHP = k_BTHP.contiguous(), v_BTHP.contiguous()
    q, group = q_BHP.contiguous(), heads // kv
    step = block(width, q.element_size())
    parts, part = parts_of(batch * kv, slots, step)
    top, total = torch.empty(2, batch * heads, parts, dtype=torch.float32, device=q.device)
    out = torch.empty(batch * heads, parts, width, dtype=torch.float32, device=q.device)
    y = torch.empty_like(q)
    part_rows: Any = part_kernel[(parts, batch * kv)]
    part_rows(
        q, k_BTHP, v_BTHP, position_B.contiguous(), out, top, total, scale / math.log(2), slots,
        part, k_BTHP.stride(0), k_BTHP.stride(1), v_BTHP.stride(0), v_BTHP.stride(1),
        KV=kv, GROUP=group, P=width, ROWS=rows_of(group), BLOCK=step,
        num_warps=WARPS * rows_of(group) // 16, num_stages=STAGES,
    )  # fmt: skip
    join: Any = join_kernel[(batch * heads,)]
    join(out, top, total, y, parts, PARTS=triton.next_power_of_2(parts), P=width, num_warps=WARPS)
    return y
