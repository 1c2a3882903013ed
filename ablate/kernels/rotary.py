"""Rotary position embedding, half-split style (RoFormer, arXiv:2104.09864; layout of GPT-NeoX)."""

from __future__ import annotations

import torch

from ablate.kernels.dispatch import compute_dtype


def rotary(
    x_BLHP: torch.Tensor,
    positions_BL: torch.Tensor,
    *,
    base: float = 10000.0,
    dim: int | None = None,
) -> torch.Tensor:
    """Rotates the first `dim` channels of each head by angles position * base^(-2i/dim).

    x_BLHP: (B, L, H, P); positions_BL: (B, L) or (1, L) integers; dim: even, at most P (None: P).
    Channel i is paired with channel i + dim/2. Returns x's dtype; angles are float32 (or float64).
    """
    head_dim = x_BLHP.shape[-1]
    dim = head_dim if dim is None else dim
    if dim % 2 or not 0 < dim <= head_dim:
        raise ValueError(f"dim={dim} must be even and between 2 and the head dimension {head_dim}")
    dtype = compute_dtype(x_BLHP)
    half = dim // 2
    index = torch.arange(half, device=x_BLHP.device, dtype=dtype)
    angle = positions_BL.to(dtype)[..., None, None] * base ** (-index / half)
    cos, sin = angle.cos(), angle.sin()
    first, second = x_BLHP[..., :half].to(dtype), x_BLHP[..., half:dim].to(dtype)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    rotated = rotated.to(x_BLHP.dtype)
    return rotated if dim == head_dim else torch.cat([rotated, x_BLHP[..., dim:]], -1)
