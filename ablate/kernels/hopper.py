"""Who gets the products with epilogues of `products_gluon`.

That file is written in Gluon, which is experimental in Triton and may change with any version of
it, so it is imported here alone, when it is first wanted, and for versions in TESTED alone. Any
other version, GPU or dtype, and the interpreter, does the same in two steps.
"""

from __future__ import annotations

import functools
import re
from types import ModuleType

import torch
import triton
from torch import Tensor

from ablate.kernels.dispatch import INTERPRET

TESTED = re.compile(r"3\.[67]\.\d+")  # releases: between them a version can be anything


@functools.cache
def _gluon() -> ModuleType | None:
    """The kernels, or None where this Triton is not known to compile them."""
    if not TESTED.fullmatch(triton.__version__):
        return None
    try:
        from ablate.kernels import products_gluon
    except Exception:  # whatever an experimental module raises, there is the other form
        return None
    return products_gluon


def products(v: Tensor) -> ModuleType | None:
    """The module for tensors like v, or None. Asked in operators, where torch.compile does not
    look."""
    half = v.dtype in (torch.float16, torch.bfloat16)
    if INTERPRET or not v.is_cuda or not half:
        return None
    return _gluon() if torch.cuda.get_device_capability(v.device) == (9, 0) else None
