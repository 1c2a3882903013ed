"""`ablate bench kernels`: our kernels beside every installed peer, in one run on one GPU.

Before anything is timed, outputs and gradients of ours and of each peer are compared in bfloat16
with the float64 definition at a short length. Times are medians: `clock` by CUDA events around the
call (Triton's do_bench, L2 flushed), `device` the sum of the kernels' own times. The floor is the
time of moving each input and output once at the copy rate, or of the arithmetic, whichever is
longer, as measured on an H200.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ablate.data.tokens import usable_cores
from ablate.errors import UserError
from ablate.kernels.dispatch import ALIGN
from ablate.kernels.precompile import compile_together
from ablate.run import lifeline

Inputs = dict[str, Any]
Function = Callable[[Inputs], Any]
CHECK_BATCH, CHECK_LENGTH = 2, 192


@dataclass(frozen=True)
class Case:
    """One line of the bench: an operation at a size.

    inputs(batch, length): leaves that require gradients, and the rest. floor, must: milliseconds
    forward and forward+backward on one H200 (None where there is no figure).
    """

    operation: str
    size: str
    batch: int
    length: int
    inputs: Callable[[int, int], Inputs]
    ours: Function
    oracle: Function
    peers: Callable[[], dict[str, Function]]
    floor: tuple[float | None, float | None] = (None, None)
    must: tuple[float | None, float | None] = (None, None)
    tuning: tuple[str, ...] = ()
    """peers whose backward pass tunes itself for many minutes, and is left out unless asked for"""
    less: tuple[Callable[[int, int], Inputs], Function] | None = None
    """inputs and function of what `ours` does besides the operation: its times are taken off"""


@dataclass
class Row:
    """A measured line; times in milliseconds, memory in GiB, errors relative in the norm."""

    operation: str
    size: str
    who: str
    forward: float | None = None
    both: float | None = None
    forward_device: float | None = None
    both_device: float | None = None
    memory: float | None = None
    error: float | None = None
    worst_gradient: str = ""
    floor: tuple[float | None, float | None] = (None, None)
    must: tuple[float | None, float | None] = (None, None)
    failed: str = ""
    no_backward: str = ""
    """why there is a figure of the forward pass alone"""


def _randn(*shape: int, scale: float = 1.0, dtype: Any = torch.bfloat16) -> torch.Tensor:
    t = torch.randn(*shape, device="cuda", dtype=torch.float32) * scale
    return t.to(dtype).requires_grad_()


def _documents(batch: int, length: int, size: int) -> torch.Tensor | None:
    """Where documents of this size begin; None for a size of 0."""
    if not size:
        return None
    index = torch.arange(length, device="cuda", dtype=torch.int32)
    return (index // size * size).expand(batch, length).contiguous()


def _forms(
    module: str, ours: str, oracle: str, inputs: str, **options: Any
) -> tuple[Function, Function]:
    """Two functions of a module of `ablate.kernels`, on inputs that are named in order, or as
    keyword=name."""
    found = importlib.import_module(f"ablate.kernels.{module}")
    pairs = [word.partition("=") for word in inputs.split()]

    def call(fn: Callable[..., Any], t: Inputs) -> Any:
        keywords = {keyword: t[name] for keyword, _, name in pairs if name}
        return fn(*(t[name] for name, _, more in pairs if not more), **keywords, **options)

    return partial(call, getattr(found, ours)), partial(call, getattr(found, oracle))


def _installed(peers: dict[str, tuple[str, Callable[..., Any]]]) -> dict[str, Function]:
    """Of peers, each the place of a function and how it is called on the inputs, those that can be
    imported here."""
    found: dict[str, Function] = {}
    for name, (place, call) in peers.items():
        module, _, function = place.rpartition(".")
        with contextlib.suppress(ImportError, AttributeError):
            found[name] = partial(call, getattr(importlib.import_module(module), function))
    return found


def _compiled(fn: Function) -> dict[str, Function]:
    torch._dynamo.reset()
    return {"compile": torch.compile(fn, dynamic=False)}


# -- convolution ------------------------------------------------------------------------------


def _conv_inputs(batch: int, length: int, width: int, documents: int = 0) -> Inputs:
    return {
        "x": _randn(batch, length, width),
        "weight": _randn(width, 4, scale=0.3, dtype=torch.float32),
        "bias": _randn(width, scale=0.3, dtype=torch.float32),
        "doc": _documents(batch, length, documents),
    }


def _conv_torch(t: Inputs) -> Any:
    x = F.pad(t["x"].transpose(1, 2), (3, 0))
    w, b = t["weight"].to(x.dtype), t["bias"].to(x.dtype)
    return F.silu(F.conv1d(x, w.unsqueeze(1), b, groups=x.shape[1])).transpose(1, 2)


def _conv_peers() -> dict[str, Function]:
    found = _installed({
        "fla": (
            "fla.modules.causal_conv1d.causal_conv1d",
            lambda fn, t: fn(t["x"], t["weight"], t["bias"], activation="silu")[0],
        ),
        "causal-conv1d": (
            "causal_conv1d.causal_conv1d_fn",
            lambda fn, t: fn(
                t["x"].transpose(1, 2), t["weight"].to(t["x"].dtype), t["bias"].to(t["x"].dtype),
                activation="silu",
            ).transpose(1, 2),
        ),
    })  # fmt: skip
    return found | _compiled(_conv_torch)


# -- norms ------------------------------------------------------------------------------------


def _gated_inputs(batch: int, length: int, width: int = 1536) -> Inputs:
    return {
        "x": _randn(batch * length, width),
        "z": _randn(batch * length, width),
        "weight": _randn(width, dtype=torch.float32),
    }


def _gated_peers(oracle: Function) -> dict[str, Function]:
    def call(fn: Callable[..., Any], t: Inputs) -> Any:
        return fn(t["x"], t["weight"], None, z=t["z"], eps=1e-5, norm_before_gate=False)

    found = _installed({
        "mamba_ssm": ("mamba_ssm.ops.triton.layernorm_gated.rmsnorm_fn", call),
        "fla (mamba_ssm's)": ("fla.modules.norm.layernorm_gated.rmsnorm_fn", call),
    })  # fmt: skip
    return found | _compiled(oracle)


def _add_inputs(
    batch: int, length: int, width: int = 768, stream: torch.dtype = torch.bfloat16
) -> Inputs:
    return {
        "x": _randn(batch * length, width),
        "residual": _randn(batch * length, width, dtype=stream),
        "weight": _randn(width, dtype=torch.float32),
    }


def _add_peers(oracle: Function) -> dict[str, Function]:
    found = _installed({
        "fla": (
            "fla.modules.norm.layernorm.rms_norm",
            lambda fn, t: fn(t["x"], t["weight"], None, residual=t["residual"], prenorm=True),
        ),
        "liger": (
            "liger_kernel.ops.fused_add_rms_norm.LigerFusedAddRMSNormFunction",
            lambda fn, t: fn.apply(t["x"], t["residual"], t["weight"], 1e-5),
        ),
    })  # fmt: skip
    return found | _compiled(oracle)


# -- loss -------------------------------------------------------------------------------------


def _loss_inputs(batch: int, length: int) -> Inputs:
    return {
        "x": _randn(batch * length, 768),
        "weight": _randn(50304, 768, scale=0.02),
        "target": torch.randint(0, 50304, (batch * length,), device="cuda"),
    }


def _loss_torch(t: Inputs) -> Any:
    logits = F.linear(t["x"], t["weight"])
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), t["target"])


def _loss_peers() -> dict[str, Function]:
    found = _installed({
        "liger": (
            "liger_kernel.ops.fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction",
            lambda fn, t: _outputs(fn.apply(t["x"], t["weight"], t["target"]))[0],
        )
    })  # fmt: skip
    return found | _compiled(_loss_torch)


# -- feed-forward layer -----------------------------------------------------------------------


def _mlp_inputs(
    batch: int, length: int, width: int = 768, hidden: int = 3072, gated: bool = False
) -> Inputs:
    return {
        "x": _randn(batch * length, width),
        "w_in": _randn(hidden * (1 + gated), width, scale=1.5 * width**-0.5),
        "w_out": _randn(width, hidden, scale=hidden**-0.5),
    }


def _mlp_torch(gated: bool, t: Inputs) -> Any:
    h = F.linear(t["x"], t["w_in"])
    if gated:
        gate, value = h.chunk(2, -1)
        return F.linear(F.silu(gate) * value, t["w_out"])
    return F.linear(F.gelu(h), t["w_out"])


def _mlp_peers(gated: bool) -> dict[str, Function]:
    from ablate.kernels import gelu, swiglu

    act = swiglu if gated else gelu

    def apart(t: Inputs) -> Any:
        return F.linear(act(F.linear(t["x"], t["w_in"]), backend="triton"), t["w_out"])

    return {"apart": apart} | _compiled(partial(_mlp_torch, gated))


def _mlp(gated: bool) -> tuple[Function, Function, Callable[[], dict[str, Function]]]:
    # "triton": what is compared with the definition has fewer rows than are fused by themselves
    ours, _ = _forms("mlp", "mlp", "mlp", "x w_in w_out", gated=gated, backend="triton")
    return ours, partial(_mlp_torch, gated), partial(_mlp_peers, gated)


def _projection_inputs(batch: int, length: int, width: int, out: int) -> Inputs:
    return {
        "x": _randn(batch * length, width),
        "weight": _randn(out, width, scale=width**-0.5, dtype=torch.float32),
    }


def _under_autocast(fn: Callable[..., Any], t: Inputs) -> Any:
    with torch.autocast("cuda", torch.bfloat16):
        return fn(t["x"], t["weight"])


def _projection_peers() -> dict[str, Function]:
    return {"autocast": partial(_under_autocast, F.linear)}


# -- state space ------------------------------------------------------------------------------


def _rate_bias(n: int) -> torch.Tensor:
    """The inverse softplus of step sizes that are log-uniform from 0.001 to 0.1."""
    step = torch.empty(n, device="cuda").uniform_(-6.9, -2.3)
    return torch.log(torch.expm1(step.exp())).requires_grad_()


def _ssd_inputs(batch: int, length: int, heads: int, documents: int = 0) -> Inputs:
    rate = torch.empty(heads, device="cuda").uniform_(1, 16)
    bias = _rate_bias(heads)
    return {
        "x": _randn(batch, length, heads, 64),
        "dt": _randn(batch, length, heads, scale=0.5),
        "A": (-rate).requires_grad_(),
        "B": _randn(batch, length, 1, 128),
        "C": _randn(batch, length, 1, 128),
        "D": _randn(heads, dtype=torch.float32),
        "dt_bias": bias,
        "doc": _documents(batch, length, documents),
    }


def _ssd_peers() -> dict[str, Function]:
    return _installed({
        "mamba_ssm": (
            "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined",
            lambda fn, t: fn(
                t["x"], t["dt"], t["A"], t["B"], t["C"], 256, D=t["D"], dt_bias=t["dt_bias"],
                dt_softplus=True,
            ),
        )
    })  # fmt: skip


def _selective_inputs(batch: int, length: int, width: int, documents: int = 0) -> Inputs:
    bias = _rate_bias(width)
    rate = torch.arange(1.0, 17.0, device="cuda").expand(width, 16)
    return {
        "u": _randn(batch, length, width),
        "delta": _randn(batch, length, width, scale=0.5),
        "A": (-rate).contiguous().requires_grad_(),
        "B": _randn(batch, length, 16),
        "C": _randn(batch, length, 16),
        "D": _randn(width, dtype=torch.float32),
        "z": _randn(batch, length, width),
        "bias": bias,
        "doc": _documents(batch, length, documents),
    }


def _selective_peers() -> dict[str, Function]:
    def call(fn: Callable[..., Any], t: Inputs) -> Any:
        # it wants channels before time, in memory too
        u, delta, B, C, z = (t[k].transpose(1, 2) for k in ("u", "delta", "B", "C", "z"))
        return fn(
            u, delta, t["A"], B, C, t["D"], z=z, delta_bias=t["bias"], delta_softplus=True
        ).transpose(1, 2)

    return _installed(
        {"mamba_ssm": ("mamba_ssm.ops.selective_scan_interface.selective_scan_fn", call)}
    )


def _delta_inputs(
    batch: int, length: int, heads: int, keys: int, values: int, documents: int = 0
) -> Inputs:
    rate = torch.empty(heads, device="cuda").uniform_(0.01, 16)
    step = F.softplus(torch.randn(batch, length, heads, device="cuda") - 4.0)
    return {
        "q": _randn(batch, length, heads, keys),
        "k": _randn(batch, length, heads, keys),
        "v": _randn(batch, length, heads, values),
        "log_decay": (-rate * step).requires_grad_(),
        "beta": torch.rand(batch, length, heads, device="cuda").requires_grad_(),
        "doc": _documents(batch, length, documents),
    }


def _delta_peers() -> dict[str, Function]:
    return _installed({
        "fla": (
            "fla.ops.gated_delta_rule.chunk_gated_delta_rule",
            lambda fn, t: fn(
                t["q"], t["k"], t["v"], t["log_decay"], t["beta"], use_qk_l2norm_in_kernel=True
            )[0],
        )
    })  # fmt: skip


def _gla_inputs(batch: int, length: int, heads: int, documents: int = 0) -> Inputs:
    g = F.logsigmoid(torch.randn(batch, length, heads, 192, device="cuda")) / 16
    return {
        "q": _randn(batch, length, heads, 192),
        "k": _randn(batch, length, heads, 192),
        "v": _randn(batch, length, heads, 384),
        "g": g.to(torch.bfloat16).requires_grad_(),
        "doc": _documents(batch, length, documents),
    }


def _gla_peers() -> dict[str, Function]:
    return _installed(
        {"fla": ("fla.ops.gla.chunk_gla", lambda fn, t: fn(t["q"], t["k"], t["v"], t["g"])[0])}
    )


_CORE1 = "xz conv_weight conv_bias x_proj dt_proj dt_bias A_log D"


def _core1_inputs(batch: int, length: int, inner: int = 1536, rank: int = 48) -> Inputs:
    rate = torch.arange(1.0, 17.0, device="cuda").log().expand(inner, 16)
    return {
        "xz": _randn(batch, length, 2 * inner),
        "conv_weight": _randn(inner, 4, scale=0.3, dtype=torch.float32),
        "conv_bias": _randn(inner, scale=0.1, dtype=torch.float32),
        "x_proj": _randn(rank + 32, inner, scale=inner**-0.5, dtype=torch.float32),
        "dt_proj": _randn(inner, rank, scale=rank**-0.5, dtype=torch.float32),
        "dt_bias": _rate_bias(inner),
        "A_log": rate.contiguous().requires_grad_(),
        "D": _randn(inner, dtype=torch.float32),
    }


def _core1_peers() -> dict[str, Function]:
    """Its parts, one after the other, each with a backward pass of its own."""
    _, parts = _forms("mamba1_core", "mamba1_core", "mamba1_core_reference", _CORE1, backend=None)
    return {"parts": parts}


def _core_inputs(batch: int, length: int, heads: int = 24) -> Inputs:
    inner, shared = 64 * heads, 128
    used = 2 * inner + 2 * shared + heads
    return {
        "zxbcdt": _randn(batch, length, used + -used % ALIGN),  # padded as in the layer
        "conv_weight": _randn(inner + 2 * shared, 4, scale=0.3, dtype=torch.float32),
        "conv_bias": _randn(inner + 2 * shared, scale=0.1, dtype=torch.float32),
        "dt_bias": torch.empty(heads, device="cuda").uniform_(-6.0, -2.0).requires_grad_(),
        "A_log": torch.empty(heads, device="cuda").uniform_(0.0, 2.7).requires_grad_(),
        "D": _randn(heads, dtype=torch.float32),
        "norm_weight": _randn(inner, dtype=torch.float32),
    }


def _layer_inputs(batch: int, length: int, heads: int = 24, width: int = 768) -> Inputs:
    return _core_inputs(batch, length, heads) | _projected(batch, length, heads, width)


def _projected_inputs(batch: int, length: int, heads: int = 24, width: int = 768) -> Inputs:
    return {"y": _randn(batch, length, 64 * heads)} | _projected(batch, length, heads, width)


def _projected(batch: int, length: int, heads: int, width: int) -> Inputs:
    inner = 64 * heads
    return {
        "projection": _randn(width, inner, scale=inner**-0.5, dtype=torch.float32),
        "residual": _randn(batch, length, width, dtype=torch.float32),
        "next_norm": _randn(width, dtype=torch.float32),
    }


def _layer(apart: bool, exact: bool, t: Inputs) -> Any:
    """A Mamba-2 layer after its in-projection, with the norm that follows; apart: as it is trained,
    the core's norm divides where the residual is added. exact: by the definitions."""
    kernels = importlib.import_module("ablate.kernels")
    names = ["zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight"]
    backend = "reference" if exact else None
    options: dict[str, Any] = {"head_dim": 64, "n_groups": 1, "d_state": 128, "backend": backend}
    inputs, projection = [t[n] for n in names], t["projection"]
    with torch.autocast("cuda", torch.bfloat16, enabled=not exact):
        if not apart:
            out = kernels.linear(kernels.mamba2_core(*inputs, **options), projection)
            more: dict[str, Any] = {}
        else:
            out, squares = kernels.mamba2_core(*inputs, **options, projection_DI=projection)
            more = {"squares_xS": squares, "squares_of": projection.shape[-1]}
        return kernels.rms_norm(
            out, t["next_norm"], residual=t["residual"], backend=backend, **more
        )


def _without_core(t: Inputs) -> Any:
    """What `_layer` does after the core: cuBLAS's product, the residual and the norm."""
    kernels = importlib.import_module("ablate.kernels")
    with torch.autocast("cuda", torch.bfloat16):
        out = kernels.linear(t["y"], t["projection"])
        return kernels.rms_norm(out, t["next_norm"], residual=t["residual"])


def _layer_case(
    size: str, batch: int, must: float | None = None, apart: bool = False, **options: int
) -> Case:
    return Case(
        "mamba2_core", size, batch, 2048, partial(_layer_inputs, **options),
        partial(_layer, apart, False), partial(_layer, apart, True), dict, must=(None, must),
        less=(partial(_projected_inputs, **options), _without_core),
    )  # fmt: skip


def _core_peers() -> dict[str, Function]:
    return _installed({
        "mamba_ssm": (
            "mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined",
            lambda fn, t: fn(
                t["zxbcdt"], t["conv_weight"], t["conv_bias"], t["dt_bias"], -torch.exp(t["A_log"]),
                t["D"], 256, rmsnorm_weight=t["norm_weight"], rmsnorm_eps=1e-5, headdim=64,
            ),
        )
    })  # fmt: skip


def _cases() -> list[Case]:
    conv = _forms("conv1d", "causal_conv1d", "causal_conv1d_reference",
                  "x weight bias doc_start_BL=doc")  # fmt: skip
    gated = _forms("norm", "gated_rms_norm", "gated_rms_norm_reference", "x z weight")
    add = _forms("norm", "rms_norm", "rms_norm_reference", "x weight residual=residual")
    loss, _ = _forms("cross_entropy", "linear_cross_entropy", "linear_cross_entropy_reference",
                     "x weight target")  # fmt: skip
    ssd = _forms("ssd", "ssd", "ssd_recurrent",
                 "x dt A B C D dt_bias_H=dt_bias doc_start_BL=doc", dt_softplus=True)  # fmt: skip
    scan = _forms("selective_scan", "selective_scan", "selective_scan_recurrent",
                  "u delta A B C D z_BLD=z delta_bias_D=bias doc_start_BL=doc",
                  delta_softplus=True)  # fmt: skip
    delta = _forms("gated_delta_rule", "gated_delta_rule", "gated_delta_rule_recurrent",
                   "q k v log_decay beta doc_start_BL=doc", normalize_qk=True)  # fmt: skip
    gla = _forms("gla", "gla", "gla_recurrent", "q k v g doc_start_BL=doc")
    core = _forms("mamba2_core", "mamba2_core", "mamba2_core_reference",
                  "zxbcdt conv_weight conv_bias dt_bias A_log D norm_weight",
                  head_dim=64, n_groups=1, d_state=128)  # fmt: skip
    core1 = _forms("mamba1_core", "mamba1_core", "mamba1_core_reference", _CORE1)
    linear = partial(_under_autocast, importlib.import_module("ablate.kernels.linear").linear)
    projection = (linear, lambda t: F.linear(t["x"], t["weight"]), _projection_peers)
    window = _forms("attention", "attention", "attention_reference",
                    "q k v window=window doc_start_BL=doc")  # fmt: skip
    none: Callable[[], dict[str, Function]] = dict
    return [
        Case("causal_conv1d", "B=8 L=4096 D=1792", 8, 4096, partial(_conv_inputs, width=1792),
             *conv, _conv_peers, (0.055, 0.138), (0.078, 0.25)),
        Case("causal_conv1d", "documents of 64", 8, 4096,
             partial(_conv_inputs, width=1792, documents=64), *conv, none),
        Case("gated_rms_norm", "M=32768 D=1536", 8, 4096, _gated_inputs, *gated,
             partial(_gated_peers, gated[1]), (0.070, 0.19), (0.085, 0.32)),
        Case("gated_rms_norm", "M=65536 D=576", 32, 2048, partial(_gated_inputs, width=576),
             *gated, none, (0.053, 0.14)),
        Case("rms_norm + residual", "M=32768 D=768", 8, 4096, _add_inputs, *add,
             partial(_add_peers, add[1]), (0.047, 0.094)),
        Case("rms_norm + residual", "M=65536 D=288, float32 stream", 32, 2048,
             partial(_add_inputs, width=288, stream=torch.float32), *add, none, (0.053, 0.123)),
        Case("linear_cross_entropy", "M=32768 D=768 V=50304", 8, 4096, _loss_inputs, loss,
             _loss_torch, _loss_peers, (None, 14.2), (None, 14.5)),
        # of products alone, at 790 TFLOP/s
        Case("linear", "M=32768 D=768 E=3352", 8, 4096,
             partial(_projection_inputs, width=768, out=3352), *projection, (0.214, 0.641)),
        Case("linear", "M=32768 D=1536 E=768", 8, 4096,
             partial(_projection_inputs, width=1536, out=768), *projection, (0.098, 0.294)),
        Case("mlp", "GELU M=32768 D=768 H=3072", 8, 4096, _mlp_inputs, *_mlp(gated=False),
             (0.391, 1.174)),
        Case("mlp", "SwiGLU M=65536 D=288 H=768", 32, 2048,
             partial(_mlp_inputs, width=288, hidden=768, gated=True), *_mlp(gated=True),
             (0.110, 0.330)),
        Case("ssd", "B=8 L=4096 H=24 P=64 N=128", 8, 4096, partial(_ssd_inputs, heads=24), *ssd,
             _ssd_peers, (0.051, 0.151), (0.22, 0.70)),
        Case("ssd", "H=64", 8, 4096, partial(_ssd_inputs, heads=64), *ssd, _ssd_peers,
             (0.130, 0.393), (0.55, 1.8)),
        Case("ssd", "B=4 L=1024 H=6", 4, 1024, partial(_ssd_inputs, heads=6), *ssd, _ssd_peers),
        Case("ssd", "B=1 L=131072 H=24", 1, 131072, partial(_ssd_inputs, heads=24), *ssd, none),
        Case("ssd", "documents of 500", 8, 4096, partial(_ssd_inputs, heads=24, documents=500),
             *ssd, none),
        Case("selective_scan", "B=8 L=4096 D=1536 N=16", 8, 4096,
             partial(_selective_inputs, width=1536), *scan, _selective_peers, (0.19, 0.57),
             (0.68, 3.3)),
        Case("selective_scan", "B=4 L=1024 D=384", 4, 1024, partial(_selective_inputs, width=384),
             *scan, _selective_peers),
        Case("selective_scan", "B=1 L=131072 D=1536", 1, 131072,
             partial(_selective_inputs, width=1536), *scan, none),
        Case("selective_scan", "documents of 500", 8, 4096,
             partial(_selective_inputs, width=1536, documents=500), *scan, none),
        Case("gated_delta_rule", "B=8 L=4096 H=6 K=128 V=256", 8, 4096,
             partial(_delta_inputs, heads=6, keys=128, values=256), *delta, _delta_peers,
             (0.071, 0.19)),
        Case("gated_delta_rule", "H=12 K=64 V=128", 8, 4096,
             partial(_delta_inputs, heads=12, keys=64, values=128), *delta, _delta_peers,
             (0.071, 0.19)),
        Case("gated_delta_rule", "H=6 K=256 V=512", 4, 4096,
             partial(_delta_inputs, heads=6, keys=256, values=512), *delta, _delta_peers,
             (0.071, 0.19)),
        Case("gated_delta_rule", "B=4 L=1024 H=4 K=64 V=128", 4, 1024,
             partial(_delta_inputs, heads=4, keys=64, values=128), *delta, _delta_peers),
        Case("gated_delta_rule", "documents of 500", 8, 4096,
             partial(_delta_inputs, heads=6, keys=128, values=256, documents=500), *delta, none),
        Case("gla", "B=8 L=4096 H=4 K=192 V=384", 8, 4096, partial(_gla_inputs, heads=4), *gla,
             _gla_peers, (0.082, 0.222), tuning=("fla",)),
        Case("gla", "B=4 L=1024 H=1", 4, 1024, partial(_gla_inputs, heads=1), *gla, _gla_peers,
             tuning=("fla",)),
        Case("gla", "B=1 L=131072 H=4", 1, 131072, partial(_gla_inputs, heads=4), *gla, none),
        Case("gla", "documents of 500", 8, 4096, partial(_gla_inputs, heads=4, documents=500),
             *gla, none),
        Case("mamba1_core", "B=16 L=2048 width 768", 16, 2048, _core1_inputs, *core1,
             _core1_peers),
        Case("mamba2_core", "B=16 L=2048 width 768", 16, 2048, _core_inputs, *core, _core_peers,
             (None, None), (None, 1.0)),
        Case("mamba2_core", "B=32 L=2048 width 288", 32, 2048, partial(_core_inputs, heads=9),
             *core, none),
        # the whole layer less its projection and the norm after it
        _layer_case("in a layer, width 768", 16, 1.0),
        _layer_case("in a layer as trained, width 768", 16, 1.0, apart=True),
        _layer_case("in a layer, width 288", 32, heads=9, width=288),
        _layer_case("in a layer as trained, width 288", 32, apart=True, heads=9, width=288),
        Case("attention", "window 2048 H=12 P=64", 8, 4096,
             partial(_window_inputs, heads=12, head_dim=64, window=2048), *window, _window_peers,
             (0.20, 0.69), (0.45, 1.85)),
        Case("attention", "window 1024 H=16 P=128", 8, 4096,
             partial(_window_inputs, heads=16, head_dim=128, window=1024), *window, _window_peers,
             (0.31, 1.08), (0.70, 2.35)),
        Case("attention", "documents of 500 H=12 P=64", 8, 4096,
             partial(_window_inputs, heads=12, head_dim=64, window=None, documents=500), *window,
             _window_peers),
    ]  # fmt: skip


# -- attention --------------------------------------------------------------------------------


def _window_inputs(
    batch: int, length: int, heads: int, head_dim: int, window: int | None, documents: int = 0
) -> Inputs:
    return {
        **{name: _randn(batch, length, heads, head_dim) for name in "qkv"},
        # the short inputs that are compared with the definition get a window inside them
        "window": length // 3 if window and window >= length else window,
        "doc": _documents(batch, length, documents),
    }


def _window_peers() -> dict[str, Function]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def flex() -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        masks: dict[tuple[int, int | None], Any] = {}

        def run(t: Inputs) -> Any:
            length, window, doc = t["q"].shape[1], t["window"], t["doc"]
            if (length, window) not in masks:

                def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
                    mask = j <= i
                    mask = mask if window is None else mask & (j > i - window)
                    return mask if doc is None else mask & (j >= doc[b, i])

                batch = None if doc is None else doc.shape[0]
                masks[length, window] = create_block_mask(visible, batch, None, length, length)
            q, k, v = (t[n].transpose(1, 2) for n in ("q", "k", "v"))
            y: Any = compiled(q, k, v, block_mask=masks[length, window])
            return y.transpose(1, 2)

        return run

    def full(*backends: Any) -> Function:
        def run(t: Inputs) -> Any:
            q, k, v = (t[n].transpose(1, 2) for n in ("q", "k", "v"))
            with sdpa_kernel(list(backends)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return run

    return {
        "flex": flex(),
        "full cudnn": full(SDPBackend.CUDNN_ATTENTION),
        "full flash": full(SDPBackend.FLASH_ATTENTION),
    }


# -- measuring --------------------------------------------------------------------------------


def _leaves(t: Inputs) -> dict[str, torch.Tensor]:
    return {k: v for k, v in t.items() if isinstance(v, torch.Tensor) and v.requires_grad}


def _outputs(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _gradients(fn: Function, t: Inputs, backward: bool = True) -> dict[str, torch.Tensor]:
    """Outputs and, with `backward`, the gradients of a random projection of them."""
    outs = _outputs(fn(t))
    outputs = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    if not backward:
        return outputs
    generator = torch.Generator("cuda").manual_seed(1)
    total = torch.zeros((), device="cuda")
    for out in outs:
        weight = torch.randn(out.shape, generator=generator, device="cuda", dtype=torch.float32)
        total = total + (out * weight.to(out.dtype)).sum(dtype=torch.promote_types(
            out.dtype, torch.float32))  # fmt: skip
    names = _leaves(t)
    found = dict(zip(names, torch.autograd.grad(total, list(names.values())), strict=True))
    return found | outputs


def _errors(fn: Function, case: Case, backward: bool) -> tuple[float, str]:
    """The largest relative error among outputs and gradients, and whose it is."""
    torch.manual_seed(0)
    t = case.inputs(CHECK_BATCH, CHECK_LENGTH)
    exact = {
        k: v.detach().double().requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for k, v in t.items()
    }
    want = _gradients(case.oracle, exact, backward)
    got = _gradients(fn, t, backward)
    errors = {}
    for name, ref in want.items():
        difference = (got[name].double() - ref).norm() / ref.norm().clamp(min=1e-30)
        value = float(difference)
        errors[name] = value if value == value else float("inf")
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def _device_ms(fn: Callable[[], Any], repeats: int = 5) -> float:
    from torch.profiler import ProfilerActivity, profile

    fn()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            fn()
        torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in recorded.key_averages()) / repeats / 1000


def _compile_ahead(cases: Sequence[Case]) -> None:
    """Our kernels for all cases together; what goes wrong here is told by the case's own row."""
    with compile_together(usable_cores()) as dry_run, dry_run():
        for case in cases:
            for size in ((CHECK_BATCH, CHECK_LENGTH), (case.batch, case.length)):
                with contextlib.suppress(Exception):
                    _gradients(case.ours, case.inputs(*size))


def _measure(case: Case, who: str, fn: Function, milliseconds: int, tune: bool = False) -> Row:
    backward = tune or who not in case.tuning
    row = _timed(case, who, fn, milliseconds, backward)
    if row.failed and backward:
        # fla refuses the gated delta rule's backward pass where Triton gets it wrong; what its
        # forward pass takes is still worth knowing
        refused, row = row.failed, _timed(case, who, fn, milliseconds, backward=False)
        if not row.failed:
            row.no_backward = refused
    return row


def _timed(case: Case, who: str, fn: Function, milliseconds: int, backward: bool) -> Row:
    row = Row(case.operation, case.size, who, floor=case.floor, must=case.must)
    try:
        # torch's own, of which a second shape would compile twice, and attention without a window
        if who != "compile" and not who.startswith("full"):
            row.error, row.worst_gradient = _errors(fn, case, backward)
        figures = _figures(case, case.inputs, fn, milliseconds, backward)
        if case.less is not None:
            besides = _figures(case, *case.less, milliseconds, backward)
            del figures["memory"]  # peaks cannot be taken off each other
            figures = {name: value - besides[name] for name, value in figures.items()}
        for name, value in figures.items():
            setattr(row, name, value)
    except Exception as problem:
        row.failed = f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}"
    finally:
        torch.cuda.empty_cache()
    return row


def _figures(
    case: Case,
    inputs: Callable[[int, int], Inputs],
    fn: Function,
    milliseconds: int,
    backward: bool,
) -> dict[str, float]:
    """Times and memory, by the names of `Row`."""
    from triton.testing import do_bench

    torch.manual_seed(0)
    t = inputs(case.batch, case.length)
    leaves = list(_leaves(t).values())
    with torch.no_grad():
        grads = [torch.randn_like(o) for o in _outputs(fn(t))]

    def forward() -> None:
        with torch.no_grad():
            fn(t)

    def both() -> None:
        torch.autograd.grad(_outputs(fn(t)), leaves, grads)

    found = {}
    for name, call in (("forward", forward), ("both", both))[: 1 + backward]:
        call()
        found[name] = do_bench(call, warmup=10, rep=milliseconds, return_mode="median")
        found[f"{name}_device"] = _device_ms(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both() if backward else forward()
    found["memory"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return found


def _chosen(only: str) -> list[Case]:
    """Raises UserError where a word is in no case."""
    every = _cases()
    words = [word.strip() for word in only.split(",") if word.strip()]
    for word in words:
        if not any(word in f"{c.operation} {c.size}" for c in every):
            known = ", ".join(dict.fromkeys(c.operation for c in every))
            raise UserError(f"--only is '{word}', which is in no operation and no size of {known}")
    named = [c for c in every if any(word in f"{c.operation} {c.size}" for word in words)]
    return named if words else every


def _doubled(case: Case) -> list[Case]:
    """The case, with twice the length, and with twice the batch."""
    bare = replace(case, peers=dict, floor=(None, None), must=(None, None))
    return [
        case,
        replace(bare, size=f"{case.size}, length doubled", length=2 * case.length),
        replace(bare, size=f"{case.size}, batch doubled", batch=2 * case.batch),
    ]


def bench_kernels(
    only: str = "", peers: str = "all", milliseconds: int = 100, tune: bool = False,
    double: bool = False,
) -> Iterator[Row]:  # fmt: skip
    """Measures the cases whose operation or size contains a word of `only`, separated by commas;
    yields one row at a time, ours first.

    peers: "all", "none", or names separated by commas. tune: wait for those that tune themselves.
    double: also with twice the length and with twice the batch.
    """
    cases = _chosen(only)
    if double:
        cases = [c for case in cases for c in _doubled(case)]
    _compile_ahead(cases)
    for case in cases:
        yield _measure(case, "ours", case.ours, milliseconds)
        if peers == "none":
            continue
        for name, fn in case.peers().items():
            if peers == "all" or any(word in name for word in peers.split(",")):
                yield _measure(case, name, fn, milliseconds, tune)


def first_calls(only: str = "") -> Iterator[tuple[Case, float | None, float | None]]:
    """Seconds of the first forward and backward pass of each operation at its first size, in a new
    process with an empty cache: by itself, where the kernels of a pass compile at the same time in
    operations of several (`define_op`), and with those of both passes (`compile_together`), as in
    training. None where that failed."""
    cases = {case.operation: case for case in reversed(_chosen(only))}
    for case in reversed(cases.values()):
        yield case, _first_call(case, together=False), _first_call(case, together=True)


def _first_call(case: Case, *, together: bool) -> float | None:
    code = (
        "from ablate.bench.kernels import time_first_call; from ablate.run import die_with_parent; "
        f"die_with_parent(); print(time_first_call{(case.operation, case.size, together)!r})"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache, lifeline() as stdin:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdin=stdin, stdout=subprocess.PIPE,
            text=True, check=False,
        )  # fmt: skip
    return None if done.returncode else float(done.stdout.split()[-1])


def time_first_call(operation: str, size: str, together: bool) -> float:
    """Seconds of this process's first call: its kernels' imports and compilation, and itself.

    Not what torch's first backward pass of any kind imports, which is SymPy.
    """
    case = next(c for c in _cases() if (c.operation, c.size) == (operation, size))
    t = case.inputs(case.batch, case.length)
    leaves = list(_leaves(t).values())
    one = torch.ones(2, 2, device="cuda", requires_grad=True)
    torch.autograd.grad([one @ one], [one], [torch.ones_like(one)])
    torch.cuda.synchronize()

    def both() -> None:
        outs = _outputs(case.ours(t))
        torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])

    begun = time.perf_counter()
    if together:
        with compile_together(usable_cores()) as dry_run:
            with dry_run():
                both()
            both()
    else:
        both()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(rows: list[Row]) -> str:
    """Markdown: milliseconds as forward / forward+backward, ratios of the clock time."""
    lines = [
        "| operation | size | who | clock ms | device ms | / floor | / must | GiB | worst error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r.failed:
            lines.append(f"| {r.operation} | {r.size} | {r.who} | {r.failed} | | | | | |")
            continue

        def ratio(to: tuple[float | None, float | None], r: Row = r) -> str:
            pairs = zip((r.forward, r.both), to, strict=True)
            return " / ".join(_number(a / b, 2) if a and b else "-" for a, b in pairs)

        error = "-" if r.error is None else f"{r.error:.1e} ({r.worst_gradient})"
        if r.no_backward:
            error += f"; no backward pass: {r.no_backward}"
        lines.append(
            f"| {r.operation} | {r.size} | {r.who} | {_number(r.forward)} / {_number(r.both)} "
            f"| {_number(r.forward_device)} / {_number(r.both_device)} | {ratio(r.floor)} "
            f"| {ratio(r.must)} | {_number(r.memory, 2)} | {error} |"
        )
    return "\n".join(lines)


def environment() -> dict[str, str]:
    """What the figures were measured on."""
    import triton

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }


def run(args: list[str]) -> int:
    """The command `ablate bench kernels`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="ablate bench kernels", description="Our kernels beside every installed peer."
    )
    parser.add_argument(
        "--only", default="", help="words of operations or sizes (conv,norm,window)"
    )
    parser.add_argument("--peers", default="all", help="all, none, or names (fla,liger,compile)")
    parser.add_argument("--ms", type=int, default=100, help="time spent on each figure")
    parser.add_argument(
        "--tune", action="store_true", help="wait for peers that tune themselves for minutes"
    )
    parser.add_argument(
        "--cold", action="store_true", help="seconds of first calls with an empty cache instead"
    )
    parser.add_argument(
        "--double", action="store_true", help="also with the length and with the batch doubled"
    )
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    options = parser.parse_args(args)
    if not torch.cuda.is_available():
        print("ablate bench kernels needs a CUDA GPU, and this machine has none.", file=sys.stderr)
        return 2
    print(", ".join(f"{k} {v}" for k, v in environment().items()), flush=True)
    if options.cold:
        print(
            "| operation | size | first call, s | kernels compiled together, s |\n|---|---|---|---|"
        )
        seconds = {}
        for case, alone, together in first_calls(options.only):
            cells = (_number(alone, 1), _number(together, 1))
            print(f"| {case.operation} | {case.size} | {' | '.join(cells)} |", flush=True)
            seconds[case.operation] = {"size": case.size, "alone": alone, "together": together}
        _write(options.json, first_calls=seconds)
        return int(any(found["alone"] is None for found in seconds.values()))
    rows = []
    for row in bench_kernels(options.only, options.peers, options.ms, options.tune, options.double):
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    print("\n" + table(rows))
    _write(options.json, rows=[vars(r) for r in rows])
    return 0


def _write(path: Path | None, **figures: Any) -> None:
    if path is not None:
        path.write_text(json.dumps({"environment": environment(), **figures}, indent=1))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
