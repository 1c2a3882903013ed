"""GELU's kernels against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _check import compare

from ablate.kernels import gelu

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpret),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_values_and_gradients(device, dtype, scale):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 is not the GPU's")
    x = scale * torch.randn(3, 1500, dtype=torch.float64, requires_grad=True)
    compare(
        lambda x: gelu(x, backend="triton"),
        F.gelu,
        {"x": x},
        limit={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype],
        dtype=dtype,
        device=device,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_far_from_zero(device):
    x = torch.tensor([-1e4, -20.0, -6.0, -0.0, 0.0, 6.0, 20.0, 1e4], device=device)
    y = gelu(x.requires_grad_(), backend="triton")
    y.sum().backward()
    torch.testing.assert_close(y, F.gelu(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        x.grad.cpu(), torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1]), rtol=0, atol=1e-6
    )
