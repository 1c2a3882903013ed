"""Compilation by layer kind: the same numbers, one compilation a kind however deep the stack."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from ablate.arch.spec import Architecture
from ablate.config import load
from ablate.data import Batch
from ablate.layers.context import ResidualLayer, pre_norm
from ablate.layers.mamba2 import Mamba2
from ablate.layers.mlp import MLP
from ablate.model import LanguageModel, param_groups
from ablate.train.optim import make_adamw
from ablate.train.step import Stepper
from ablate.train.stop import TrialFailed

CFG = load({"train": {"tokens": 1, "batch_size": 4}}).train

SMALL = {
    "mamba2": {"d_state": 8, "head_dim": 8},
    "mamba1": {"d_state": 4},
    "gated_deltanet": {"head_dim": 8},
    "attention": {"head_dim": 8, "n_heads": 2},
    "swa": {"head_dim": 8, "n_heads": 2, "window": 6},
    "retnet": {"head_dim": 8},
}


def model(pattern: str) -> LanguageModel:
    arch = Architecture(pattern, d_model=16, vocab_size=64, options=SMALL)
    return LanguageModel(arch, seed=0).train()


def batch(length: int) -> Batch:
    tokens = torch.randint(0, 64, (4, length + 1), generator=torch.Generator().manual_seed(0))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def loss_and_gradients(net: LanguageModel, docs: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    tokens = torch.randint(0, 64, (2, 25), generator=torch.Generator().manual_seed(0))
    starts = (torch.arange(24) // 9 * 9).int().expand(2, -1).contiguous() if docs else None
    loss = net.loss(tokens[:, :-1], tokens[:, 1:], starts)
    return loss, list(torch.autograd.grad(loss, list(net.parameters())))


@pytest.mark.parametrize("docs", [False, True])
def test_compiled_layers_give_the_same_loss_and_gradients(docs: bool) -> None:
    torch._dynamo.reset()
    pattern = "M-mGLR*SM-mGLR*S"
    plain, compiled = model(pattern), model(pattern)
    compiled.compile_layers(backend="eager")
    want, got = loss_and_gradients(plain, docs), loss_and_gradients(compiled, docs)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    for g, w in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_depth_costs_no_further_compilation() -> None:
    found = {}
    for pattern in ("mM-GR*L", "mM-GR*Lx3"):
        torch._dynamo.reset()
        counters.clear()
        net = model(pattern)
        net.compile_layers(backend="eager")
        loss_and_gradients(net, False)
        loss_and_gradients(net, False)
        found[pattern] = counters["stats"]["unique_graphs"]
    assert found["mM-GR*L"] == found["mM-GR*Lx3"] == 3  # M, m, - and * have nothing to fuse


def test_validation_runs_uncompiled() -> None:
    torch._dynamo.reset()
    counters.clear()
    net = model("Gm").eval()
    net.compile_layers(backend="eager")
    loss_and_gradients(net, False)
    assert counters["stats"]["unique_graphs"] == 0


def test_compilations_are_counted_and_more_than_expected_are_an_error() -> None:
    torch._dynamo.reset()
    net = model("mGRL*-x2")
    net.compile_layers(backend="eager")
    assert net.expected_compilations == 3
    optimizer = make_adamw(param_groups(net, 0.1), CFG)
    stepper = Stepper(net, optimizer, CFG, bf16=False, micro_batch=2)
    stepper.warm_up(batch(24))
    weights = {name: p.clone() for name, p in net.named_parameters()}
    assert stepper.compilations == 3
    stepper(batch(24), 1e-3)
    stepper(batch(24), 1e-3)
    assert stepper.compilations == 3
    assert not torch.equal(weights["embedding"], net.embedding)
    with pytest.raises(TrialFailed, match=r"compiled \d+ times, where 3 were expected"):
        stepper(batch(20), 1e-3)


def test_activation_checkpointing_compiles_no_more() -> None:
    results = []
    for recompute in (False, True):
        torch._dynamo.reset()
        net = model("GR*S-")
        net.compile_layers(backend="aot_eager")
        net.activation_checkpointing = recompute
        before = net.compilations()
        results.append(loss_and_gradients(net, True))
        assert net.compilations() - before == 2
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_layers_with_nothing_to_fuse_import_no_compiler() -> None:
    code = """
import sys, torch
from ablate.arch.spec import Architecture
from ablate.config import load
from ablate.data import Batch
from ablate.model import LanguageModel, param_groups
from ablate.train.optim import make_adamw
from ablate.train.step import Stepper
cfg = load({"train": {"tokens": 1, "batch_size": 4}}).train
options = {"mamba2": {"d_state": 8, "head_dim": 8}, "attention": {"head_dim": 8, "n_heads": 2}}
net = LanguageModel(Architecture("M-*-x2", d_model=16, vocab_size=64, options=options), seed=0)
net.train().compile_layers()
stepper = Stepper(net, make_adamw(param_groups(net, 0.1), cfg), cfg, bf16=False, micro_batch=2)
tokens = torch.randint(0, 64, (4, 24))
stepper.warm_up(Batch(tokens, tokens, None))
stepper(Batch(tokens, tokens, None), 1e-3)
assert net.expected_compilations == stepper.compilations == 0
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_an_activation_without_a_kernel_is_compiled() -> None:
    for kind, expected in (("swiglu", 0), ("gelu", 0), ("relu2", 1)):
        arch = Architecture("-x3", d_model=16, vocab_size=64, options={"mlp": {"kind": kind}})
        net = LanguageModel(arch, seed=0)
        net.compile_layers(backend="eager")
        assert net.expected_compilations == expected, kind


class Doubling(MLP):
    """A user's layer that adds its branch twice."""

    def forward(self, x_BLD, ctx, state=None):
        return x_BLD + 2 * self.branch(pre_norm(x_BLD, self.norm, self.eps), ctx, state)


class Twice(Mamba2):
    def branch(self, u_BLD, ctx, state=None):
        return 2 * super().branch(u_BLD, ctx, state)


class Dropping(MLP):
    def branch(self, u_BLD, ctx, state=None):
        return torch.nn.functional.dropout(super().branch(u_BLD, ctx, state), 0.5)


def with_layer(kind: type[ResidualLayer], place: int = 1) -> LanguageModel:
    net = model("M-*-")
    own = kind(net.layers[place].options, net.layers[place].eps)
    own.load_state_dict(net.layers[place].state_dict())
    net.layers[place] = own
    return net.train()


@pytest.mark.parametrize(("kind", "place"), [(Doubling, 1), (Twice, 0)])
def test_a_forward_of_ones_own_is_the_one_that_runs(kind, place) -> None:
    plain, chained = with_layer(kind, place), with_layer(kind, place)
    chained.compile_layers(backend="eager")
    want, got = loss_and_gradients(plain, False), loss_and_gradients(chained, False)
    torch.testing.assert_close(got, want)
    assert not torch.equal(want[0], loss_and_gradients(model("M-*-"), False)[0])


def test_activation_checkpointing_draws_the_same_numbers_again() -> None:
    found = []
    for recompute in (False, True):
        net = with_layer(Dropping)
        net.activation_checkpointing = recompute
        torch.manual_seed(3)
        found.append(loss_and_gradients(net, False))
    torch.testing.assert_close(found[1], found[0])


def test_one_layer_a_kind_and_option_set() -> None:
    arch = Architecture("M-*-M-", d_model=16, vocab_size=64, options=SMALL)
    net = LanguageModel(arch, seed=0)
    whole = net.layers
    with net.one_layer_a_kind():
        assert list(net.layers) == [whole[0], whole[1], whole[2]]
    assert net.layers is whole
