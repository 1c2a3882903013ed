"""SwiGLU's product (arXiv:2002.05202): silu(gate) * value."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.dispatch import use_triton


def swiglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * value, (..., F), of x (..., 2 F), which holds the gates first, as one projection
    writes them; in x's dtype; on a GPU the arithmetic is float32's.

    backend: None chooses; "triton" or "reference" insist.
    Raises ValueError where the last axis is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu: the last axis is {x.shape[-1]}, which has no two halves")
    if use_triton(backend, x, supported=x.is_floating_point()):
        from ablate.kernels.swiglu_triton import swiglu_triton

        return swiglu_triton(x)
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value
