"""Triton kernels of the gated delta rule against fp64 in the interpreter and on a GPU, what they
assemble to, and the promises of every kernel: repeatable, compiled whole, captured in a graph."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from _check import DEVICES, assert_compiles_whole, assert_repeats, assert_replays, compare, error
from test_gated_delta_rule import documents, equal_keys, make

pytest.importorskip("triton")

from ablate.kernels import gated_delta_rule_triton as kernels
from ablate.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_recurrent

module = import_module("ablate.kernels.gated_delta_rule")

# The gradient of a log decay is a sum over all later tokens that cancels: 2.1e-3 in fp16.
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
on_devices = pytest.mark.parametrize("device", DEVICES)


def against_the_definition(
    tensors, device, dtype, limit, starts=None, *, normalize=True, final=True
):
    def oracle(**kwargs):
        return gated_delta_rule_recurrent(**kwargs, doc_start_BL=starts)

    def ours(**kwargs):
        on = None if starts is None else starts.to(device)
        return gated_delta_rule(**kwargs, doc_start_BL=on, backend="triton")

    compare(
        ours, oracle, tensors, limit=limit, dtype=dtype, device=device, normalize_qk=normalize,
        return_final_state=final,
    )  # fmt: skip


CASES = {
    "odd length, odd widths": ((2, 73, 1, 20, 24), {}),
    "one token": ((2, 1, 2, 16, 16), {}),
    "shorter than a tile": ((1, 5, 1, 8, 24), {"state": False}),
    "whole tiles, several blocks of values": ((1, 64, 1, 16, 80), {}),
    "narrow": ((1, 40, 1, 4, 3), {}),
    "weak decay": ((1, 130, 1, 16, 16), {"decay": 1e-4}),
    "beta of zero": ((1, 40, 1, 16, 16), {"beta": 0.0}),
    "beta of one": ((1, 70, 1, 16, 16), {"beta": 1.0}),
    "beta of two": ((1, 70, 1, 16, 16), {"beta": 2.0}),
}
GPU_CASES = CASES | {
    "wide": ((2, 200, 3, 128, 256), {}),
    "narrower": ((1, 130, 4, 64, 128), {}),
}


@on_devices
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES.keys())
@pytest.mark.parametrize("docs", ["none", "some", "every token"])
def test_values_and_gradients(device, dtype, case, docs):
    shape, numbers = case
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 is not the GPU's")
    first = case is CASES["odd length, odd widths"]
    if device == "cpu" and (docs != "none" or dtype != torch.float32) and not first:
        pytest.skip("slow in the interpreter")
    if device == "cpu" and case not in CASES.values():
        pytest.skip("slow in the interpreter")
    starts = None
    if docs != "none":
        starts = documents(*shape[:2], *((1, 0) if docs == "every token" else (37, -5)))
    tensors = make(*shape, **numbers)
    if docs == "every token":  # nothing is carried: no gradient to compare but zero
        tensors["log_decay_BLH"].requires_grad_(False)
        if tensors["initial_state_BHKV"] is not None and shape[0] == 1:
            tensors["initial_state_BHKV"].requires_grad_(False)
    if numbers.get("beta") == 0.0 and shape[1] > 1:  # decays scale the first state alone
        assert docs != "none" or tensors["initial_state_BHKV"] is not None
    final = tensors["initial_state_BHKV"] is not None
    against_the_definition(tensors, device, dtype, LIMITS[dtype], starts, final=final)


@on_devices
@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("name", ["HOPPER", "OTHER"])
@pytest.mark.parametrize("keys", [20, 136])
def test_every_table_in_float32(device, docs, name, keys, monkeypatch):
    """The tiles of 16-bit data, exactly."""
    if device == "cuda":
        pytest.skip("tiles of 16-bit data need not fit in float32")
    if keys > 128 and not docs:
        pytest.skip("slow in the interpreter")
    monkeypatch.setattr(kernels, "table", lambda x: getattr(kernels, name))
    monkeypatch.setattr(module, "triton_supports", lambda *a: True)
    starts = documents(1, 73, 30, -5) if docs else None
    against_the_definition(make(1, 73, 1, keys, 40), device, torch.float32, 1e-5, starts)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_keys(device, dtype):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 is not the GPU's")
    shape = (1, 40, 1, 136, 16) if device == "cpu" else (2, 150, 2, 256, 300)
    against_the_definition(make(*shape), device, dtype, LIMITS[dtype])


@on_devices
def test_keys_as_they_are(device):
    t = make(1, 70, 2, 16, 16)
    t["k_BLHK"] = (0.2 * t["k_BLHK"].detach()).requires_grad_()
    against_the_definition(t, device, torch.float32, 1e-5, normalize=False)


@on_devices
def test_strong_decay(device):
    # Every third step forgets slowly, or all gradients of decays were rounding alone; sums of log
    # decays up to thousands leave a step of one ulp some 1e-4.
    t = make(1, 70, 2, 8, 8, decay=1e2)
    t["log_decay_BLH"].detach()[:, ::3] *= 1e-3
    against_the_definition(t, device, torch.float32, 1e-3)


@on_devices
def test_equal_keys_and_beta_two(device):
    against_the_definition(equal_keys(70), device, torch.float32, 1e-4)


@on_devices
def test_slices_are_read_in_place(device):
    torch.manual_seed(0)
    wide = torch.randn(2, 13, 90, device=device, requires_grad=True)
    rates = torch.randn(2, 13, 5, device=device, requires_grad=True)
    weight = torch.randn(2, 13, 2, 20, device=device)

    def run(backend):
        q, k, v = wide[..., 3:19], wide[..., 19:35], wide[..., 45:85]
        q, k = (x.unflatten(-1, (2, 8)) for x in (q, k))
        y = gated_delta_rule(
            q, k, v.unflatten(-1, (2, 20)), -rates[..., 1:3].exp(), rates[..., 3:].sigmoid(),
            normalize_qk=True, backend=backend,
        )  # fmt: skip
        return (y.detach(), *torch.autograd.grad((y * weight).sum(), (wide, rates)))

    for ours, want in zip(run("triton"), run("reference"), strict=True):
        assert error(ours, want) < 1e-5


def test_what_stays_in_pytorch():
    t = make(1, 3, 1, 2, 4)
    with pytest.raises(ValueError, match="does not support"):
        gated_delta_rule(**t, backend="triton")
    assert gated_delta_rule(**t).dtype == torch.float64


# -- on a GPU -----------------------------------------------------------------------------------


def on_gpu(shape=(2, 333, 3, 64, 96)):
    halves = ("q_BLHK", "k_BLHK", "v_BLHV")
    return {
        k: v.detach().to("cuda", torch.bfloat16 if k in halves else torch.float32).requires_grad_()
        for k, v in make(*shape).items()
    } | {"doc_start_BL": documents(*shape[:2], 70, -5).cuda()}


def scan(t):
    y, last = gated_delta_rule(**t, normalize_qk=True, return_final_state=True)
    return (y.float().sin().sum() + last.square().sum()).reshape(())


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [64, 256])
def test_two_runs_agree_bit_for_bit(keys):
    assert_repeats(scan, on_gpu((2, 333, 3, keys, 96)))


@pytest.mark.gpu
def test_compile_takes_the_whole_graph():
    assert_compiles_whole(scan, on_gpu())


@pytest.mark.gpu
def test_graph_capture_and_replay():
    assert_replays(scan, on_gpu())


@pytest.mark.gpu
def test_past_two_to_the_31():
    length = 600_000
    q, k = (torch.randn(1, length, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(1, length, 1, 4096, device="cuda", dtype=torch.bfloat16)
    rate = torch.rand(1, length, 1, device="cuda")
    with torch.no_grad():
        y = gated_delta_rule(q, k, v, -rate - 0.5, rate, normalize_qk=True)
        part = slice(length - 192, length)
        want = gated_delta_rule(
            q[:, part], k[:, part], v[:, part], -rate[:, part] - 0.5, rate[:, part],
            normalize_qk=True, backend="reference",
        )  # fmt: skip
    assert error(y[:, -50:], want[:, -50:]) < 1e-2


# -- without a GPU ------------------------------------------------------------------------------

FLOATS = (
    "decay", "beta", "factors", "first", "dlast", "dfirst", "parts", "ddecay", "dbeta", "r",
)  # fmt: skip


def assembled(kernel, name, arch, dtype, keys, values, **flags):
    from _compile import resources

    table = kernels.SINGLE if dtype == "fp32" else kernels.HOPPER if arch == 90 else kernels.OTHER
    found = table[min(k for k in table if k[0] == name and k[1] >= keys)]
    heads, chunk = 6, 64 if table is kernels.HOPPER else 32
    row = heads * (2 * keys + values)
    blocked = name in ("prepare", "gradient") and kernel is not kernels._project_kernel
    block = min(found.keys, keys) if blocked else keys
    constants = {
        "UNIT": 8, "Q_STRIDE_L": row, "K_STRIDE_L": row, "V_STRIDE_L": row, "X_STRIDE_L": row,
        "DECAY_STRIDE_L": heads, "BETA_STRIDE_L": heads, "H": heads, "K": keys, "V": values,
        "BK": block, "BV": min(found.values, values), "BH": 8, "BL": 16, "Q": chunk,
        "BLOCKS": -(-keys // min(found.keys, keys)),
        "NORMALIZE": keys <= found.keys or name == "prepare",
        "HAS_DOC": False, "HAS_FIRST": False, "HAS_LAST": True, "OUTPUT": True, "FULL": True,
        "PREC": found.precision, "SOLVE": "tf32x3" if dtype == "fp32" else "tf32",
        "TWICE": found.twice, "STAGES": found.stages,
    } | flags  # fmt: skip
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    types = {}
    for argument in kernel.arg_names:
        if argument.endswith("_ptr"):
            short = argument.removesuffix("_ptr")
            last = short == "states" and constants.get("OUTPUT", False)
            kind = "fp32" if short in FLOATS or last else "i32" if short == "doc" else dtype
            types[argument] = "*" + kind
        elif argument not in constants:
            types[argument] = "fp32" if argument in ("scale", "strongest", "eps") else "i32"
    return resources(kernel, types, constants, arch=arch, num_warps=found.warps)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("arch", "dtype", "keys", "values", "flags"),
    [
        *((arch, "bf16", 128, 256, {}) for arch in (80, 86, 89, 90)),
        (90, "bf16", 128, 256, {"HAS_DOC": True, "HAS_FIRST": True, "FULL": False}),
        (80, "bf16", 256, 512, {"HAS_DOC": True, "FULL": False}),
        (90, "bf16", 256, 512, {"HAS_DOC": True, "FULL": False}),
        (80, "fp16", 64, 128, {}),
        (90, "fp16", 64, 128, {}),
        (86, "fp32", 128, 256, {"HAS_DOC": True, "FULL": False}),
        (90, "fp32", 128, 256, {}),
    ],
)
def test_it_assembles(arch, dtype, keys, values, flags):
    from _compile import assert_fits

    shape = (arch, dtype, keys, values)
    assert_fits(assembled(kernels._prepare_kernel, "prepare", *shape, **flags), arch)
    scans = [
        assembled(kernels._scan_kernel, "scan", *shape, OUTPUT=True, **flags),
        assembled(kernels._scan_kernel, "scan", *shape, OUTPUT=False, **flags),
        assembled(kernels._reverse_kernel, "reverse", *shape, **flags),
    ]
    for found in scans:
        assert_fits(found, arch)
        if arch == 90 and dtype != "fp32" and keys <= 128:
            assert "wgmma" in found.ptx
            assert found.shared <= 113 * 1024  # two programs on a multiprocessor
    assert_fits(assembled(kernels._gradient_kernel, "gradient", *shape, **flags), arch)
    assert_fits(assembled(kernels._sum_parts_kernel, "gradient", *shape, **flags), arch)
    if keys > 128:
        assert_fits(assembled(kernels._project_kernel, "gradient", *shape, **flags), arch)
