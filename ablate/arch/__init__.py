"""Patterns, architectures and their cost."""

from __future__ import annotations

from ablate.arch.cost import Cost
from ablate.arch.spec import Architecture

__all__ = ["Architecture", "Cost"]
