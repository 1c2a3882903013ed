"""Training: one loop, from a config to a run folder with a result.

`ablate.train` is both this package and, by the line at the end, the function `train` itself, so
that `ablate.train(cfg)` works whichever was imported first.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from ablate.train.loop import train
from ablate.train.stop import Pruned, TrialFailed

__all__ = ["Pruned", "TrialFailed", "train"]


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
