"""AdamW: its groups, clipping and skipping inside the fused kernel, its state by name."""

from __future__ import annotations

import copy

import pytest
import torch

from ablate.arch.spec import Architecture
from ablate.config import load
from ablate.model import LanguageModel, param_groups
from ablate.train.optim import (
    apply_step,
    group_table,
    load_state_tensors,
    make_adamw,
    state_tensors,
)

CFG = load({"train": {"tokens": 1, "lr": 0.01}}).train


def model() -> LanguageModel:
    options = {"mamba2": {"d_state": 4, "head_dim": 8}, "attention": {"head_dim": 8}}
    arch = Architecture("M-m*", d_model=16, vocab_size=64, options=options)
    return LanguageModel(arch, seed=0)


def test_groups_hold_every_parameter_once_and_spare_the_right_ones() -> None:
    net = model()
    rows = {row["group"]: row for row in group_table(net, param_groups(net, 0.1))}
    assert rows["decay"]["weight_decay"] == 0.1
    assert rows["no_decay"]["weight_decay"] == 0.0
    assert {"A_log", "D", "dt_bias", "embedding", "final_norm", "norm", "conv_weight"} <= set(
        rows["no_decay"]["names"]
    )
    assert {"in_proj", "out_proj"} <= set(rows["decay"]["names"])
    assert not set(rows["decay"]["names"]) & set(rows["no_decay"]["names"])
    assert sum(row["params"] for row in rows.values()) == net.arch.num_params()
    assert {row["dtype"] for row in rows.values()} == {"float32"}


def test_a_forgotten_parameter_is_an_error() -> None:
    net = model()
    groups = param_groups(net, 0.1)
    groups[0]["params"].pop()
    with pytest.raises(ValueError, match="exactly once"):
        group_table(net, groups)


def gradients(net: torch.nn.Module, size: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.grad = size * torch.randn(p.shape, generator=generator)
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("size", [1e-4, 10.0])
def test_clips_like_clip_grad_norm(size: float) -> None:
    net, twin = model(), model()
    ours = make_adamw(param_groups(net, 0.1), CFG)
    theirs = torch.optim.AdamW(param_groups(twin, 0.1), lr=0.01, betas=(0.9, 0.95), foreach=False)
    for _ in range(3):
        norm = torch.nn.utils.get_total_norm(gradients(net, size))
        apply_step(ours, norm, CFG.clip, torch.zeros(()))
        gradients(twin, size)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), CFG.clip)
        theirs.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_skipped_step_changes_nothing() -> None:
    net = model()
    optimizer = make_adamw(param_groups(net, 0.1), CFG)
    norm = torch.nn.utils.get_total_norm(gradients(net, 1.0))
    apply_step(optimizer, norm, 1.0, torch.zeros(()))
    before = copy.deepcopy({**net.state_dict(), **state_tensors(net, optimizer)})
    gradients(net, float("nan"))
    apply_step(optimizer, torch.tensor(float("nan")), 1.0, torch.ones(()))
    after = {**net.state_dict(), **state_tensors(net, optimizer)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_state_comes_back_exactly() -> None:
    net, twin = model(), model()
    optimizer = make_adamw(param_groups(net, 0.1), CFG)
    apply_step(optimizer, torch.nn.utils.get_total_norm(gradients(net, 1.0)), 1.0, torch.zeros(()))
    twin.load_state_dict(net.state_dict())
    other = make_adamw(param_groups(twin, 0.1), CFG)
    load_state_tensors(twin, other, state_tensors(net, optimizer))
    for which, opt in ((net, optimizer), (twin, other)):
        norm = torch.nn.utils.get_total_norm(gradients(which, 0.3))
        apply_step(opt, norm, 1.0, torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
