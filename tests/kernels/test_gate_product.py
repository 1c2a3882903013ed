"""The gate's gradient in the epilogue of a product, against the product and the gate apart."""

from __future__ import annotations

import os

import pytest
import torch
from _check import error, gradients

from ablate.kernels import hopper, mamba2_core, norm_triton
from ablate.kernels.precompile import compile_together

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
SIZES = [  # M, D, the inner width and the width of the rows that z lies in
    (32768, 768, 1536, 3352),
    (65536, 288, 576, 1424),
    (5000, 328, 1096, 2200),
    (4133, 72, 200, 208),  # one tile and no more to most programs
    (4099, 8, 4096, 4096),  # a step a tile, and less
    (129, 1000, 8, 16),
]


def operands(M, D, inner, row):
    """dout and w of few digits each, so that float32 holds every sum of their products and its
    order is of no account; gates of zero, of nearly zero and far out among the others."""
    generator = torch.Generator("cuda").manual_seed(M)

    def whole(*shape, scale):
        n = torch.randint(-20, 21, shape, generator=generator, device="cuda")
        return (n * scale).to(BF16)

    z, y = (
        torch.randn(M, width, generator=generator, device="cuda").mul(2).to(BF16)
        for width in (row, inner)
    )
    for i, value in enumerate((0.0, 1e-38, -90.0, 60.0)):
        z[:, i::11] = value
    dsquares = torch.randn(M, generator=generator, device="cuda") / inner
    return whole(M, D, scale=1 / 16), whole(D, inner, scale=1 / 128), dsquares, y, z


def together(kernels, dout, w, dsquares, y, wide):
    d_wide = torch.zeros_like(wide)
    z, dz = (t[:, : y.shape[1]] for t in (wide, d_wide))
    return kernels.gate_gradients(dout, w, dsquares, y, z, dz), d_wide


def apart(dout, w, dsquares, y, wide):
    d_wide = torch.zeros_like(wide)
    z, dz = (t[:, : y.shape[1]] for t in (wide, d_wide))
    return norm_triton.gate_gradients(dout @ w, dsquares, y, z, dz), d_wide


@pytest.fixture(scope="module")
def kernels():
    """The products, compiled together for what is compared here."""
    module = hopper.products(torch.empty(0, device="cuda", dtype=BF16))
    if module is None:
        pytest.skip("fused on sm_90 alone, with Triton 3.6 and 3.7")
    with compile_together(os.cpu_count() or 8) as dry_run, dry_run():
        for M, D, inner, row in SIZES:
            together(module, *operands(min(M, 4096 + M % 16), D, inner, row))
    return module


@pytest.mark.parametrize(("M", "D", "inner", "row"), SIZES)
def test_the_separate_form_bit_for_bit(kernels, monkeypatch, M, D, inner, row):
    # sums of parts in 16 bits would not be exact
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    t = operands(M, D, inner, row)
    for got, want in zip(together(kernels, *t), apart(*t), strict=True):
        assert torch.equal(got, want)  # and what lies beside z is left alone


@pytest.mark.parametrize("beside_copies", [False, True])
def test_a_thousand_launches_agree(kernels, beside_copies):
    """Of shapes in turn, with nothing between them, and while copies take memory and its clock."""
    inputs = [operands(*size) for size in SIZES[2:]]
    wants = [together(kernels, *t) for t in inputs]
    stream = torch.cuda.Stream()
    there, here = (torch.zeros(2**26, device="cuda", dtype=torch.uint8) for _ in range(2))
    different = torch.zeros((), device="cuda", dtype=torch.int64)
    torch.cuda.synchronize()
    for i in range(500):
        if beside_copies:
            with torch.cuda.stream(stream):
                here.copy_(there)
        for got, want in zip(together(kernels, *inputs[i % 4]), wants[i % 4], strict=True):
            different += (got != want).any()
    torch.cuda.synchronize()
    assert different.item() == 0


def test_the_core_takes_it(kernels, monkeypatch):
    """With the gradients that the separate form gives, but for the order of sums in one product."""
    generator = torch.Generator().manual_seed(0)
    heads, p, n, width = 4, 64, 64, 96

    def made(*shape, scale=1.0, dtype=torch.float32):
        return (torch.randn(*shape, generator=generator) * scale).to("cuda", dtype).requires_grad_()

    t = {
        "zxbcdt_BLE": made(2, 300, 2 * heads * p + 2 * n + heads + 4, dtype=BF16),
        "conv_weight_CK": made(heads * p + 2 * n, 4, scale=0.5),
        "conv_bias_C": made(heads * p + 2 * n),
        "dt_bias_H": made(heads),
        "A_log_H": made(heads),
        "D_H": made(heads),
        "projection_DI": made(width, heads * p, scale=0.06),
    }

    def loss(t):
        options = {"head_dim": p, "n_groups": 1, "d_state": n}
        out, squares = mamba2_core(**t, norm_weight_I=None, **options)
        mean = squares.sum(-1, keepdim=True) / (heads * p) + 1e-5
        return (out.float() * torch.rsqrt(mean)).sin().sum()

    calls = []
    fused = kernels.gate_gradients
    monkeypatch.setattr(kernels, "gate_gradients", lambda *a: calls.append(1) or fused(*a))
    ours = gradients(loss, t)
    assert calls
    calls.clear()
    monkeypatch.setattr("ablate.kernels.mamba2_core_triton.products", lambda v: None)
    for got, want in zip(ours, gradients(loss, t), strict=True):
        assert error(got, want) < 4e-3
    assert not calls
