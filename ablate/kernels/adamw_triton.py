"""AdamW over every parameter in one launch, and before it the total norm of the gradients in two.

The tensors are known by a table of their addresses, which kernels turn into pointers, so that one
launch reaches all of them. What the host would have to read, the norm and whether the step is to
be taken, goes from kernel to kernel. All sums have a fixed order.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ablate.kernels.dispatch import define_op

BLOCK, WARPS = 2048, 8
WIDTH, TENSORS, PREPARE_WARPS = 8192, 256, 16  # of the one program between the other two kernels

# A row of the table: addresses of parameter, gradient, both moments, count of steps and learning
# rate; numbers in the tensor; the bits of weight decay, both betas and epsilon in float64.
COLUMNS = tl.constexpr(11)
# Per tensor: what gradients are multiplied by (-1: no step), lr * decay, lr and the second moment's
# root by their bias corrections, 1 - beta1, 1 - beta2, epsilon.
FACTORS = tl.constexpr(7)


@triton.jit
def _floats(address):
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def _inside(address, start, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Pointers to a block of a tensor; WHOLE: the tensor is aligned, so that loads can be wide."""
    pointer = _floats(address) + start  # of which the compiler takes the hint, and not of a cast
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + tl.arange(0, BLOCK)


@triton.jit
def _place(table_ptr, block_ptr, BLOCK: tl.constexpr):
    """A program's tensor, the row of that, where its block begins, how many numbers are left."""
    entry = block_ptr + tl.program_id(0) * 2
    tensor = tl.load(entry)
    start = tl.load(entry + 1).to(tl.int64) * BLOCK
    row = table_ptr + tensor * COLUMNS
    return tensor, row, start, tl.load(row + 6) - start


@triton.jit
def squares_kernel(table_ptr, block_ptr, square_ptr, BLOCK: tl.constexpr):
    _, row, start, left = _place(table_ptr, block_ptr, BLOCK)
    grad = tl.load(row + 1)
    if (left >= BLOCK) & (grad % 16 == 0):
        g = tl.load(_inside(grad, start, BLOCK, True))
    else:
        mask = tl.arange(0, BLOCK) < left
        g = tl.load(_inside(grad, start, BLOCK, False), mask=mask, other=0.0)
    tl.store(square_ptr + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit(do_not_specialize=["blocks", "tensors"])
def prepare_kernel(
    table_ptr, square_ptr, loss_ptr, norm_ptr, bad_ptr, factor_ptr, blocks, tensors, clip,
    WIDTH: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, blocks, WIDTH):
        at = start + tl.arange(0, WIDTH)
        total += tl.load(square_ptr + at, mask=at < blocks, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total, 0))
    nothing = norm * 0.0 + tl.load(loss_ptr) * 0.0  # NaN where one of them is not finite
    good = nothing == 0.0
    tl.store(norm_ptr, norm)
    tl.store(bad_ptr, nothing != 0.0)
    scale = tl.where(good, tl.minimum(clip / norm, 1.0), -1.0)  # 0 is a factor that underflows
    for start in range(0, tensors, TENSORS):
        tensor = start + tl.arange(0, TENSORS)
        mask = tensor < tensors
        row = table_ptr + tensor * COLUMNS
        steps = _floats(tl.load(row + 4, mask=mask, other=0))
        step = tl.load(steps, mask=mask, other=0.0) + good.to(tl.float32)
        tl.store(steps, step, mask=mask)
        lr = tl.load(_floats(tl.load(row + 5, mask=mask, other=0)), mask=mask, other=0.0)
        decay = tl.load(row + 7, mask=mask, other=0).to(tl.float64, bitcast=True)
        beta1 = tl.load(row + 8, mask=mask, other=0).to(tl.float64, bitcast=True)
        beta2 = tl.load(row + 9, mask=mask, other=0).to(tl.float64, bitcast=True)
        eps = tl.load(row + 10, mask=mask, other=0).to(tl.float64, bitcast=True)
        # In float64: 1 - beta ** step is a small difference in the first steps.
        left1 = 1.0 - tl.exp(step.to(tl.float64) * tl.log(beta1))
        left2 = 1.0 - tl.exp(step.to(tl.float64) * tl.log(beta2))
        out = factor_ptr + tensor * FACTORS
        tl.store(out, scale, mask=mask)
        tl.store(out + 1, lr * decay, mask=mask)
        tl.store(out + 2, lr / left1, mask=mask)
        tl.store(out + 3, 1.0 / tl.sqrt(left2), mask=mask)
        tl.store(out + 4, 1.0 - beta1, mask=mask)
        tl.store(out + 5, 1.0 - beta2, mask=mask)
        tl.store(out + 6, eps, mask=mask)


@triton.jit
def _update(
    param, grad, average, square, factor, start, mask, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    params = _inside(param, start, BLOCK, WHOLE)
    averages = _inside(average, start, BLOCK, WHOLE)
    squares = _inside(square, start, BLOCK, WHOLE)
    p = tl.load(params, mask=mask)
    # What nobody reads again before the next step leaves the caches to others.
    g = tl.load(_inside(grad, start, BLOCK, WHOLE), mask=mask, eviction_policy="evict_first")
    m = tl.load(averages, mask=mask, eviction_policy="evict_first")
    v = tl.load(squares, mask=mask, eviction_policy="evict_first")
    g *= tl.load(factor)
    m += tl.load(factor + 4) * (g - m)
    v += tl.load(factor + 5) * (g * g - v)
    root = tl.sqrt(v) * tl.load(factor + 3) + tl.load(factor + 6)
    # Both changes together, so that the parameter is rounded once: beside that, the last bits of an
    # approximate root and quotient are nothing, and exact ones take half of the registers again.
    p -= tl.load(factor + 1) * p + tl.load(factor + 2) * m / root
    tl.store(params, p, mask=mask, eviction_policy="evict_first")
    tl.store(averages, m, mask=mask, eviction_policy="evict_first")
    tl.store(squares, v, mask=mask, eviction_policy="evict_first")


@triton.jit
def update_kernel(table_ptr, block_ptr, factor_ptr, BLOCK: tl.constexpr):
    tensor, row, start, left = _place(table_ptr, block_ptr, BLOCK)
    factor = factor_ptr + tensor * FACTORS
    p, g, m, v = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    if tl.load(factor) >= 0.0:
        if (left >= BLOCK) & ((p | g | m | v) % 16 == 0):
            _update(p, g, m, v, factor, start, None, BLOCK, True)
        else:
            mask = tl.arange(0, BLOCK) < left
            _update(p, g, m, v, factor, start, mask, BLOCK, False)


def blocks_of(sizes: Sequence[int], device: torch.device) -> Tensor:
    """For each program its tensor and which block of it, (programs, 2), for tensors of `sizes`."""
    counts = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
    tensor = torch.arange(len(sizes)).repeat_interleave(counts)
    block = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, block], 1).int().to(device)


def _prepare(
    table: Tensor, blocks: Tensor, loss: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    squares, norm = loss.new_empty(len(blocks)), loss.new_empty(())
    bad = torch.empty_like(norm, dtype=torch.bool)
    factors = loss.new_empty(len(table), FACTORS.value)
    squares_kernel[(len(blocks),)](table, blocks, squares, BLOCK, num_warps=WARPS)
    prepare_kernel[(1,)](
        table, squares, loss, norm, bad, factors, len(blocks), len(table), clip, WIDTH, TENSORS,
        num_warps=PREPARE_WARPS,
    )  # fmt: skip
    return norm, bad, factors


def _apply(table: Tensor, blocks: Tensor, factors: Tensor) -> None:
    update_kernel[(len(blocks),)](table, blocks, factors, BLOCK, num_warps=WARPS)


prepare = define_op(
    "adamw_prepare(Tensor table, Tensor blocks, Tensor loss, float clip)"
    " -> (Tensor, Tensor, Tensor)",
    _prepare,
    lambda table, blocks, loss, clip: (
        loss.new_empty(()),
        loss.new_empty((), dtype=torch.bool),
        loss.new_empty(len(table), FACTORS.value),
    ),
)
"""The gradients' total norm, whether it or the loss is not finite, and what `update` needs besides
the table, for gradients clipped to the norm `clip`. The counts of steps go up where both are."""

update = define_op(
    "adamw_update(Tensor table, Tensor blocks, Tensor factors) -> ()", _apply, lambda *_: None
)
"""One step of every tensor of the table, or none where `prepare` found something not finite."""
