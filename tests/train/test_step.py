"""The captured and compiled step against the plain one."""

from __future__ import annotations

import pytest
import torch

from ablate.arch.spec import Architecture
from ablate.config import load
from ablate.data import Batch
from ablate.model import LanguageModel, param_groups
from ablate.train.environment import numerics
from ablate.train.optim import make_adamw
from ablate.train.step import Reading, Stepper

SIZES = {"mamba2": {"d_state": 16, "head_dim": 16}, "attention": {"head_dim": 16}}
SIZES |= {"swa": {"head_dim": 16, "window": 8}, "mamba1": {"d_state": 8}}
SIZES |= {"gated_deltanet": {"head_dim": 16}, "retnet": {"head_dim": 16}}


def run(
    pattern: str,
    device: str,
    steps: int = 7,
    *,
    capture: bool,
    bad_step: int = -1,
    micro_batch: int | None = None,
    recompute: bool = False,
    warm: bool = False,
    **train,
):
    """Readings after each step, and the weights at the end."""
    cfg = load({"train": {"tokens": 1, "lr": 0.01, "batch_size": 4, **train}}).train
    place = torch.device(device)
    with numerics(cfg, place):
        arch = Architecture(pattern, d_model=48, vocab_size=64, options=SIZES)
        net = LanguageModel(arch, seed=0).to(place).train()
        net.activation_checkpointing = recompute
        if train.get("compile"):
            net.compile_layers()
        optimizer = make_adamw(param_groups(net, 0.1), cfg)
        stepper = Stepper(
            net, optimizer, cfg, bf16=device == "cuda", capture=capture, micro_batch=micro_batch
        )
        readings: list[Reading] = []
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            tokens = torch.randint(0, 64, (4, 33), generator=generator)
            targets = tokens[:, 1:].clone()
            targets[:, : step % 5] = -100  # so that the number of targets differs between steps
            starts = (torch.arange(32) // (5 + step) * (5 + step)).int().expand(4, -1)
            lr = float("nan") if step == bad_step else 0.01 / (step + 1)
            batch = Batch(tokens[:, :-1].contiguous(), targets, starts.contiguous())
            if warm and step == 0:
                stepper._one_of_each(batch.to(place))  # the dry run, which only a GPU needs
                stepper.warm_up(batch)
                assert len(net.layers) == arch.n_layers
            stepper(batch, lr)
            readings.append(stepper.read())
        return readings, {n: p.detach().cpu() for n, p in net.named_parameters()}


def test_micro_batches_give_the_same_step() -> None:
    whole, weights = run("M-*", "cpu", capture=False)
    cut, weights_cut = run("M-*", "cpu", capture=False, micro_batch=3)
    assert [r.loss for r in cut] == pytest.approx([r.loss for r in whole], rel=1e-5)
    for name, w in weights.items():
        torch.testing.assert_close(weights_cut[name], w, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["M-M-", "*-*-", "S-m-", "G-G-", "L-R-"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_captured_step_is_the_plain_one_bit_for_bit(pattern, micro_batch) -> None:
    plain, weights = run(pattern, "cuda", capture=False, micro_batch=micro_batch)
    captured, weights_captured = run(pattern, "cuda", capture=True, micro_batch=micro_batch)
    assert captured == plain
    for name, w in weights.items():
        assert torch.equal(weights_captured[name], w), name


@pytest.mark.parametrize("pattern", ["M-", "m*", "S-", "G-", "LR"])
def test_activation_checkpointing_changes_no_bit(pattern: str) -> None:
    kept, weights = run(pattern, "cpu", capture=False)
    again, weights_again = run(pattern, "cpu", capture=False, recompute=True)
    assert again == kept
    for name, w in weights.items():
        assert torch.equal(weights_again[name], w), name


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["M-*S", "mGLR"])
def test_activation_checkpointing_is_captured_and_compiled(pattern: str) -> None:
    results = []
    for recompute in (False, True):
        torch._dynamo.reset()
        results.append(run(pattern, "cuda", capture=True, recompute=recompute, compile=True))
    assert results[0][0] == results[1][0]
    for name, w in results[0][1].items():
        assert torch.equal(results[1][1][name], w), name


@pytest.mark.parametrize("pattern", ["M-M-m", "*-S-", "G-L-R"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_warm_up_changes_no_bit(pattern: str, device: str) -> None:
    """On a GPU its dry run leaves gradients of memory that nobody wrote, and drops them."""
    results = []
    for warm in (False, True):
        torch._dynamo.reset()
        on_gpu = device == "cuda"
        results.append(run(pattern, device, 4, capture=on_gpu, warm=warm, compile=on_gpu))
    assert results[0][0] == results[1][0]
    for name, w in results[0][1].items():
        assert torch.equal(results[1][1][name], w), name


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["M-M-", "*-S-", "L-R-"])
def test_a_compiled_step_agrees(pattern) -> None:
    torch._dynamo.reset()
    plain, _ = run(pattern, "cuda", capture=False)
    compiled, _ = run(pattern, "cuda", capture=True, compile=True)
    assert [r.loss for r in compiled] == pytest.approx([r.loss for r in plain], rel=5e-3)
