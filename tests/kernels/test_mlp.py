"""GELU or SwiGLU between matrices as one operation, against float64 and its separate form."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.nn.functional as F
from _check import (
    DEVICES,
    assert_compiles_whole,
    assert_repeats,
    assert_replays,
    compare,
    error,
    gradients,
    leaves,
    run,
)

from ablate.kernels import gelu, mlp, swiglu
from ablate.kernels.dispatch import HAS_TRITON
from ablate.kernels.precompile import compile_together

LIMITS = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [  # rows, d, h, out
    ((2, 100), 72, 136, None),  # ragged everywhere, also in the last step of a product
    ((257,), 128, 256, None),
    ((1, 3, 1), 64, 128, 40),
    ((), 16, 8, None),
    ((130,), 64, 160, None),  # a tile's columns end between its halves
]
EXACT = [  # M, D, H
    (32768, 768, 3072),
    (5000, 328, 1096),
    (4133, 72, 200),  # one tile and no more to most programs
    (4099, 8, 4096),  # a step a tile, and less
    (129, 1000, 8),
]
LAYER, LONG = (4096, 256, 1024), (800_000, 64, 3072)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def is_gated(w_in, w_out):
    return w_in.shape[0] != w_out.shape[1]


def oracle(x, w_in, w_out, backend=None):
    h = F.linear(x, w_in)
    if is_gated(w_in, w_out):
        gate, value = h.chunk(2, -1)
        return F.linear(F.silu(gate) * value, w_out)
    return F.linear(F.gelu(h), w_out)


def separate(x, w_in, w_out):
    """By the kernels that stood alone before."""
    act = swiglu if is_gated(w_in, w_out) else gelu
    return F.linear(act(F.linear(x, w_in), backend="triton"), w_out)


def fused(x, w_in, w_out):
    return mlp(x, w_in, w_out, gated=is_gated(w_in, w_out), backend="triton")


def tensors(rows, d, h, out=None, dtype=torch.float64, device="cpu", seed=0, gated=False):
    """x of a norm's output, and weights that keep its scale."""
    generator = torch.Generator().manual_seed(seed)
    rows = rows if isinstance(rows, tuple) else (rows,)
    t = {
        "x": torch.randn(*rows, d, generator=generator, dtype=torch.float64),
        "w_in": torch.randn(h * (1 + gated), d, generator=generator, dtype=torch.float64)
        * 1.5
        / d**0.5,
        "w_out": torch.randn(out or d, h, generator=generator, dtype=torch.float64) / h**0.5,
    }
    return {k: v.to(device, dtype).requires_grad_() for k, v in t.items()}


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "d", "h", "out"), SHAPES)
def test_values_and_gradients(device, dtype, rows, d, h, out, gated, request):
    if device == "cuda":
        if dtype == torch.float32:
            pytest.skip("the kernels take 16 bits on a GPU")
        request.getfixturevalue("kernels")
    compare(
        fused, oracle, tensors(rows, d, h, out, gated=gated), limit=LIMITS[dtype], dtype=dtype,
        device=device,
    )  # fmt: skip


@pytest.mark.interpret
def test_tensors_that_do_not_lie_together():
    """Rows that lie apart, and a first number that is not at a whole 16 bytes."""
    t = tensors((4, 9), 24, 16)
    base = torch.randn(4, 10, 24, dtype=torch.float16).requires_grad_()
    flat = torch.randn(16 * 24 + 1, dtype=torch.float16)
    w_in, w_out = flat[1:].view(16, 24) / 5, t["w_out"].detach().half()
    for x in (base[:, 1:], base[:, :9].transpose(0, 1)):
        y = fused(x, w_in, w_out)
        want = oracle(x.double(), w_in.double(), w_out.double())
        assert y.shape == want.shape
        assert error(y.detach(), want.detach()) < 2e-3
    y.sum().backward()  # whose gradient lies in one number
    want.sum().backward(inputs=[wide := base])
    assert torch.isfinite(wide.grad).all()


@pytest.mark.interpret
@pytest.mark.parametrize("wanted", [("x",), ("w_in",), ("w_out",), ("x", "w_out")])
def test_only_the_gradients_that_are_asked_for(wanted):
    t = leaves(tensors(20, 16, 24), torch.float32)
    for name, v in t.items():
        v.requires_grad_(name in wanted)
    _, grads = run(fused, t)
    _, want = run(oracle, leaves(t, torch.float64))
    assert set(grads) == set(wanted)
    for name in wanted:
        assert error(grads[name], want[name]) < 5e-6


@pytest.mark.interpret
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
def test_the_operators_without_the_fused_kernels(dtype, gated):
    """Rounded before the activation and after, and gradients of the rounded numbers."""
    from ablate.kernels import mlp_triton as module

    t = leaves(tensors(70, 24, 40, gated=gated), dtype)
    x, w_in, w_out = (v.detach() for v in t.values())
    pre, act = module._forward_op(x, w_in, gated)
    assert pre.dtype == act.dtype == dtype
    assert torch.equal(pre, x @ w_in.T)
    wide = pre.double().requires_grad_()
    gate, value = wide.chunk(2, -1)
    want = F.silu(gate) * value if gated else F.gelu(wide)
    want.backward(x.double() @ w_out.double())
    d_pre = module._backward_op(x, w_out, pre, gated)
    assert d_pre.dtype == dtype
    assert error(act, want.detach()) < LIMITS[dtype] / 2
    assert error(d_pre, wide.grad) < LIMITS[dtype]


@needs_triton
def test_a_triton_that_was_not_tested_costs_the_fused_kernels_alone(monkeypatch):
    import triton

    from ablate.kernels import hopper

    found = hopper._gluon.__wrapped__
    for version in ("3.8.0", "3.7.0+git0123abc", "4.0.0", "3.60.0"):
        monkeypatch.setattr(triton, "__version__", version)
        assert found() is None
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert found() is not None
    monkeypatch.delattr(sys.modules["ablate.kernels"], "products_gluon")
    monkeypatch.delitem(sys.modules, "ablate.kernels.products_gluon")
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    assert found() is None


@needs_triton
def test_who_gets_the_fused_kernels(monkeypatch):
    from ablate.kernels import hopper as module

    class OnGPU:
        is_cuda, device = True, "cuda"

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    monkeypatch.setattr(module, "INTERPRET", False)
    monkeypatch.setattr(module, "_gluon", lambda: module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert module.products(OnGPU(BF16)) is module.products(OnGPU(FP16)) is module
    assert module.products(OnGPU(torch.float32)) is None
    assert module.products(torch.ones(1, dtype=BF16)) is None
    for other in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=other: found)
        assert module.products(OnGPU(BF16)) is None


def test_the_plain_form_is_torchs_and_says_what_does_not_fit():
    t = tensors((3, 5), 12, 20)
    torch.testing.assert_close(mlp(**rename(t)), oracle(**t))
    with pytest.raises(ValueError, match=r"x ends in 11"):
        mlp(torch.randn(3, 11), torch.randn(20, 12), torch.randn(12, 20))
    with pytest.raises(ValueError, match=r"\(2 H, D\)"):
        mlp(torch.randn(3, 12), torch.randn(20, 12), torch.randn(12, 20), gated=True)
    with pytest.raises(ValueError, match="does not support"):
        mlp(**rename(t), backend="triton")  # float64, and 12 numbers a row
    with pytest.raises(ValueError, match="unknown"):
        mlp(**rename(t), backend="cudnn")


def rename(t):
    return {"x": t["x"], "w_in_ED": t["w_in"], "w_out_OH": t["w_out"]}


@pytest.mark.parametrize(
    "backend",
    [None, pytest.param("triton", marks=pytest.mark.interpret)],
)
def test_under_autocast_gradients_of_float32_weights_are_float32(backend):
    t = leaves(tensors(40, 16, 32), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(**rename(t), backend=backend)
    assert y.dtype == BF16
    y.float().square().sum().backward()
    exact = leaves(t, torch.float64)
    want = oracle(**exact)
    want.square().sum().backward()
    assert error(y.detach(), want.detach()) < 2e-2
    for name, v in t.items():
        assert v.grad.dtype == torch.float32
        assert error(v.grad, exact[name].grad) < 3e-2


# --- on a GPU -----------------------------------------------------------------------------------


def operands(M, d, h, dtype, gated=False):
    """x, dy, w_in and w_out of few digits each, so that float32 holds every sum of their products:
    their order is of no account, and what stands in pre crosses the steep part of GELU."""
    generator = torch.Generator("cuda").manual_seed(M)

    def whole(*shape, scale):
        n = torch.randint(-20, 21, shape, generator=generator, device="cuda")
        return (n * scale).to(dtype)

    return (
        whole(M, d, scale=1 / 16), whole(M, d, scale=1 / 16),
        whole(h * (1 + gated), d, scale=1 / 128), whole(d, h, scale=1 / 128),
    )  # fmt: skip


@pytest.fixture(scope="module")
def kernels():
    """The fused kernels, compiled together for what is compared here."""
    from ablate.kernels import hopper

    module = hopper.products(torch.empty(0, device="cuda", dtype=BF16))
    if module is None:
        pytest.skip("fused on sm_90 alone, with Triton 3.6 and 3.7")
    with compile_together(os.cpu_count() or 8) as dry_run, dry_run():
        for dtype in (BF16, FP16):
            for M, d, h in [*EXACT, LAYER, LONG] if dtype == BF16 else EXACT:
                for gated in (False, True):
                    together(module, *operands(min(M, 4096 + M % 16), d, h, dtype, gated))
            for rows, d, h, out in SHAPES:
                for gated in (False, True):
                    t = tensors(rows, d, h, out, dtype, "cuda", gated=gated)
                    x, w_in, w_out = t.values()
                    x = x.reshape(-1, d)
                    together(module, x, x.new_empty(len(x), out or d), w_in, w_out)
    return module


def apart(x, dy, w_in, w_out):
    """pre, act and the gradient of pre by torch's products and the kernels between them."""
    from ablate.kernels import gelu_triton, swiglu_triton

    pre = x @ w_in.T
    act = swiglu_triton if is_gated(w_in, w_out) else gelu_triton
    return pre, act._forward(pre), act._backward(pre, dy @ w_out)


def together(kernels, x, dy, w_in, w_out):
    if is_gated(w_in, w_out):
        pre, act = kernels.swiglu(x, w_in)
        return pre, act, kernels.swiglu_gradients(dy, w_out, pre)
    pre, act = kernels.gelu(x, w_in)
    return pre, act, kernels.gelu_gradients(dy, w_out, pre)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("M", "d", "h"), EXACT)
def test_the_separate_form_bit_for_bit(kernels, monkeypatch, M, d, h, dtype, gated):
    for kind in ("bf16", "fp16"):  # sums of parts in 16 bits would not be exact
        name = f"allow_{kind}_reduced_precision_reduction"
        monkeypatch.setattr(torch.backends.cuda.matmul, name, False)
    t = operands(M, d, h, dtype, gated)
    for got, want in zip(together(kernels, *t), apart(*t), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("beside_copies", [False, True])
def test_a_thousand_launches_agree(kernels, beside_copies):
    """Of shapes in turn, with nothing between them, and while copies take memory and its clock."""
    shapes = [(EXACT[1], BF16), (EXACT[2], FP16), (EXACT[3], BF16), (EXACT[4], FP16)]
    inputs = [operands(*shape, dtype, i % 2 == 1) for i, (shape, dtype) in enumerate(shapes)]
    inputs += [operands(*shape, dtype, i % 2 == 0) for i, (shape, dtype) in enumerate(shapes)]
    wants = [together(kernels, *t) for t in inputs]
    stream = torch.cuda.Stream()
    there, here = (torch.zeros(2**26, device="cuda", dtype=torch.uint8) for _ in range(2))
    host = torch.zeros(2**22, dtype=torch.uint8).pin_memory()
    different = torch.zeros((), device="cuda", dtype=torch.int64)
    torch.cuda.synchronize()
    for i in range(500):
        if beside_copies:
            with torch.cuda.stream(stream):
                here.copy_(there)
                if i % 7 == 0:
                    there[: host.numel()].copy_(host, non_blocking=True)
        for got, want in zip(together(kernels, *inputs[i % 8]), wants[i % 8], strict=True):
            different += (got != want).any()
    torch.cuda.synchronize()
    assert different.item() == 0


def loss(t):
    return fused(t["x"], t["w_in"], t["w_out"]).float().sin().sum()


def gpu(rows, d=768, h=3072, seed=0, gated=False):
    return tensors(rows, d, h, dtype=BF16, device="cuda", seed=seed, gated=gated)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "d", "h"), [(4096, 768, 3072), (5000, 328, 1096), (4133, 72, 200)]
)
def test_no_worse_than_the_separate_form(kernels, rows, d, h, gated):
    t = gpu(rows, d, h, gated=gated)
    exact_outs, exact = run(oracle, leaves(t, torch.float64))
    fused_outs, fused_grads = run(fused, leaves(t))
    outs, grads = run(separate, leaves(t))
    assert error(fused_outs[0], exact_outs[0]) <= 1.5 * error(outs[0], exact_outs[0])
    for name, ref in exact.items():
        assert error(fused_grads[name], ref) <= 1.5 * error(grads[name], ref), name


@pytest.mark.gpu
def test_two_runs_agree_bit_for_bit(kernels):
    assert_repeats(loss, gpu(4096))
    assert_repeats(loss, gpu(5000, 328, 1096, gated=True))


@pytest.mark.gpu
def test_compile_takes_the_whole_graph(kernels):
    assert_compiles_whole(loss, gpu(4096))


@pytest.mark.gpu
def test_graph_capture_and_replay(kernels):
    assert_replays(loss, gpu(5000, 328, 1096))
    assert_replays(loss, gpu(5000, 328, 1096, gated=True))


@pytest.mark.gpu
def test_under_checkpointing_gradients_are_the_same(kernels):
    from torch.utils.checkpoint import checkpoint

    t = gpu(4096)
    kept = gradients(loss, t)
    again = gradients(
        lambda t: checkpoint(fused, *t.values(), use_reentrant=False).float().sin().sum(), t
    )
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_the_layer_takes_it_under_autocast(kernels, monkeypatch):
    from ablate.kernels import mlp_triton as module
    from ablate.layers.context import Context
    from ablate.layers.mlp import MLP, MLPOptions

    calls = []
    apply = module._MLP.apply
    monkeypatch.setattr(
        module._MLP, "apply", lambda *args: calls.append(args[0].shape) or apply(*args)
    )
    layer = MLP(MLPOptions(d_model=256, kind="gelu"), 1e-5).cuda()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.06)
    positions = torch.arange(2048, device="cuda")[None]
    x = torch.randn(2, 2048, 256, device="cuda", requires_grad=True)
    with torch.autocast("cuda", BF16):
        y = layer(x, Context(positions))
        layer(x[:, :64], Context(positions[:, :64]))  # too few rows
    assert calls == [(4096, 256)]
    y.sum().backward()
    assert layer.in_proj.grad.dtype == layer.out_proj.grad.dtype == x.grad.dtype == torch.float32
    wide = MLP(MLPOptions(d_model=256, kind="gelu"), 1e-5)
    wide.load_state_dict(layer.state_dict())
    wide.double()
    x64 = x.detach().double().cpu().requires_grad_()
    want = wide(x64, Context(positions.cpu()))
    want.sum().backward()
    assert error(y.detach(), want.detach()) < 1e-2
    for p, q in zip(layer.parameters(), wide.parameters(), strict=True):
        assert error(p.grad, q.grad) < 2e-2


@pytest.mark.gpu
def test_past_two_to_the_31(kernels):
    """Hidden numbers around 2^31, and the last ones."""
    rows, d, h = LONG
    x = torch.randn(rows, d, device="cuda", dtype=BF16)
    w_in = (torch.randn(h, d, device="cuda") / 8).to(BF16)
    w_out = (torch.randn(d, h, device="cuda") / 55).to(BF16)
    pre, act = kernels.gelu(x, w_in)
    d_pre = kernels.gelu_gradients(x, w_out, pre)
    across = slice(2**31 // h - 150, 2**31 // h + 150)
    for some in (across, slice(rows - 300, rows)):
        assert error(pre[some], x[some].double() @ w_in.double().T) < 5e-3
        wide = pre[some].double().requires_grad_()
        assert error(act[some], F.gelu(wide.detach())) < 5e-3
        F.gelu(wide).backward(x[some].double() @ w_out.double())
        assert error(d_pre[some], wide.grad) < 5e-3
