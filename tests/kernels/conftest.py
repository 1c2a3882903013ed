"""Where each kind of kernel test runs, and the repairs Triton's interpreter needs.

    pytest tests/kernels                          plain PyTorch forms and compile tests
    TRITON_INTERPRET=1 pytest tests/kernels       adds the interpreter tests, leaves out compiling

The two do not mix in one process: interpreted functions cannot be compiled.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers _check and _compile
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("interpret") and not (INTERPRET and HAS_TRITON):
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))
        if item.get_closest_marker("compile") and (INTERPRET or not HAS_TRITON):
            item.add_marker(pytest.mark.skip(reason="compiles; not under TRITON_INTERPRET=1"))


def _repair_interpreter() -> None:
    """bf16 dots go through float32 (the interpreter multiplies the raw bits), float32 is rounded to
    bf16 as a GPU does it (the interpreter cuts digits off, so that all sums come out 0.3% small),
    and autotuners with several configurations take the first instead of asking for a driver."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import autotuner, interpreter

    autotuner.Autotuner.prune_configs = lambda self, kwargs: self.configs[:1]
    autotuner.Autotuner.do_bench = property(
        lambda self: lambda fn, quantiles: [0.0, 0.0, 0.0], lambda self, value: None
    )
    dot = interpreter.InterpreterBuilder.create_dot
    convert = interpreter._convert_float

    def round_to_nearest(data, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = round_to_nearest

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(data.view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, d, *rest: dot(
        self, widen(a), widen(b), d, *rest
    )


if INTERPRET and HAS_TRITON:
    _repair_interpreter()
