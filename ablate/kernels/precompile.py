"""The kernels of a step compiled at the same time, instead of each when it is first launched.

Triton's passes, the assembler and the C compiler that Triton up to 3.6 calls once a kernel for what
launches it leave the interpreter's lock, so threads are enough.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ablate.kernels.dispatch import HAS_TRITON, INTERPRET

DryRun = Callable[[], contextlib.AbstractContextManager[None]]

MOST_KERNELS = 8  # of one operation's pass that are worth a thread each
_together = False  # kernels are compiled together now
_one = threading.RLock()  # at a time: each puts back the launch that it found


@functools.cache
def _load_apart() -> None:
    """All launchers that Triton up to 3.6 builds are modules of one name. Python fills the module
    that has it with what is loaded a second time, maybe while another thread has yet to read it."""
    from triton.runtime import build

    load, one = getattr(build, "_load_module_from_path", None), threading.Lock()
    if load is None:
        return

    def alone(name: str, path: str) -> Any:
        with one:
            return types.SimpleNamespace(**vars(load(name, path)))

    build._load_module_from_path = alone


@contextlib.contextmanager
def compile_together(threads: int, *, own: bool = False) -> Iterator[DryRun]:
    """Inside, Triton kernels compile in so many threads; at the end all of them are ready.

        with compile_together(16) as dry_run:
            with dry_run():
                step()  # launches nothing: kernels are only handed to the threads
            step()      # waits for a kernel that is not ready yet where it launches it

    What operations return in a dry run is not initialised. A kernel that does not compile raises
    where it is launched, not in a dry run.

    own: what other threads launch meanwhile is launched as ever.
    """
    if not HAS_TRITON or INTERPRET:
        yield contextlib.nullcontext
        return
    from triton.runtime import JITFunction
    from triton.runtime._async_compile import AsyncCompileMode, active_mode

    _load_apart()

    class Pending(AsyncCompileMode):
        def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Any) -> Any:
            def ready() -> Any:
                kernel = compile_fn()
                _ = kernel.run  # makes what launches it, and loads it, when it is first asked for
                return kernel

            return super().submit(key, ready, finalize_fn)

    dry, here = False, threading.get_ident()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if own and threading.get_ident() != here:
            return launch(self, *args, grid=grid, warmup=warmup, **kwargs)
        # The mode is set here, because the backward pass launches from threads of autograd's.
        token = active_mode.set(pending)
        try:
            return launch(self, *args, grid=grid, warmup=warmup or dry, **kwargs)
        finally:
            active_mode.reset(token)

    @contextlib.contextmanager
    def dry_run() -> Iterator[None]:
        nonlocal dry
        dry = True
        try:
            yield
        finally:
            dry = False

    def begin() -> None:  # a thread's device is the first one until it is told
        if device is not None:
            torch.cuda.set_device(device)

    global _together
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    with _one, ThreadPoolExecutor(threads, "triton", begin) as pool:
        launch = JITFunction.run
        pending = Pending(pool, ignore_errors=True)
        JITFunction.run, _together = run, True
        try:
            yield dry_run
        finally:
            JITFunction.run, _together = launch, False
            pending.__exit__(None, None, None)


def first_call_together(impl: Callable[..., Any]) -> Callable[..., Any]:
    """`impl`, whose first call finds its kernels compiled together, unless a step's already are."""
    called = INTERPRET or not HAS_TRITON

    def call(*args: Any) -> Any:
        nonlocal called
        if not called:
            called = True
            capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            if not _together and not capturing:
                with compile_together(MOST_KERNELS, own=True) as dry_run, dry_run():
                    impl(*args)
        return impl(*args)

    return call
