"""A projection of an odd width whose rows lie aligned, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ablate.layers.context import ALIGN, _AlignedLinear, aligned_linear


@pytest.mark.parametrize("rows", [(3,), (2, 5)])
@pytest.mark.parametrize("apart", [False, True])
def test_values_gradients_and_rows(rows, apart):
    x = torch.randn(*rows, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    y = _AlignedLinear.apply(x, weight)
    want = F.linear(x, weight)
    torch.testing.assert_close(y, want)
    assert y.stride(-2) % ALIGN == 0
    assert y.shape == want.shape
    dy = torch.randn(want.shape, dtype=torch.float64)
    if apart:  # what lies between the rows is read by nobody
        wide = torch.full((*rows, 16), torch.nan, dtype=torch.float64)
        dy = wide[..., :13].copy_(dy)
    got = torch.autograd.grad(y, (x, weight), dy)
    torch.testing.assert_close(got, torch.autograd.grad(want, (x, weight), dy))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_on_a_gpu(compiled):
    x = torch.randn(2, 70, 64, device="cuda", requires_grad=True)
    weight = torch.randn(41, 64, device="cuda", requires_grad=True)
    dy = torch.randn(2, 70, 41, device="cuda")
    run = torch.compile(aligned_linear, fullgraph=True) if compiled else aligned_linear
    with torch.autocast("cuda", torch.bfloat16):
        got, want = run(x, weight), F.linear(x, weight)
    assert got.dtype == torch.bfloat16
    assert got.stride(-2) % ALIGN == 0
    pairs = zip(
        (got, *torch.autograd.grad(got, (x, weight), dy.bfloat16())),
        (want, *torch.autograd.grad(want, (x, weight), dy.bfloat16())),
        strict=True,
    )
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
