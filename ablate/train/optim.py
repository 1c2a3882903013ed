"""AdamW over the model's parameter groups, its state by parameter name.

Only the fused kernel is used: it exists for CPU and CUDA, takes the clipping factor and the
"skip this step" flag as device tensors, and so needs no host synchronisation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ablate.config import TrainConfig

STATE = ("step", "exp_avg", "exp_avg_sq")


class _AdamW(torch.optim.AdamW):
    """torch keeps these from being traced, for which it imports its whole compiler: on a CPU, which
    compiles nothing, half of what a process takes to its first step. Nothing here is traced."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def make_adamw(groups: list[dict[str, Any]], cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over `groups` from `model.param_groups`.

    On a GPU the learning rate is a tensor there, which a captured step reads.
    """
    device = groups[0]["params"][0].device
    on_gpu = device.type == "cuda"
    lr: float | Tensor = torch.tensor(cfg.lr, device=device) if on_gpu else cfg.lr
    return _AdamW(
        groups, lr=lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True, capturable=on_gpu
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def apply_step(optimizer: torch.optim.AdamW, norm: Tensor, clip: float, skip: Tensor) -> None:
    """One update with gradients clipped to `clip`, or none where `skip` is 1.

    Clipping and skipping happen inside the fused kernel (the hooks that torch.amp.GradScaler
    uses): no pass over the gradients of their own, and nothing read back by the host.
    norm: 0-dim, the gradients' total norm; skip: 0-dim float32, 0 or 1.
    """
    hooks: Any = optimizer
    hooks.grad_scale = (norm / clip).clamp(min=1.0).float()
    hooks.found_inf = skip
    optimizer.step()


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
