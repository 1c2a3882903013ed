"""The kernels of GELU and SwiGLU against torch's arithmetic in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _check import DEVICES, assert_compiles_whole, assert_replays, compare

from ablate.kernels import gelu, swiglu

LIMITS = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def gated(x):
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(
    ("fn", "oracle", "shape"),
    [
        (gelu, F.gelu, (3, 1500)),
        (swiglu, gated, (3, 7, 2 * 96)),
        (swiglu, gated, (70, 2 * 1024)),
        (swiglu, gated, (5, 2 * 33)),
        (swiglu, gated, (2,)),
    ],
)
def test_values_and_gradients(device, dtype, scale, fn, oracle, shape):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 is not the GPU's")
    # seeded: of a single pair, a gate far below zero leaves nothing that fp16 could hold
    generator = torch.Generator().manual_seed(1)
    x = scale * torch.randn(shape, dtype=torch.float64, generator=generator)
    x.requires_grad_()
    compare(
        lambda x: fn(x, backend="triton"), oracle, {"x": x}, limit=LIMITS[dtype], dtype=dtype,
        device=device,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_far_from_zero(device):
    far = torch.tensor([-1e4, -20.0, -6.0, -0.0, 0.0, 6.0, 20.0, 1e4], device=device)
    x = far.clone().requires_grad_()
    y = gelu(x, backend="triton")
    y.sum().backward()
    torch.testing.assert_close(y, F.gelu(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        x.grad.cpu(), torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1]), rtol=0, atol=1e-6
    )
    x = torch.cat((far, far.flip(0))).requires_grad_()
    want = torch.cat((far, far.flip(0))).requires_grad_()
    for out in (swiglu(x, backend="triton"), gated(want)):
        out.sum().backward()
    torch.testing.assert_close(x.grad, want.grad, rtol=1e-5, atol=1e-5)


def test_slices_and_wrong_shapes():
    wide = torch.randn(3, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(swiglu(wide[..., 2:10]), gated(wide[..., 2:10]))
    with pytest.raises(ValueError, match="last axis is 7"):
        swiglu(torch.randn(3, 7))


@pytest.mark.gpu
def test_in_a_graph_and_compiled():
    def run(t):
        return (swiglu(t["x"][..., 8:]).float().sin().sum() + gelu(t["x"]).float().sum()).square()

    x = torch.randn(33, 264, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert_compiles_whole(run, {"x": x})
    assert_replays(run, {"x": x})
