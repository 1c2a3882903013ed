"""The kernels of a step compiled at the same time, instead of each when it is first launched.

Triton's passes, the assembler and the C compiler that Triton up to 3.6 calls once a kernel for what
launches it leave the interpreter's lock, so threads are enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ablate.kernels.dispatch import HAS_TRITON, INTERPRET

DryRun = Callable[[], contextlib.AbstractContextManager[None]]

MOST_KERNELS = 8  # of one operation's pass that are worth a thread each
_together = False  # kernels are compiled together now


@contextlib.contextmanager
def compile_together(threads: int) -> Iterator[DryRun]:
    """Inside, Triton kernels compile in so many threads; at the end all of them are ready.

        with compile_together(16) as dry_run:
            with dry_run():
                step()  # launches nothing: kernels are only handed to the threads
            step()      # waits for a kernel that is not ready yet where it launches it

    What operations return in a dry run is not initialised. A kernel that does not compile raises
    where it is launched, not in a dry run.
    """
    if not HAS_TRITON or INTERPRET:
        yield contextlib.nullcontext
        return
    from triton.runtime import JITFunction
    from triton.runtime._async_compile import AsyncCompileMode, active_mode

    class Pending(AsyncCompileMode):
        def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Any) -> Any:
            def ready() -> Any:
                kernel = compile_fn()
                _ = kernel.run  # makes what launches it, and loads it, when it is first asked for
                return kernel

            return super().submit(key, ready, finalize_fn)

    launch, dry = JITFunction.run, False

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
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
    with ThreadPoolExecutor(threads, "triton", begin) as pool:
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
                with compile_together(MOST_KERNELS) as dry_run, dry_run():
                    impl(*args)
        return impl(*args)

    return call
