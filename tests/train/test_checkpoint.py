"""Checkpoints: whole or not there, the newest undamaged one counts, nothing pickled."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ablate.train import checkpoint

MODEL = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(())}
MOMENTS = {"a.weight/exp_avg": torch.full((2, 3), 0.1), "run/rng": torch.get_rng_state()}


def save(root: Path, step: int) -> Path:
    return checkpoint.save(root, step, MODEL, MOMENTS, {"data": "x", "loss": 0.1 + 0.2})


def test_comes_back_exactly(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found.step == 7
    assert found.state["loss"] == 0.1 + 0.2
    assert all(torch.equal(found.model[k], MODEL[k]) for k in MODEL)
    assert all(torch.equal(found.optimizer[k], MOMENTS[k]) for k in MOMENTS)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("harm", ["flip", "cut", "no_manifest", "missing", "empty"])
def test_a_damaged_one_is_skipped_with_one_line(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    victim = newest / "optimizer.safetensors"
    if harm == "flip":
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(bytes(data))
    elif harm == "cut":
        victim.write_bytes(victim.read_bytes()[:-8])
    elif harm == "no_manifest":
        (newest / "manifest.json").unlink()
    elif harm == "missing":
        victim.unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    with caplog.at_level(logging.WARNING):
        found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(caplog.records) == 1
    save(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_half_written_ones_are_not_seen(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.99")
    assert checkpoint.steps(tmp_path) == [1]
    checkpoint.tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_keeps_two_and_those_asked_for(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
        checkpoint.tidy(tmp_path, keep=[2])
    assert checkpoint.steps(tmp_path) == [2, 4, 5]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ("none", None),
        ("weights", ["model.safetensors"]),
        ("all", ["step-00000001", "step-00000003"]),
    ],
)
def test_what_stays_after_the_result(tmp_path: Path, keep: str, left: list[str] | None) -> None:
    root = tmp_path / "checkpoint"
    for step in (1, 2, 3):
        save(root, step)
    kept = [1] if keep == "all" else []
    for _ in range(2):  # a second time changes nothing
        checkpoint.finish(root, keep, kept)
    assert (sorted(p.name for p in root.iterdir()) if root.exists() else None) == left


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from ablate.train import checkpoint
root = Path(sys.argv[1])
small = {"a": torch.ones(4)}
checkpoint.save(root, 1, small, small, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(root, 2, {"a": torch.ones(100_000)}, small, {})
except OSError as error:
    print("refused", checkpoint.load_newest(root).step, len(list(root.iterdir())))
"""


def test_a_disk_that_refuses_leaves_the_one_before(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["refused", "1", "1"], done.stderr
