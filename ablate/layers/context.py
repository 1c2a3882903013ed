"""What every layer of a stack sees besides the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.kernels import causal_conv1d, gated_rms_norm, linear, rms_norm
from ablate.kernels.dispatch import ALIGN

State = dict[str, Tensor]  # the decoding cache of one layer


@dataclass
class Context:
    """Shared by the layers of one forward pass or one decoding step.

    positions_BL: index of each token within its document, (B, L) or (1, L); L is 1 in a step.
    doc_start_BL: int32, index within the row of the first token of each token's document (negative
        for a document that began earlier); None where layers see across documents.
    x0_BLD: the input embedding; (B, D) in a step.
    tables: by (base, dim), the rotary tables of `positions_BL` (`kernels.rotary_table`); a layer
        that finds none makes its own.
    lengths_B: real tokens of each row, in a prefill of rows that are padded on the right; None
        where all are real. Only modules with `ragged = True` are given it.
    losses: auxiliary losses that layers add to the training loss.
    """

    positions_BL: Tensor
    doc_start_BL: Tensor | None = None
    x0_BLD: Tensor | None = None
    tables: dict[tuple[float, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    lengths_B: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)


def pre_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    return cast(Tensor, rms_norm(x, weight_D, eps=eps))


class ResidualLayer(nn.Module):
    """x + branch(norm(x)), which every kind of this package is; a subclass gives the branch.

    `branch(u, ctx, state)` maps the normalised stream (B, L, D) and fills the state, if there is
    one; `branch_step(u, ctx, state)` does so for one token, (B, D).

    fusible: between the kernels and products of its branch there is arithmetic that torch.compile
        would fuse; where there is none, compiling costs seconds and gains nothing.
    """

    fusible: bool = True

    def __init__(self, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.eps = norm_eps
        self.norm = nn.Parameter(torch.empty(d_model))

    def branch(self, u_BLD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        raise NotImplementedError

    def branch_step(self, u_BD: Tensor, ctx: Context, state: State) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BLD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        return x_BLD + self.branch(pre_norm(x_BLD, self.norm, self.eps), ctx, state)

    def step(self, x_BD: Tensor, ctx: Context, state: State) -> Tensor:
        return x_BD + self.branch_step(pre_norm(x_BD, self.norm, self.eps), ctx, state)

    def chained(
        self, u_BLD: Tensor, x_BLD: Tensor, next_norm_D: Tensor, ctx: Context
    ) -> tuple[Tensor, Tensor]:
        """The stream after this layer, normalised for the next one and as it is, from the same two
        before it: the addition and the norm are one kernel, and so are their gradients."""
        out = self.branch(u_BLD, ctx)
        u, x = rms_norm(out, next_norm_D, eps=self.eps, residual=x_BLD)
        return u, x

    def chained_step(
        self, u_BD: Tensor, x_BD: Tensor, next_norm_D: Tensor, ctx: Context, state: State
    ) -> tuple[Tensor, Tensor]:
        """`chained` of one token."""
        out = self.branch_step(u_BD, ctx, state)
        u, x = rms_norm(out, next_norm_D, eps=self.eps, residual=x_BD)
        return u, x


def last_inputs(x_BLD: Tensor, lengths_B: Tensor, n: int) -> Tensor:
    """The last `n` real inputs of each row, (B, n, D), zeros before its start: what a short
    convolution must remember of rows that are padded on the right."""
    padded = F.pad(x_BLD, (0, 0, n, 0))
    index_Bn = lengths_B[:, None] + torch.arange(n, device=x_BLD.device)
    return padded.gather(1, index_Bn[..., None].expand(-1, -1, x_BLD.shape[-1]))


def short_conv(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    ctx: Context,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """The causal convolution, and what it must remember: the last inputs of each row."""
    y, state = causal_conv1d(
        x_BLD,
        weight_DK,
        bias_D,
        activation=activation,
        return_final_state=True,
        doc_start_BL=ctx.doc_start_BL,
    )
    if ctx.lengths_B is not None:
        state = last_inputs(x_BLD, ctx.lengths_B, weight_DK.shape[1] - 1)
    return y, state


def beyond(x_BLx: Tensor, lengths_B: Tensor) -> Tensor:
    """(B, L) bool: from each row's end on."""
    return torch.arange(x_BLx.shape[1], device=x_BLx.device) >= lengths_B[:, None]


def stop_at_end(dt_BLx: Tensor, lengths_B: Tensor | None) -> Tensor:
    """Step sizes before softplus that leave a scan's state alone from each row's end on: softplus
    of -1e4 is exactly 0, so the state decays by exp(0) and takes up nothing."""
    if lengths_B is None:
        return dt_BLx
    return dt_BLx.masked_fill(beyond(dt_BLx, lengths_B)[..., None], -1e4)


def gated_output(
    y_xHV: Tensor, z_xE: Tensor, norm_V: Tensor, eps: float, out_proj_DE: Tensor
) -> Tensor:
    """norm(y) * silu(z) of each head, with one weight for all, projected to the stream."""
    y = gated_rms_norm(
        y_xHV.flatten(-2),
        z_xE,
        norm_V.repeat(z_xE.shape[-1] // len(norm_V)),
        eps=eps,
        group_size=len(norm_V),
        norm_before_gate=True,
    )
    return linear(y, out_proj_DE)


def padded_linear(x: Tensor, weight_ED: Tensor) -> Tensor:
    """x weight^T; on a GPU with columns of zeros behind it that make its rows whole 16 bytes. An
    odd number of heads makes Mamba-2's projection that odd."""
    width = weight_ED.shape[0]
    if not x.is_cuda or width % ALIGN == 0:
        return linear(x, weight_ED)
    return linear(x, F.pad(weight_ED, (0, 0, 0, -width % ALIGN)))


def aligned_linear(x: Tensor, weight_ED: Tensor) -> Tensor:
    """x weight^T, on a GPU a view of `padded_linear`. The gradient of a view is copied, unless the
    layer is compiled."""
    return padded_linear(x, weight_ED)[..., : weight_ED.shape[0]]
