"""The fused products of `gelu_mlp` assemble for Hopper, in the versions of Triton they ship for."""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")

from _compile import assert_fits, resources  # noqa: E402
from test_precompile import Hopper  # noqa: E402
from triton.runtime import driver  # noqa: E402

from ablate.kernels import gelu_mlp_triton  # noqa: E402
from ablate.kernels.precompile import compile_together  # noqa: E402

pytestmark = pytest.mark.compile

module = gelu_mlp_triton._gluon()
if module is None:
    pytest.skip(f"no fused kernels for Triton {triton.__version__}", allow_module_level=True)


def built(name: str, N: int, K: int, kind: str):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]

    def described(rows: int, columns: int) -> str:
        layout = module._described(torch.empty(8, 8, dtype=dtype), rows, columns).layout
        return f"tensordesc<{kind}[{rows}, {columns}],{layout!r}>"

    rows, columns, depth = module.ROWS, module.COLUMNS, module.DEPTH
    half = described(rows, columns // 2)
    if name == "forward":
        types = {"x_desc": described(rows, depth), "w_desc": described(columns, depth)}
        types |= {"pre_desc": half, "act_desc": half}
    else:
        types = {"dy_desc": described(rows, depth), "w_desc": described(depth, columns)}
        types |= {"pre_desc": half, "d_pre_desc": half}
    group = module.FORWARD_GROUP if name == "forward" else module.BACKWARD_GROUP
    constants = {
        "N": N, "K": K, "BM": rows, "BN": columns, "BK": depth, "GROUP": group,
        "STAGES": module.STAGES,
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
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_kernels_assemble(name, N, K, kind):
    found = built(name, N, K, kind)
    assert_fits(found, 90, spills=64)  # of an epilogue, of which a thread has one a tile
    assert found.registers <= module.REGISTERS
    assert found.scratch == 0, "a launch must allocate nothing"
    assert "setmaxnreg" in found.ptx, "the loader must leave its registers to the consumers"
    assert "wgmma.mma_async" in found.ptx
    if K > module.DEPTH:
        assert "wgmma.wait_group.sync.aligned 1" in found.ptx, "a product must be in flight"
    for copied in (r"shared::\w+\.global", r"global\.shared::cta"):
        assert re.search(rf"cp\.async\.bulk\.tensor\.2d\.{copied}", found.ptx), "by tensor maps"
    assert not re.search(r"\b(ld|st)\.global", found.ptx), "and by nothing else"
    # A step of a consumer, 64 deep in two halves of 64 rows, is eight products. Where the assembler
    # does not see that their results are left alone it waits for each.
    lines = found.sass.splitlines()
    products = [i for i, line in enumerate(lines) if "HGMMA" in line]
    assert len(products) == 16
    assert sum("gsb0" in lines[i] for i in products) == 2
    for first, last in ((0, 7), (8, 15)):
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
    for kernel in (module.forward_kernel, module.backward_kernel):
        kernel.device_caches.clear()
    x, w_in = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((256, 64), (128, 64)))
    with compile_together(2) as dry_run, dry_run():
        for _ in range(2):
            pre, _ = module.forward(x, w_in)
            module.backward(x, w_in.T, pre)
    assert sorted(names) == ["backward_kernel", "forward_kernel"]
    ready = [k.device_caches[0][0] for k in (module.forward_kernel, module.backward_kernel)]
    assert [len(r) for r in ready] == [1, 1]
    for kernel in (module.forward_kernel, module.backward_kernel):
        kernel.device_caches.clear()  # what was compiled here is for no GPU that there is
