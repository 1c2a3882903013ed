"""How long a run is: a number of steps, or seconds of training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ablate.config import TrainConfig


@dataclass(frozen=True)
class Budget:
    """Either `steps` or `seconds` is set; progress runs from 0 to 1 in both."""

    steps: int | None
    seconds: float | None

    @classmethod
    def of(cls, cfg: TrainConfig, tokens_per_step: int, flops_per_token: float) -> Budget:
        """Tokens and FLOPs become whole steps, rounded up.

        flops_per_token: training FLOPs, forward and backward, by the cost contract.
        """
        if cfg.seconds is not None:
            return cls(None, cfg.seconds)
        tokens = cfg.tokens if cfg.tokens is not None else (cfg.flops or 0.0) / flops_per_token
        return cls(max(1, math.ceil(tokens / tokens_per_step)), None)

    def progress(self, step: float, seconds: float) -> float:
        """Share of the budget that is spent after `step` steps and `seconds` of training."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.seconds is not None
        return min(1.0, seconds / self.seconds)

    def total_steps(self, step: int, seconds: float) -> int:
        """Steps of the whole run; for a budget in seconds an estimate from those behind."""
        if self.steps is not None:
            return self.steps
        done = self.progress(step, seconds)
        return step if done >= 1 or step == 0 or done == 0 else max(step + 1, round(step / done))

    def decay_start(self, decay: float, branch_at: int | None) -> float:
        """Progress at which wsd begins to decay: for a branch its first step.

        A budget in steps begins its decay at a whole step, so that a branch from that very step is
        the unbroken run.
        """
        if self.steps is None:
            return 1 - decay
        step = branch_at if branch_at is not None else round((1 - decay) * self.steps)
        return step / self.steps
