"""Whether layers of one's own let a token see what it must not: a loss would mean nothing then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ablate.errors import UserError
from ablate.layers.context import Context
from ablate.layers.registry import KINDS, own_modules
from ablate.model.lm import same_shape

_VISIBLE = 1e-3  # of the largest output: above rounding, also of a product of spectra


def check_causal(
    model: Any, seq_len: int, documents: bool, autocast: Callable[[], Any] = contextlib.nullcontext
) -> None:
    """UserError where a layer that is not of this package lets later tokens change what it makes of
    earlier ones; with `documents`, also where those of another document do.

    Each such kind's first layer runs on random numbers (1, seq_len, d_model), as they are and with
    all after one place others. A layer whose initial output is zero shows nothing.
    """
    letters = model.arch.letters
    own = {letter: letters.index(letter) for letter in letters if own_modules(letter)}
    cut = min(seq_len // 2 + 3, seq_len - 1)  # within a chunk of any power of two
    if not own or cut < 1:
        return
    device = model.embedding.device
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 1, seq_len, model.arch.d_model, generator=generator).to(device)
    index_1L = torch.arange(seq_len, device=device)[None]
    start_1L = torch.where(index_1L < cut, 0, cut).int()
    before = index_1L[0] < cut
    later = torch.where(before[:, None], x, other)
    earlier = torch.where(before[:, None], other, x)
    training = model.training
    model.eval()
    try:
        cuda = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(cuda), autocast():
            for letter, i in own.items():
                name, layer = KINDS[letter].name, model.layers[i]
                y, again, changed = (_branch(layer, v, index_1L) for v in (x, x, later))
                if _differ(y, again, changed, before):
                    raise UserError(
                        f"layer kind '{name}' is not causal: what it makes of a token changes with "
                        "later ones, which the model is to predict"
                    )
                if not documents:
                    continue
                y, again, changed = (_branch(layer, v, index_1L, start_1L) for v in (x, x, earlier))
                if _differ(y, again, changed, ~before):
                    raise UserError(
                        f"layer kind '{name}' looks across documents, and data.reset_documents is "
                        "true: let it heed ctx.doc_start_BL, or give data.reset_documents=false"
                    )
    finally:
        model.train(training)


def _branch(layer: Any, x_BLD: Tensor, index_1L: Tensor, start_1L: Tensor | None = None) -> Tensor:
    """What the layer adds to the stream of the only row, (L, D)."""
    positions = index_1L if start_1L is None else index_1L - start_1L
    y = same_shape(layer, x_BLD, layer(x_BLD, Context(positions, start_1L, x_BLD)))
    return (y - x_BLD)[0].double()


def _differ(y: Tensor, again: Tensor, changed: Tensor, rows: Tensor) -> bool:
    """Whether rows change by more than rounding, and than they do by themselves."""
    noise, change = ((v - y)[rows].abs().max() for v in (again, changed))
    return bool(change > torch.maximum(10 * noise, _VISIBLE * y.abs().max()))
