"""The plan: every estimate says where it is from, and what seeds detect is what the tests have."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from ablate import config
from ablate.__main__ import main
from ablate.errors import UserError
from ablate.report import estimate as estimates
from ablate.report.plan import ASSUMED_NOISE, noise_of, plan
from ablate.report.stats import (
    minimum_detectable_effect,
    seeds_for_equivalence,
    seeds_needed,
)
from ablate.run import RunFolder, write_json
from ablate.study import space
from ablate.study.folder import StudyFolder

GRID = {
    "arch.pattern": None,
    "arch.n_layers": 4,
    "arch.mlp_share": 0.0,
    "study.grid": {"arch.attention_share": [0.0, 0.25, 0.5]},
    "study.seeds": [0, 1],
    "study.finding": "attention_share",
}


def said(console: Any) -> str:
    return " ".join(console.file.getvalue().split())


def finished(tree: dict[str, Any], name: str, losses: list[float], **train: Any) -> StudyFolder:
    """An earlier study of the same cells on this machine, with planted losses and speeds."""
    cfg = config.load(tree)
    folder = StudyFolder(Path(tree["study"]["folder"]) / name)
    here = estimates.machine(cfg)
    cells = {}
    for cell, loss in zip(space.cells(tree), losses, strict=True):
        cost = cell.trial.architecture.cost(cfg.data.seq_len)
        run = folder.run(cell.key)
        run.create(cell.trial.tree)
        run.write_environment(
            {
                "hardware": {"cpu": here.name, "cores": 2},
                "numerics": {"precision": "fp32", "threads": here.threads},
            }
        )
        run.write_result(
            {
                "architecture": {
                    "pattern": cell.trial.architecture.pattern,
                    "d_model": cfg.arch.d_model,
                    "params": cost.params,
                    "non_embedding_params": cost.non_embedding_params,
                    "state_bytes": cost.state_bytes,
                    "train_flops_per_token": cost.train_flops,
                },
                "train": {
                    "flops": 1e9,
                    "tokens": cell.trial.tokens,
                    "tokens_per_second": 1000.0,
                    "peak_memory_bytes": 3e8,
                    "micro_batch": cfg.train.batch_size,
                    **train,
                },
                "seconds": {"train": 5.0, "start_up": 3.0, "first_step": 1.0, "validation": 9.0},
                "val_b": {"loss": loss},
                "data": {"unique_tokens": 5000},
            },
            run.begin(),
        )
        cells[cell.key] = {"arm": cell.arm, "seed": cell.seed}
    write_json(folder.path / "study.json", {"name": name, "cells": cells})
    return folder


def test_from_nothing_it_is_the_contract_and_an_assumption(make: Any, console: Any) -> None:
    tree = make(**GRID)
    plan(tree, console, hours=2.0)
    text = said(console)
    for words in (
        *("M**M", "attention_share=0.25", "contract at 10% of the measured peak"),
        "6 trials, ",
        "from the files' sizes, at 1 bytes a token",
        "noise: 0.004 nats between seeds, 0.30 of its variance",
        "assumed, as no finished study of this size is here",
        "published: 50% attention, +0.029 nats from the best: 2 seeds",
        "2 hours give",
        "memory, where not measured: 16 bytes a parameter",
    ):
        assert words in text, words
    given = {"n_arms": 3, "n_seeds": 2, "correlation": 0.3}
    effect = minimum_detectable_effect(0.004, **given)  # type: ignore[arg-type]
    assert f"{effect:.2g}" in text
    assert not Path(tree["study"]["folder"]).exists()


def test_earlier_runs_of_the_architecture_then_of_the_size(make: Any, console: Any) -> None:
    tree = make(**GRID)
    finished(tree, "before", [3.0] * 6)
    cfg, cells = config.load(tree), space.cells(tree)
    here = estimates.machine(cfg)
    past = estimates.history(Path(tree["study"]["folder"]), here)
    assert len(past) == 6
    trial = cells[0].trial
    known = estimates.speed(trial, past, here)
    assert known.source == "2 earlier runs of this architecture (before)"
    tokens = trial.tokens
    cost = trial.architecture.cost(cfg.data.seq_len)
    found = estimates.estimate(trial, known, here)
    validation = 6 * 1500 * cost.forward_flops / (1000 * cost.train_flops)
    assert found.seconds == pytest.approx(tokens / 1000 + validation + 4.0)
    assert found.memory == 3e8
    other = space.cells(make(**{**GRID, "arch.d_model": 24}))[0].trial
    known = estimates.speed(other, past, here)
    assert known.source == "5 earlier runs of about this size (before)"
    assert math.isnan(known.memory)
    elsewhere = estimates.Machine("another", False, False, 1, 1e10, "measured")
    assert estimates.history(Path(tree["study"]["folder"]), elsewhere) == []
    far = space.cells(make(**{**GRID, "arch.d_model": 128}))[0].trial
    assert estimates.speed(far, past, here).source.startswith("contract")
    plan(tree, console)
    assert "earlier runs of this architecture (before)" in said(console)
    assert "5k unique ones (counted by before)" in said(console)


def test_noise_is_measured_where_it_can_be(make: Any) -> None:
    tree = make(**GRID)
    cells = space.cells(tree)
    study = StudyFolder(Path(tree["study"]["folder"]) / "tiny")
    assumed = noise_of(cells, study)
    assert (assumed.sigma, assumed.correlation) == ASSUMED_NOISE
    finished(tree, "before", [3.0, 3.1, 3.2, 3.02, 3.1, 3.24])
    measured = noise_of(cells, study)
    assert measured.source == "the earlier study before, 2 degrees of freedom"
    assert 0.005 < measured.sigma < 0.05
    # one of the same models that were trained for a hundredth of the time is no guide
    finished(tree, "brief", [3.0, 3.9, 3.2, 3.0, 3.1, 4.2], tokens=cells[0].trial.tokens / 100)
    assert noise_of(cells, study).source == "the earlier study before, 2 degrees of freedom"
    finished(tree, "tiny", [3.0, 3.1, 3.2, 3.002, 3.1, 3.203])
    own = noise_of(cells, study)
    assert own.source.startswith("the finished runs of this study")
    assert own.sigma < measured.sigma / 3


def test_stages_are_planned_apart(make: Any, console: Any) -> None:
    tree = make(**{**GRID, "study.tune": {"points": 5}})
    plan(tree, console)
    text = said(console)
    assert "tune: 15 trials" in text
    assert "confirm: 6 trials" in text
    assert "both stages:" in text
    assert "first stage: 5 learning rates an arm" in text


def test_the_second_stage_is_planned_at_the_rates_found(make: Any, console: Any) -> None:
    tree = make(**{**GRID, "study.tune": {"points": 5}})
    arms = dict.fromkeys(cell.arm for cell in space.cells(tree))
    fits = [{"arm": arm, "chosen": 2e-3} for arm in arms]
    folder = StudyFolder(Path(tree["study"]["folder"]) / "tiny")
    folder.write_index({"tuned": {"problems": [], "fit": {"fits": fits}}})
    plan(tree, console)
    assert "confirm: 6 trials" in said(console)
    assert "what seeds detect" in said(console)


def test_certificates_are_in_the_plan(make: Any, console: Any) -> None:
    attention = {"head_dim": 4, "n_heads": 2}
    changes = {"match.by": "attention_inner", "match.tolerance": 0.05, "arch.attention": attention}
    plan(make(**GRID, **changes), console)
    text = said(console)
    assert "matched: attention_share=0.5: " in text
    assert "n_heads and n_kv_heads of attention 2 to" in text
    assert "attention_share=0.5, unmatched" in text


def test_calibration_trains_twenty_steps_and_leaves_nothing(make: Any, console: Any) -> None:
    tree = make(**{**GRID, "study.grid": {"arch.attention_share": [0.0, 0.5]}})
    plan(tree, console, calibrate=True)
    text = said(console)
    assert "calibration of 20 steps" in text
    assert "unique ones (counted)" in text
    assert not Path(tree["study"]["folder"]).exists()


def test_a_gpu_that_is_not_here(make: Any, console: Any) -> None:
    tree = make(**{**GRID, "train.device": "auto"})
    plan(tree, console, gpu="H100")
    assert "time on H100, by: contract at 10% of the data sheet peak of 9.9e+14" in said(console)
    with pytest.raises(UserError, match="gpu is 'H900', whose peak is not known; there are"):
        plan(tree, console, gpu="H900")


def test_a_budget_in_seconds_and_one_arm(make: Any, console: Any) -> None:
    plan(make(**{"train.tokens": None, "train.seconds": 7.0}), console)
    text = said(console)
    assert "epochs: unknown, as the budget is in seconds" in text
    assert "what seeds detect" not in text
    with pytest.raises(UserError, match="there is one arm"):
        plan(make(), console, hours=1.0)


def test_the_figures_to_plan_by() -> None:
    given: dict[str, Any] = {"n_arms": 8, "correlation": 0.3}
    assert minimum_detectable_effect(0.004, n_seeds=3, **given) == pytest.approx(0.008, abs=4e-4)
    assert minimum_detectable_effect(0.004, n_seeds=3, comparisons=7, **given) == pytest.approx(
        0.011, abs=5e-4
    )
    assert minimum_detectable_effect(0.004, n_seeds=6, **given) == pytest.approx(0.0055, abs=2e-4)
    two: dict[str, Any] = {"n_arms": 2, "correlation": 0.3}
    assert 900 < seeds_needed(0.0004, 0.004, **two) < 1200  # GQA: about a thousand
    for effect in (0.04, 0.007, 0.004):
        n = seeds_needed(effect, 0.004, **given)
        assert minimum_detectable_effect(0.004, n_seeds=n, **given) <= effect
        assert n == 2 or minimum_detectable_effect(0.004, n_seeds=n - 1, **given) > effect
    assert 6 <= seeds_for_equivalence(0.005, 0.004, **given) <= 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hours=many"], "hours is 'many'; give a positive number of GPU-hours"),
        (["hours=-3"], "hours is '-3'"),
        (["calibrate=perhaps"], "calibrate is 'perhaps'; give true or false"),
        (["calibrate=true", "gpu=H100"], "leave one"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "+sweep=attn_ratio", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_earlier_run_is_passed_over(make: Any) -> None:
    tree = make(**GRID)
    folder = finished(tree, "before", [3.0] * 6)
    broken = next(iter(folder.index()["cells"]))
    (RunFolder(folder.path / broken).path / "result.json").write_text("{}")
    here = estimates.machine(config.load(tree))
    assert len(estimates.history(Path(tree["study"]["folder"]), here)) == 5


def test_epochs_are_those_of_the_arm_that_sees_its_text_most(make: Any, console: Any) -> None:
    tree = make(**{"study.grid": {"data.max_bytes": [40_000, 10_000]}, "data.val_share": 0.1})
    plan(tree, console)
    (line,) = re.findall(r"text: .*", said(console))
    assert "of 8k unique ones" in line
    assert "epochs in the arm with most" in line
