from __future__ import annotations

import pytest
import torch
from _check import compare

import ablate.kernels.cross_entropy as module
from ablate.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def inputs(rows=37, width=12, vocabulary=19, seed=0):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, vocabulary, (rows,), generator=g)
    target[::5] = -100
    return {
        "x_MD": torch.randn(rows, width, generator=g, dtype=torch.float64, requires_grad=True),
        "weight_VD": torch.randn(
            vocabulary, width, generator=g, dtype=torch.float64, requires_grad=True
        ),
        "target_M": target,
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [19 * 5, 1 << 21])
def test_cpu_form_agrees_with_the_definition(reduction, z_loss, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    compare(
        linear_cross_entropy, linear_cross_entropy_reference, inputs(), limit=1e-12,
        z_loss=z_loss, reduction=reduction,
    )  # fmt: skip


def test_definition_agrees_with_torch():
    t = inputs()
    logits = t["x_MD"] @ t["weight_VD"].t()
    for reduction in ("mean", "sum", "none"):
        want = torch.nn.functional.cross_entropy(logits, t["target_M"], reduction=reduction)
        torch.testing.assert_close(linear_cross_entropy(**t, reduction=reduction), want)


def test_only_one_input_may_need_a_gradient():
    t = inputs()
    full = linear_cross_entropy(**t)
    (want,) = torch.autograd.grad(full, t["weight_VD"])
    part = linear_cross_entropy(t["x_MD"].detach(), t["weight_VD"], t["target_M"])
    (got,) = torch.autograd.grad(part, t["weight_VD"])
    torch.testing.assert_close(got, want)


def test_nothing_to_predict_gives_zero_not_nan():
    t = inputs()
    t["target_M"][:] = -100
    loss = linear_cross_entropy(**t)
    loss.backward()
    assert loss.item() == 0.0
    assert t["x_MD"].grad.abs().max() == 0


def test_token_losses_ignore_the_z_loss_and_carry_no_gradient():
    t = inputs()
    losses = linear_cross_entropy(**t, reduction="none", z_loss=1.0)
    assert not losses.requires_grad
    kept = losses[t["target_M"] != -100].mean()
    torch.testing.assert_close(kept, linear_cross_entropy(**t).detach())


def test_autocast_uses_bfloat16_products_and_a_float32_weight_gradient():
    t = {k: v.detach().float() if v.is_floating_point() else v for k, v in inputs().items()}
    t["weight_VD"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(**t)
    loss.backward()
    assert loss.dtype == torch.float32
    assert t["weight_VD"].grad.dtype == torch.float32


def test_unknown_reduction_is_told():
    with pytest.raises(ValueError, match="median"):
        linear_cross_entropy(**inputs(), reduction="median")
