"""Peak FLOP/s of the hardware, which MFU is a share of.

For GPUs the data sheet's dense rate (no sparsity) with fp32 accumulation; for anything else the
best of a few matrix products on this machine.
"""

from __future__ import annotations

import functools
import re
import time

import torch

# Name in torch.cuda.get_device_name -> (bf16 tensor cores, fp32 without tensor cores), TFLOP/s.
# The first entry that occurs in the name counts. Sources: NVIDIA's data sheets.
_GPUS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2450, 80),
    ("B200", 2250, 75),
    ("GH200", 989.4, 66.9),
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756, 51.2),
    ("H100 NVL", 835, 60),
    ("H100", 989.4, 66.9),
    ("H20", 148, 44),
    ("A100", 312, 19.5),
    ("A800", 312, 19.5),
    ("A40", 149.7, 37.4),
    ("A30", 165, 10.3),
    ("A10G", 70, 31.5),
    ("A10", 125, 31.2),
    ("L40S", 362, 91.6),
    ("L40", 181, 90.5),
    ("L4", 121, 30.3),
    ("RTX 6000 Ada", 364, 91.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 4080", 97.5, 48.7),
    ("RTX 3090", 71, 35.6),
)


def data_sheet(name: str) -> tuple[float, float] | None:
    """(bf16, fp32) FLOP/s of the GPU of this name; None where it is not known."""
    for part, tensor, plain in _GPUS:
        if re.search(rf"{part}(?!\d)", name, re.IGNORECASE):  # H1000 is no H100
            return tensor * 1e12, plain * 1e12
    return None


def known_gpus() -> str:
    return ", ".join(part for part, _, _ in _GPUS)


@functools.cache
def peak_flops(device: str, bf16: bool, threads: int = 1) -> tuple[float, str]:
    """(FLOP/s, "data sheet" or "measured") of `device`, "cpu" or "cuda", for one trial.

    Measured once in a process, in half a second; `threads` is part of the cache's key.
    """
    rates = data_sheet(torch.cuda.get_device_name()) if device == "cuda" else None
    if rates is not None:
        return rates[0 if bf16 else 1], "data sheet"
    return _measure(device, bf16), "measured"


def _measure(device: str, bf16: bool) -> float:
    n = 8192 if device == "cuda" else 512
    # The CPU's yardstick is fp32 whatever the run uses: few have bf16 units.
    dtype = torch.bfloat16 if device == "cuda" and bf16 else torch.float32
    a = torch.ones(n, n, device=device, dtype=dtype)
    out = torch.empty_like(a)
    best = float("inf")
    # Long enough to meet moments in which no neighbour takes the core: a peak that is measured too
    # low would show as an MFU above what any run can have.
    deadline = time.perf_counter() + 0.5
    while True:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        _wait(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > deadline:
            break
    return 2 * n**3 / best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
