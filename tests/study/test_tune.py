"""Tuned learning rates: fits that find a planted optimum, and two stages that survive kills."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from ablate import config
from ablate.errors import UserError
from ablate.study import space
from ablate.study.folder import StudyFolder
from ablate.study.supervisor import run_study
from ablate.study.tune import Run, Tuning, grid, tune

from .conftest import FAKE, calls, start
from .fake_child import DIVERGES, RAISES

BEST = 10**-2.5  # of the make-believe trainer


def planted(
    rng: np.random.Generator,
    optima: dict[str, float],
    *,
    points: int = 5,
    seeds: int = 1,
    noise: float = 0.004,
    skew: float = 0.0,
) -> list[Run]:
    """Losses 2 + 0.02 u^2 + skew u^3, u octaves from each arm's optimum, with seed effects."""
    runs = []
    for seed in range(seeds):
        luck = rng.normal(0, 0.01)
        for arm, best in optima.items():
            for rate in grid(3e-3, points, 1.0):
                u = math.log2(rate / best)
                loss = 2 + 0.02 * u**2 + skew * u**3 + luck + rng.normal(0, noise)
                runs.append(Run(arm, rate, seed, loss))
    return runs


def test_rates_are_octaves_around_the_arms_own() -> None:
    assert grid(4e-3, 5, 1.0) == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    assert grid(4e-3, 6, 0.5)[3] == 4e-3
    assert set(grid(4e-3, 5, 1.0)) < set(grid(4e-3, 7, 1.0))  # more points repeat no run


def test_without_noise_the_optimum_is_exact() -> None:
    runs = planted(np.random.default_rng(0), {"a": 2.3e-3, "b": 4.1e-3}, noise=0.0, seeds=2)
    found = tune(runs)
    assert not found.problems
    assert found.degree == 2
    assert [f.chosen for f in found.fits] == [2.3e-3, 4.1e-3]
    for fit in found.fits:
        assert fit.optimum == pytest.approx(fit.chosen, rel=2e-3)
        assert fit.minus == pytest.approx(0.02 / 4, rel=0.02)
        assert fit.plus == pytest.approx(0.02 / 4, rel=0.02)
        assert fit.loss(fit.optimum) == pytest.approx(fit.loss(2 * fit.optimum) - 0.02, abs=1e-3)
    assert repr(found) == repr(Tuning.of(json.loads(json.dumps(found.plain()))))


def test_the_interval_covers_the_planted_optimum() -> None:
    rng = np.random.default_rng(1)
    optima = {f"a{i}": 3e-3 * 2 ** rng.uniform(-0.5, 0.5) for i in range(4)}
    inside, total, covered = 0, 0, 0
    for _ in range(150):
        found = tune(planted(rng, optima))
        for fit in found.fits:
            if fit.problem is None:
                total += 1
                inside += fit.low <= optima[fit.arm] <= fit.high
                covered += abs(fit.minus - 0.02 / 4) < fit.minus_half + 0.02
    assert total > 570
    assert inside / total == pytest.approx(0.95, abs=0.03)
    assert covered == total


def test_a_skewed_curve_takes_a_cubic_and_keeps_the_optimum() -> None:
    rng = np.random.default_rng(2)
    optima = {f"a{i}": 3e-3 for i in range(6)}
    # 0.02 u^2 + 0.008 u^3 (steep above) still has its minimum at u = 0
    found = tune(planted(rng, optima, skew=0.008, noise=0.002, seeds=2))
    assert found.degree == 3
    for fit in found.fits:
        u = optimize.minimize_scalar(
            lambda x, fit=fit: fit.loss(2**x), bounds=(-9.5, -7.5), method="bounded"
        ).x
        assert 2**u == pytest.approx(fit.optimum, rel=0.01)
        assert fit.optimum == pytest.approx(3e-3, rel=0.25)
        assert fit.plus > fit.minus
    assert tune(planted(rng, optima, seeds=2)).degree == 2


def test_a_smooth_optimum_is_sharper_and_its_fit_is_tested() -> None:
    rng = np.random.default_rng(3)
    places = {f"a{i}": i / 6 for i in range(7)}
    straight = {arm: 3e-3 * 2 ** (0.8 * p - 0.4) for arm, p in places.items()}
    own, smooth, ps = [], [], []
    for _ in range(60):
        runs = planted(rng, straight)
        each, line = tune(runs), tune(runs, smooth="linear", places=places)
        if each.problems or line.problems:
            continue
        own += [math.log2(f.optimum / straight[f.arm]) for f in each.fits]
        smooth += [math.log2(f.chosen / straight[f.arm]) for f in line.fits]
        ps.append(line.smooth_p)
    assert np.std(smooth) < 0.7 * np.std(own)
    assert np.mean(np.array(ps) < 0.05) < 0.15
    bent = {arm: 3e-3 * 2 ** (1.2 * (i % 2) - 0.6) for i, arm in enumerate(places)}
    assert tune(planted(rng, bent, noise=0.001), smooth="linear", places=places).smooth_p < 0.01


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (1e-4, ["lowest learning rate", "lower train.lr, such as train.lr=0.00075,"]),
        (0.1, ["highest", "higher train.lr, such as train.lr=0.012,"]),
    ],
)
def test_an_optimum_at_the_edge_is_a_problem(best: float, words: list[str]) -> None:
    found = tune(planted(np.random.default_rng(4), {"good": 3e-3, "bad": best}))
    (problem,) = found.problems
    assert problem.startswith("arm 'bad': ")
    assert all(word in problem for word in words)
    assert math.isnan(found.rates()["bad"])


def test_diverged_rates_are_left_out_and_bound_the_optimum() -> None:
    runs = planted(np.random.default_rng(5), {"a": 3e-3}, noise=0.0)
    gone = [r._replace(loss=math.inf) if r.rate == 12e-3 else r for r in runs]
    assert tune(gone).rates()["a"] == 3e-3
    gone = [r._replace(loss=math.inf) if r.rate > 3e-3 else r for r in runs]
    assert "only 3 of 5" in tune(gone).problems[0]
    wide = planted(np.random.default_rng(5), {"a": 3e-3}, noise=0.0, points=7)
    gone = [r._replace(loss=math.inf) if r.rate > 3e-3 else r for r in wide]
    assert "those above it diverged" in tune(gone).problems[0]
    assert "smaller study.tune.octaves" in tune(gone).problems[0]


# --- two stages ----------------------------------------------------------------------------------

TWO = {"study.grid": {"arch.mamba2.d_conv": [2, 4]}, "study.seeds": [0, 1], "train.lr": 4e-3}


def two(make: Any, **changes: Any) -> dict[str, Any]:
    return make(**{**TWO, "study.tune": {"points": 5}, **changes})


def folder_of(tree: dict[str, Any]) -> StudyFolder:
    return StudyFolder(Path(tree["study"]["folder"]) / tree["study"]["name"])


def check_finished(tree: dict[str, Any]) -> None:
    """Every trial of both stages once, the second at the fitted rates."""
    index = folder_of(tree).index()
    stages = Counter(cell.get("stage", "confirm") for cell in index["cells"].values())
    assert stages == {"tune": 10, "confirm": 4}
    rates = {f["arm"]: f["chosen"] for f in index["tuned"]["fit"]["fits"]}
    assert all(rate == pytest.approx(BEST, rel=0.01) for rate in rates.values())
    for key, cell in index["cells"].items():
        tree_of_run = folder_of(tree).run(key).config()
        assert tree_of_run is not None
        if cell.get("stage") == "tune":
            assert tree_of_run["seed"] == 1000
            assert cell["factors"]["train.lr"] == tree_of_run["train"]["lr"]
        else:
            assert tree_of_run["seed"] in (0, 1)
            assert tree_of_run["train"]["lr"] == rates[cell["arm"]]
    ends = Counter(call[0] for call in calls(tree) if call[2] == "ends")
    # one may have been killed with its result written, before it could note that
    assert set(ends.values()) == {1}
    assert len(index["cells"].keys() - ends.keys()) <= 1
    assert index["orphans"] == []


def test_tune_then_confirm_and_never_again(make: Any, console: Any) -> None:
    tree = two(make)
    outcome = run_study(tree, console=console, child_command=FAKE)
    assert outcome.exit_code == 0
    assert outcome.problems == []
    assert len(outcome.done) == 14
    check_finished(tree)
    text = console.file.getvalue()
    assert "d_conv=2: learning rate 0.00316 is confirmed" in text
    assert "d_conv=2, tuning lr=0.001, seed 1000: done" in text
    before = calls(tree)
    assert run_study(tree, console=console, child_command=FAKE).exit_code == 0
    assert calls(tree) == before


@pytest.mark.parametrize("stage", ["tune", "confirm"])
def test_a_kill_in_either_stage_repeats_nothing(make: Any, console: Any, stage: str) -> None:
    tree = two(make)
    process = start(tree, "fake", FAKE_STEP_SECONDS="0.05")
    at = 3 if stage == "tune" else 12
    end = time.monotonic() + 120
    while not (folder_of(tree).path.exists() and len(calls(tree)) > 2 * at):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert (folder_of(tree).index()["tuned"] is None) == (stage == "tune")
    outcome = run_study(tree, console=console, child_command=FAKE)
    assert outcome.exit_code == 0
    check_finished(tree)


def test_two_invocations_come_to_the_same_rates(make: Any) -> None:
    tree = two(make)
    processes = [start(tree, "fake", FAKE_STEP_SECONDS="0.03") for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    check_finished(tree)


def test_an_edge_ends_the_study_before_its_second_stage(make: Any, console: Any) -> None:
    tree = two(make, **{"train.lr": 0.02})
    outcome = run_study(tree, console=console, child_command=FAKE)
    assert outcome.exit_code == 1
    assert len(outcome.problems) == 2
    assert "the confirming stage has not begun: arm 'd_conv=2'" in console.file.getvalue()
    assert len(calls(tree)) == 20
    # Wider, around the same rate: the runs that are there are used.
    tree["study"]["tune"] = {"points": 9}
    assert run_study(tree, console=console, child_command=FAKE).exit_code == 0
    begun = Counter(call[0] for call in calls(tree) if call[2] == "begins")
    assert sorted(begun.values()) == [1] * (18 + 4)


def test_divergence_is_an_answer_and_a_failure_is_not(make: Any, console: Any) -> None:
    tree = two(make, **{"train.lr": DIVERGES / 16, "study.tune": {"points": 5, "octaves": 2.0}})
    outcome = run_study(tree, console=console, child_command=FAKE)
    assert outcome.exit_code == 0
    assert len(outcome.causes) == 2
    tree = two(make, **{"train.lr": RAISES / 16, "study.tune": {"points": 5, "octaves": 2.0}})
    outcome = run_study(tree, console=console, child_command=FAKE)
    assert outcome.exit_code == 1
    assert "failed trials have been run again" in outcome.problems[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study.tune": {"points": 3}}, r"study\.tune: 'points' must be 0 or at least 5"),
        ({"study.tune": {"points": 5, "seeds": [1, 1]}}, r"'seeds' must be distinct"),
        ({"study.tune": {"points": 5, "seeds": [1]}}, r"share \[1\]: figures need fresh seeds"),
        ({"study.seeds": [], "seed": 1000}, r"study\.tune\.seeds has 1000"),
        ({"study.grid": {"train.lr": [1e-3, 2e-3]}}, r"'train\.lr' is a factor and tuned"),
        ({"train.lr": 5.0}, r"tries the learning rate 20"),
        (
            {"study.tune": {"points": 5, "smooth": "linear"}},
            r"study\.tune\.smooth is 'linear', which needs 3 different values",
        ),
        (
            {
                "study.grid": {"arch.placement": ["even", "front", "back"]},
                "arch.pattern": None,
                "arch.n_layers": 8,
                "arch.attention_share": 0.25,
                "study.tune": {"points": 5, "smooth": "linear"},
            },
            r"the factor of arm 'placement=even' is no number",
        ),
        (
            {
                "study.grid": {},
                "study.search": {"train.lr": {"low": 1e-4, "high": 1e-2}},
                "study.n_trials": 3,
            },
            r"'tune' needs 'grid' or 'arms'",
        ),
    ],
)
def test_mistakes_name_the_field(make: Any, changes: dict[str, Any], message: str) -> None:
    tree = two(make, **changes)
    with pytest.raises(UserError, match=message):
        space.tuning(config.load(tree), space.cells(tree))
