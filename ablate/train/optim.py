"""AdamW over the model's parameter groups, its state by parameter name.

On a GPU our kernels take a step (`ablate.kernels.adamw_triton`), elsewhere torch's fused one does.
Both read the clipping factor and the "skip this step" flag on the device, and so need no host
synchronisation.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ablate.config import TrainConfig
from ablate.kernels.dispatch import use_triton

STATE = ("step", "exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch's, with a step that clips. torch keeps its methods from being traced, for which it
    imports its whole compiler: on a CPU, which compiles nothing, half of what a process takes to
    its first step. Nothing here is traced."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._blocks: tuple[list[int], Tensor] | None = None  # of tensors of which sizes
        self._spare: Tensor | None = None  # pinned, for the table of the next graph
        self._kept: list[Tensor] = []  # of graphs

    @torch.no_grad()
    def clipped_step(self, loss: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        """One update with gradients clipped to the total norm `clip`, or none where that norm or
        `loss` is not finite; no pass over the gradients to clip them, nothing read by the host.

        Returns the norm before clipping and whether there was no update, both 0-dim.
        """
        rows = self._rows()
        if rows is not None:
            from ablate.kernels.adamw_triton import blocks_of, prepare, update

            table, sizes = self._table(rows, loss.device), [row[6] for row in rows]
            if self._blocks is None or self._blocks[0] != sizes:
                self._blocks = sizes, blocks_of(sizes, loss.device)
            blocks = self._blocks[1]
            norm, bad, factors = prepare(table, blocks, loss, clip)
            update(table, blocks, factors)
            return norm, bad
        params = (p for group in self.param_groups for p in group["params"])
        grads = [p.grad for p in params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        bad = ~(norm.isfinite() & loss.isfinite())
        # The hooks that torch.amp.GradScaler uses.
        hooks: Any = self
        hooks.grad_scale, hooks.found_inf = (norm / clip).clamp(min=1.0).float(), bad.float()
        self.step()
        return norm, bad

    def _rows(self) -> list[list[int]] | None:
        """The rows of our kernels' table; None where a tensor is nothing for them."""
        rows = []
        for group in self.param_groups:
            numbers = (group["weight_decay"], *group["betas"], group["eps"])
            bits = struct.unpack("4q", struct.pack("4d", *numbers))
            for p in group["params"]:
                if p.grad is None or not isinstance(group["lr"], Tensor):
                    return None
                state = self.state[p]
                if not state:  # as torch begins
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                moments = state["exp_avg"], state["exp_avg_sq"]
                tensors = (p, p.grad, *moments, state["step"], group["lr"])
                supported = all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
                if not use_triton(None, *tensors, supported=supported):
                    return None
                rows.append([*(t.data_ptr() for t in tensors), p.numel(), *bits])
        return rows

    def _table(self, rows: list[list[int]], device: torch.device) -> Tensor:
        """The table on the device, new with every call, as gradients need not stay in place.

        A graph copies its table whenever it is replayed, from memory that is pinned before, since
        that cannot be captured, and kept.
        """
        table = torch.tensor(rows)
        if device.type != "cuda":
            return table
        if not torch.cuda.is_current_stream_capturing():
            self._spare = table.pin_memory()
            return self._spare.to(device, non_blocking=True)
        if self._spare is None:
            raise RuntimeError("AdamW takes an ordinary step before each one that is captured")
        self._kept.append(self._spare.copy_(table))
        self._spare = None
        return self._kept[-1].to(device, non_blocking=True)


def make_adamw(groups: list[dict[str, Any]], cfg: TrainConfig) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019) over `groups` from `model.param_groups`.

    On a GPU the learning rate is a tensor there, which a captured step reads.
    """
    device = groups[0]["params"][0].device
    on_gpu = device.type == "cuda"
    lr: float | Tensor = torch.tensor(cfg.lr, device=device) if on_gpu else cfg.lr
    return AdamW(
        groups, lr=lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True, capturable=on_gpu
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def rehearse(cfg: TrainConfig, device: torch.device) -> None:
    """A step of a parameter that nobody needs, which compiles what a step needs."""
    p = nn.Parameter(torch.zeros(1, device=device))
    p.grad = torch.zeros_like(p)
    make_adamw([{"params": [p]}], cfg).clipped_step(p.grad.sum(), cfg.clip)


def group_table(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a parameter group: what it is called, how large it is, whether it decays.

    Raises ValueError when the groups do not hold every trained parameter exactly once.
    """
    rows, seen = [], []
    for group in groups:
        params = list(group["params"])
        seen += [id(p) for p in params]
        rows.append(
            {
                "group": group["name"],
                "weight_decay": group["weight_decay"],
                "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in params})),
                "tensors": len(params),
                "params": sum(p.numel() for p in params),
                "names": sorted({name.rsplit(".", 1)[-1] for name in group["names"]}),
            }
        )
    trained = sorted(id(p) for p in model.parameters() if p.requires_grad)
    if sorted(seen) != trained:
        raise ValueError("the parameter groups do not hold every trained parameter exactly once")
    return rows


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `<parameter>/<moment>` tensors; empty before the first step."""
    return {
        f"{name}/{key}": optimizer.state[p][key]
        for name, p in model.named_parameters()
        if p in optimizer.state
        for key in STATE
    }


def load_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `state_tensors`; KeyError when a parameter's state is missing."""
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        optimizer.state[p] = {
            key: tensors[f"{name}/{key}"].to(p.device, copy=True) for key in STATE
        }
