"""Layer kinds: one file each, with its options, its cost and its module."""

from __future__ import annotations

from ablate.layers.context import Context, State
from ablate.layers.options import DERIVED, STRICT, DerivedInt, PositiveFloat, PositiveInt
from ablate.layers.registry import KINDS, RESERVED, Kind, load_modules, register

__all__ = [
    "DERIVED",
    "KINDS",
    "RESERVED",
    "STRICT",
    "Context",
    "DerivedInt",
    "Kind",
    "PositiveFloat",
    "PositiveInt",
    "State",
    "load_modules",
    "register",
]
