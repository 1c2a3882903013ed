"""Gated linear attention in Triton against fp64, in the interpreter and on a GPU, and the promises
of every kernel: repeatable, compiled whole, captured in a graph, within every architecture."""

from __future__ import annotations

import pytest
import torch
from _check import DEVICES, assert_compiles_whole, assert_repeats, assert_replays, compare, error
from test_gla import documents, inputs

pytest.importorskip("triton")

from ablate.kernels import gla_triton as kernels
from ablate.kernels.gla import gla, gla_recurrent

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
on_devices = pytest.mark.parametrize("device", DEVICES)

CASES = {
    "more than a chunk": {"length": 75, "width": 16, "values": 24},
    "one token": {"length": 1, "width": 16, "values": 16},
    "shorter than a tile": {"length": 5, "width": 16, "values": 16, "initial": False},
    "whole chunks": {"batch": 1, "length": 128, "heads": 1, "width": 16, "values": 16},
    "blocks of keys and values": {"batch": 1, "length": 40, "heads": 1, "width": 96, "values": 72},
    "one channel": {"length": 20, "width": 1, "values": 1},
    "weak decay": {"batch": 1, "length": 75, "width": 16, "values": 16, "decay": 1e-4},
    "strong decay": {"batch": 1, "length": 75, "width": 16, "values": 16, "decay": 30.0},
}
IN_THE_INTERPRETER = ("more than a chunk", "strong decay")  # with documents and in half precision
# On a GPU also the published widths, of which a block is neither the whole nor a power of two.
GPU_CASES = CASES | {
    "published": {"length": 200, "heads": 2, "width": 192, "values": 384},
    "published, strong decay": {"length": 200, "heads": 2, "width": 192, "values": 384, "decay": 9},
}


@on_devices
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.parametrize("docs", ["none", "some", "every token"])
def test_values_and_gradients(device, dtype, case, docs):
    if device == "cpu":
        if dtype == torch.bfloat16:
            pytest.skip("the interpreter's bf16 is not the GPU's")
        if case not in CASES or (
            (docs != "none" or dtype != torch.float32) and case not in IN_THE_INTERPRETER
        ):
            pytest.skip("slow in the interpreter")
    tensors = inputs(**GPU_CASES[case])
    batch, length = tensors["q_BLHK"].shape[:2]
    starts = None
    if docs != "none":
        starts = documents(batch, length, *((1, 0) if docs == "every token" else (30, -3)))
    if docs == "every token":  # nothing is carried: no gradient to compare but zero
        tensors["log_decay_BLHK"].requires_grad_(False)
        if tensors["initial_state_BHKV"] is not None:
            tensors["initial_state_BHKV"].requires_grad_(False)

    def oracle(**kwargs):
        return gla_recurrent(**kwargs, doc_start_BL=starts)

    def ours(**kwargs):
        on = None if starts is None else starts.to(device)
        return gla(**kwargs, doc_start_BL=on, backend="triton")

    compare(
        ours, oracle, tensors, limit=LIMITS[dtype], dtype=dtype, device=device,
        return_final_state=True,
    )  # fmt: skip


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("docs", [False, True])
def test_segments(device, dtype, docs, monkeypatch):
    # five segments of the sequence, the last one not whole
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("the interpreter's bf16 is not the GPU's")
    monkeypatch.setattr(kernels, "SEGMENT_CHUNKS", 1)
    length = 4 * kernels.CHUNKS[dtype.itemsize] + 11
    starts = documents(1, length, 100, -5) if docs else None

    def oracle(**kwargs):
        return gla_recurrent(**kwargs, doc_start_BL=starts)

    def ours(**kwargs):
        on = None if starts is None else starts.to(device)
        return gla(**kwargs, doc_start_BL=on, backend="triton")

    compare(
        ours, oracle, inputs(1, length, 1, 16, 16, decay=0.01), limit=LIMITS[dtype], dtype=dtype,
        device=device, return_final_state=True,
    )  # fmt: skip


@on_devices
def test_decays_of_every_size_side_by_side(device):
    t = inputs(1, 70, 1, 6, 5)
    with torch.no_grad():
        t["log_decay_BLHK"][:, ::5] = -torch.inf
        t["log_decay_BLHK"][:, 1::5] = -80.0
        t["log_decay_BLHK"][:, 2::5] *= 1e-4
        t["log_decay_BLHK"][..., 3] = 0.0

    def oracle(log_decay_BLHK, **kwargs):  # its gradient of -inf is 0 times -inf
        return gla_recurrent(log_decay_BLHK=log_decay_BLHK.clamp(min=-1e3), **kwargs)

    compare(
        lambda **k: gla(**k, backend="triton"), oracle, t, limit=1e-5, dtype=torch.float32,
        device=device, return_final_state=True,
    )  # fmt: skip


@on_devices
def test_slices_are_read_in_place_and_types_mix(device):
    """As a layer has it, log decays in float32 with half-precision data, and a scale."""
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    wide = torch.randn(2, 21, 2 * 48 + 64, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(2, 21, 2, 24, device=device).sigmoid().log().requires_grad_()
    weight = torch.randn(2, 21, 2, 32, device=device, dtype=dtype)

    def run(backend):
        q, k, v = (t.unflatten(-1, (2, -1)) for t in wide.split((48, 48, 64), dim=-1))
        y = gla(q, k, v, g, scale=0.3, backend=backend)
        return (y.detach(), *torch.autograd.grad((y * weight).sum(), (wide, g)))

    for ours, want in zip(run("triton"), run("reference"), strict=True):
        assert ours.dtype == want.dtype
        assert error(ours, want) < 1e-2


def test_float64_stays_in_pytorch():
    t = inputs(1, 3, 1, 2, 2)
    with pytest.raises(ValueError, match="does not support"):
        gla(**t, backend="triton")
    assert gla(**t).dtype == torch.float64


# -- on a GPU -----------------------------------------------------------------------------------


def on_gpu(batch=2, length=333, heads=2, width=96, values=192):
    t = inputs(batch, length, heads, width, values, decay=0.05)
    halves = ("q_BLHK", "k_BLHK", "v_BLHV", "log_decay_BLHK")
    return {
        k: v.detach().to("cuda", torch.bfloat16 if k in halves else torch.float32).requires_grad_()
        for k, v in t.items()
    } | {"doc_start_BL": documents(batch, length, 70, -5).cuda()}


def run(t):
    y, last = gla(**t, return_final_state=True)
    return (y.float().sin().sum() + last.square().sum()).reshape(())


@pytest.mark.gpu
def test_two_runs_agree_bit_for_bit():
    assert_repeats(run, on_gpu())


@pytest.mark.gpu
def test_compile_takes_the_whole_graph():
    assert_compiles_whole(run, on_gpu())


@pytest.mark.gpu
def test_graph_capture_and_replay():
    assert_replays(run, on_gpu())


@pytest.mark.gpu
def test_past_two_to_the_31():
    length, heads = 600_000, 28
    q = torch.randn(2, length, heads, 64, device="cuda", dtype=torch.bfloat16)
    g = -q.abs() - 0.5
    with torch.no_grad():
        y = gla(q, q, q, g)
        part = slice(length - 200, length)
        want = gla(q[1:, part], q[1:, part], q[1:, part], g[1:, part], backend="reference")
    assert error(y[1:, -50:], want[:, -50:]) < 1e-2


# -- without a GPU ------------------------------------------------------------------------------

KERNELS = ("pairs", "state", "mix", "dmix", "passed", "grad")
FLOATS = ("keep", "first", "segment", "kept", "last", "through")


def assembled(name, arch, *, dtype="bf16", decays=None, width=192, values=384, **flags):
    from _compile import resources

    kernel = getattr(kernels, f"_{name.removeprefix('d')}_kernel")
    size = 4 if dtype == "fp32" else 2
    decays = decays or dtype
    config = kernels.CONFIGS[name, size]
    if arch < 90:
        config = kernels.BEFORE_90.get((name, size), config)
    chunk = kernels.CHUNKS[size]
    row = 2 * (width + values) * 4 + 16
    constants = {
        "UNIT": 8, "Q_ROW": row, "K_ROW": row, "V_ROW": row, "M_ROW": row, "G_ROW": 4 * width,
        "H": 4, "K": width, "V": values, "BK": kernels._block(width, config.keys),
        "BV": kernels._block(values, config.values), "Q": chunk, "BITS": chunk.bit_length() - 1,
        "FORGET": kernels.FORGET, "SAFE": 2.0**-72, "HAS_DOC": False, "HAS_FIRST": False,
        "FULL": True, "PASS": 0, "REVERSE": False, "BACKWARD": name == "dmix",
        "PREC": "tf32x3" if dtype == "fp32" else "ieee",
        "PIECES": {"bf16": 1, "fp16": 2, "fp32": 3}[decays], "DPIECES": 3 if dtype == "fp32" else 2,
        "STAGES": config.stages,
    } | flags  # fmt: skip
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    kinds = dict.fromkeys(FLOATS, "fp32") | {"doc": "i32", "spans": "bf16"}
    kinds |= dict.fromkeys(("g", "dg"), decays)
    kinds |= dict.fromkeys(("dseen", "dleaving"), "bf16" if dtype == "bf16" else "fp32")
    types = {}
    for argument in kernel.arg_names:
        if argument.endswith("_ptr"):
            types[argument] = "*" + kinds.get(argument.removesuffix("_ptr"), dtype)
        elif argument not in constants:
            types[argument] = "fp32" if argument == "scale" else "i32"
    return resources(kernel, types, constants, arch=arch, num_warps=config.warps)


ODD = {"HAS_DOC": True, "FULL": False, "HAS_FIRST": True, "REVERSE": True}


@pytest.mark.compile
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("arch", "dtype", "flags"),
    [(arch, "bf16", {}) for arch in (80, 86, 89, 90)]
    + [(arch, dtype, ODD) for arch in (86, 90) for dtype in ("bf16", "fp32")],
)
def test_it_assembles(name, arch, dtype, flags):
    from _compile import assert_fits

    found = assembled(name, arch, dtype=dtype, **flags)
    few_warps = name == "grad" and arch == 90 and dtype == "bf16"
    assert_fits(found, arch, spills=160 if few_warps else 16)
    if arch == 90 and dtype == "bf16":  # the assembler gets those of the gradient wrong
        assert ("wgmma" in found.ptx) == (not few_warps)
    if name == "pairs" and dtype == "bf16":
        # for the start, the end and a bit in its loop one exponential a number, and one a channel
        block = 32 * 64 // 128
        assert found.ptx.count("ex2.approx") <= 3 * block + 8


@pytest.mark.compile
@pytest.mark.parametrize("size", sorted(kernels.CHUNKS))
def test_spans_assemble(size):
    from _compile import assert_fits, resources

    chunk = kernels.CHUNKS[size]
    constants = {"Q": chunk, "BITS": chunk.bit_length() - 1}
    assert_fits(resources(kernels._spans_kernel, {"spans_ptr": "*bf16"}, constants, arch=90), 90)


@pytest.mark.compile
@pytest.mark.parametrize("number", [1, 2])
def test_segments_assemble(number):
    from _compile import assert_fits

    assert_fits(assembled("state", 90, PASS=number, HAS_FIRST=number == 2), 90)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["pairs", "grad"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_decays_in_float32_assemble(name, dtype):
    from _compile import SHARED_LIMIT

    found = assembled(name, 86, dtype=dtype, decays="fp32")
    assert found.shared <= SHARED_LIMIT[86]
