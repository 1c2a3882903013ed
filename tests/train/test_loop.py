"""The loop: what it writes, that it repeats itself exactly, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from ablate.data import prepare
from ablate.errors import UserError
from ablate.model import LanguageModel
from ablate.run import RunFolder, StaleWriter
from ablate.train import Pruned, TrialFailed, checkpoint, loop, train
from tests.train.conftest import Make, curve


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "study" / "run")


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    found = checkpoint.load_newest(folder.checkpoint)
    assert found is not None
    return {**found.model, **found.optimizer}


def same_weights(a: RunFolder, b: RunFolder) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# --- what comes out ------------------------------------------------------------------------------


def test_result_and_files(tiny: Make, folder: RunFolder) -> None:
    cfg = tiny()
    result = train(cfg, folder)
    assert folder.result() == json.loads(json.dumps(result))
    assert folder.status()["state"] == "done"
    assert not folder.checkpoint.exists()
    done, shape = result["train"], result["architecture"]
    assert done["steps"] == 20
    assert done["tokens"] == 20 * 4 * 16
    assert done["text_tokens"] == done["tokens"] / 2
    assert done["flops"] == done["tokens"] * shape["train_flops_per_token"]
    assert 0 < done["mfu"] < 1
    assert shape["attention_of_layers"] == 0.25
    assert {"start_up", "data", "build", "first_step", "train", "validation"} <= set(
        result["seconds"]
    )
    for split in ("val_a", "val_b"):
        items = folder.evaluation(split) or {}
        assert result[split]["loss"] == pytest.approx(sum(items["nats"]) / sum(items["tokens"]))
    assert result["mqar"]["queries"] == 6 * 2
    rows = folder.metrics()
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [row["step"] for row in rows if "val_a_loss" in row] == [4, 8, 12, 16, 20]
    assert {"versions", "commit", "hardware", "numerics", "parameter_groups"} <= set(
        folder.environment()
    )


def test_a_finished_run_is_not_repeated(tiny: Make, folder: RunFolder) -> None:
    first = train(tiny(), folder)
    before = folder.stamp()
    assert train(tiny(), folder) == json.loads(json.dumps(first))
    assert folder.stamp() == before


def test_without_a_folder_and_from_a_dict(tiny: Make, tmp_path: Path, monkeypatch: Any) -> None:
    import ablate

    monkeypatch.chdir(tmp_path)
    cfg = tiny(train={"tokens": 64})
    assert ablate.train(cfg.model_dump())["train"]["steps"] == 1
    assert list(tmp_path.iterdir()) == []


def test_progress(tiny: Make, folder: RunFolder) -> None:
    rows: list[dict[str, Any]] = []
    train(tiny(train={"log_every": 5}), folder, on_progress=rows.append)
    assert {"start_up", "data", "build", "train", "validation"} <= {row["phase"] for row in rows}
    last = rows[-1]
    assert (last["step"], last["steps"]) == (20, 20)
    assert last["loss"] > 0
    assert last["tokens_per_second"] > 0
    assert last["seconds_left"] is not None
    assert {row["step"] for row in rows} >= {5, 10, 15, 20}


def test_a_longer_log_interval_logs_the_mean(tiny: Make, tmp_path: Path) -> None:
    each, mean = RunFolder(tmp_path / "each"), RunFolder(tmp_path / "mean")
    train(tiny(), each)
    train(tiny(train={"log_every": 8}), mean)
    losses = [row["loss"] for row in each.metrics() if "loss" in row]
    means = {row["step"]: row["loss"] for row in mean.metrics() if "loss" in row}
    assert list(means) == [8, 16, 20]
    assert means[16] == pytest.approx(sum(losses[8:16]) / 8)


def test_lines_that_wait_for_the_next_step_say_the_same(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, late = RunFolder(tmp_path / "at_once"), RunFolder(tmp_path / "late")
    train(tiny(train={"log_every": 3}), at_once)
    monkeypatch.setattr("ablate.train.loop._queues", lambda device: True)
    train(tiny(train={"log_every": 3}), late)
    assert curve(at_once.metrics()) == curve(late.metrics())


# --- the same again ------------------------------------------------------------------------------


def test_two_runs_are_bitwise_equal(tiny: Make, tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / name) for name in "ab"]
    results = [train(tiny(train={"keep": "all"}), folder) for folder in folders]
    assert curve(folders[0].metrics()) == curve(folders[1].metrics())
    assert same_weights(*folders)
    assert results[0]["val_b"] == results[1]["val_b"]
    assert results[0]["mqar"] == results[1]["mqar"]


def test_seed_changes_the_run(tiny: Make) -> None:
    assert train(tiny(seed=1))["val_b"]["loss"] != train(tiny(seed=2))["val_b"]["loss"]


def test_micro_batches_give_the_loss_of_the_whole(tiny: Make, tmp_path: Path) -> None:
    """Rows of recall and of text have very different numbers of scored tokens."""
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    settings = {"z_loss": 1e-3, "lr": 1e-3}
    train(tiny(train=settings), whole)
    train(tiny(train={**settings, "micro_batch": 1}), parts)
    for a, b in zip(curve(whole.metrics()), curve(parts.metrics()), strict=True):
        for name in ("loss", "grad_norm", "val_a_loss"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4), (name, a["step"])


class Stop:
    """Sends a signal when training reaches a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM, phase: str = "train") -> None:
        self.step, self.number, self.phase = step, number, phase

    def __call__(self, row: dict[str, Any]) -> None:
        if row["step"] >= self.step and row["phase"] == self.phase:
            self.step = 10**9
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("phase", ["train", "validation"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_continued_is_unbroken(
    tiny: Make, tmp_path: Path, number: int, phase: str
) -> None:
    cfg = tiny(train={"keep": "all", "log_every": 3}, evaluate={"mqar_rows": 4})
    unbroken, broken = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "broken")
    result = train(cfg, unbroken)
    for step in (3, 8, 11):
        with pytest.raises(KeyboardInterrupt):
            train(cfg, broken, on_progress=Stop(step, number, phase))
        assert broken.status()["state"] == "interrupted"
        assert broken.result() is None
    again = train(cfg, broken)
    assert curve(broken.metrics()) == curve(unbroken.metrics())
    assert same_weights(unbroken, broken)
    assert again["val_b"] == result["val_b"]
    assert again["mqar"] == result["mqar"]
    assert again["train"]["seconds"] > 0
    assert again["train"]["steps"] == 20


def test_resumes_from_the_one_before_a_damaged_checkpoint(
    tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = tiny(train={"keep": "all", "checkpoint_steps": [5, 9]})
    unbroken, broken = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "broken")
    train(cfg, unbroken)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, broken, on_progress=Stop(12))
    steps = checkpoint.steps(broken.checkpoint)
    assert steps[:2] == [5, 9]
    for step in steps[1:]:
        (broken.checkpoint / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    train(cfg, broken)
    assert len([r for r in caplog.records if "cannot be used" in r.message]) == len(steps) - 1
    assert curve(broken.metrics()) == curve(unbroken.metrics())


# --- branches ------------------------------------------------------------------------------------

WSD = {"schedule": "wsd", "decay": 0.4, "warmup": 0.1, "keep": "all", "log_every": 3}


def test_a_branch_where_the_unbroken_run_decays_is_that_run(tiny: Make, tmp_path: Path) -> None:
    trunk, branch = RunFolder(tmp_path / "trunk"), RunFolder(tmp_path / "branch")
    whole = train(tiny(train={**WSD, "checkpoint_steps": [7, 12]}), trunk)
    arm = {**WSD, "decay": 0.9, "branch_from": str(trunk.path), "branch_at": 12}
    part = train(tiny(train=arm), branch)
    assert part["val_b"] == whole["val_b"]
    assert part["train"]["branch"] == {"from": "trunk", "at": 12}
    assert same_weights(trunk, branch)
    after = [row for row in curve(trunk.metrics()) if row["step"] > 12]
    assert curve(branch.metrics()) == after


def test_a_branch_is_resumed_too(tiny: Make, tmp_path: Path) -> None:
    trunk = RunFolder(tmp_path / "trunk")
    train(tiny(train={**WSD, "checkpoint_steps": [7]}), trunk)
    arm = {**WSD, "branch_from": str(trunk.path), "branch_at": 7, "tokens": 64 * 15}
    folders = [RunFolder(tmp_path / name) for name in ("unbroken", "broken")]
    whole = train(tiny(train=arm), folders[0])
    assert whole["train"]["steps"] == 15
    with pytest.raises(KeyboardInterrupt):
        train(tiny(train=arm), folders[1], on_progress=Stop(10))
    train(tiny(train=arm), folders[1])
    assert curve(folders[0].metrics()) == curve(folders[1].metrics())
    assert same_weights(*folders)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"branch_at": 8}}, "branch_at is 8"),
        ({"train": {"branch_at": 16}}, "learning rate"),
        ({"train": {"branch_at": 1}}, "learning rate"),
        ({"train": {"lr": 1e-2}}, "train.lr"),
        ({"arch": {"d_model": 32}}, "arch.d_model"),
        ({"seed": 5}, "another seed"),
        ({"train": {"tokens": 64 * 7}}, "budget of 7 steps"),
        ({"train": {"branch_from": "nowhere"}}, "no run folder"),
    ],
)
def test_a_branch_that_does_not_fit(
    tiny: Make, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], message: str
) -> None:
    trunk = RunFolder(tmp_path_factory.getbasetemp() / "shared-trunk")
    train(tiny(train={**WSD, "checkpoint_steps": [1, 7, 16]}), trunk)
    base = {**WSD, "branch_from": str(trunk.path), "branch_at": 7}
    changes = {**changes, "train": {**base, **changes.get("train", {})}}
    with pytest.raises(UserError, match=message):
        train(tiny(**changes))


# --- budgets -------------------------------------------------------------------------------------


def test_a_budget_in_flops(tiny: Make) -> None:
    cost = train(tiny(train={"tokens": 64}))["architecture"]["train_flops_per_token"]
    result = train(tiny(train={"tokens": None, "flops": cost * 64 * 3.5}))
    assert result["train"]["steps"] == 4


def test_a_budget_in_seconds_adds_up_over_resumes(tiny: Make, folder: RunFolder) -> None:
    cfg = tiny(train={"tokens": None, "seconds": 0.5}, evaluate={"mqar_rows": 0})
    with pytest.raises(KeyboardInterrupt):
        train(cfg, folder, on_progress=Stop(5))
    before = folder.status()["step"]
    result = train(cfg, folder)
    assert result["train"]["steps"] > before
    assert 0.5 <= result["seconds"]["train"] < 1.0
    lrs = [row["lr"] for row in folder.metrics() if "lr" in row]
    assert lrs[-1] < 0.5 * max(lrs)
    assert sum("val_a_loss" in row for row in folder.metrics()) == 5


def test_too_many_epochs_are_refused_before_compute(tiny: Make, folder: RunFolder) -> None:
    cfg = tiny(data={"allow_repeats": False}, train={"tokens": 10**7})
    with pytest.raises(UserError, match="epochs"):
        train(cfg, folder)
    assert folder.metrics() == []
    assert "epochs" in folder.status()["cause"]


# --- bad ends ------------------------------------------------------------------------------------


def broken_loss(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the training loss of these calls NaN."""
    calls = iter(range(10**9))
    original = LanguageModel.loss

    def loss(self: LanguageModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        value = original(self, *args, **kwargs)
        if kwargs.get("reduction") == "sum" and next(calls) in steps:
            return value * float("nan")
        return value

    monkeypatch.setattr(LanguageModel, "loss", loss)


def test_a_bad_step_is_skipped_and_counted(
    tiny: Make, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_loss(monkeypatch, {3, 4, 9})
    result = train(tiny(), folder)
    assert result["train"]["skipped_steps"] == 3
    assert result["train"]["steps"] == 20
    rows = {row["step"]: row for row in folder.metrics() if "lr" in row}
    assert rows[4]["loss"] is None
    assert rows[6]["loss"] is not None


def test_many_bad_steps_in_a_row_have_diverged(
    tiny: Make, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MAX_SKIPPED", 5)
    broken_loss(monkeypatch, {1, 2, *range(6, 100)})
    with pytest.raises(TrialFailed, match="diverged: 5 steps"):
        train(tiny(), folder)
    assert folder.status()["state"] == "failed"
    assert folder.status()["cause"].startswith("diverged")
    assert folder.status()["step"] >= 10


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        ({3, 4, *range(15, 20)}, "the last 5 steps"),
        ({*range(2, 8), *range(9, 14)}, "11 of 20 steps"),
        ({*range(2, 8), *range(9, 13)}, None),  # half of them
        ({*range(16, 20)}, None),
    ],
)
@pytest.mark.parametrize("log_every", [1, 7])
def test_a_run_that_ends_in_bad_steps_or_skipped_most_has_diverged(
    tiny: Make,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    bad: set[int],
    cause: str | None,
    log_every: int,
) -> None:
    broken_loss(monkeypatch, bad)
    cfg = tiny(train={"log_every": log_every})
    if cause is None:
        assert train(cfg, folder)["train"]["skipped_steps"] == len(bad)
        return
    with pytest.raises(TrialFailed, match=f"diverged: {cause} .* up to step 20"):
        train(cfg, folder)
    assert folder.status()["state"] == "failed"
    assert folder.status()["cause"].startswith("diverged")
    assert folder.result() is None


def test_a_full_disk_fails_the_trial_and_leaves_the_checkpoint(
    tiny: Make, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint.save_file

    def refuse(*args: Any) -> None:
        if checkpoint.steps(folder.checkpoint):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args)

    cfg = tiny(train={"keep": "all", "checkpoint_steps": [5, 10]})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", refuse)
        with pytest.raises(TrialFailed, match="disk full"):
            train(cfg, folder)
    assert folder.status()["cause"].startswith("disk full")
    assert checkpoint.steps(folder.checkpoint) == [5]
    assert train(cfg, folder)["train"]["steps"] == 20


def test_pruned(tiny: Make, folder: RunFolder) -> None:
    seen = []

    def should_prune(step: int, loss: float) -> bool:
        seen.append((step, loss))
        return step >= 8

    with pytest.raises(Pruned):
        train(tiny(), folder, should_prune=should_prune)
    assert [step for step, _ in seen] == [4, 8]
    status = folder.status()
    assert (status["state"], status["step"]) == ("pruned", 8)
    assert status["val_a_loss"] == seen[-1][1]
    assert folder.result() is None
    assert not folder.checkpoint.exists()


def test_a_stale_writer_writes_nothing_more(tiny: Make, folder: RunFolder) -> None:
    def take_over(row: dict[str, Any]) -> None:
        if row["step"] == 6 and folder.status()["generation"] == 1:
            folder.begin()

    with pytest.raises(StaleWriter):
        train(tiny(), folder, on_progress=take_over)
    assert folder.result() is None
    assert folder.status() == {**folder.status(), "state": "running", "generation": 2}


@pytest.mark.parametrize("phase", ["train", "checkpoint", "validation", "evaluation"])
def test_a_folder_that_is_moved_is_not_made_again(
    tiny: Make, folder: RunFolder, tmp_path: Path, phase: str
) -> None:
    def move(row: dict[str, Any]) -> None:
        if row["phase"] == phase and folder.path.exists():
            folder.path.parent.rename(tmp_path / "elsewhere")

    def evaluate(cfg: Any, folder: RunFolder, *model: Any, **more: Any) -> dict[str, Any]:
        folder.write_evaluation("needle", {"value": 1})
        return {}

    cfg = tiny(train={"checkpoint_seconds": 1e-3, "keep": "weights"})
    with pytest.raises(StaleWriter, match=r"its folder '.*/study/run' is gone \(moved or deleted"):
        train(cfg, folder, on_progress=move, evaluate=evaluate)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_folder_that_is_moved_before_the_first_step_is_not_made_again(
    tiny: Make, folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move(data: Any) -> Any:
        folder.path.parent.rename(tmp_path / "elsewhere")
        return prepare(data)

    monkeypatch.setattr(loop, "prepare", move)
    with pytest.raises(StaleWriter, match="is gone"):
        train(tiny(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_held_folder_and_another_config(tiny: Make, folder: RunFolder) -> None:
    lock = folder.lock()
    with pytest.raises(filelock.Timeout):
        train(tiny(), folder)
    lock.release()
    train(tiny(train={"tokens": 64}), folder)
    (folder.path / "result.json").unlink()
    with pytest.raises(UserError, match="another config"):
        train(tiny(seed=9), folder)


def test_settings_come_back(tiny: Make) -> None:
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    handler = signal.getsignal(signal.SIGTERM)
    train(tiny(train={"tokens": 64, "threads": 2}))
    after = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    assert after == before
    assert signal.getsignal(signal.SIGTERM) is handler


def test_bf16_keeps_fp32_master_weights(tiny: Make, folder: RunFolder) -> None:
    result = train(tiny(train={"precision": "bf16", "keep": "all"}), folder)
    assert {t.dtype for t in checkpoint.load(folder.checkpoint, 20).model.values()} == {
        torch.float32
    }
    assert folder.environment()["numerics"]["precision"] == "bf16"
    full = train(tiny())
    assert result["val_b"]["loss"] != full["val_b"]["loss"]
    assert result["val_b"]["loss"] == pytest.approx(full["val_b"]["loss"], rel=0.02)


def test_the_groups_are_said(
    tiny: Make, folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="ablate"):
        train(tiny(train={"tokens": 64}), folder)
    said = [r.message for r in caplog.records if r.message.startswith("AdamW")]
    assert [line.split(":")[0] for line in said] == ["AdamW decay", "AdamW no_decay"]
    assert "A_log" in said[1]
    assert len(folder.environment()["parameter_groups"]) == 2


def test_killed_right_after_the_result(tiny: Make, folder: RunFolder) -> None:
    result = train(tiny(), folder)
    checkpoint.save(folder.checkpoint, 20, {"a": torch.ones(1)}, {"b": torch.ones(1)}, {})
    folder.begin()
    assert train(tiny(), folder) == json.loads(json.dumps(result))
    assert folder.status()["state"] == "done"
    assert not folder.checkpoint.exists()


def test_a_torn_line_is_dropped_and_logged_again(tiny: Make, tmp_path: Path) -> None:
    unbroken, broken = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "broken")
    train(tiny(), unbroken)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), broken, on_progress=Stop(6))
    with (broken.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tok')
    train(tiny(), broken)
    assert curve(broken.metrics()) == curve(unbroken.metrics())


def test_what_fails_after_a_library_has_swallowed_an_interrupt_is_interrupted(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_imported(self: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        raise AttributeError("module 'numpy' has no attribute 'matrix'")

    monkeypatch.setattr(loop._Run, "build", half_imported)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), folder)
    assert folder.status()["state"] == "interrupted"
