"""Several processes for one run, by gloo on a CPU: the curve of one, and one decision for all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ablate.__main__ import main
from ablate.errors import UserError
from ablate.run import RunFolder
from ablate.train import Pruned, TrialFailed, ranks, train
from ablate.train.step import Stepper
from tests.train.conftest import Make, curve

SCRIPT = """
import json, sys, os
from pathlib import Path
from ablate.config import load
from ablate.run import RunFolder
from ablate.train import train
cfg = load(json.loads(sys.argv[1]))
result = train(cfg, RunFolder(Path(sys.argv[2])))
Path(sys.argv[3], os.environ["RANK"]).write_text(json.dumps(result["val_b"]["loss"]))
"""


@pytest.fixture
def pair(tiny: Make) -> Make:
    def make(**changes: Any) -> Any:
        settings = {"devices": 2, "device": "cpu", "lr": 3e-4, **changes.pop("train", {})}
        return tiny(train=settings, **changes)

    return make


def agrees(one: RunFolder, two: RunFolder) -> None:
    rows, others = curve(one.metrics()), curve(two.metrics())
    assert len(rows) == len(others)
    for a, b in zip(rows, others, strict=True):
        for name in a.keys() & {"loss", "grad_norm", "val_a_loss"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5), (name, a["step"])


def test_two_processes_are_one_to_rounding(
    pair: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    train(pair(train={"devices": 1}), one)
    result = train(pair(train={"micro_batch": 1}), two)
    agrees(one, two)
    assert result["train"]["micro_batch"] == 1
    assert result["train"]["tokens"] == 20 * 4 * 16
    assert not dist.is_initialized()
    assert "not released" not in caplog.text


def test_pruned_and_resumed_by_all(pair: Make, tmp_path: Path) -> None:
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    train(pair(train={"devices": 1, "keep": "all"}), one)
    cfg = pair(train={"keep": "all", "checkpoint_steps": [6]})
    with pytest.raises(Pruned):
        train(cfg, two, should_prune=lambda step, loss: step >= 8)
    assert two.status()["state"] == "pruned"
    assert not dist.is_initialized()
    train(cfg, two)  # both go on from step 6, the moments included
    agrees(one, two)


def test_a_process_that_is_lost_fails_the_run(
    pair: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    started: list[Any] = []
    launch = ranks.launch

    def remember(*args: Any) -> Any:
        started.append(launch(*args))
        return started[0]

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            started[0].started[0].kill()

    monkeypatch.setattr("ablate.train.loop.launch", remember)
    with pytest.raises(TrialFailed):
        train(pair(), folder, on_progress=kill)
    assert folder.status()["state"] == "failed"
    assert "ended with exit code -9" in folder.status()["cause"]


def test_memory_that_ends_in_another_process_is_the_cause() -> None:
    class Gone:
        returncode = errno.ENOMEM

        def poll(self) -> int:
            return self.returncode

    lost = ranks.Ranks(0, 2, [Gone()]).lost()  # type: ignore[list-item]
    assert lost is not None
    assert lost.startswith("out of memory")


def test_an_error_of_the_first_ends_the_others(
    pair: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Stepper) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(Stepper, "note", fail)
    with pytest.raises(TrialFailed, match="out of memory"):
        train(pair(), RunFolder(tmp_path / "run"))
    assert not dist.is_initialized()


def test_by_torchrun(pair: Make, tmp_path: Path) -> None:
    script, marks = tmp_path / "script.py", tmp_path / "marks"
    script.write_text(SCRIPT)
    marks.mkdir()
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)]
    command += [pair().model_dump_json(), str(folder.path), str(marks)]
    root = str(Path(__file__).resolve().parents[2])
    for _ in range(2):  # the second time it is finished
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    losses = [json.loads(path.read_text()) for path in sorted(marks.iterdir())]
    assert losses == 2 * [(folder.result() or {})["val_b"]["loss"]]


def test_the_command_under_torchrun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    assert main(["no=such", "field=either"]) == 0
    monkeypatch.setenv("RANK", "0")
    assert main(["no=such"]) == 2
    assert "WORLD_SIZE" not in os.environ


def test_torchrun_of_another_size(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=r"train\.devices is 1.*4 processes.*train\.devices=4"):
        train(tiny())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one_to_rounding(
    tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    settings = {"precision": "fp32", "lr": 3e-4}
    train(tiny(train=settings), one)
    train(tiny(train={**settings, "devices": 2}), two)
    agrees(one, two)
    assert "not released" not in caplog.text  # NCCL waits for captured steps that use it
