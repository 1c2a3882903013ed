"""The Triton forms of convolution, norms and loss against fp64: interpreter and GPU."""

from __future__ import annotations

import pytest
import torch
from _check import DEVICES, compare, error

pytest.importorskip("triton")

from ablate.kernels import conv1d_triton
from ablate.kernels.conv1d import causal_conv1d, causal_conv1d_reference
from ablate.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ablate.kernels.norm import (
    gated_rms_norm,
    gated_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16]
on_devices = pytest.mark.parametrize("device", DEVICES)
in_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def triton_form(fn):
    return lambda **kwargs: fn(**kwargs, backend="triton")


def make(seed, **shapes):
    g = torch.Generator().manual_seed(seed)
    return {
        name: None
        if shape is None
        else torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


def documents(batch, length, device, seed=0):
    """Random starts; the first document of odd rows began before the row."""
    g = torch.Generator().manual_seed(seed)
    begin = torch.rand(batch, length, generator=g) < 0.2
    index = torch.arange(length).expand(batch, length)
    start = torch.where(begin, index, -1).cummax(1).values
    first = torch.tensor([-5 * (b % 2) for b in range(batch)])
    return torch.where(start < 0, first[:, None], start).to(torch.int32).to(device)


@on_devices
@in_dtypes
@pytest.mark.parametrize(
    ("shape", "taps", "options"),
    [
        ((2, 50, 72), 4, "bias"),
        ((2, 50, 72), 4, "bias state docs"),
        ((3, 2, 5), 4, "bias state docs"),
        ((2, 1, 130), 3, "bias state"),
        ((1, 37, 140), 2, "docs linear"),
        ((2, 128, 256), 4, "bias"),  # nothing sticks out of a tile
        ((1, 48, 130), 4, "bias state docs"),  # channels alone do
        ((1, 512, 256), 4, "bias state docs"),  # the shipped tile, where nothing sticks out of it
    ],
)
@pytest.mark.parametrize("tile", ["small", "shipped"])
def test_causal_conv1d(device, dtype, shape, taps, options, tile, monkeypatch):
    batch, length, width = shape
    if tile == "small":  # many programs in time and in channels
        monkeypatch.setattr(conv1d_triton, "FORWARD", conv1d_triton.Config(64, 16, 1, 1))
        monkeypatch.setattr(conv1d_triton, "BACKWARD", conv1d_triton.Config(128, 8, 1, 1))
        if length > 128:
            pytest.skip("for the shipped tile")
    elif device == "cpu" and shape[1] > 4:
        pytest.skip("slow in the interpreter; the small tile takes these shapes")
    tensors = make(
        length,
        x_BLD=shape,
        weight_DK=(width, taps),
        bias_D=(width,) if "bias" in options else None,
        initial_state_BDK=(batch, taps - 1, width) if "state" in options else None,
    )
    doc = documents(batch, length, "cpu") if "docs" in options else None

    def oracle(**kwargs):
        return causal_conv1d_reference(
            **kwargs, doc_start_BL=doc, activation=None if "linear" in options else "silu"
        )

    def ours(**kwargs):
        return causal_conv1d(
            **kwargs, backend="triton", activation=None if "linear" in options else "silu",
            doc_start_BL=None if doc is None else doc.to(device),
        )  # fmt: skip

    compare(ours, oracle, tensors, limit=LIMITS[dtype], dtype=dtype, device=device)


@on_devices
def test_conv_and_gated_norm_read_slices_in_place(device):
    wide = torch.randn(2, 9, 40, device=device)
    x, z = wide[..., 8:24], wide[..., 24:40]
    w = torch.randn(16, 4, device=device)
    torch.testing.assert_close(
        causal_conv1d(x, w, backend="triton"), causal_conv1d(x.contiguous(), w, backend="reference")
    )
    torch.testing.assert_close(
        gated_rms_norm(x, z, w[:, 0], backend="triton"),
        gated_rms_norm(x, z, w[:, 0], backend="reference"),
    )


@on_devices
@in_dtypes
@pytest.mark.parametrize(("shape", "group"), [((2, 13, 48), None), ((7, 96), 32), ((5, 300), 100)])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("weight", [True, False])
def test_gated_rms_norm(device, dtype, shape, group, before, weight):
    tensors = make(1, x_BLD=shape, z_BLD=shape, weight_D=(shape[-1],) if weight else None)
    compare(
        triton_form(gated_rms_norm), gated_rms_norm_reference, tensors, limit=LIMITS[dtype],
        dtype=dtype, device=device, group_size=group, norm_before_gate=before,
    )  # fmt: skip


@on_devices
@in_dtypes
@pytest.mark.parametrize("shape", [(2, 11, 48), (37, 300), (1, 3)])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("weight", [True, False])
def test_rms_norm(device, dtype, shape, residual, weight):
    tensors = make(
        2, x=shape, weight_D=(shape[-1],) if weight else None, residual=shape if residual else None
    )
    compare(
        triton_form(rms_norm), rms_norm_reference, tensors, limit=LIMITS[dtype],
        dtype=dtype, device=device, eps=1e-3,
    )  # fmt: skip


@on_devices
@in_dtypes
@pytest.mark.parametrize("parts", [1, 3])
def test_rms_norm_of_what_is_divided_first(device, dtype, parts):
    tensors = make(2, x=(37, 300), weight_D=(300,), residual=(37, 300), squares_xS=(37, parts))
    tensors["squares_xS"] = (tensors["squares_xS"].detach().square() * 64 + 1).requires_grad_()
    compare(
        triton_form(rms_norm), rms_norm_reference, tensors, limit=LIMITS[dtype], dtype=dtype,
        device=device, squares_of=64,
    )  # fmt: skip


@on_devices
@in_dtypes
@pytest.mark.parametrize("shape", [(40, 300), (1, 5), (16, 128)])
def test_scale_columns(device, dtype, shape):
    from ablate.kernels import norm_triton

    t = make(3, matrix=shape, scale=shape[1:], dout=shape)
    m, scale, dout = (v.detach().to(device, dtype) for v in t.values())
    wide = [v.double().cpu() for v in (m, scale, dout)]
    assert error(norm_triton.scale_columns(m, scale, dtype), wide[0] * wide[1]) < LIMITS[dtype]
    d_m, d_scale = norm_triton.scale_columns_gradients(dout, m, scale)
    assert error(d_m, wide[2] * wide[1]) < LIMITS[dtype]
    assert error(d_scale, (wide[2] * wide[0]).sum(0)) < LIMITS[dtype]


@on_devices
def test_rms_norm_with_a_wider_residual(device):
    x = torch.randn(6, 48, device=device).half().requires_grad_()
    residual = torch.randn(6, 48, device=device, requires_grad=True)
    weight = torch.randn(48, device=device, requires_grad=True)
    grads = []
    for backend in ("triton", "reference"):
        y, total = rms_norm(x, weight, residual=residual, backend=backend)
        assert (y.dtype, total.dtype) == (torch.float16, torch.float32)
        loss = (y.float() * residual.detach()).sum() + total.sin().sum()
        grads.append(torch.autograd.grad(loss, (x, residual, weight)))
    for ours, want in zip(*grads, strict=True):
        assert ours.dtype == want.dtype
        torch.testing.assert_close(ours, want, rtol=3e-3, atol=3e-3)


@on_devices
@in_dtypes
@pytest.mark.parametrize(("rows", "vocabulary"), [(37, 150), (130, 83), (5, 128), (3, 9000)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy(device, dtype, rows, vocabulary, z_loss, reduction, monkeypatch):
    import ablate.kernels.cross_entropy_triton as module

    monkeypatch.setattr(module, "CHUNK_BYTES", 1)  # chunks of 128 rows
    if vocabulary < 200:  # several blocks of columns, with a remainder and without
        monkeypatch.setattr(module, "CONFIG", module.Config(block=64, warps=4))
    tensors = make(3, x_MD=(rows, 24), weight_VD=(vocabulary, 24))
    target = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(0))
    target[::4] = -100
    tensors["target_M"] = target
    compare(
        triton_form(linear_cross_entropy), linear_cross_entropy_reference, tensors,
        limit=LIMITS[dtype] * 4, dtype=dtype, device=device, z_loss=z_loss, reduction=reduction,
    )  # fmt: skip


@on_devices
def test_token_losses(device):
    x, w = torch.randn(70, 24, device=device), torch.randn(150, 24, device=device)
    target = torch.randint(0, 150, (70,), device=device)
    target[::3] = -100
    torch.testing.assert_close(
        linear_cross_entropy(x, w, target, reduction="none", backend="triton"),
        linear_cross_entropy(x, w, target, reduction="none", backend="reference"),
    )
