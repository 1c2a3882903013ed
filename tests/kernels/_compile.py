"""Compiles a Triton kernel for a GPU that is not there and reads what the assembler made of it.

As a program it reads what a GPU has run: `python tests/kernels/_compile.py TRITON_CACHE_DIR` names
the kernels of a cache that read registers which nothing has set, and fails if there are any or the
cache is empty.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 86, 89, 90)
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Resources:
    """Bytes of shared memory, registers a thread, bytes spilled to local memory, bytes of global
    memory a launch would allocate, the PTX, and what the assembler made of it."""

    shared: int
    registers: int
    spills: int
    scratch: int
    ptx: str
    sass: str


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
    """Compiles `kernel`, in Triton or in Gluon, for sm_<arch>.

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
    source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source
    compiled = triton.compile(
        source(kernel, types, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "maxnreg": registers},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "--print-code", file.name)
    unset = unset_registers(sass)
    assert not unset, f"the assembler reads uniform registers that nothing has set: {unset[0]}"
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return Resources(
        shared=compiled.metadata.shared,
        registers=int(used["REG"]),
        spills=int(used["LOCAL"]) + int(used["STACK"]),
        scratch=compiled.metadata.global_scratch_size,
        ptx=compiled.asm["ptx"],
        sass=sass,
    )


def _run(tool: str, *args: str) -> str:
    return subprocess.run(
        [str(TOOLS / tool), *args], capture_output=True, text=True, check=True
    ).stdout


def unset_in(cubin: str | Path) -> list[str]:
    """`unset_registers` of an assembled kernel."""
    return unset_registers(_run("nvdisasm", "--print-code", str(cubin)))


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_UNIFORM = re.compile(r"(gdesc|desc)?\[?\bUR(\d+)(\.64)?")


def unset_registers(sass: str) -> list[str]:
    """Instructions that read a uniform register which no instruction before them writes.

    ptxas 12.8, which Triton 3.6 and 3.7 bring, loses descriptors of wgmma's operands in kernels
    with many of them (as `fla` found too, and refuses such kernels): the address in shared memory
    is then whatever the register held. Results are wrong or the launch faults, on a GPU alone.
    """
    written: set[int] = set()
    found = []
    for line in sass.splitlines():
        match = _INSTRUCTION.search(line)
        if not match:
            continue
        name, operands = match.group(1), [o.strip() for o in match.group(2).split(",")]
        pair = name.startswith("U") and bool(re.search(r"\.64\b|WIDE", name))
        target = None
        if re.match(r"U|R2UR|S2UR|CS2UR|REDUX", name):
            target = re.fullmatch(r"UR(\d+)", operands[0])
        reads: set[int] = set()
        # of the four registers of a wgmma's descriptors the first two are the left operand's
        left_in_registers = name.startswith("HGMMA") and re.match(r"R\d+", operands[1])
        for operand in operands[1:] if target else operands:
            for kind, number, wide in _UNIFORM.findall(operand):
                first, count = int(number), 1
                if kind == "gdesc":
                    first, count = (first + 2, 2) if left_in_registers else (first, 4)
                elif kind or wide or (pair and "WIDE" not in name):
                    count = 2
                reads |= set(range(first, first + count))
        targets = set() if target is None else {int(target.group(1)) + i for i in range(1 + pair)}
        if name == "UMOV" and reads - written:  # half of a pair that is set or dropped later on
            written -= targets
            continue
        if reads - written:
            found.append(" ".join(match.group(0).split()))
        written |= targets
    return found


def assert_fits(found: Resources, arch: int, *, spills: int = 16) -> None:
    """Within the architecture's shared memory, and no more than `spills` bytes spilled: a word or
    two, which one Triton spills where the other does not, cost nothing."""
    assert found.shared <= SHARED_LIMIT[arch], f"{found.shared} bytes of shared memory on sm_{arch}"
    assert found.spills <= spills, f"{found.spills} bytes spilled on sm_{arch}"


def main(cache: Path) -> int:
    cubins = sorted(cache.rglob("*.cubin"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(unset_in, cubins))
    bad = [(cubin, unset[0]) for cubin, unset in zip(cubins, found, strict=True) if unset]
    for cubin, instruction in bad:
        print(f"{cubin}: reads a uniform register that nothing has set: {instruction}")
    print(f"{len(cubins)} kernels, {len(bad)} of them read what nothing has set")
    return 1 if bad or not cubins else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
