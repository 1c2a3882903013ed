"""What every layer of a stack sees besides the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from ablate.kernels import rms_norm

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
    losses: auxiliary losses that layers add to the training loss.
    """

    positions_BL: Tensor
    doc_start_BL: Tensor | None = None
    x0_BLD: Tensor | None = None
    tables: dict[tuple[float, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)


def pre_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    return cast(Tensor, rms_norm(x, weight_D, eps=eps))


ALIGN = 8  # numbers of 16 bits in 16 bytes, below which matrix products on a GPU crawl


def aligned_linear(x: Tensor, weight_ED: Tensor) -> Tensor:
    """x weight^T; on a GPU the product is padded to rows of whole 16 bytes, of which this is a
    view. An odd number of heads makes Mamba-2's projection that odd."""
    width = weight_ED.shape[0]
    if not x.is_cuda or width % ALIGN == 0:
        return F.linear(x, weight_ED)
    return F.linear(x, F.pad(weight_ED, (0, 0, 0, -width % ALIGN)))[..., :width]
