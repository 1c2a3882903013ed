"""The learning rate as a function of progress through the budget.

Progress runs from 0 to 1, whatever the budget counts: tokens, FLOPs or seconds. The loop passes the
middle of a step, (step + 1/2) / steps, so that neither the first nor the last step is wasted on a
learning rate of zero.
"""

from __future__ import annotations

import math


def lr_scale(
    kind: str, progress: float, *, warmup: float, decay_start: float, min_ratio: float
) -> float:
    """Learning rate over its peak, in [0, 1].

    kind: "cosine" (to min_ratio at the end), "wsd" (constant, then 1 - sqrt from decay_start on:
        Haegele et al. 2024, arXiv:2405.18392, section 3) or "constant".
    warmup: share of the budget over which the rate rises linearly from 0.
    decay_start: progress at which wsd begins to decay.
    Raises ValueError for an unknown kind.
    """
    if kind not in ("cosine", "wsd", "constant"):
        raise ValueError(f"unknown schedule {kind!r}")
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return progress / warmup
    if kind == "cosine":
        done = (progress - warmup) / (1 - warmup)
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done))
    if kind == "wsd" and progress > decay_start:
        done = (progress - decay_start) / (1 - decay_start)
        return min_ratio + (1 - min_ratio) * (1 - math.sqrt(done))
    return 1.0
