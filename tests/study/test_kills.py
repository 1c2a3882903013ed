"""A tiny real study on the CPU: killed at random, its figures are those of an unbroken one."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from ablate import config
from ablate.errors import UserError
from ablate.run import RunFolder, find_runs, write_json
from ablate.study.folder import StudyFolder
from ablate.study.rerun import OTHER_TOLERANCE, compare, kept
from ablate.study.store import Store
from ablate.train import train
from tests.processes import left_behind

from .conftest import start

MEASURED = {"seconds_to_first_step", "seconds", "tokens_per_second", "mfu", "peak_memory_bytes"}


def science(value: Any) -> Any:
    """Without what a clock or a memory counter said."""
    if isinstance(value, dict):
        return {k: science(v) for k, v in value.items() if k not in MEASURED}
    return [science(v) for v in value] if isinstance(value, list) else value


def figures(folder: RunFolder) -> dict[str, Any]:
    files = sorted((folder.path / "evaluation").glob("*.json"))
    return {
        "result": science(folder.result()),
        "metrics": science(folder.metrics()),
        **{file.name: science(json.loads(file.read_text())) for file in files},
    }


def all_figures(tree: dict[str, Any]) -> dict[str, Any]:
    path = Path(tree["study"]["folder"]) / tree["study"]["name"]
    return {run.key: figures(run) for run in find_runs(path)}


def optuna_states(tree: dict[str, Any]) -> dict[str, list[str]]:
    folder = StudyFolder(Path(tree["study"]["folder"]) / tree["study"]["name"])
    trials = Store(folder, config.load(tree)).trials()
    return {key: sorted(t.state.name for t in found) for key, found in trials.items()}


def finish(tree: dict[str, Any]) -> None:
    process = start(tree)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def real(make: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    return make(
        **{
            "arch.pattern": None,
            "arch.n_layers": 2,
            "arch.mlp_share": 0.0,
            "study.grid": {"arch.attention_share": [0.0, 0.1, 0.5]},
            "study.folder": str(folder),
            "train.tokens": 32 * 4 * 160,
            "train.eval_every": 50,
            "train.checkpoint_seconds": 0.2,
            "data.allow_repeats": True,
            "data.mqar": {"share": 0.25, "pairs": 2},
            "evaluate.mqar_rows": 8,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quiet")


@pytest.fixture(scope="module")
def undisturbed(make: Any, quiet: Path) -> dict[str, Any]:
    """The figures of the study in `quiet`, which nothing has disturbed."""
    tree = real(make, quiet)
    finish(tree)
    found = all_figures(tree)
    assert len(found) == 2  # the shares 0.0 and 0.1 of two layers are one pattern, so one run
    return found


def begun(tree: dict[str, Any]) -> int:
    """How often a trial has been begun or taken up, in all."""
    path = Path(tree["study"]["folder"]) / tree["study"]["name"]
    return sum(run.status().get("generation", 0) for run in find_runs(path))


def kill_often(tree: dict[str, Any], times: int, rng: random.Random, most: float) -> int:
    """Start the study and kill the parent, or the parent and its group; how many kills hit.

    At a random moment of up to `most` seconds after a trial has begun: importing torch before
    takes seconds in which nothing can break.
    """
    hits = 0
    for _ in range(times):
        before = begun(tree)
        process = start(tree)
        while process.poll() is None and begun(tree) == before:
            time.sleep(0.05)
        try:
            process.communicate(timeout=rng.uniform(0, most))
        except subprocess.TimeoutExpired:
            hits += 1
            rng.choice([os.kill, os.killpg])(process.pid, signal.SIGKILL)
            process.communicate(timeout=60)
    return hits


def check(tree: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    finish(tree)
    assert all_figures(tree) == undisturbed
    states = optuna_states(tree)
    assert set(states) == set(undisturbed)
    for names in states.values():
        assert names.count("COMPLETE") == 1
        assert set(names) <= {"COMPLETE", "FAIL"}
    folder = StudyFolder(Path(tree["study"]["folder"]) / tree["study"]["name"])
    for key in states:
        assert folder.run(key).status()["state"] == "done"
        assert not folder.run(key).checkpoint.exists()


def test_a_rerun_gives_the_same_losses(quiet: Path, undisturbed: dict[str, Any]) -> None:
    again = compare(next(find_runs(quiet / "tiny")).path)
    assert again.old == again.new
    assert set(again.old) == {"val_a", "val_b"}
    assert again.same


def test_a_rerun_that_cannot_be_kept_is_told_before_it_runs(
    undisturbed: dict[str, Any], quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(next(find_runs(quiet / "tiny")).path, run)
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    (run / "evaluation").write_text("in the way")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(UserError, match=r"cannot write to '.*run' \(File exists\)"):
        compare(run)


def test_a_rerun_whose_text_is_gone_has_one_sentence(
    undisturbed: dict[str, Any], quiet: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(next(find_runs(quiet / "tiny")).path, run.path)
    gone = config.override(run.config() or {}, {"data.path": str(tmp_path / "gone")})
    run.create(gone, replace=True)
    with pytest.raises(UserError, match=r"failed when trained again: .*data\.path"):
        compare(run.path)
    assert "Traceback" not in capfd.readouterr().err


def test_the_spread_of_reruns_is_their_tolerance(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = RunFolder.environment
    monkeypatch.setattr(RunFolder, "environment", lambda run: {**said(run), "dirty": False})
    changes = {"study.grid": {}, "train.tokens": 32 * 4 * 30, "train.deterministic": False}
    run = RunFolder(tmp_path / "run")
    train(config.load(real(make, tmp_path, **changes)), run)
    found = compare(run.path)
    assert (found.tolerance, found.same) == (OTHER_TOLERANCE, True)
    assert "times=5 measures by how much runs differ" in found.why
    (first,) = kept(run)
    assert first["new"] == found.new
    apart = [{**first["new"], "val_b": first["new"]["val_b"] + 1e-4 * i} for i in range(5)]
    reruns = {str(i): {**first, "new": losses} for i, losses in enumerate(apart, 1)}
    run.write_evaluation("rerun", {"task": "rerun", "reruns": reruns})
    found = compare(run.path)
    # of 0, 0, 1, 2, 3 and 4: a variance of 8 / 3, t of 5 degrees of freedom
    by_hand = 2.570582 * math.sqrt(2 * 8 / 3) * 1e-4
    assert found.tolerance == {"val_a": 0.0, "val_b": pytest.approx(by_hand, rel=1e-6)}
    assert found.why == "95% bound by 5 reruns"
    assert len(kept(run)) == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rerun_ends_with_its_parent(make: Any, tmp_path: Path, number: signal.Signals) -> None:
    tree = real(make, tmp_path, **{"study.grid": {}, "train.tokens": 10**9})
    run = RunFolder(tmp_path / "run")
    run.create(config.load(tree).model_dump(mode="json"))
    write_json(run.path / "result.json", {"train": {"micro_batch": 4}})
    code = "import sys; from ablate.study.rerun import compare; compare(sys.argv[1])"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    under_way = "ablate-rerun-*/run/metrics.jsonl"
    left = left_behind(code, [str(run.path)], number, temporary, under_way)
    if number == signal.SIGTERM:
        assert not left


@pytest.mark.slow
def test_twenty_kills_change_nothing(make: Any, tmp_path: Path) -> None:
    changes = {"train.tokens": 32 * 4 * 1200, "study.seeds": [0, 1]}
    quiet = real(make, tmp_path / "quiet", **changes)
    finish(quiet)
    tree = real(make, tmp_path / "killed", **changes)
    assert kill_often(tree, 20, random.Random(2), most=3.0) >= 12
    check(tree, all_figures(quiet))


@pytest.mark.slow
def test_damaged_checkpoints_cost_no_figure(
    make: Any, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    tree = real(make, tmp_path)
    folder = tmp_path / "tiny"
    process = start(tree)
    while process.poll() is None and not list(folder.glob("*/checkpoint/step-*")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    damaged = list(folder.glob("*/checkpoint/step-*/model.safetensors"))
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-5])
    check(tree, undisturbed)
