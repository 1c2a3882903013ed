"""Queries, keys and values out of the fused projection, against the separate rotations."""

from __future__ import annotations

import pytest
import torch
from _check import DEVICES, compare

from ablate.kernels import rotary_qkv


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv", "width", "own"),
    [(2, 70, 3, 1, 16, True), (2, 64, 2, 2, 6, False), (1, 1, 1, 1, 64, False)],
)
def test_rotary_qkv_against_float64(device, dtype, batch, length, heads, kv, width, own):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("no more than float16 shows in the interpreter")
    torch.manual_seed(0)
    qkv = torch.randn(batch, length, (heads + 2 * kv) * width, dtype=torch.float64)
    positions = torch.arange(length)[None]
    if own:  # every row at its own place
        positions = (positions + 17 * torch.arange(batch)[:, None]) % 40
    options = {"n_heads": heads, "n_kv_heads": kv, "head_dim": width}
    compare(
        lambda qkv: rotary_qkv(qkv, positions.to(qkv.device), **options, backend="triton"),
        lambda qkv: rotary_qkv(qkv, positions, **options, backend="reference"),
        {"qkv": qkv.requires_grad_()},
        limit={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype],
        dtype=dtype,
        device=device,
    )


def test_part_of_the_head_has_no_kernel():
    with pytest.raises(ValueError, match="does not support"):
        rotary_qkv(
            torch.zeros(1, 2, 24),
            torch.arange(2)[None],
            n_heads=1,
            n_kv_heads=1,
            head_dim=8,
            dim=4,
            backend="triton",
        )
