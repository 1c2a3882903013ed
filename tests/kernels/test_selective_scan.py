from __future__ import annotations

from importlib import import_module

import pytest
import torch
from _check import compare

from ablate.kernels.selective_scan import (
    selective_scan,
    selective_scan_recurrent,
)

module = import_module("ablate.kernels.selective_scan")


def inputs(batch=2, length=19, width=3, state=4, *, full=True, initial=True, decay=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    t = {
        "u_BLD": rand(batch, length, width),
        "delta_BLD": rand(batch, length, width),
        "A_DN": -decay * rand(width, state).exp(),
        "B_BLN": rand(batch, length, state),
        "C_BLN": rand(batch, length, state),
        "D_D": rand(width) if full else None,
        "z_BLD": rand(batch, length, width) if full else None,
        "delta_bias_D": rand(width) if full else None,
        "initial_state_BDN": rand(batch, width, state) if initial else None,
    }
    return {k: v if v is None else v.requires_grad_() for k, v in t.items()}


DOCS = torch.tensor([[0] * 5 + [5] * 6 + [11] * 8, [-2] * 3 + [3] * 16], dtype=torch.int32)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("chunk", [24 * 4, 1 << 20])
@pytest.mark.parametrize("decay", [1e-3, 1.0, 1e3])
def test_chunks_agree_with_the_definition(documents, full, chunk, decay, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    compare(
        selective_scan, selective_scan_recurrent, inputs(full=full, decay=decay), limit=1e-11,
        delta_softplus=True, doc_start_BL=DOCS if documents else None, return_final_state=True,
    )  # fmt: skip
