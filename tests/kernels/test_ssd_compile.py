"""The scan's kernels assemble for each architecture; on sm_90 they do not spill."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

from _compile import ARCHITECTURES, SHARED_LIMIT, resources  # noqa: E402

from ablate.kernels import ssd_triton  # noqa: E402

pytestmark = pytest.mark.compile

FLOATS = "d dts first segment kept last parts through squares"
TYPES = dict.fromkeys((f"{name}_ptr" for name in FLOATS.split()), "*fp32") | {"doc_ptr": "*i32"}
SIZES = {  # published: 24 heads of 64, state of 128, x B C one tensor of 1792 channels
    "UNIT": 8, "DX_UNIT": 8, "DB_UNIT": 8, "X_STRIDE_L": 1792, "B_STRIDE_L": 1792,
    "C_STRIDE_L": 1792, "DX_STRIDE_L": 1792, "DB_STRIDE_L": 1792, "H": 24, "PER_GROUP": 24,
    "G": 1, "HEADS": 24, "P": 64, "N": 128, "BP": 64, "BN": 128, "Q": 64, "PASS": 0,
    "REVERSE": False, "HAS_FIRST": False, "D_RANK": 1, "BH": 8, "DT_STRIDE_L": 3352,
    "DDT_STRIDE_L": 3352, "HAS_BIAS": True, "SOFTPLUS": True, "LOG_A": True, "HAS_D": True,
    "PREC": "ieee", "BLOCKS": 2, "Z_UNIT": 8, "Z_STRIDE_L": 3352, "GATED": False,
}  # fmt: skip

SPLIT = ("state", "bc_grad")  # over the columns of a state


def compiled(name, kind, arch, config, **changes):
    kernel = getattr(ssd_triton, f"_{name.removeprefix('gated_')}_kernel")
    warps, stages, registers = config
    values = SIZES | {"STAGES": stages, "GATED": name == "gated_scan"} | changes
    constants = {n: values[n] for n in kernel.arg_names if n in values}
    types = {
        n: TYPES.get(n, f"*{kind}") if n.endswith("_ptr") else "i32"
        for n in kernel.arg_names
        if n not in constants
    }
    return resources(kernel, types, constants, arch=arch, num_warps=warps, registers=registers)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("documents", "whole", "spills"),  # a few words, more with masks
    [(False, True, 64), (True, True, 128), (True, False, 256)],
    ids=["whole chunks", "documents", "documents, a part of a chunk"],
)
@pytest.mark.parametrize("name", ["state", "scan", "gated_scan", "dx", "bc_grad"])
def test_scan(name, documents, whole, spills, arch):
    config = ssd_triton.config(name, 2, 64 * 128, arch >= 90)
    changes = {"HAS_DOC": documents, "FULL": whole}
    if name in SPLIT:
        changes["BN"] = ssd_triton.COLUMNS
    found = compiled(name, "bf16", arch, config, **changes)
    assert found.shared <= SHARED_LIMIT[arch]
    if arch == 90:
        assert found.spills <= spills, f"{found.spills} bytes spilled"


@pytest.mark.parametrize(
    ("p", "n", "kind"),
    [(128, 128, "bf16"), (64, 128, "fp32"), (128, 64, "fp32")],
)
@pytest.mark.parametrize("name", ["state", "scan", "gated_scan", "dx", "bc_grad"])
def test_large_states_fit_the_shared_memory(name, p, n, kind):
    changes = {"P": p, "N": n, "BP": p, "BN": ssd_triton.COLUMNS if name in SPLIT else n}
    changes |= {"HAS_DOC": False, "FULL": True, "PREC": "ieee" if kind == "bf16" else "tf32x3"}
    config = ssd_triton.config(name, 2 if kind == "bf16" else 4, p * n, True)
    found = compiled(name, kind, 90, config, **changes)
    assert found.shared <= SHARED_LIMIT[90]
    if kind == "bf16":  # in float32 dx spills kilobytes: products of three, and no wider registers
        assert found.spills <= 192


@pytest.mark.parametrize(
    ("name", "p", "n"),
    [
        ("scan", 16, 32),
        ("scan", 32, 64),
        ("gated_scan", 16, 32),
        ("dx", 16, 64),
        ("bc_grad", 64, 16),
        ("bc_grad", 64, 32),
    ],
)
def test_a_narrow_head_alone_keeps_its_descriptors(name, p, n):
    config = ssd_triton.config(name, 2, p * n, True)
    for documents in (False, True):
        changes = {"P": p, "N": n, "BP": p, "BN": n, "HAS_DOC": documents, "FULL": False}
        changes |= {"H": 1, "HEADS": 1, "X_STRIDE_L": p, "B_STRIDE_L": n, "C_STRIDE_L": n}
        compiled(name, "bf16", 90, config, **changes)  # `_compile.unset_registers`


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["dt", "dt_grad"])
def test_step_sizes(name, arch):
    found = compiled(name, "bf16", arch, (2, 1, None))
    assert found.spills == 0
