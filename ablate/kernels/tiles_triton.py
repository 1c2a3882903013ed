"""Tiles of row-major matrices, how the tensors they lie in must lie in memory, and functions in as
few instructions as a GPU has for them."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ablate.kernels.dispatch import INTERPRET

LOG2E = tl.constexpr(1.4426950408889634)
"""exp(x) = exp2(x log2(e)): `tl.exp` guards numbers that are not normal, with three instructions
more than the one that `tl.exp2` is."""
APPROXIMATE = tl.constexpr(not INTERPRET)  # the interpreter runs no assembly


@triton.jit
def reciprocal(x):
    """1 / x in float32 within an ulp, by one instruction where a division takes eight. What lies
    below the normal numbers counts as zero: such a result is 0, of such an x it is infinity."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x):
    """Of float32: 0 below -88, 1 above 17, and NaN of NaN."""
    return reciprocal(1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def away_from_zero(z):
    """z, or 2^-100 where it is smaller than that: a gate that nothing is lost behind, so that
    y = (y silu(z)) / silu(z) to rounding."""
    return tl.where(tl.abs(z) < 7.888609052210118e-31, 7.888609052210118e-31, z)


@triton.jit
def load_tile(
    ptr, rows, cols, n_rows, n_cols, stride, FULL_ROWS: tl.constexpr, FULL_COLS: tl.constexpr
):
    """A tile of a row-major matrix, zero outside; masks only where the tile can stick out."""
    ptrs = ptr + rows[:, None] * stride + cols[None, :]
    if FULL_ROWS and FULL_COLS:
        return tl.load(ptrs)
    elif FULL_COLS:
        return tl.load(ptrs, mask=rows[:, None] < n_rows, other=0.0)
    elif FULL_ROWS:
        return tl.load(ptrs, mask=cols[None, :] < n_cols, other=0.0)
    else:
        return tl.load(ptrs, mask=(rows[:, None] < n_rows) & (cols[None, :] < n_cols), other=0.0)


@triton.jit
def store_tile(
    ptr, value, rows, cols, n_rows, n_cols, stride, FULL_ROWS: tl.constexpr, FULL_COLS: tl.constexpr
):
    ptrs = ptr + rows[:, None] * stride + cols[None, :]
    value = value.to(ptr.dtype.element_ty)
    if FULL_ROWS and FULL_COLS:
        tl.store(ptrs, value)
    else:
        tl.store(ptrs, value, mask=(rows[:, None] < n_rows) & (cols[None, :] < n_cols))


def precision(dtype: torch.dtype) -> str:
    """Of `tl.dot`: as exact as the type, which float32 reaches by three products of tf32."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def before_90(v: Tensor) -> bool:
    """Whether v lies on a GPU before sm_90; on a CPU, for the interpreter, it does not."""
    return v.is_cuda and torch.cuda.get_device_capability(v.device) < (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 where there is none, for the interpreter."""
    if INTERPRET or device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def contiguous(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a backward pass will come, for which something has to be kept."""
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)


def starts(doc_start_BL: Tensor | None) -> Tensor | None:
    """First tokens of documents as the kernels read them: int32, contiguous."""
    return None if doc_start_BL is None else doc_start_BL.to(torch.int32).contiguous()


def dense_last(v: Tensor) -> Tensor:
    """v with its last axis dense; a copy only where it is not."""
    return v if v.stride(-1) == 1 else v.contiguous()


def dense_rows(v: Tensor) -> Tensor:
    """v (B, L, H, width) with its last two axes dense; a copy only where they are not."""
    dense = v.stride(3) == 1 and v.stride(2) == v.shape[3]
    return v if dense else v.contiguous()


def batch_unit(*tensors: Tensor) -> int:
    """8 if every batch stride is a multiple of 8 elements, which wide loads need to know, or 1."""
    return 8 if all(v.stride(0) % 8 == 0 for v in tensors) else 1
