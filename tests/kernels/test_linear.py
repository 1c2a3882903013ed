"""A projection in bf16 whose weight has its gradient in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ablate.kernels.linear import MixedLinear, linear

BF16 = torch.bfloat16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(device):
    g = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*s, generator=g) for s in ((3, 40, 24), (16, 24), (3, 40, 16)))
    return x.to(device, BF16), w.to(device), dy.to(device, BF16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_rounded_product(device, compiled):
    x, w, dy = make(device)
    x, w = x.requires_grad_(), w.requires_grad_()

    def call(x, w):
        return MixedLinear.apply(x, w)

    fn = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    y = fn(x, w)
    assert torch.equal(y, F.linear(x, w.to(BF16)))
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert (dx.dtype, dw.dtype) == (BF16, torch.float32)
    rows, columns = dy.flatten(0, 1).double(), x.detach().flatten(0, 1).double()
    torch.testing.assert_close(dw.double(), rows.t() @ columns, rtol=1e-5, atol=1e-5)
    want = rows @ w.detach().to(BF16).double()
    torch.testing.assert_close(dx.flatten(0, 1).double(), want, rtol=1e-2, atol=1e-2)


def test_what_needs_no_gradient_gets_none():
    x, w, dy = make("cpu")
    y = MixedLinear.apply(x, w.requires_grad_())
    (dw,) = torch.autograd.grad(y, (w,), dy)
    assert dw.shape == w.shape
    y = MixedLinear.apply(x.requires_grad_(), w.detach())
    (dx,) = torch.autograd.grad(y, (x,), dy)
    assert dx.shape == x.shape


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_on_a_gpu(compiled):
    x, w, dy = make("cuda")
    fn = torch.compile(linear, fullgraph=True) if compiled else linear
    found = []
    for form in (fn, F.linear):
        x1, w1 = x.float().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast("cuda", BF16):
            y = form(x1, w1)
        y.backward(dy)
        found.append((y.detach(), x1.grad, w1.grad))
    (y, dx, dw), (y2, dx2, dw2) = found
    assert torch.equal(y, y2)
    torch.testing.assert_close(dx, dx2, rtol=1e-2, atol=1e-2)
    assert dw.dtype == torch.float32
    exact = dy.flatten(0, 1).double().t() @ x.flatten(0, 1).double()
    assert (dw - exact).norm() < 1e-5 * exact.norm() < (dw2 - exact).norm()
