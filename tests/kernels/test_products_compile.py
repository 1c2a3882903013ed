"""Products with epilogues assemble for Hopper, in the versions of Triton that they ship for."""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")

from _compile import assert_fits, resources  # noqa: E402
from test_precompile import Hopper  # noqa: E402
from triton.runtime import driver  # noqa: E402

from ablate.kernels import hopper  # noqa: E402
from ablate.kernels.precompile import compile_together  # noqa: E402

pytestmark = pytest.mark.compile

module = hopper._gluon()
if module is None:
    pytest.skip(f"no fused kernels for Triton {triton.__version__}", allow_module_level=True)


OPERANDS = {
    "gelu": "x_desc w_desc pre_desc act_desc",
    "gelu_backward": "dy_desc w_desc pre_desc d_pre_desc",
    "swiglu": "x_desc gate_w_desc value_w_desc gate_desc value_desc act_desc",
    "swiglu_backward": "dy_desc w_desc gate_desc value_desc d_gate_desc d_value_desc",
    "gate": "dout_desc w_desc z_desc y_desc dz_desc dx_desc",
}
TWO_READ = ("swiglu_backward", "gate")  # by their epilogues


def built(name: str, N: int, K: int, kind: str):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]

    def described(rows: int, columns: int) -> str:
        layout = module._described(torch.empty(8, 8, dtype=dtype), rows, columns).layout
        return f"tensordesc<{kind}[{rows}, {columns}],{layout!r}>"

    rows, columns = module.ROWS, module.COLUMNS
    depth, stages = module.DEPTH, module.STAGES
    if name in TWO_READ:
        depth, stages = module.GATE_DEPTH, module.GATE_STAGES
    left, right = described(rows, depth), described(depth, columns)
    piece, half = described(rows, columns // module.PIECES), described(columns // 2, depth)
    names = OPERANDS[name].split()
    block = {"gelu": described(columns, depth), "swiglu": half}.get(name, right)
    types = {n: block if n.endswith("w_desc") else piece for n in names}
    types[names[0]] = left
    if name == "gate":
        types["dsquares_ptr"] = "*fp32"
    group = module.FORWARD_GROUP if name in ("gelu", "swiglu") else module.BACKWARD_GROUP
    constants = {
        "N": N, "K": K, "BM": rows, "BN": columns, "BK": depth, "GROUP": group, "STAGES": stages,
        "PIECES": module.PIECES,
    }  # fmt: skip
    return resources(
        getattr(module, f"{name}_kernel"), types | {"M": "i32"}, constants, arch=90,
        registers=module.REGISTERS,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("N", "K", "kind"),
    [(3072, 768, "bf16"), (3072, 768, "fp16"), (1152, 288, "bf16"), (200, 72, "fp16"),
     (8, 8, "bf16")],
)  # fmt: skip
@pytest.mark.parametrize("name", OPERANDS)
def test_the_kernels_assemble(name, N, K, kind):
    found = built(name, N, K, kind)
    assert_fits(found, 90, spills=80)  # of an epilogue, of which a thread has one a tile
    assert found.registers <= module.REGISTERS
    assert found.scratch == 0, "a launch must allocate nothing"
    assert "setmaxnreg" in found.ptx, "the loader must leave its registers to the consumers"
    assert "wgmma.mma_async" in found.ptx
    depth = module.GATE_DEPTH if name in TWO_READ else module.DEPTH
    if depth < K:
        assert "wgmma.wait_group.sync.aligned 1" in found.ptx, "a product must be in flight"
    for copied in (r"shared::\w+\.global", r"global\.shared::cta"):
        assert re.search(rf"cp\.async\.bulk\.tensor\.2d\.{copied}", found.ptx), "by tensor maps"
    assert "st.global" not in found.ptx, "and by nothing else"
    assert ("ld.global" in found.ptx) == (name == "gate"), "but for a number a row"
    # A step of a consumer is a product for each 16 of its depth and half of its 128 rows. Where the
    # assembler does not see that their results are left alone it waits for each.
    each = 2 * depth // 16
    lines = found.sass.splitlines()
    products = [i for i, line in enumerate(lines) if "HGMMA" in line]
    assert len(products) == 2 * each
    assert sum("gsb0" in lines[i] for i in products) == 2
    for first, last in ((0, each - 1), (each, 2 * each - 1)):
        step = lines[products[first] : products[last]]
        assert not any(re.search("STL|LDL", line) for line in step), "spilled amid a step"


def test_kernels_of_a_step_compile_together(monkeypatch, tmp_path):
    """Gluon's too, and tensor maps are known before anything is launched."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Hopper())
    names = []
    compiled = triton.compiler.compile

    def compile(src, *args, **kwargs):
        names.append(src.name)
        return compiled(src, *args, **kwargs)

    monkeypatch.setattr(triton.compiler, "compile", compile)
    kernels = [getattr(module, f"{name}_kernel") for name in OPERANDS]
    for kernel in kernels:
        kernel.device_caches.clear()
    x, w_in = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((256, 64), (128, 64)))
    with compile_together(2) as dry_run, dry_run():
        for _ in range(2):
            pre, _ = module.gelu(x, w_in)
            module.gelu_gradients(x, w_in.T, pre)
            module.swiglu_gradients(x, w_in[:64].T, module.swiglu(x, w_in)[0])
            module.gate_gradients(x, w_in.T, x.new_zeros(256).float(), pre, pre, pre)
    assert sorted(names) == sorted(f"{name}_kernel" for name in OPERANDS)
    assert {len(k.device_caches[0][0]) for k in kernels} == {1}
    for kernel in kernels:
        kernel.device_caches.clear()  # what was compiled here is for no GPU that there is
