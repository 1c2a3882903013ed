"""One optimiser step, with everything it measures left on the device.

The host reads `Stepper.read` at log steps only; nothing here waits for the device, so this is the
part that can be captured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ablate.config import TrainConfig
from ablate.data import Batch
from ablate.train.optim import apply_step, set_lr

# Positions in the vector of running figures; those before _NORM begin anew with each reading.
_LOSS, _COUNT, _NORM, _SKIPPED, _STREAK, _WORST = range(6)


@dataclass(frozen=True)
class Reading:
    """What happened since the last reading; `skipped` counts from the start of the run."""

    loss: float  # mean over the steps that were taken; NaN when none was
    grad_norm: float  # of the last step, before clipping
    skipped: int
    worst_streak: int  # most skipped steps in a row


class Stepper:
    """Forward, backward, clipping and AdamW over one batch."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.AdamW, cfg: TrainConfig, bf16: bool
    ) -> None:
        self.model: Any = model
        self.optimizer = optimizer
        self.cfg = cfg
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.device = self.params[0].device
        self.bf16 = bf16
        self.running = torch.zeros(6, dtype=torch.float64, device=self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def __call__(self, parts: Sequence[Batch], scored: int, lr: float) -> None:
        """One step.

        parts: micro-batches on the device.
        scored: targets that count in all of them together; the loss is the mean over these, so
            that it does not depend on how the batch was cut.
        A loss or gradient that is not finite leaves weights and moments as they were.
        """
        loss = torch.zeros((), device=self.device)
        for batch in parts:
            with self.autocast():
                part = self.model.loss(
                    batch.tokens_BL,
                    batch.targets_BL,
                    batch.doc_start_BL,
                    z_loss=self.cfg.z_loss,
                    reduction="sum",
                )
                part = part / max(scored, 1)
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.params if p.grad is not None], foreach=True
        )
        bad = ~(norm.isfinite() & loss.isfinite())
        set_lr(self.optimizer, lr)
        apply_step(self.optimizer, norm, self.cfg.clip, bad.float())
        self.optimizer.zero_grad(set_to_none=True)
        self._count(loss, norm, bad)

    def _count(self, loss: Tensor, norm: Tensor, bad: Tensor) -> None:
        run = self.running
        skip = bad.double()
        run[_LOSS] += torch.where(bad, 0.0, loss)
        run[_COUNT] += 1 - skip
        run[_NORM] = norm
        run[_SKIPPED] += skip
        run[_STREAK] = (run[_STREAK] + 1) * skip
        run[_WORST] = torch.maximum(run[_WORST], run[_STREAK])

    def read(self) -> Reading:
        """Wait for the device, read the figures, and begin a new interval."""
        total, count, norm, skipped, _, worst = self.running.tolist()
        self.running[:_NORM].zero_()  # an assignment of a number would wait for the device
        return Reading(total / count if count else math.nan, norm, int(skipped), int(worst))
