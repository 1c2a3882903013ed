"""A projection of an odd width whose rows lie aligned, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ablate.kernels.dispatch import ALIGN
from ablate.layers.context import aligned_linear


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
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()
