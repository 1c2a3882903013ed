"""GELU (arXiv:1606.08415), the exact one: x Phi(x) with Phi the normal distribution function."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.dispatch import use_triton


def gelu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """x Phi(x), any shape, in x's dtype; arithmetic in float32 (float64 for float64).

    backend: None chooses; "triton" or "reference" (torch's) insist.
    """
    if use_triton(backend, x):
        from ablate.kernels.gelu_triton import gelu_triton

        return gelu_triton(x)
    return F.gelu(x)
