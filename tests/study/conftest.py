from __future__ import annotations

import copy
import io
import multiprocessing
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.study.drive import FAKE, drive

__all__ = ["FAKE", "calls", "start"]

ROOT = Path(__file__).parents[2]


def deep_update(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Dotted names set in a copy of a tree; sections and dict-valued fields are made as needed."""
    tree = copy.deepcopy(tree)
    for dotted, value in changes.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        lines = [f"document {i} says {j * i % 97} and {j} times over" for j in range(40)]
        (folder / f"{i:03}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def make(
    text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """A tiny study's tree, in a folder of its own, with dotted changes."""
    base = {
        "arch": {
            "pattern": "M*-",
            "d_model": 16,
            "mamba2": {"d_state": 8, "head_dim": 8},
            "attention": {"head_dim": 8},
        },
        "data": {
            "source": "files",
            "path": str(text),
            "val_share": 0.2,
            "seq_len": 32,
            "cache": str(cache),
        },
        "train": {"tokens": 32 * 4 * 12, "batch_size": 4, "device": "cpu", "log_every": 4},
        "evaluate": {"tokens": 1500},
        "study": {"name": "tiny", "workers": 2},
        "tracker": {"kind": "none"},
        "seed": 0,
    }

    def make(**changes: Any) -> dict[str, Any]:
        folder = {"study.folder": str(tmp_path_factory.mktemp("study") / "runs")}
        return deep_update(base, {**folder, **changes})

    return make


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=140)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ablate.study.supervisor"])  # so that a start costs no import


class Study:
    """A study in a process of its own, with as much of `subprocess.Popen` as tests need."""

    def __init__(self, tree: dict[str, Any], fake: bool, environment: dict[str, str]) -> None:
        folder = Path(tree["study"]["folder"])
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.output = folder.with_name(f"{folder.name}.{time.monotonic_ns()}.log")
        self.output.touch()
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        arguments = (tree, fake, environment, str(self.output))
        self._process = FORKS.Process(target=drive, args=arguments)
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, None]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("study", timeout)
        return self.output.read_text(), None


def start(tree: dict[str, Any], *words: str, **environment: str) -> Study:
    """The study in a process of its own, at the head of its own process group."""
    return Study(tree, "fake" in words, environment)


def calls(tree: dict[str, Any]) -> list[list[str]]:
    """What the fake trainer wrote down: [key, pid, "begins", step] and [key, pid, "ends"]."""
    path = Path(tree["study"]["folder"]) / tree["study"]["name"] / "calls.log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []
