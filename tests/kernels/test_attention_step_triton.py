"""One decoded token against a cache in the kernel, against float64; and what it takes of a GPU."""

from __future__ import annotations

import pytest
import torch
from _check import error

triton = pytest.importorskip("triton")

from _compile import ARCHITECTURES, assert_fits, resources  # noqa: E402

from ablate.kernels import attention_step  # noqa: E402
from ablate.kernels import attention_triton as module  # noqa: E402

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpret),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def check(device, dtype, batch, slots, heads, kv, width, positions, scale=None):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, width, dtype=torch.float64)
    k, v = torch.randn(2, batch, slots, kv, width, dtype=torch.float64)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    at = None if positions is None else torch.tensor(positions)
    want = attention_step(*(t.double() for t in (q, k, v)), position_B=at, scale=scale)
    # what is not visible must not be read, whatever stands there
    if at is not None:
        hidden = torch.arange(slots) > at[:, None]
        k[hidden] = v[hidden] = float("nan")
    moved = [t.to(device) for t in (q, k, v)]
    at = None if at is None else at.to(device)
    got = attention_step(*moved, position_B=at, scale=scale, backend="triton")
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert error(got, want) < LIMITS[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("batch", "slots", "heads", "kv", "width", "positions"),
    [
        (1, 700, 2, 2, 64, [650]),  # several parts, the last one empty in part
        (2, 300, 6, 2, 16, [0, 299]),  # shared heads; the first token; a full cache
        (2, 90, 4, 1, 32, [7, 1000]),  # a ring buffer that has gone round
        (1, 5, 1, 1, 16, None),
    ],
)
def test_against_float64(device, dtype, batch, slots, heads, kv, width, positions):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("no more than float16 shows in the interpreter")
    check(device, dtype, batch, slots, heads, kv, width, positions)


@pytest.mark.gpu
@pytest.mark.parametrize(("kv", "width"), [(32, 128), (8, 128), (1, 256), (20, 64)])
def test_published_sizes(kv, width):
    heads = 32 if kv < 20 or kv == 32 else kv
    check("cuda", torch.bfloat16, 2, 20_000, heads, kv, width, [19_999, 12_345], scale=0.1)


def test_parts_fill_a_gpu_and_stay_whole_blocks():
    for rows, slots in ((1, 1), (8, 131_072), (32, 131_072), (640, 2048), (4, 1_000_000)):
        parts, part = module.parts_of(rows, slots, 64)
        assert part % 64 == 0
        assert (parts - 1) * part < slots <= parts * part
        assert parts <= module.MOST_PARTS
    assert 8 * module.parts_of(8, 131_072, 64)[0] >= 400
    assert module.parts_of(640, 2048, 64)[0] == 1


def test_cases_without_a_kernel():
    q, k = torch.zeros(1, 2, 24), torch.zeros(1, 4, 2, 24)
    with pytest.raises(ValueError, match="does not support"):
        attention_step(q, k, k, backend="triton")


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("kind", "size"), [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize(("width", "group"), [(64, 1), (128, 4), (128, 32), (256, 1)])
def test_it_assembles(arch, kind, size, width, group):
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{kind}") | {"position_ptr": "*i64"}
    types |= dict.fromkeys(("out_ptr", "top_ptr", "total_ptr"), "*fp32") | {"scale": "fp32"}
    strides = ("k_batch", "k_row", "v_batch", "v_row")
    types |= dict.fromkeys(("slots", "part", *strides), "i32")
    constants = {
        "KV": 4,
        "GROUP": group,
        "P": width,
        "ROWS": module.rows_of(group),
        "BLOCK": module.block(width, size),
    }
    options = {"num_warps": module.WARPS * max(1, group // 16), "num_stages": module.STAGES}
    aligned = (*(name for name, kind in types.items() if kind.startswith("*")), *strides)
    found = resources(module.part_kernel, types, constants, arch=arch, aligned=aligned, **options)
    assert_fits(found, arch)
    types = dict.fromkeys(("out_ptr", "top_ptr", "total_ptr"), "*fp32")
    types |= {"y_ptr": f"*{kind}", "parts": "i32"}
    constants = {"PARTS": module.MOST_PARTS, "P": width}
    found = resources(module.join_kernel, types, constants, arch=arch, num_warps=module.WARPS)
    assert_fits(found, arch)
