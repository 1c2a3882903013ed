"""Rotary position embedding, half-split style (RoFormer, arXiv:2104.09864; layout of GPT-NeoX)."""

from __future__ import annotations

import torch
from torch import Tensor

from ablate.kernels.dispatch import compute_dtype, use_triton

Table = tuple[Tensor, Tensor]


def rotary_table(positions_BL: Tensor, base: float, dim: int, dtype: torch.dtype) -> Table:
    """Cosines and sines of position * base^(-2i/dim), each (B, L, 1, dim/2) in `dtype`.

    Layers of one stack share them: made in each layer they cost more than the rotation.
    """
    half = dim // 2
    index = torch.arange(half, device=positions_BL.device, dtype=dtype)
    angle = positions_BL.to(dtype)[..., None, None] * base ** (-index / half)
    return angle.cos(), angle.sin()


def rotary(
    x_BLHP: Tensor,
    positions_BL: Tensor,
    *,
    base: float = 10000.0,
    dim: int | None = None,
    table: Table | None = None,
) -> Tensor:
    """Rotates the first `dim` channels of each head by angles position * base^(-2i/dim).

    x_BLHP: (B, L, H, P); positions_BL: (B, L) or (1, L) integers; dim: even, at most P (None: P).
    table: of these positions, base and dim, where it is at hand.
    Channel i is paired with channel i + dim/2. Returns x's dtype; angles are float32 (or float64).
    """
    head_dim = x_BLHP.shape[-1]
    dim = head_dim if dim is None else dim
    if dim % 2 or not 0 < dim <= head_dim:
        raise ValueError(f"dim={dim} must be even and between 2 and the head dimension {head_dim}")
    dtype = compute_dtype(x_BLHP)
    half = dim // 2
    cos, sin = table or rotary_table(positions_BL, base, dim, dtype)
    first, second = x_BLHP[..., :half].to(dtype), x_BLHP[..., half:dim].to(dtype)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    rotated = rotated.to(x_BLHP.dtype)
    return rotated if dim == head_dim else torch.cat([rotated, x_BLHP[..., dim:]], -1)


def rotary_qkv(
    qkv_BLE: Tensor,
    positions_BL: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    base: float = 10000.0,
    dim: int | None = None,
    table: Table | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, L, H, P), keys and values (B, L, K, P) of a fused projection, the first two
    rotated: `rotary` of each, with one gradient of the projection.

    qkv_BLE: (B, L, (H + 2 K) P), queries first, values last. The rest as in `rotary`.
    """
    if use_triton(backend, qkv_BLE, supported=dim in (None, head_dim) and head_dim <= 256):
        from ablate.kernels.rotary_triton import rotary_qkv_triton

        tables = table or rotary_table(positions_BL, base, head_dim, torch.float32)
        return rotary_qkv_triton(qkv_BLE, *tables, n_heads, n_kv_heads, head_dim)
    heads = qkv_BLE.unflatten(-1, (-1, head_dim))
    qk, v = heads.split((n_heads + n_kv_heads, n_kv_heads), dim=2)
    qk = rotary(qk, positions_BL, base=base, dim=dim, table=table)
    q, k = qk.split((n_heads, n_kv_heads), dim=2)
    return q, k, v
