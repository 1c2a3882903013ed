"""What a run ran on, and the numeric settings it ran under."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ablate.arch.spec import Architecture
from ablate.config import DataConfig, TrainConfig
from ablate.errors import UserError
from ablate.kernels import attention_form
from ablate.layers.attention import AttentionOptions

_PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors", "optuna", "wandb")


def device_of(cfg: TrainConfig) -> torch.device:
    """The device to train on; `UserError` when a GPU is asked for and there is none."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is 'cuda', but torch sees no GPU here; use 'auto' or 'cpu'")
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def uses_bf16(cfg: TrainConfig, device: torch.device) -> bool:
    """Whether matrix products run in bf16 under autocast; the master weights are fp32 always."""
    return cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")


@contextlib.contextmanager
def numerics(cfg: TrainConfig, device: torch.device) -> Iterator[None]:
    """Threads, determinism and TF32 for one run; what was set before comes back afterwards.

    TF32 is allowed where bf16 is (whatever still is an fp32 product there needs no more), and off
    when fp32 was asked for.
    """
    threads = torch.get_num_threads()
    tf32 = torch.get_float32_matmul_precision()
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]

    torch.set_num_threads(cfg.threads)
    torch.set_float32_matmul_precision("high" if uses_bf16(cfg, device) else "highest")
    if cfg.deterministic:
        # Read by cuBLAS when it starts; without it some of its products differ between runs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Only to warn (1) would let attention's backward take its faster, varying form. (torch's
        # use_deterministic_algorithms also imports Inductor, to tell it: `compile_layers` does.)
        _set_deterministic(2)
        # Filling every new tensor with NaN is a debugging aid that costs a pass over memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(tf32)
        _set_deterministic(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _set_deterministic(mode: int) -> None:
    torch.set_deterministic_debug_mode(mode)
    if "torch._inductor.config" in sys.modules:
        sys.modules["torch._inductor.config"].deterministic = mode > 0  # type: ignore[attr-defined]


def environment(cfg: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Versions, commit, hardware and numeric settings, as they go into environment.json."""
    return {
        "versions": {"python": platform.python_version(), "ablate": version("ablate-hybrids")}
        | {name: version(name) for name in _PACKAGES},
        **commit(),
        "platform": platform.platform(),
        "host": platform.node(),
        "hardware": _hardware(device),
        # which GPU of its type: they differ in speed
        **({"gpu_id": _gpu_id(device)} if device.type == "cuda" else {}),
        "numerics": {
            "device": device.type,
            "precision": "bf16" if uses_bf16(cfg, device) else "fp32",
            "tf32": uses_bf16(cfg, device) and device.type == "cuda",
            "deterministic": cfg.deterministic,
            "threads": cfg.threads,
        },
    }


def attention_forms(
    arch: Architecture, data: DataConfig, cfg: TrainConfig, device: torch.device
) -> dict[str, str]:
    """Which implementation the attention of each letter takes in training, by letter."""
    dtype = torch.bfloat16 if uses_bf16(cfg, device) else torch.float32
    doc = None
    if data.reset_documents:
        doc = torch.zeros(1, data.seq_len, dtype=torch.int32, device=device)
    forms = {}
    for letter, o in zip(arch.letters, arch.layer_options, strict=True):
        if isinstance(o, AttentionOptions) and letter not in forms:
            q, k, v = (
                torch.empty(
                    (1, data.seq_len, heads, o.head_dim),
                    dtype=dtype,
                    device=device,
                    requires_grad=True,
                )
                for heads in (o.n_heads, o.n_kv_heads, o.n_kv_heads)
            )
            forms[letter] = attention_form(q, k, v, window=o.window, doc_start_BL=doc)
    return forms


def commit() -> dict[str, Any]:
    """{"commit": hash, "dirty": bool} of the source checkout that this package runs from.

    Both None when it was installed from a wheel, or git is not there; ABLATE_COMMIT=<hash> in the
    environment says what the code is where it was copied without its repository.
    """
    told = os.environ.get("ABLATE_COMMIT")
    if told:
        return {"commit": told, "dirty": False}
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    head = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "ablate")
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hardware(device: torch.device) -> dict[str, Any]:
    hardware: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return hardware


def _gpu_id(device: torch.device) -> str | None:
    """Tells a GPU from others, and no one which it is: a hash of its UUID."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else hashlib.sha256(str(uuid).encode()).hexdigest()[:12]


def _cpu_name() -> str:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
