"""Which form of an operation runs, and how a Triton form becomes a torch operator.

`backend=None` picks Triton for CUDA tensors where the kernel supports the case and plain PyTorch
otherwise. `ABLATE_KERNELS=reference` in the environment, read once at import, forces PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

FORCE_REFERENCE = os.environ.get("ABLATE_KERNELS") == "reference"
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

_LIBRARY = torch.library.Library("ablate", "FRAGMENT")

ALIGN = 8  # numbers of 16 bits in 16 bytes, below which matrix products on a GPU crawl


def use_triton(backend: str | None, *tensors: torch.Tensor, supported: bool = True) -> bool:
    """True when the Triton form should run on these tensors.

    `supported` tells whether the kernel handles the case at all; float64 and empty tensors none
    does. Asking for `backend="triton"` insists, also on the CPU (where it works in Triton's
    interpreter only).
    Raises ValueError for an unknown backend, or for "triton" where there is none.
    """
    if backend == "reference" or (backend is None and FORCE_REFERENCE):
        return False
    supported = supported and all(t.dtype != torch.float64 and t.numel() > 0 for t in tensors)
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError("backend='triton' needs the package triton, which is not installed")
        if not supported:
            raise ValueError("backend='triton' does not support this case; use backend=None")
        return True
    if backend is not None:
        raise ValueError(f"backend={backend!r} is unknown; use None, 'triton' or 'reference'")
    return supported and HAS_TRITON and all(t.is_cuda for t in tensors)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of internal arithmetic: float64 stays, everything else becomes float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def define_op(
    schema: str, impl: Callable[..., Any], fake: Callable[..., Any], *, several: bool = False
) -> Any:
    """Registers `ablate::<schema>` and returns the callable operator.

    several: it launches several kernels, which its first call compiles at the same time. For that
        `impl` is called twice, so it must not add to what it is given.

    `Library.define` costs about 1.6 µs a call where `torch.library.custom_op` costs 7. The operator
    is opaque to torch.compile, so exactly the kernel that was tested is the one that runs.
    """
    name = schema.split("(", 1)[0]
    if several:
        from ablate.kernels.precompile import first_call_together

        impl = first_call_together(impl)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ablate::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ablate, name).default
