"""Compiles a Triton kernel for a GPU that is not there and reads what the assembler used."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 86, 89, 90)
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Resources:
    """Bytes of shared memory, registers a thread, bytes spilled to local memory, and the PTX."""

    shared: int
    registers: int
    spills: int
    ptx: str


def resources(
    kernel,
    signature: dict[str, str],
    constants: dict[str, object],
    *,
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    registers: int | None = None,
    aligned: tuple[str, ...] | None = None,
) -> Resources:
    """Compiles `kernel` for sm_<arch>.

    signature: type of every argument that is not a constexpr ("*bf16", "i32", "fp32", ...).
    constants: the constexprs by name. registers: the most a thread may use.
    aligned: arguments divisible by 16 (default: the pointers).
    """
    types = signature | dict.fromkeys(constants, "constexpr")
    missing = set(kernel.arg_names) ^ set(types)
    assert not missing, f"arguments without a type, or unknown: {missing}"
    types = {name: types[name] for name in kernel.arg_names}
    if aligned is None:
        aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in aligned
    }
    compiled = triton.compile(
        ASTSource(kernel, types, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "maxnreg": registers},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return Resources(
        shared=compiled.metadata.shared,
        registers=int(used["REG"]),
        spills=int(used["LOCAL"]) + int(used["STACK"]),
        ptx=compiled.asm["ptx"],
    )


def assert_fits(found: Resources, arch: int) -> None:
    """Within the architecture's shared memory, and nothing spilled."""
    assert found.shared <= SHARED_LIMIT[arch], f"{found.shared} bytes of shared memory on sm_{arch}"
    assert found.spills == 0, f"{found.spills} bytes spilled on sm_{arch}"
