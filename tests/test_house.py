"""The order of the house: who may import whom, and what must not be imported at all."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ablate"
# Lowest first; a module may import from its own room and from those before it.
ROOMS = [
    "errors",
    "config",
    "run",
    "kernels",
    "layers",
    "arch",
    "model",
    "data",
    "train",
    "evaluate",
    "study",
    "report",
    "bench",
    "compose",
    "__main__",
]


def imports(path: Path) -> set[str]:
    """Rooms of `ablate` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            assert node.level == 0, f"{path}: imports are absolute"
        for name in names:
            parts = name.split(".")
            if parts[0] == "ablate" and len(parts) > 1 and parts[1] in ROOMS:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_run_upward_only(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":  # the package's face loads names lazily from anywhere
        return
    assert room in ROOMS, f"{path} stands in no room of the house"
    above = {other for other in imports(path) if ROOMS.index(other) > ROOMS.index(room)}
    assert not above, f"{room} may not import {above}"


@pytest.mark.parametrize(
    "statement",
    [
        "import ablate, ablate.report; ablate.load_study",
        "import ablate.report.page",
        "import ablate.study.status",
        "import ablate.config, ablate.compose",
    ],
)
def test_reading_results_imports_no_torch(statement):
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_kernels_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; import ablate.kernels"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_face_is_short_and_every_name_on_it_exists():
    import ablate

    assert len(ablate.__all__) <= 8
    for name in ablate.__all__:
        assert getattr(ablate, name) is not None
