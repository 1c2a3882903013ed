"""Comparing an operation with its oracle: values and the gradient of every input, norm-wise."""

from __future__ import annotations

import pytest
import torch

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpret),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """Norm of the difference over the reference's norm; infinite when anything is not finite."""
    out, ref = out.double().cpu(), ref.double().cpu()
    if not bool(torch.isfinite(out).all()):
        return float("inf")
    return float((out - ref).norm() / ref.norm().clamp(min=1e-12))


def leaves(tensors: dict, dtype: torch.dtype | None = None, device: str | None = None) -> dict:
    """Fresh leaves that require gradients (floats only); None stays."""
    result = {}
    for name, t in tensors.items():
        if t is None or not t.is_floating_point():
            result[name] = t if t is None else t.to(device=device)
        else:
            new = t.detach().to(device=device, dtype=dtype or t.dtype).clone()
            result[name] = new.requires_grad_(t.requires_grad)
    return result


def run(fn, tensors: dict, seed: int = 0, **options) -> tuple[list, dict]:
    """Outputs of fn(**tensors) and every leaf's gradient for fixed random output gradients."""
    out = fn(**tensors, **options)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for o in outs:
        weight = torch.randn(o.shape, generator=generator, dtype=torch.float64)
        total = total + (o * weight.to(o.device, o.dtype)).sum()
    total.backward()
    grads = {k: t.grad for k, t in tensors.items() if t is not None and t.requires_grad}
    return [o.detach() for o in outs], grads


def compare(
    fn, oracle, tensors: dict, *, limit: float, dtype=torch.float64, device=None, **options
):
    """Asserts that fn in `dtype` agrees with the oracle in float64 on the same rounded inputs."""
    rounded = leaves(tensors, dtype)
    exact_outs, exact = run(oracle, leaves(rounded, torch.float64), **options)
    outs, grads = run(fn, leaves(rounded, device=device), **options)
    for i, (out, ref) in enumerate(zip(outs, exact_outs, strict=True)):
        assert out.shape == ref.shape
        assert error(out, ref) <= limit, f"output {i}: {error(out, ref):.2e} > {limit:.0e}"
    for name, ref in exact.items():
        assert grads[name] is not None, f"no gradient for {name}"
        assert error(grads[name], ref) <= limit, (
            f"gradient of {name}: {error(grads[name], ref):.2e} > {limit:.0e}"
        )


# --- promises of every kernel, on a GPU: fn(tensors) is a scalar --------------------------------


def gradients(fn, tensors: dict) -> list[torch.Tensor]:
    """The scalar fn(tensors), and the gradient of every tensor that wants one.

    Without the graph, whose nodes would tie a later capture to this call's stream.
    """
    loss = fn(tensors)
    wanted = [v for v in tensors.values() if v.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def assert_repeats(fn, tensors: dict) -> None:
    """Two runs agree bit for bit."""
    for a, b in zip(gradients(fn, tensors), gradients(fn, tensors), strict=True):
        assert torch.equal(a, b)


def assert_compiles_whole(fn, tensors: dict) -> None:
    """torch.compile takes it without a break in the graph."""
    compiled = torch.compile(fn, fullgraph=True)
    for a, b in zip(gradients(compiled, tensors), gradients(fn, tensors), strict=True):
        assert error(a, b) < 1e-2


def assert_replays(fn, tensors: dict) -> None:
    """A CUDA graph captures it, and its replay gives the same bits."""
    want = gradients(fn, tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients(fn, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(fn, tensors)
    for g in got:
        g.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
