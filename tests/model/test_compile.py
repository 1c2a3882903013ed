"""Compilation by layer kind: the same numbers, one compilation a kind however deep the stack."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from ablate.arch.spec import Architecture
from ablate.model import LanguageModel

SMALL = {
    "mamba2": {"d_state": 8, "head_dim": 8},
    "mamba1": {"d_state": 4},
    "attention": {"head_dim": 8, "n_heads": 2},
    "swa": {"head_dim": 8, "n_heads": 2, "window": 6},
}


def model(pattern: str) -> LanguageModel:
    arch = Architecture(pattern, d_model=16, vocab_size=64, options=SMALL)
    return LanguageModel(arch, seed=0).train()


def loss_and_gradients(net: LanguageModel, docs: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    tokens = torch.randint(0, 64, (2, 25), generator=torch.Generator().manual_seed(0))
    starts = (torch.arange(24) // 9 * 9).int().expand(2, -1).contiguous() if docs else None
    loss = net.loss(tokens[:, :-1], tokens[:, 1:], starts)
    return loss, list(torch.autograd.grad(loss, list(net.parameters())))


@pytest.mark.parametrize("docs", [False, True])
def test_compiled_layers_give_the_same_loss_and_gradients(docs: bool) -> None:
    torch._dynamo.reset()
    pattern = "M-m*SM-m*S"
    plain, compiled = model(pattern), model(pattern)
    compiled.compile_layers(backend="eager")
    want, got = loss_and_gradients(plain, docs), loss_and_gradients(compiled, docs)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    for g, w in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_depth_costs_no_further_compilation() -> None:
    found = {}
    for pattern in ("M-*S", "M-*S-x3"):
        torch._dynamo.reset()
        counters.clear()
        net = model(pattern)
        net.compile_layers(backend="eager")
        loss_and_gradients(net, False)
        loss_and_gradients(net, False)
        found[pattern] = counters["stats"]["unique_graphs"]
    assert found["M-*S"] == found["M-*S-x3"] == 4


def test_validation_runs_uncompiled() -> None:
    torch._dynamo.reset()
    counters.clear()
    net = model("M*").eval()
    net.compile_layers(backend="eager")
    loss_and_gradients(net, False)
    assert counters["stats"]["unique_graphs"] == 0
