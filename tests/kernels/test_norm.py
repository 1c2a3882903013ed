from __future__ import annotations

import pytest
import torch

from ablate.kernels.norm import (
    gated_rms_norm,
    rms_norm,
)


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed + len(shape) + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)


def test_rms_norm_agrees_with_torch_and_has_right_gradients():
    x, w = rand(4, 7, 10), rand(10)
    torch.testing.assert_close(
        rms_norm(x, w, eps=1e-3), torch.nn.functional.rms_norm(x, (10,), w, eps=1e-3)
    )
    residual = rand(4, 7, 10, seed=1)
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, residual=r), (x, w, residual))


def test_residual_keeps_its_own_dtype():
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    y, out = rms_norm(x, torch.ones(8), residual=torch.randn(3, 8))
    assert y.dtype == torch.bfloat16
    assert out.dtype == torch.float32


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group", [None, 4])
def test_gated_norm_by_hand(before, group):
    x, z, w = rand(2, 3, 12), rand(2, 3, 12, seed=1), rand(12)
    y = gated_rms_norm(x, z, w, eps=0.0, group_size=group, norm_before_gate=before)
    size = group or 12
    for g in range(12 // size):
        s = slice(g * size, (g + 1) * size)
        gate = z[..., s] * torch.sigmoid(z[..., s])
        inner = x[..., s] if before else x[..., s] * gate
        want = inner / inner.square().mean(-1, keepdim=True).sqrt() * w[s]
        torch.testing.assert_close(y[..., s], want * gate if before else want)


def test_a_group_that_does_not_divide_is_told():
    with pytest.raises(ValueError, match="group_size=5"):
        gated_rms_norm(rand(2, 12), rand(2, 12), None, group_size=5)
