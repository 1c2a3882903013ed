"""The Triton scan against fp64 in the interpreter and on a GPU, what it assembles to, and the
promises of every kernel: repeatable, compiled whole, captured in a graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from _check import DEVICES, assert_compiles_whole, assert_repeats, assert_replays, compare, error

pytest.importorskip("triton")

from ablate.kernels import selective_scan_triton as kernels
from ablate.kernels.selective_scan import selective_scan, selective_scan_recurrent

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
on_devices = pytest.mark.parametrize("device", DEVICES)


def make(batch, length, width, state, options="", *, decay=1.0, step=0.0, seed=0):
    """Inputs by name; `options` lists the optional ones: skip, gate, bias, state."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    t = {
        "u_BLD": rand(batch, length, width),
        "delta_BLD": rand(batch, length, width) + step,
        "A_DN": -decay * rand(width, state).exp(),
        "B_BLN": rand(batch, length, state),
        "C_BLN": rand(batch, length, state),
        "D_D": rand(width) if "skip" in options else None,
        "z_BLD": rand(batch, length, width) if "gate" in options else None,
        "delta_bias_D": rand(width) if "bias" in options else None,
        "initial_state_BDN": rand(batch, width, state) if "state" in options else None,
    }
    return {k: v if v is None else v.requires_grad_() for k, v in t.items()}


def documents(batch, length, every, first=0):
    """Documents of `every` tokens, those of row b shifted by b; `first` < 0: continued ones."""
    index = torch.arange(length)
    rows = [(index - first - b) // every * every + first + b for b in range(batch)]
    return torch.stack(rows).to(torch.int32)


ALL = "skip gate bias state"
CASES = {
    "everything": ((2, 37, 40, 16), ALL, {}),
    "nothing": ((2, 24, 33, 16), "", {}),
    "one token": ((3, 1, 5, 16), ALL, {}),
    "shorter than a tile": ((2, 3, 32, 16), ALL, {}),
    "one channel": ((1, 19, 1, 16), ALL, {}),
    "whole tiles": ((1, 32, 64, 16), ALL, {}),
    "narrow state": ((2, 21, 70, 8), "gate", {}),
    "wide state": ((1, 21, 9, 64), "skip bias", {}),
    "odd state": ((1, 21, 12, 5), ALL, {}),
    "one number of state": ((1, 11, 12, 1), ALL, {}),
    "weak decay": ((1, 40, 8, 16), ALL, {"decay": 1e-4}),
    "strong decay": ((1, 40, 8, 16), ALL, {"decay": 1e3}),
    "large steps": ((1, 20, 8, 16), ALL, {"step": 30.0, "decay": 0.01}),
    "small steps": ((1, 20, 8, 16), ALL, {"step": -12.0}),
}


@on_devices
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("docs", ["none", "some", "every token"])
def test_values_and_gradients(device, dtype, case, docs):
    shape, options, numbers = case
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 is not the GPU's")
    if numbers and dtype != torch.float32:
        pytest.skip("gradients past the range of half precision")
    first = case is CASES["everything"]
    if device == "cpu" and (docs != "none" or dtype != torch.float32) and not first:
        pytest.skip("slow in the interpreter")
    starts = None
    if docs != "none":
        starts = documents(shape[0], shape[1], *((1, 0) if docs == "every token" else (7, -3)))

    def oracle(**kwargs):
        return selective_scan_recurrent(**kwargs, doc_start_BL=starts)

    def ours(**kwargs):
        on = None if starts is None else starts.to(device)
        return selective_scan(**kwargs, doc_start_BL=on, backend="triton")

    tensors = make(*shape, options, **numbers)
    if docs == "every token":  # nothing is carried: no gradient to compare but zero
        tensors["A_DN"].requires_grad_(False)
        if tensors["initial_state_BDN"] is not None and shape[0] == 1:
            tensors["initial_state_BDN"].requires_grad_(False)
    compare(
        ours, oracle, tensors, limit=LIMITS[dtype], dtype=dtype, device=device,
        delta_softplus=True, return_final_state="state" in options,
    )  # fmt: skip


@on_devices
@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("tokens", [4, 8])
@pytest.mark.parametrize("span", [8, 16])
def test_every_tile_in_segments(device, docs, tokens, span, monkeypatch):
    # five segments of the sequence, the last one not whole
    if device == "cpu" and (docs, tokens, span) not in ((True, 4, 8), (False, 8, 16)):
        pytest.skip("slow in the interpreter")
    monkeypatch.setattr(kernels, "SPAN", span)
    monkeypatch.setattr(kernels, "_segments", lambda length, warps: 5)
    for name in ("FORWARD", "BACKWARD"):
        config = dataclasses.replace(getattr(kernels, name), tokens=tokens, registers=None)
        monkeypatch.setattr(kernels, name, config)
    starts = documents(2, 139, 45, -5) if docs else None

    def oracle(**kwargs):
        return selective_scan_recurrent(**kwargs, doc_start_BL=starts)

    def ours(**kwargs):
        on = None if starts is None else starts.to(device)
        return selective_scan(**kwargs, doc_start_BL=on, backend="triton")

    compare(
        ours, oracle, make(2, 139, 6, 16, ALL, decay=0.05), limit=1e-5, dtype=torch.float32,
        device=device, delta_softplus=True, return_final_state=True,
    )  # fmt: skip


@on_devices
def test_steps_without_softplus(device):
    # steps of any sign, and exactly zero
    tensors = make(1, 21, 9, 16, ALL, decay=0.1)
    with torch.no_grad():
        tensors["delta_BLD"][:, ::3] = 0.0
    compare(
        lambda **k: selective_scan(**k, backend="triton"), selective_scan_recurrent, tensors,
        limit=1e-5, dtype=torch.float32, device=device, return_final_state=True,
    )  # fmt: skip


@on_devices
def test_slices_are_read_in_place(device):
    torch.manual_seed(0)
    wide = torch.randn(2, 13, 90, device=device, requires_grad=True)
    narrow = torch.randn(2, 13, 35, device=device, requires_grad=True)
    A, weight = -torch.rand(40, 16, device=device), torch.randn(2, 13, 40, device=device)

    def run(backend):
        u, z = wide[..., 5:45], wide[..., 50:]
        delta, B, C = u.transpose(0, 1).contiguous().transpose(0, 1), narrow[..., :16], None
        C = narrow[..., 19:]
        y = selective_scan(u, delta, A, B, C, z_BLD=z, delta_softplus=True, backend=backend)
        return (y.detach(), *torch.autograd.grad((y * weight).sum(), (wide, narrow)))

    for ours, want in zip(run("triton"), run("reference"), strict=True):
        assert error(ours, want) < 1e-5


@on_devices
def test_without_gradients_nothing_is_saved(device):
    t = make(1, 9, 8, 16)
    t = {k: v if v is None else v.detach().float().to(device) for k, v in t.items()}
    _, _, saved = kernels._forward(*list(t.values())[:5], None, None, None, None, None, True, False)
    assert saved.numel() == 0
    y = selective_scan(**t, delta_softplus=True, backend="triton")
    assert error(y, selective_scan(**t, delta_softplus=True, backend="reference")) < 1e-5


def test_float64_and_wide_states_stay_in_pytorch():
    t = make(1, 3, 2, 4)
    with pytest.raises(ValueError, match="does not support"):
        selective_scan(**t, backend="triton")
    assert selective_scan(**t).dtype == torch.float64


# -- on a GPU -----------------------------------------------------------------------------------


def on_gpu(batch=2, length=333, width=96, state=16):
    t = make(batch, length, width, state, ALL)
    halves = ("u_BLD", "delta_BLD", "B_BLN", "C_BLN", "z_BLD")
    return {
        k: v.detach().to("cuda", torch.bfloat16 if k in halves else torch.float32).requires_grad_()
        for k, v in t.items()
    } | {"doc_start_BL": documents(batch, length, 70, -5).cuda()}


def scan(t):
    y, last = selective_scan(**t, delta_softplus=True, return_final_state=True)
    return (y.float().sin().sum() + last.square().sum()).reshape(())


@pytest.mark.gpu
def test_two_runs_agree_bit_for_bit():
    assert_repeats(scan, on_gpu())


@pytest.mark.gpu
def test_compile_takes_the_whole_graph():
    assert_compiles_whole(scan, on_gpu())


@pytest.mark.gpu
def test_graph_capture_and_replay():
    assert_replays(scan, on_gpu())


@pytest.mark.gpu
def test_past_two_to_the_31():
    length, width = 600_000, 1792
    u = torch.randn(2, length, width, device="cuda", dtype=torch.bfloat16)
    A = -torch.rand(width, 16, device="cuda") - 0.5
    B, C = (torch.randn(2, length, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        y = selective_scan(u, u, A, B, C, delta_softplus=True)
        part = slice(length - 400, length)
        want = selective_scan(
            u[1:, part], u[1:, part], A, B[1:, part], C[1:, part], delta_softplus=True,
            backend="reference",
        )  # fmt: skip
    assert error(y[1:, -50:], want[:, -50:]) < 1e-2


# -- without a GPU ------------------------------------------------------------------------------

FLOATS = (
    "A", "B", "C", "D", "bias", "first", "dlast", "last", "ends", "sums", "dBC", "dA", "dD",
    "dfirst",
)  # fmt: skip


def assembled(kernel, config, arch, *, state=16, dtype="bf16", width=1536, **flags):
    from _compile import resources

    states = max(4, 1 << (state - 1).bit_length())
    constants = {
        "UNIT": 16, "DY_ROW": width, "U_ROW": width, "DT_ROW": width, "Z_ROW": 2 * width,
        "DZ_ROW": 2 * width,
        "D": width, "N": state, "BD": 128 * config.warps // states, "BN": states,
        "T": config.tokens, "SPAN": kernels.SPAN, "HAS_D": True, "HAS_Z": True, "HAS_BIAS": True,
        "SOFTPLUS": True, "HAS_FIRST": False, "HAS_LAST": True, "HAS_DOC": False, "SAVE": True,
        "FULL": True, "PASS": 0,
    } | flags  # fmt: skip
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    types = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            short = name.removesuffix("_ptr")
            kind = "fp32" if short in FLOATS else "i32" if short == "doc" else dtype
            types[name] = "*" + ("fp32" if short == "saved" and dtype == "fp16" else kind)
        elif name not in constants:
            types[name] = "i32"
    return resources(
        kernel, types, constants, arch=arch, num_warps=config.warps, registers=config.registers
    )


@pytest.mark.compile
@pytest.mark.parametrize("arch", [80, 86, 89, 90])
@pytest.mark.parametrize(
    "flags",
    [{}, {"dtype": "fp32", "HAS_DOC": True, "FULL": False}, {"state": 8}, {"PASS": 1}, {"PASS": 2}],
    ids=["bf16", "fp32, documents, odd length", "narrow state", "first pass", "second pass"],
)
def test_it_assembles(arch, flags):
    from _compile import SHARED_LIMIT, assert_fits

    state = flags.get("state", 16)
    found = assembled(kernels._forward_kernel, kernels.FORWARD, arch, **flags)
    assert_fits(found, arch)
    assert found.registers <= 168  # three programs of four warps on a multiprocessor
    if flags == {}:  # one exponential a state and token, and what a channel and token takes
        assert found.ptx.count("ex2.approx") <= 8 * 4 + 8
        assert "shfl" not in found.ptx
    found = assembled(kernels._backward_kernel, kernels.backward_config(state), arch, **flags)
    assert found.shared <= SHARED_LIMIT[arch]
    assert found.registers <= 168
    # held to that many, it sets a few numbers aside that are used outside the loop
    assert found.spills <= 64
    if flags == {}:
        assert found.ptx.count("ex2.approx") <= 8 * 4 + 8
        # across threads only at the end, for the sums over time
        assert found.ptx.count("shfl") < 20
