"""Kernels compiled together on threads, with nothing launched, for a GPU that is not there."""

from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ablate.kernels import adamw_triton
from ablate.kernels.precompile import compile_together, first_call_together

pytestmark = pytest.mark.compile


@triton.jit
def doubled(x_ptr, y_ptr):
    tl.store(y_ptr, 2 * tl.load(x_ptr))


@triton.jit
def halved(x_ptr, y_ptr):
    tl.store(y_ptr, 0.5 * tl.load(x_ptr))


@triton.jit
def wrong(x_ptr):
    tl.store(x_ptr, no_such_name)  # noqa: F821


class Hopper:
    """What Triton asks a GPU's driver before a launch."""

    def __init__(self) -> None:
        self.utils = self
        self.loaded: list[str] = []  # threads

    def launcher_cls(self, source: object, metadata: object) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, *of: object) -> tuple[int, int, int, int, int]:
        self.loaded.append(threading.current_thread().name)
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch, tmp_path) -> list[str]:
    """Threads that compiled something, one entry a kernel, with an empty cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names: list[str] = []
    compiled = triton.compiler.compile

    def compile(*args, **kwargs):
        names.append(threading.current_thread().name)
        return compiled(*args, **kwargs)

    monkeypatch.setattr(triton.compiler, "compile", compile)
    for kernel in (doubled, halved, wrong):
        kernel.device_caches.clear()
    monkeypatch.setattr(driver, "_active", Hopper())
    return names


@pytest.fixture
def loaders(compilers: list[str]) -> list[str]:
    """Threads that made ready to launch what they compiled."""
    return driver.active.loaded


def test_a_dry_run_compiles_on_threads_and_launches_nothing(
    compilers: list[str], loaders: list[str]
) -> None:
    x, y = torch.ones(1), torch.zeros(1)
    with compile_together(2) as dry_run, dry_run():
        doubled[(1,)](x, y)
        backward = threading.Thread(target=lambda: halved[(1,)](x, y))  # as autograd has its own
        backward.start()
        backward.join()
        doubled[(1,)](x, y)
    assert y.item() == 0
    assert len(compilers) == 2  # each once
    assert sorted(loaders) == sorted(compilers)
    assert all(name.startswith("triton") for name in compilers)
    ready = [len(kernel.device_caches[0][0]) for kernel in (doubled, halved)]
    assert ready == [1, 1]
    doubled.warmup(x, y, grid=(1,))
    assert len(compilers) == 2


def test_an_operation_of_several_kernels_compiles_them_together_once(compilers: list[str]) -> None:
    calls = []

    def impl(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        doubled.warmup(x, y, grid=(1,))  # nothing can be launched here
        halved.warmup(x, y, grid=(1,))
        calls.append(y)
        return y

    op = first_call_together(impl)
    assert op(torch.ones(1)) is calls[1]
    assert len(compilers) == 2
    assert all(name.startswith("triton") for name in compilers)
    assert op(torch.ones(1)) is calls[2]
    with compile_together(2) as dry_run, dry_run():  # a step's own
        first_call_together(impl)(torch.ones(1))
    assert len(calls) == 4


def test_what_other_threads_launch_during_a_first_call_is_launched(
    compilers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    def launch(self, *args, grid, warmup, **kwargs):
        launched.append((threading.current_thread().name, warmup))

    monkeypatch.setattr(triton.runtime.JITFunction, "run", launch)

    def impl() -> None:
        doubled[(1,)](None, None)
        other = threading.Thread(target=lambda: halved[(1,)](None, None), name="other")
        other.start()
        other.join()

    first_call_together(impl)()
    own = threading.current_thread().name
    assert launched == [(own, True), ("other", False), (own, False), ("other", False)]


def test_a_kernel_that_does_not_compile_raises_where_it_runs(compilers: list[str]) -> None:
    with compile_together(2) as dry_run:
        with dry_run():
            wrong[(1,)](torch.ones(1))
        with pytest.raises(triton.CompilationError, match="no_such_name"):
            wrong[(1,)](torch.ones(1))


def test_a_step_of_one_number_compiles_what_any_step_of_adamw_needs(compilers: list[str]) -> None:
    for kernel in vars(adamw_triton).values():
        if isinstance(kernel, triton.JITFunction):
            kernel.device_caches.clear()
    with compile_together(2) as dry_run, dry_run():
        for sizes, clip in (([1], 1.0), ([5000] * 16, 0.5), ([7, 8, 9], 2.0)):
            table = torch.zeros(len(sizes), adamw_triton.COLUMNS.value, dtype=torch.int64)
            blocks = adamw_triton.blocks_of(sizes, table.device)
            *_, factors = adamw_triton.prepare(table, blocks, torch.ones(()), clip)
            adamw_triton.update(table, blocks, factors)
    assert len(compilers) == 3


def test_afterwards_kernels_are_launched_again() -> None:
    run = triton.runtime.JITFunction.run
    with pytest.raises(ZeroDivisionError), compile_together(1) as dry_run, dry_run():
        raise ZeroDivisionError
    assert triton.runtime.JITFunction.run is run
