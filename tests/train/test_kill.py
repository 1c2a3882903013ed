"""kill -9 at any moment, and the same command again: the curve of the unbroken run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ablate.run import RunFolder
from ablate.train import train
from tests.train.conftest import Make, curve

SERVER = Path(__file__).with_name("kill_server.py")


def test_killed_at_random_moments(tiny: Make, tmp_path: Path) -> None:
    settings = {"tokens": 200 * 64, "checkpoint_seconds": 0.02, "log_every": 7, "eval_every": 40}
    cfg = tiny(train=settings)
    unbroken = RunFolder(tmp_path / "unbroken")
    result = train(cfg, unbroken)
    killed = RunFolder(tmp_path / "killed")
    command = [sys.executable, str(SERVER), cfg.model_dump_json(), str(killed.path), "0", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5
    assert curve(killed.metrics()) == curve(unbroken.metrics())
    again = killed.result()
    assert again is not None
    for part in ("val_a", "val_b", "mqar", "architecture", "data"):
        assert again[part] == result[part]
    assert again["train"]["loss"] == result["train"]["loss"]
    assert killed.evaluation("val_b") == unbroken.evaluation("val_b")
    assert not killed.checkpoint.exists()
