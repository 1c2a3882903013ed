"""Second stage of every weight gradient: the ordered sum of the programs' partial sums."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 256, 16


@triton.jit
def sum_rows_kernel(x_ptr, out_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        offset = row[:, None].to(tl.int64) * columns + column[None, :]
        mask = (row[:, None] < rows) & inside[None, :]
        total += tl.load(x_ptr + offset, mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=inside)


def sum_rows(x_RC: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the rows of a contiguous float32 matrix, deterministic; returns (C,) in dtype."""
    rows, columns = x_RC.shape
    out = torch.empty(columns, dtype=dtype, device=x_RC.device)
    sum_rows_kernel[(triton.cdiv(columns, COLUMNS),)](
        x_RC, out, rows, columns, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8
    )
    return out
