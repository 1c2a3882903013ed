"""Patterns, architectures, their cost, and how they are matched.

Names are loaded when first used, so that a report reads certificates without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ablate.arch.cost import Cost
    from ablate.arch.spec import Architecture

_HOMES = {"Architecture": "ablate.arch.spec", "Cost": "ablate.arch.cost"}
__all__ = ["Architecture", "Cost"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ablate.arch' has no attribute '{name}'")
