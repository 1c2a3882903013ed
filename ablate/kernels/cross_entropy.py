"""Output projection and cross-entropy in one operation, without keeping the logits.

The rows are taken in chunks; each chunk's logits become their own gradient in place, and the
gradients of x and of the weight are finished in the forward pass (the idea of Liger's fused linear
cross-entropy, arXiv:2410.10989, section 3.2). The z-loss is PaLM's (arXiv:2204.02311, section 5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ablate.kernels.dispatch import compute_dtype, use_triton

CHUNK_ELEMENTS = 1 << 21  # logits of one chunk on the CPU: 8 MB of float32


def linear_cross_entropy_reference(
    x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, *, z_loss: float = 0.0,
    ignore_index: int = -100, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The definition with all logits in memory, differentiated by autograd."""
    dtype = compute_dtype(x_MD)
    logits_MV = x_MD.to(dtype) @ weight_VD.to(dtype).t()
    keep_M = target_M != ignore_index
    lse_M = torch.logsumexp(logits_MV, -1)
    picked_M = logits_MV.gather(1, torch.where(keep_M, target_M, 0).long().unsqueeze(1)).squeeze(1)
    loss_M = lse_M - picked_M
    if reduction == "none":
        return torch.where(keep_M, loss_M, 0.0)
    total = torch.where(keep_M, loss_M + z_loss * lse_M.square(), 0.0).sum()
    return total / keep_M.sum().clamp(min=1) if reduction == "mean" else total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, z_loss: float,
        ignore_index: int, mean: bool,
    ) -> Tensor:  # fmt: skip
        dtype = compute_dtype(x_MD)
        need_x, need_weight = ctx.needs_input_grad[:2]
        weight = weight_VD.to(dtype)
        keep_M = target_M != ignore_index
        picked_M = torch.where(keep_M, target_M, 0).long()
        scale_M = keep_M.to(dtype)
        if mean:
            scale_M = scale_M / keep_M.sum().clamp(min=1)
        total = torch.zeros((), dtype=dtype, device=x_MD.device)
        d_x = torch.empty_like(x_MD) if need_x else None
        d_weight = torch.zeros_like(weight) if need_weight else None
        for rows in _chunks(x_MD.shape[0], weight.shape[0]):
            x = x_MD[rows].to(dtype)
            logits = x @ weight.t()
            index = picked_M[rows].unsqueeze(1)
            scale = scale_M[rows].unsqueeze(1)
            lse = torch.logsumexp(logits, -1, keepdim=True)
            loss = lse - logits.gather(1, index)
            if z_loss:
                loss = loss + z_loss * lse.square()
            total += (loss * scale).sum()
            if not (need_x or need_weight):
                continue
            grad = logits.sub_(lse).exp_()
            slope = scale * (1 + 2 * z_loss * lse) if z_loss else scale
            grad.mul_(slope).scatter_add_(1, index, -scale)
            if d_x is not None:
                d_x[rows] = grad @ weight
            if d_weight is not None:
                d_weight.addmm_(grad.t(), x)
        ctx.save_for_backward(d_x, d_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        d_x, d_weight = ctx.saved_tensors
        d_x = None if d_x is None else d_x * grad.to(d_x.dtype)
        d_weight = None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype)
        return d_x, d_weight, None, None, None, None


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


@torch.no_grad()
def _token_losses(x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, ignore_index: int) -> Tensor:
    dtype = compute_dtype(x_MD)
    weight = weight_VD.to(dtype)
    keep_M = target_M != ignore_index
    picked_M = torch.where(keep_M, target_M, 0).long()
    loss_M = torch.empty(x_MD.shape[0], dtype=dtype, device=x_MD.device)
    for rows in _chunks(x_MD.shape[0], weight.shape[0]):
        logits = x_MD[rows].to(dtype) @ weight.t()
        picked = logits.gather(1, picked_M[rows].unsqueeze(1)).squeeze(1)
        loss_M[rows] = torch.logsumexp(logits, -1) - picked
    return torch.where(keep_M, loss_M, 0.0)


def linear_cross_entropy(
    x_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    *,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of softmax(x weight^T) against targets, in nats.

    x_MD: (M, D); weight_VD: (V, D); target_M: (M,) integers, `ignore_index` for none.
    z_loss: coefficient of logsumexp(logits)^2, added per token that counts.
    reduction: "mean" over the tokens that count (0 when none does), "sum", or "none": the
        cross-entropy of each token (0 where ignored) without the z-loss and without gradients.
    Returns float32 (float64 for float64 inputs). Under autocast the products run in its dtype.
    Nothing waits for the device. Raises ValueError for an unknown reduction, or a target for more
    or fewer rows than x has.
    """
    if x_MD.shape[:1] != target_M.shape:
        raise ValueError(f"x has {x_MD.shape[0]} rows and target {tuple(target_M.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown; use 'mean', 'sum' or 'none'")
    device = x_MD.device.type
    if torch.is_autocast_enabled(device) and x_MD.dtype == torch.float32:
        x_MD = x_MD.to(torch.get_autocast_dtype(device))
    if use_triton(backend, x_MD, weight_VD):
        from ablate.kernels.cross_entropy_triton import (
            linear_cross_entropy_triton,
            token_losses_triton,
        )

        if reduction == "none":
            return token_losses_triton(x_MD, weight_VD, target_M, ignore_index)
        return linear_cross_entropy_triton(
            x_MD, weight_VD, target_M, z_loss, ignore_index, reduction == "mean"
        )
    with torch.autocast(device, enabled=False):
        if reduction == "none":
            return _token_losses(x_MD, weight_VD, target_M, ignore_index)
        total: Tensor = _LinearCrossEntropy.apply(
            x_MD, weight_VD, target_M, z_loss, ignore_index, reduction == "mean"
        )
        return total
