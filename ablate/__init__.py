"""Decide how a hybrid language model should be built.

    import ablate
    ablate.Architecture("mS-x8", d_model=512, vocab_size=32_000).cost(4096)
    ablate.train(cfg)                        # a Config or a plain dict
    ablate.load_study("runs/attn_ratio")     # a pandas frame, one row a run

Names are loaded when first used, so that reading results imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ablate.arch.spec import Architecture
    from ablate.config import Config
    from ablate.errors import UserError
    from ablate.report import load_study
    from ablate.train.loop import train

_HOMES = {
    "Architecture": "ablate.arch.spec",
    "Config": "ablate.config",
    "UserError": "ablate.errors",
    "load_study": "ablate.report",
    "train": "ablate.train.loop",
}
__all__ = ["Architecture", "Config", "UserError", "load_study", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ablate' has no attribute '{name}'")
