"""Text in, batches out: corpora, tokenizers, packing, the loader and the synthetic recall rows.

Names are resolved on first use, so that the processes that tokenise start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ablate.data.recall import mqar_rows, recall_rows
    from ablate.data.stream import (
        Batch,
        TrainStream,
        check_epochs,
        eval_batches,
        model_vocab,
        prefetched,
    )
    from ablate.data.tokens import Split, TokenSet, prepare

__all__ = [
    "Batch",
    "Split",
    "TokenSet",
    "TrainStream",
    "check_epochs",
    "eval_batches",
    "model_vocab",
    "mqar_rows",
    "prefetched",
    "prepare",
    "recall_rows",
]

_MODULES = {"recall": ("mqar_rows", "recall_rows"), "tokens": ("Split", "TokenSet", "prepare")}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ablate.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ablate.data.{_HOME.get(name, 'stream')}"), name)
