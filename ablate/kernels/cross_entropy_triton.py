"""`linear_cross_entropy` on a GPU: few large chunks of rows, cuBLAS for the three products, and one
Triton kernel that turns a chunk's logits into their gradient in place.

The gradient is that of the sum over tokens; the mean's division happens on the way back, so that
half-precision gradients keep their size. The weight gradient accumulates in float32. Nothing
reads a value back to the host.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ablate.kernels.dispatch import define_op
from ablate.kernels.linear import float32_product
from ablate.kernels.tiles_triton import LOG2E

# Logits of one chunk. Large chunks cost fewer passes over the float32 weight gradient and fill the
# multiprocessors in the products (16,384 rows at V=50,304 make 2.9 even waves of d_x tiles).
CHUNK_BYTES = 1_700_000_000
EVALUATION_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Config:
    """Columns read at a time by one program, and its warps."""

    block: int
    warps: int


CONFIG = Config(block=16384, warps=32)


@triton.jit
def _add_exponentials(highest, total, x):
    """The running maximum of each strip of eight columns, and its sum of exp(x - maximum)."""
    new = tl.maximum(highest, tl.max(x, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    # Eight neighbours sit in one thread: one rescaling for eight exponentials. Differences come
    # first, or a maximum would count as one and its product's rounding.
    total *= tl.exp2((highest - safe) * LOG2E)
    return new, total + tl.sum(tl.exp2((x - safe[:, None]) * LOG2E), 1)


@triton.jit
def _store_gradient(logits_ptr, x, lse, slope, mask):
    """Of every logit but the target's, which lacks -1."""
    g = tl.exp2(x.to(tl.float32) * LOG2E - lse * LOG2E) * slope
    tl.store(logits_ptr, g.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def logits_kernel(
    logits_ptr, target_ptr, loss_ptr, vocabulary, row_stride, z_loss, ignore_index,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its loss, and its logits replaced by d(loss)/d(logits). Blocks of columns that are
    whole are read without masks, and the target's logit is corrected last: a comparison of each
    column with it would cost as much as its exponential."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride * 8
    padded = tl.cdiv(vocabulary, 8) * 8  # rows are padded, so that loads stay 16 bytes wide
    target = tl.load(target_ptr + row)
    keep = (target != ignore_index) & (target >= 0) & (target < vocabulary)
    column = tl.arange(0, BLOCK)
    whole = vocabulary // BLOCK * BLOCK
    if keep:
        highest = tl.full([BLOCK // 8], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK // 8], tl.float32)
        strip = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        for start in range(0, whole, BLOCK):
            x = tl.load(logits_ptr + start + strip, eviction_policy="evict_last")
            highest, total = _add_exponentials(highest, total, x.to(tl.float32))
        if whole < vocabulary:
            index = whole + strip
            x = tl.load(logits_ptr + index, mask=index < padded, eviction_policy="evict_last")
            x = tl.where(index < vocabulary, x.to(tl.float32), float("-inf"))
            highest, total = _add_exponentials(highest, total, x)
        top = tl.max(highest, 0)
        lse = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
        picked = tl.load(logits_ptr + target).to(tl.float32)
        tl.store(loss_ptr + row, lse - picked + z_loss * lse * lse)
        if GRADIENT:
            tl.debug_barrier()  # every thread has read the picked logit before it is overwritten
            slope = 1.0 + 2.0 * z_loss * lse
            for start in range(0, whole, BLOCK):
                at = logits_ptr + start + column
                _store_gradient(at, tl.load(at), lse, slope, None)
            if whole < vocabulary:
                at = logits_ptr + whole + column
                mask = whole + column < padded
                _store_gradient(at, tl.load(at, mask=mask, other=0.0), lse, slope, mask)
            tl.debug_barrier()
            g = tl.exp(picked - lse) * slope - 1.0
            tl.store(logits_ptr + target, g.to(logits_ptr.dtype.element_ty))
    else:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            zero = tl.zeros([BLOCK], logits_ptr.dtype.element_ty)
            for start in range(0, vocabulary, BLOCK):
                index = start + column
                tl.store(logits_ptr + index, zero, mask=index < padded)


def chunk_rows(rows: int, vocabulary: int, item_bytes: int, limit: int) -> int:
    """Equal chunks of a multiple of 128 rows whose logits stay within `limit` bytes."""
    most = max(128, limit // (vocabulary * item_bytes) // 128 * 128)
    chunks = triton.cdiv(rows, most)
    return max(1, min(rows, triton.cdiv(triton.cdiv(rows, chunks), 128) * 128))


def _logits_buffer(rows: int, vocabulary: int, like: Tensor, dtype: torch.dtype) -> Any:
    """(rows, V) whose rows begin on 16-byte borders also for odd vocabularies."""
    padded = triton.cdiv(vocabulary, 8) * 8
    return torch.empty(rows, padded, dtype=dtype, device=like.device)[:, :vocabulary]


def _launch(
    logits: Tensor, target: Tensor, loss: Tensor, z_loss: float, ignore_index: int, gradient: bool,
) -> None:  # fmt: skip
    rows, vocabulary = logits.shape
    block = min(CONFIG.block, max(64, triton.next_power_of_2(vocabulary)))
    logits_kernel[(rows,)](
        logits, target, loss, vocabulary, logits.stride(0) // 8, z_loss, ignore_index,
        GRADIENT=gradient, BLOCK=block, num_warps=max(4, CONFIG.warps * block // CONFIG.block),
    )  # fmt: skip


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (float32) = [total +] a @ b."""
    if first:
        float32_product(a, b, out=total)
    elif a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _forward(
    x: Tensor, weight: Tensor, target: Tensor, z_loss: float, ignore_index: int, need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses (M,) float32, and the gradients of their sum: d_x (M, D), d_weight (V, D) float32."""
    rows, vocabulary = x.shape[0], weight.shape[0]
    weight = weight.to(x.dtype)
    gradient = need_x or need_weight
    loss, d_x, d_weight = _results(x, weight, need_x, need_weight)
    step = chunk_rows(rows, vocabulary, x.element_size(), CHUNK_BYTES)
    buffer = _logits_buffer(step, vocabulary, x, x.dtype)
    for start in range(0, rows, step):
        end = min(rows, start + step)
        logits = buffer[: end - start]
        torch.mm(x[start:end], weight.t(), out=logits)
        _launch(logits, target[start:end], loss[start:end], z_loss, ignore_index, gradient)
        if need_x:
            torch.mm(logits, weight, out=d_x[start:end])
        if need_weight:
            _add_product(d_weight, logits.t(), x[start:end], first=start == 0)
    return loss, d_x, d_weight


def _results(
    x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32),
    )


def _token_losses(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Losses (M,) from float32 logits, in chunks; for evaluation."""
    rows, vocabulary = x.shape[0], weight.shape[0]
    weight = weight.to(x.dtype)
    loss = torch.empty(rows, dtype=torch.float32, device=x.device)
    step = chunk_rows(rows, vocabulary, 4, EVALUATION_BYTES)
    buffer = _logits_buffer(step, vocabulary, x, torch.float32)
    for start in range(0, rows, step):
        end = min(rows, start + step)
        logits = buffer[: end - start]
        _add_product(logits, x[start:end], weight.t(), first=True)
        _launch(logits, target[start:end], loss[start:end], 0.0, ignore_index, False)
    return loss


def _scaled(t: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """t * scale in another dtype, in one pass; one dimension keeps the scale in float32."""
    return torch.mul(t, scale.reshape(1), out=torch.empty(t.shape, dtype=dtype, device=t.device))


_forward_op = define_op(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, float z_loss, int ignore_index,"
    " bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor)",
    _forward,
    lambda x, weight, target, z_loss, ignore_index, *need: _results(x, weight, *need),
)
_token_losses_op = define_op(
    "linear_cross_entropy_tokens(Tensor x, Tensor weight, Tensor target, int ignore_index)"
    " -> Tensor",
    _token_losses,
    lambda x, *_: x.new_empty(x.shape[0], dtype=torch.float32),
)
_scaled_op = define_op(
    "linear_cross_entropy_scaled(Tensor t, Tensor scale, ScalarType dtype) -> Tensor",
    _scaled,
    lambda t, scale, dtype: t.new_empty(t.shape, dtype=dtype),
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, target: Tensor, z_loss: float, ignore_index: int,
        mean: bool,
    ) -> Tensor:  # fmt: skip
        need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        loss, d_x, d_weight = _forward_op(
            x, weight, target, z_loss, ignore_index, need_x, need_weight
        )
        total: Tensor = loss.sum()
        share = None
        if mean:
            share = (target != ignore_index).sum().clamp(min=1).to(torch.float32).reciprocal()
            total = total * share
        ctx.save_for_backward(d_x, d_weight, share)
        ctx.need = (need_x, need_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        d_x, d_weight, share = ctx.saved_tensors
        scale = grads[0] if share is None else grads[0] * share
        need_x, need_weight = ctx.need
        out_x = _scaled_op(d_x, scale, d_x.dtype) if need_x else None
        out_weight = _scaled_op(d_weight, scale, ctx.weight_dtype) if need_weight else None
        return out_x, out_weight, None, None, None, None


def linear_cross_entropy_triton(
    x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, z_loss: float, ignore_index: int, mean: bool
) -> Tensor:
    """See `ablate.kernels.linear_cross_entropy`."""
    total: Tensor = _LinearCrossEntropy.apply(
        x_MD, weight_VD, target_M.contiguous(), z_loss, ignore_index, mean
    )
    return total


def token_losses_triton(
    x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, ignore_index: int
) -> Tensor:
    """Cross-entropy of each token, without gradients."""
    with torch.no_grad():
        losses: Tensor = _token_losses_op(
            x_MD.detach(), weight_VD.detach(), target_M.contiguous(), ignore_index
        )
    return losses
