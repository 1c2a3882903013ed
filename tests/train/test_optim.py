"""AdamW: its groups, clipping and skipping inside the step, its state by name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from ablate.arch.spec import Architecture
from ablate.config import load
from ablate.model import LanguageModel, param_groups
from ablate.train import checkpoint
from ablate.train.optim import (
    group_table,
    load_state_tensors,
    make_adamw,
    state_tensors,
)

CFG = load({"train": {"tokens": 1, "lr": 0.01}}).train


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def model(device: str = "cpu") -> LanguageModel:
    options = {"mamba2": {"d_state": 4, "head_dim": 8}, "attention": {"head_dim": 8}}
    arch = Architecture("M-m*", d_model=16, vocab_size=64, options=options)
    return LanguageModel(arch, seed=0).to(device)


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


def gradients(net: torch.nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.grad = (size * torch.randn(p.shape, generator=generator)).to(p.device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-4, 10.0])
def test_clips_like_clip_grad_norm(size: float, device: str) -> None:
    net, twin = model(device), model(device)
    ours = make_adamw(param_groups(net, 0.1), CFG)
    theirs = torch.optim.AdamW(param_groups(twin, 0.1), lr=0.01, betas=(0.9, 0.95), foreach=False)
    for _ in range(3):
        gradients(net, size)
        norm, bad = ours.clipped_step(torch.ones((), device=device), CFG.clip)
        assert not bad
        gradients(twin, size)
        want = torch.nn.utils.clip_grad_norm_(twin.parameters(), CFG.clip)
        torch.testing.assert_close(norm, want)
        theirs.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "loss"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_skipped_step_changes_nothing(size: float, loss: float, device: str) -> None:
    net = model(device)
    optimizer = make_adamw(param_groups(net, 0.1), CFG)
    gradients(net, 1.0)
    optimizer.clipped_step(torch.ones((), device=device), 1.0)
    before = copy.deepcopy({**net.state_dict(), **state_tensors(net, optimizer)})
    gradients(net, size)
    _, bad = optimizer.clipped_step(torch.tensor(loss, device=device), 1.0)
    assert bad
    after = {**net.state_dict(), **state_tensors(net, optimizer)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("device", DEVICES)
def test_state_comes_back_exactly(device: str, tmp_path: Path) -> None:
    net, twin = model(device), model(device)
    optimizer = make_adamw(param_groups(net, 0.1), CFG)
    loss = torch.ones((), device=device)
    gradients(net, 1.0)
    optimizer.clipped_step(loss, 1.0)
    kept = dict(net.named_parameters())
    checkpoint.save(tmp_path, 1, kept, state_tensors(net, optimizer), {})
    saved = checkpoint.load(tmp_path, 1)
    assert {name.rsplit("/", 1)[0] for name in saved.optimizer} == set(kept)
    twin.load_state_dict(net.state_dict())
    other = make_adamw(param_groups(twin, 0.1), CFG)
    load_state_tensors(twin, other, saved.optimizer)
    for which, opt in ((net, optimizer), (twin, other)):
        gradients(which, 0.3)
        opt.clipped_step(loss, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
