"""The language model, its initialisation and its generation."""

from __future__ import annotations

from ablate.model.causal import check_causal
from ablate.model.generate import Decoder, Sampling, cast_weights, generate
from ablate.model.init import init_weights, param_groups
from ablate.model.lm import LanguageModel

__all__ = [
    "Decoder",
    "LanguageModel",
    "Sampling",
    "cast_weights",
    "check_causal",
    "generate",
    "init_weights",
    "param_groups",
]
