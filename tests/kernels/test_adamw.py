"""One launch of AdamW and the total norm against float64 and torch's fused kernel."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from _check import DEVICES, error

pytest.importorskip("triton")

from ablate.kernels import adamw_triton
from ablate.kernels.adamw_triton import BLOCK
from ablate.train import optim

on_devices = pytest.mark.parametrize("device", DEVICES)
SIZES = [(1,), (BLOCK - 1,), (BLOCK,), (3, 683), (5, 7), (2, BLOCK), (0,)]
BETAS, EPS, CLIP = (0.9, 0.999), 1e-8, 1.0


@pytest.fixture(autouse=True)
def _on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "use_triton", lambda backend, *tensors, supported: supported)


def parameters(device: str) -> list[torch.nn.Parameter]:
    """The last one begins where no wide load can."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in SIZES]
    tensors += [torch.randn(BLOCK + 9, generator=generator)]
    moved = [t.to(device) for t in tensors]
    moved[-1] = moved[-1][1:]
    return [torch.nn.Parameter(t) for t in moved]


def draw(params: list[torch.nn.Parameter], step: int) -> None:
    """Gradients from far below the norm that is clipped to, to far above it."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        size = 10.0 ** (step % 4 - 3) / 20
        p.grad = (size * torch.randn(p.shape, generator=generator)).to(p)
    p, grad = params[5], params[5].grad.flatten()  # this gradient too begins where no wide load can
    p.grad = torch.cat([grad[:1], grad])[1:].view_as(p)


def groups(params: list[torch.nn.Parameter]) -> list[dict]:
    return [
        {"params": params[:3], "weight_decay": 0.1},
        {"params": params[3:], "weight_decay": 0.0, "eps": 1e-6},
    ]


def ours(params: list[torch.nn.Parameter], device: str) -> optim.AdamW:
    lr = torch.tensor(0.01, device=device)
    return optim.AdamW(
        groups(params), lr=lr, betas=BETAS, eps=EPS, fused=True, capturable=device == "cuda"
    )


class Exact:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.p = [p.detach().double().cpu() for p in params]
        self.m = [torch.zeros_like(p) for p in self.p]
        self.v = [torch.zeros_like(p) for p in self.p]
        self.steps = 0

    def step(self, params: list[torch.nn.Parameter], lr: float) -> float:
        """Returns the norm before clipping."""
        self.steps += 1
        grads = [p.grad.double().cpu() for p in params]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        for i, grad in enumerate(grads):
            decay, eps = (0.1, EPS) if i < 3 else (0.0, 1e-6)
            g = grad * min(1.0, CLIP / norm)
            self.m[i] = BETAS[0] * self.m[i] + (1 - BETAS[0]) * g
            self.v[i] = BETAS[1] * self.v[i] + (1 - BETAS[1]) * g * g
            m, v = (x / (1 - b**self.steps) for x, b in zip((self.m[i], self.v[i]), BETAS))  # noqa: B905
            self.p[i] = self.p[i] - lr * (decay * self.p[i] + m / (v.sqrt() + eps))
        return norm


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().cpu().double().flatten() for t in tensors])


def state(params, optimizer, key: str) -> torch.Tensor:
    return flat(optimizer.state[p][key] for p in params)


@on_devices
@pytest.mark.parametrize("at_once", [None, 2])
def test_steps_are_as_near_to_float64_as_torchs(
    device: str, at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if at_once:  # as if there were more blocks and tensors than the program between takes at once
        monkeypatch.setattr(adamw_triton, "WIDTH", at_once)
        monkeypatch.setattr(adamw_triton, "TENSORS", at_once)
    params, twins = parameters(device), parameters(device)
    optimizer, theirs, exact = ours(params, device), ours(twins, device), Exact(params)
    loss = torch.ones((), device=device)
    for step in range(6):
        lr = 0.01 / (step + 1)
        for which in (params, twins):
            draw(which, step)
        for o in (optimizer, theirs):
            optim.set_lr(o, lr)
        norm, bad = optimizer.clipped_step(loss, CLIP)
        wide = exact.step(params, torch.tensor(lr).item())
        assert float(norm) == pytest.approx(wide, rel=1e-6)
        assert not bad
        theirs.grad_scale = torch.tensor(max(wide / CLIP, 1.0), device=device)
        theirs.found_inf = torch.zeros((), device=device)
        theirs.step()
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=2e-6, atol=2e-7)
    assert error(flat(params), flat(exact.p)) <= 1.1 * error(flat(twins), flat(exact.p))
    for key, want in (("exp_avg", exact.m), ("exp_avg_sq", exact.v)):
        found, torchs = (state(*x, key) for x in ((params, optimizer), (twins, theirs)))
        assert error(found, flat(want)) <= max(1.5 * error(torchs, flat(want)), 2e-7)
    assert state(params, optimizer, "step").tolist() == [6.0] * len(params)


@on_devices
@pytest.mark.parametrize("bad", ["gradient", "loss", "norm"])
def test_a_skipped_step_changes_nothing(device: str, bad: str) -> None:
    params = parameters(device)
    optimizer = ours(params, device)
    draw(params, 0)
    optimizer.clipped_step(torch.ones((), device=device), CLIP)
    before = copy.deepcopy([params, [optimizer.state[p] for p in params]])
    if bad == "gradient":
        params[3].grad[0, 0] = math.nan
    if bad == "norm":
        params[3].grad[0, 0] = 3e19  # its square is infinite
    loss = torch.tensor(math.inf if bad == "loss" else 1.0, device=device)
    norm, skipped = optimizer.clipped_step(loss, CLIP)
    assert skipped
    assert skipped.dtype == torch.bool
    assert bool(norm.isfinite()) == (bad == "loss")
    for p, old, moments in zip(params, *before, strict=True):
        assert torch.equal(p, old)
        assert all(torch.equal(t, moments[key]) for key, t in optimizer.state[p].items())


@on_devices
def test_gradients_of_zero_and_steps_that_differ(device: str) -> None:
    params = parameters(device)
    optimizer, exact = ours(params, device), Exact(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    norm, _ = optimizer.clipped_step(torch.ones((), device=device), CLIP)
    assert norm == 0
    assert error(flat(params[3:]), flat(exact.p[3:])) == 0
    optimizer.state[params[0]]["step"].fill_(41)  # as a checkpoint may have it
    optimizer.clipped_step(torch.ones((), device=device), CLIP)
    assert state(params, optimizer, "step").tolist() == [42.0] + [2.0] * (len(params) - 1)


@on_devices
def test_gradients_that_are_clipped_to_nothing_still_make_a_step(device: str) -> None:
    params = parameters(device)
    optimizer, before = ours(params, device), copy.deepcopy(params)
    for p in params:
        p.grad = torch.full_like(p, 1e17)
    _, bad = optimizer.clipped_step(torch.ones((), device=device), 1e-30)
    assert not bad
    assert state(params, optimizer, "step").tolist() == [1.0] * len(params)
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        torch.testing.assert_close(p, old * (1 - 0.01 * 0.1) if i < 3 else old)


@on_devices
@pytest.mark.parametrize("odd", ["no gradient", "transposed", "float64"])
def test_what_is_not_for_our_kernels_is_for_torchs(device: str, odd: str) -> None:
    params, twins = parameters(device), parameters(device)
    for which in (params, twins):
        if odd != "no gradient":
            which[3] = which[3].detach().t() if odd == "transposed" else which[3].detach().double()
            which[3].requires_grad_()
    optimizer, theirs = ours(params, device), ours(twins, device)
    loss = torch.ones((), device=device)
    for step in range(3):
        for which in (params, twins):
            draw(which, step)
            which[3].grad = torch.ones_like(which[3]) / 100
            if odd == "no gradient" and step == 1:  # and comes back, with its count behind
                which[3].grad = None
        norm, _ = optimizer.clipped_step(loss, CLIP)
        theirs.grad_scale, theirs.found_inf = (norm / CLIP).clamp(min=1.0).float(), loss * 0
        theirs.step()
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=2e-6, atol=2e-7)


@on_devices
def test_two_runs_agree_bit_for_bit(device: str) -> None:
    found = []
    for _ in range(2):
        params = parameters(device)
        optimizer = ours(params, device)
        for step in range(3):
            draw(params, step)
            norm, _ = optimizer.clipped_step(torch.ones((), device=device), CLIP)
        found.append((norm, flat(params), state(params, optimizer, "exp_avg_sq")))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
def test_graphs_read_gradients_of_their_own_and_the_learning_rate_of_the_moment() -> None:
    """Two graphs of one optimiser, with ordinary steps before, between and after them."""
    params, twins = parameters("cuda"), parameters("cuda")
    optimizer, plain = ours(params, "cuda"), ours(twins, "cuda")
    loss = torch.ones((), device="cuda")
    graphs: list[tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = []
    for step in range(12):
        lr = 0.01 / (step + 1)
        for which, optimiser in ((params, optimizer), (twins, plain)):
            draw(which, step)
            optim.set_lr(optimiser, lr)
        plain.clipped_step(loss, CLIP)
        if step < 6 and step % 3 == 2:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                _, bad = optimizer.clipped_step(loss, CLIP)
            graphs.append((graph, [p.grad for p in params]))
        if step % 3 == 0:
            optimizer.clipped_step(loss, CLIP)
        else:
            graph, read = graphs[step % len(graphs)] if graphs else (None, [])
            for to, p in zip(read, params, strict=False):
                to.copy_(p.grad)
            optimizer.clipped_step(loss, CLIP) if graph is None else graph.replay()
        for p, twin in zip(params, twins, strict=True):
            assert torch.equal(p, twin)
    assert not bad
    graph = torch.cuda.CUDAGraph()
    optimizer._spare = None
    with pytest.raises(RuntimeError, match="ordinary step"), torch.cuda.graph(graph):
        optimizer.clipped_step(loss, CLIP)


@pytest.mark.compile
@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_compiles(arch: int) -> None:
    from _compile import assert_fits, resources

    table = {"table_ptr": "*i64", "block_ptr": "*i32"}
    wide = {adamw_triton.squares_kernel: (1, "square"), adamw_triton.update_kernel: (4, "factor")}
    for kernel, (tensors, name) in wide.items():
        found = resources(
            kernel, table | {f"{name}_ptr": "*fp32"}, {"BLOCK": BLOCK}, arch=arch,
            num_warps=adamw_triton.WARPS,
        )  # fmt: skip
        assert_fits(found, arch, spills=0)
        loads = re.findall(r"ld\.global\S*v4\.b32", found.ptx)
        assert len(loads) == tensors * BLOCK // adamw_triton.WARPS // 32 // 4
    types = {"table_ptr": "*i64", "bad_ptr": "*i1", "blocks": "i32", "tensors": "i32"}
    types |= dict.fromkeys(("square_ptr", "loss_ptr", "norm_ptr", "factor_ptr"), "*fp32")
    found = resources(
        adamw_triton.prepare_kernel, types | {"clip": "fp32"},
        {"WIDTH": adamw_triton.WIDTH, "TENSORS": adamw_triton.TENSORS}, arch=arch,
        num_warps=adamw_triton.PREPARE_WARPS,
    )  # fmt: skip
    assert_fits(found, arch, spills=0)
