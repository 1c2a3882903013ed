"""What a process that trains is given: caches, GPUs, and its start before there is a trial."""

from __future__ import annotations

import json
import os
import py_compile
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ablate import config
from ablate.run import RunFolder, python_path
from ablate.study import space
from ablate.study.child import child_environment
from ablate.study.supervisor import _Supervisor, run_study

from .conftest import FAKE


def test_compile_caches_are_shared_unless_the_user_has_some(
    make: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config.load(make(**{"train.threads": 3}))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    found = child_environment(cfg, "2,3", 7)
    assert found["TRITON_CACHE_DIR"] == str(cache / "triton")
    assert found["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert found["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["ABLATE_CORES"] == "7"


@pytest.mark.parametrize("beside", [True, False])
def test_bytecode_is_kept_where_packages_came_without(
    make: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    source = tmp_path / "package" / "torch" / "__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text("answer = 42")
    if beside:
        py_compile.compile(str(source))
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    found = child_environment(config.load(make()))
    found["PYTHONPATH"] = str(tmp_path / "package")
    subprocess.run([sys.executable, "-c", "import torch"], env=found, check=True)
    kept = list((cache / "bytecode").rglob("torch/__init__*.pyc"))
    assert len(kept) == (0 if beside else 1)
    assert len(list(source.parent.rglob("*.pyc"))) == int(beside)


def supervisor(tree: dict[str, Any], console: Any) -> _Supervisor:
    cfg = config.load(tree)
    return _Supervisor(space.full(tree), cfg, space.cells(tree), console, FAKE)


@pytest.mark.parametrize(
    ("devices", "slots"), [(1, ["0", "1", "2"]), (2, ["0,1", "2,3"]), (4, ["0,1,2,3"])]
)
def test_a_slot_has_the_devices_of_a_trial(
    make: Any, console: Any, monkeypatch: pytest.MonkeyPatch, devices: int, slots: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    grid = {"study.grid": {"train.lr": [1e-3, 2e-3, 3e-3]}, "study.workers": None}
    tree = make(**grid, **{"train.devices": devices, "train.device": "auto"})
    assert supervisor(tree, console)._slots() == slots


def test_children_start_while_the_text_is_prepared(make: Any, console: Any) -> None:
    study = supervisor(make(), console)
    ready: list[bool] = []
    prepare = study._prepare_data

    def slow() -> None:
        ready.append(len(study.children) == 1 and study.children[0].process.poll() is None)
        prepare()

    study._prepare_data = slow  # type: ignore[method-assign]
    assert study.run().exit_code == 0
    assert ready == [True]


def test_a_trial_of_two_processes_that_runs_out_of_memory_begins_again(
    make: Any, console: Any
) -> None:
    tree = make(**{"train.devices": 2, "train.tokens": 32 * 4 * 3})
    child = [sys.executable, str(Path(__file__).with_name("small_child.py"))]
    outcome = run_study(tree, console=console, child_command=child)
    said = console.file.getvalue()
    assert outcome.exit_code == 0, said
    assert "again with 1 rows a pass" in said
    result = RunFolder(outcome.folder / outcome.done[0]).result()
    assert result is not None
    assert result["train"]["micro_batch"] == 1
    assert result["train"]["out_of_memory"]["from"] == 2


def test_a_trial_of_two_processes(make: Any, console: Any) -> None:
    tree = make(**{"train.devices": 2, "train.tokens": 32 * 4 * 3})
    outcome = run_study(tree, console=console)
    assert outcome.exit_code == 0, console.file.getvalue()
    run = RunFolder(outcome.folder / outcome.done[0])
    assert run.environment()["micro_batch"] == {
        "asked": None,
        "devices": 2,
        "rows": 2,
        "source": "config",
    }


@pytest.mark.parametrize("early", [True, False])
def test_a_trial_counts_the_loading_it_waited_for(make: Any, tmp_path: Path, early: bool) -> None:
    """A process that loaded while another trained cost its trial nothing; the first one did."""
    cfg = config.load(make())
    ask = {"folder": str(tmp_path / "run"), "config": make(), "generation": 0, "prune": False}
    child = subprocess.Popen(
        [sys.executable, "-m", "ablate.study.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=child_environment(cfg),
    )
    assert child.stdin is not None
    assert child.stdout is not None
    if early:
        child.stdin.write(json.dumps(ask) + "\n")
        child.stdin.flush()
    began = time.monotonic()
    while "ready" not in child.stdout.readline():
        pass
    loading = time.monotonic() - began
    if not early:
        child.stdin.write(json.dumps(ask) + "\n")
        child.stdin.flush()
    said = child.stdout.read()
    child.wait(timeout=120)
    result = RunFolder(tmp_path / "run").result()
    assert result is not None, said
    counted = result["seconds"]["start_up"]
    assert counted > 0.6 * loading if early else counted < 0.6 * loading, (counted, loading)


def test_a_stop_while_libraries_load_waits_for_them() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "ablate.study.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": python_path()},
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(b'{"stop": true}\n')
    child.stdin.flush()
    lines = [json.loads(line) for line in child.stdout if line.strip()]
    assert lines == [{"event": "ready"}, {"event": "end", "state": "interrupted", "cause": None}]
    assert child.wait() == 0
