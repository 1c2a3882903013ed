"""Every shipped configuration of convolution, norms and loss assembles for each architecture."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from _compile import (  # noqa: E402
    ARCHITECTURES,
    SHARED_LIMIT,
    assert_fits,
    resources,
    unset_registers,
)

from ablate.kernels import (  # noqa: E402
    attention_triton,
    conv1d_triton,
    cross_entropy_triton,
    gelu_triton,
    norm_triton,
    rotary_triton,
    step_triton,
    swiglu_triton,
)
from ablate.kernels import sum_rows_triton as sums  # noqa: E402

pytestmark = pytest.mark.compile
architectures = pytest.mark.parametrize("arch", ARCHITECTURES)


def pointers(names: str, kind: str) -> dict[str, str]:
    return {f"{name}_ptr": f"*{kind}" for name in names.split()}


def integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def test_uniform_registers_that_nothing_sets_are_found():
    lines = [
        "UMOV UR4, 0x400 ;", "UMOV UR7, 0x40000040 ;", "UIADD3 UR6, UP0, UR4, 0x40, URZ ;",
        "UMOV UR9, UR5 ;", "@P0 HGMMA.64x32x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, R24 ;",
    ]  # fmt: skip
    assert unset_registers(sass(lines)) == []  # the left operand is in registers
    lines.append("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4].tnspB, R24, gsb0 ;")
    assert unset_registers(sass(lines)) == ["/*0050*/ " + lines[-1]]  # UR5
    lines[-1] = "UIADD3.64 UR10, UR8, 0x2, URZ ;"
    assert unset_registers(sass(lines)) == ["/*0050*/ " + lines[-1]]  # UR8, and UR9 by its copy


def sass(lines: list[str]) -> str:
    return "\n".join(f"        /*{16 * i:04x}*/                   {x}" for i, x in enumerate(lines))


@architectures
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_convolution(arch, documents, state):
    flags = {
        "WIDTH": 1792, "UNIT": 8, "X_ROW": 3352, "TAPS": 4, "SILU": True, "HAS_BIAS": True,
        "HAS_STATE": state, "DOCS": documents, "FREE": not state,
    }  # fmt: skip
    for backward in (False, True):
        config = conv1d_triton.BACKWARD if backward else conv1d_triton.FORWARD
        kernel = conv1d_triton.backward_kernel if backward else conv1d_triton.forward_kernel
        types = pointers("x state dy dx dstate" if backward else "x state y", "bf16")
        types |= pointers("w b partial" if backward else "w b", "fp32") | pointers("doc", "i32")
        types |= integers("length x_batch" + (" dy_batch dx_batch" if backward else ""))
        constants = flags | {
            "CHANNELS": config.channels, "SEGMENT": config.segment, "STAGES": config.stages,
        } | ({"DY_ROW": 1792, "DX_ROW": 3352} if backward else {})  # fmt: skip
        found = resources(kernel, types, constants, arch=arch, num_warps=config.warps)
        assert_fits(found, arch)
        # rows of the projection are read in place, 8 bytes or more at a time
        assert "v2.b32" in found.ptx or "v4.b32" in found.ptx or "cp.async" in found.ptx


@architectures
@pytest.mark.parametrize("group", [64, 768, 1536, 4096])
def test_gated_norm(arch, group):
    block = triton.next_power_of_2(group)
    flags = {
        "width": group * 2, "X_ALIGN": 16, "Z_ALIGN": 8, "HAS_WEIGHT": True, "GATE_AFTER": False,
        "NORM": True,
        "GROUP": group, "BLOCK": block,
    }  # fmt: skip
    config = norm_triton.gated_forward_config(block)
    types = pointers("x z y", "bf16") | pointers("w", "fp32") | integers("rows x_row z_row")
    found = resources(
        norm_triton.gated_forward_kernel, types | {"eps": "fp32"}, flags | {"ROWS": config.rows},
        arch=arch, num_warps=config.warps,
    )  # fmt: skip
    assert_fits(found, arch)
    head, tail = norm_triton.head_and_tail(group)
    config = norm_triton.gated_backward_config(head)
    types = pointers("x z dy dx dz", "bf16") | pointers("w partial", "fp32")
    types |= integers("rows x_row z_row dy_row dz_row") | {"eps": "fp32"}
    found = resources(
        norm_triton.gated_backward_kernel, types,
        flags | {
            "DY_ALIGN": 16, "DZ_ALIGN": 8, "BLOCK": head, "TAIL": tail, "ROWS": config.rows,
            "STAGES": config.stages,
        },
        arch=arch, num_warps=config.warps,
    )  # fmt: skip
    assert_fits(found, arch)


@architectures
@pytest.mark.parametrize("width", [96, 288, 768, 2048, 8192])
@pytest.mark.parametrize("parts", [0, 1, 4])  # of what is divided by its root mean square first
def test_norm_with_residual(arch, width, parts):
    block = triton.next_power_of_2(width)
    config = norm_triton.forward_config(block)
    squares = pointers("squares", "fp32") | integers("of") | {"eps": "fp32"}
    found = resources(
        norm_triton.forward_kernel,
        pointers("x residual y total", "bf16") | pointers("w", "fp32")
        | integers("rows x_row residual_row") | squares,
        {"X_ALIGN": 16, "R_ALIGN": 16, "HAS_RESIDUAL": True, "HAS_WEIGHT": True, "PARTS": parts,
         "width": width, "BLOCK": block, "ROWS": config.rows},
        arch=arch, num_warps=config.warps,
    )  # fmt: skip
    assert_fits(found, arch)
    config = norm_triton.backward_config(block)
    found = resources(
        norm_triton.backward_kernel,
        pointers("total dy dtotal x dx", "bf16") | pointers("w partial dresidual dsquares", "fp32")
        | integers("rows total_row dy_row dtotal_row x_row") | squares,
        {"T_ALIGN": 16, "DY_ALIGN": 16, "DT_ALIGN": 16, "X_ALIGN": 16, "HAS_DTOTAL": True,
         "TWO_OUTPUTS": parts > 0, "HAS_WEIGHT": True, "PARTS": parts, "width": width,
         "BLOCK": block, "ROWS": config.rows, "STAGES": config.stages},
        arch=arch, num_warps=config.warps,
    )  # fmt: skip
    assert_fits(found, arch)


@architectures
@pytest.mark.parametrize("width", [576, 1536])
def test_gate_and_columns(arch, width):
    rows, block = norm_triton.gate_tile(width)
    found = resources(
        norm_triton.gate_backward_kernel,
        pointers("y z dy dx dz", "bf16") | pointers("dsquares", "fp32")
        | integers("rows z_row dz_row"),
        {"width": width, "Z_ALIGN": 8, "DZ_ALIGN": 8, "ROWS": rows, "BLOCK": block},
        arch=arch, num_warps=4,
    )  # fmt: skip
    assert_fits(found, arch)
    for name, outputs in (("", "out"), ("_backward", "dout")):
        kernel = getattr(norm_triton, f"scale_columns{name}_kernel")
        floats = "m s" if not name else "m s dm partial"
        found = resources(
            kernel, pointers(outputs, "bf16") | pointers(floats, "fp32") | integers("rows width"),
            {"ROWS": norm_triton.COLUMN_ROWS, "BLOCK": norm_triton.COLUMN_BLOCK},
            arch=arch, num_warps=norm_triton.COLUMN_WARPS,
        )  # fmt: skip
        assert_fits(found, arch)


@architectures
@pytest.mark.parametrize("gradient", [False, True])
def test_logits(arch, gradient):
    config = cross_entropy_triton.CONFIG
    types = pointers("logits", "bf16") | pointers("target", "i64") | pointers("loss", "fp32")
    types |= integers("vocabulary row_stride ignore_index") | {"z_loss": "fp32"}
    found = resources(
        cross_entropy_triton.logits_kernel, types, {"GRADIENT": gradient, "BLOCK": config.block},
        arch=arch, num_warps=config.warps,
    )  # fmt: skip
    assert_fits(found, arch)
    assert "v4.b32" in found.ptx, "the logits must be read 16 bytes at a time"


@architectures
def test_ordered_sum(arch):
    found = resources(
        sums.sum_rows_kernel, pointers("x out", "fp32") | integers("rows columns"),
        {"ROWS": sums.ROWS, "COLUMNS": sums.COLUMNS}, arch=arch, num_warps=8,
    )  # fmt: skip
    assert_fits(found, arch)


@architectures
@pytest.mark.parametrize("sign", [1, -1])
def test_rotary_qkv(arch, sign):
    parts = "q k v to_q to_k to_v"
    types = pointers(parts, "bf16") | pointers("cos sin", "fp32") | integers("length table_batch")
    types |= integers(
        " ".join(f"{p}_{axis}" for p in parts.split() for axis in ("batch", "row", "head"))
    )
    constants = {"SIGN": sign, "H": 12, "KV": 4, "P": 64, "BLOCK": 32, "ROWS": rotary_triton.ROWS}
    found = resources(rotary_triton.qkv_kernel, types, constants, arch=arch, num_warps=4)
    assert_fits(found, arch)


@architectures
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["forward", "query_grad", "key_grad"])
def test_attention(arch, head_dim, kind, plain, name):
    """plain: whole tiles, no documents, a key head for each query head."""
    kernel = getattr(attention_triton, f"{name}_kernel")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    c = attention_triton.config(name, head_dim, dtype, arch >= 90)
    constants = {
        "H": 12, "KV": 12 if plain else 4, "P": head_dim, "BM": c.queries, "BN": c.keys,
        "DOCS": not plain, "FULL": plain, "PREC": "tf32x3" if kind == "fp32" else "ieee",
    }  # fmt: skip
    others = dict.fromkeys(("sum_ptr", "delta_ptr"), "*fp32")
    others |= dict.fromkeys(("doc_ptr", "end_ptr"), "*i32") | dict.fromkeys(
        ("factor", "scale"), "fp32"
    )
    types = {
        arg: others.get(arg, f"*{kind}" if arg.endswith("_ptr") else "i32")
        for arg in kernel.arg_names
        if arg not in constants
    }
    unknown = ("factor", "scale", "window") + (() if plain else ("length",))
    found = resources(
        kernel, types, constants, arch=arch, num_warps=c.warps, num_stages=c.stages,
        aligned=tuple(set(types) - set(unknown)),
    )  # fmt: skip
    assert found.shared <= SHARED_LIMIT[arch]
    if kind == "bf16":  # float32, three products for each, may spill
        if (name, plain, arch) == ("key_grad", False, 90):
            # documents cost some words; narrower tiles spill none and are slower without documents
            assert found.shared <= SHARED_LIMIT[arch]
            assert found.spills <= 320
        else:
            assert_fits(found, arch)
        assert ("wgmma" if arch >= 90 else "mma.sync") in found.ptx
        assert "cp.async" in found.ptx, "tiles must be fetched ahead"


@architectures
def test_gelu(arch):
    flags = {"BLOCK": gelu_triton.BLOCK}
    for kernel, names in (
        (gelu_triton.forward_kernel, "x y"),
        (gelu_triton.backward_kernel, "x dy dx"),
    ):
        types = pointers(names, "bf16") | integers("n")
        found = resources(
            kernel, types, flags, arch=arch, num_warps=gelu_triton.WARPS, aligned=tuple(types)
        )  # fmt: skip
        assert_fits(found, arch)
        assert "v4.b32" in found.ptx


@architectures
def test_swiglu(arch):
    flags = {"width": 2048, "BLOCK": 1024, "ROWS": swiglu_triton.NUMBERS // 1024}
    for kernel, names in (
        (swiglu_triton.forward_kernel, "x y"),
        (swiglu_triton.backward_kernel, "x dy dx"),
    ):
        types = pointers(names, "bf16") | integers("rows")
        found = resources(kernel, types, flags, arch=arch, num_warps=swiglu_triton.WARPS)
        assert_fits(found, arch)
        assert "v4.b32" in found.ptx


@architectures
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (128, 4), (128, 32), (256, 8)])
def test_attention_of_one_token(arch, kind, head_dim, group):
    itemsize = 2 if kind == "bf16" else 4
    options = step_triton.attention_options(head_dim, group, itemsize, arch >= 90)
    types = pointers("qkv k v y", kind) | pointers("cos sin part sum", "fp32")
    types |= pointers("position", "i64") | integers("qkv_row table_row slots") | {"factor": "fp32"}
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    for parts in (1, 32):
        flags = {
            "H": 2 * group, "KV": 2, "P": head_dim, "DIM": head_dim, "SPLITS": parts, **options,
        }  # fmt: skip
        assert_fits(
            resources(step_triton.attention_kernel, types, flags, arch=arch, **launch), arch
        )
    found = resources(
        step_triton.combine_kernel, pointers("part sum", "fp32") | pointers("y", kind),
        {"P": head_dim, "BP": options["BP"], "SPLITS": step_triton.MOST_SPLITS},
        arch=arch, num_warps=4,
    )  # fmt: skip
    assert_fits(found, arch)


@architectures
def test_states_of_one_token(arch):
    types = pointers("x dt B C y", "bf16") | pointers("A D bias state", "fp32")
    types |= integers("x_row dt_row B_row C_row x_head B_group C_group groups_of")
    flags = {
        "P": 64, "N": 128, "BN": 128, "ROWS": 16, "SKIP": 1, "HAS_BIAS": True, "SOFTPLUS": True,
    }  # fmt: skip
    assert_fits(resources(step_triton.ssd_kernel, types, flags, arch=arch), arch)
    types = pointers("u dt B C z y", "bf16") | pointers("A D bias state", "fp32")
    types |= integers("u_row dt_row B_row C_row z_row width A_row")
    flags = {
        "N": 16, "BN": 16, "ROWS": 64, "SKIP": True, "GATE": True, "HAS_BIAS": True,
        "SOFTPLUS": True,
    }  # fmt: skip
    assert_fits(resources(step_triton.scan_kernel, types, flags, arch=arch), arch)
    types = pointers("x state y", "bf16") | pointers("w b", "fp32") | integers("x_row width")
    flags = {"TAPS": 4, "SILU": True, "HAS_BIAS": True, "BLOCK": 256}
    assert_fits(resources(step_triton.conv_kernel, types, flags, arch=arch), arch)
    types = pointers("q k v y", "bf16") | pointers("g beta state", "fp32")
    types |= integers("q_row k_row v_row g_row beta_row q_head k_head v_head") | {"scale": "fp32"}
    flags = {"K": 128, "V": 256, "BK": 128, "COLS": 16, "EPS": 1e-6}
    assert_fits(resources(step_triton.delta_kernel, types, flags, arch=arch), arch)
    types = pointers("q k v g y", "bf16") | pointers("state", "fp32") | {"scale": "fp32"}
    types |= integers("q_row k_row v_row g_row q_head k_head v_head g_head")
    flags = {"K": 192, "V": 384, "BK": 256, "COLS": 8}
    assert_fits(resources(step_triton.gla_kernel, types, flags, arch=arch), arch)
