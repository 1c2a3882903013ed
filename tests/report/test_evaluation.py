"""What evaluation/ holds, on the page: recall, needles, length, benchmarks, paired tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ablate.__main__ import main
from ablate.report import load_study
from ablate.report.evaluation import Evaluations, _Scores
from ablate.report.page import write_report
from ablate.report.plots import looks
from ablate.report.stats import mcnemar, paired_items
from ablate.report.verdicts import analyse
from ablate.run import RunFolder, find_runs


def recall(rng, accuracy):
    """A phonebook's file: 40 documents of 2 sizes."""
    cells, columns = {}, {k: [] for k in ("cell", "x", "depth", "cluster", "exact_match")}
    for entries in (5, 20):
        hits = (rng.random(40) < accuracy).astype(float)
        name = f"entries={entries}"
        verdict = "floor" if not hits.any() else None
        cells[name] = {"x": entries, "items": 40, "exact_match": hits.mean(), "verdict": verdict}
        columns["cell"] += [name] * 40
        columns["x"] += [entries] * 40
        columns["depth"] += [0.5] * 40
        columns["cluster"] += [f"{entries}:{i}" for i in range(40)]
        columns["exact_match"] += hits.tolist()
    content = {"task": "phonebook", "metric": "exact_match", "cells": cells, "items": columns}
    return {**content, "value": 0.5, "verdict": None, "fuzzy": {"is_fuzzy": accuracy < 0.5}}


def needle(rng, accuracy):
    columns = {k: [] for k in ("cell", "x", "depth", "cluster", "exact_match")}
    cells = {}
    for length in (512, 1024):
        name = f"length={length}"
        cells[name] = {"x": length, "items": 12, "exact_match": accuracy, "verdict": None}
        for depth in (0.0, 0.5, 1.0):
            for i in range(4):
                columns["cell"].append(name)
                columns["x"].append(length)
                columns["depth"].append(depth)
                columns["cluster"].append(f"{length}:{depth}:{i}")
                columns["exact_match"].append(float(rng.random() < accuracy))
    return {"task": "passkey", "metric": "exact_match", "cells": cells, "items": columns}


def length(level):
    items = {str(m): (level - 0.1 * m + np.linspace(0, 0.5, 8)).tolist() for m in (1, 2)}
    return {
        "task": "length",
        "metric": "loss",
        "documents": 8,
        "by_multiple": {m: float(np.mean(v)) for m, v in items.items()},
        "by_position": {"first": [1, 2, 3], "last": [1, 2, 4], "loss": [level + 1, level, level]},
        "items": {**items, "position": []},
    }


def benchmark(rng, accuracy):
    score = (rng.random(60) < accuracy).astype(float)
    ids = [f"boolq:{i}" for i in range(60)]
    clusters = [f"boolq:{i // 3}" for i in range(60)]
    items = {"id": ids, "cluster": clusters, "score": score.tolist()}
    return {"task": "boolq", "shots": 0, "metric": "acc", "value": score.mean(), "items": items}


@pytest.fixture
def evaluated(study: Path) -> Path:
    """Recall rises with the share of attention, all else is equal; every run is evaluated."""
    for run in find_runs(study):
        arm, seed = int(run.key[:2]), int(run.key[2:4])
        rng = np.random.default_rng(10 * arm + seed)
        accuracy = (0.05, 0.6, 0.9, 0.95)[arm]
        run.write_evaluation("phonebook", recall(rng, accuracy))
        run.write_evaluation("passkey", needle(rng, accuracy))
        run.write_evaluation("length", length(2.0 + 0.1 * arm))
        run.write_evaluation("boolq-0shot", benchmark(np.random.default_rng(seed), 0.6))
    return study


def test_the_page_shows_what_was_evaluated(evaluated: Path):
    text = write_report(evaluated).read_text()
    assert "Recall, length and benchmarks" in text
    for name in ("recall", "needle", "positions"):
        assert (evaluated / "report" / f"{name}.png").stat().st_size > 5000
    assert "at floor" not in text or "phonebook" in text
    table = pd.read_csv(evaluated / "report" / "evaluation.csv")
    assert set(table["task"]) == {"phonebook", "passkey", "length", "boolq-0shot"}
    assert len(table) == 4 * (2 + 2 + 2 + 1)


def test_arms_are_compared_on_the_same_items(evaluated: Path):
    found = Evaluations.read(analyse(load_study(evaluated)), evaluated).table()
    reference, *_, last = found["arm"].unique()
    row = found[(found["task"] == "phonebook") & (found["arm"] == last)].iloc[0]
    assert row["difference"] > 0.7
    assert row["difference_low"] > 0.5
    assert row["p"] < 0.01
    assert np.isnan(row["mcnemar_p"])  # two seeds an arm
    first = found[found["arm"] == reference]
    assert first["difference"].isna().all()
    assert first[first["task"] == "phonebook"]["fuzzy"].all()
    same = found[(found["task"] == "boolq-0shot") & (found["arm"] == last)].iloc[0]
    assert same["difference"] == 0
    assert same["p"] == 1
    loss = found[(found["task"] == "length") & (found["arm"] == last)]
    assert loss["cell"].tolist() == ["1 training lengths", "2 training lengths"]
    assert loss["difference"].tolist() == pytest.approx([0.3, 0.3])


def test_seeds_that_differ_and_a_score_without_spread(evaluated: Path):
    found = Evaluations.read(analyse(load_study(evaluated)), evaluated).table()
    book = found[(found["task"] == "phonebook") & (found["cell"] == "entries=5")]
    for row in book.itertuples():
        own = [float(v) for v in row.by_seed.split()]
        assert len(own) == 2
        assert np.mean(own) == pytest.approx(row.value, abs=1e-4)
    by_seed = [[float(v) for v in row.by_seed.split()] for row in book.itertuples()]
    noise = np.sqrt(np.mean([np.var(by_seed[i], ddof=1) for i in (0, -1)]))
    last = book.iloc[-1]
    assert last["over_noise"] == pytest.approx(last["difference"] / noise, rel=0.01)
    loss = found[found["task"] == "length"]
    assert (loss["by_seed"].str.split().str[0] == loss["by_seed"].str.split().str[1]).all()
    every = pd.Series(1.0, index=range(40))
    clusters = pd.Series(range(40))
    mean = _Scores(every, clusters, [1.0]).mean()
    assert (mean.low, mean.high) == (pytest.approx(0.912, abs=1e-3), 1.0)
    none = _Scores(0 * every, clusters // 10, [0.0]).mean()  # four texts of ten questions
    assert (none.low, none.high) == (0.0, pytest.approx(0.602, abs=1e-3))


def test_seeds_that_were_asked_for_different_lengths(evaluated: Path):
    """Rows are of all that was asked; the curve of an arm is of what all its seeds have."""
    run = next(run for run in find_runs(evaluated) if run.key[:4] == "0101")
    more = length(2.1)
    more["by_multiple"] |= {"4": 1.9}
    more["items"]["4"] = [1.9] * 8
    del more["by_multiple"]["1"], more["items"]["1"]
    run.write_evaluation("length", more)
    write_report(evaluated)
    found = pd.read_csv(evaluated / "report" / "evaluation.csv")
    found = found[found["task"] == "length"]
    assert set(found["cell"]) == {f"{m} training lengths" for m in (1, 2, 4)}
    four = found[found["cell"] == "4 training lengths"]
    assert four["items"].tolist().count(0) == 3
    assert four["value"].max() == pytest.approx(1.9)


def test_a_verdict_is_that_of_every_seed(study: Path):
    for run in find_runs(study):
        seed = int(run.key[2:4])
        content = recall(np.random.default_rng(seed), 0.5)
        for cell in content["cells"].values():
            cell |= {"verdict": "floor" if seed == 0 else None, "tokens": 120.0}
        content["cells"]["entries=20"]["verdict"] = "cut"
        run.write_evaluation("phonebook", content)
    found = Evaluations.read(analyse(load_study(study)), study).table()
    assert set(found[found["cell"] == "entries=5"]["verdict"]) == {""}
    assert set(found[found["cell"] == "entries=20"]["verdict"]) == {"cut"}
    assert set(found["tokens"]) == {120.0}
    assert "texts cut" in write_report(study).read_text()


def test_one_seed_has_mcnemar(synthetic, tmp_path: Path):
    study = synthetic.write_study(tmp_path / "one", seeds=(0,))
    for run in find_runs(study):
        arm = int(run.key[:2])
        run.write_evaluation("phonebook", recall(np.random.default_rng(arm), (0.1, 0.9)[arm > 0]))
    found = Evaluations.read(analyse(load_study(study)), study).table()
    row = found[found["arm"] != found["arm"].iloc[0]].iloc[0]
    assert row["mcnemar_p"] < 1e-4


def test_nothing_evaluated_leaves_the_page_as_it_was(study: Path):
    text = write_report(study).read_text()
    assert "Recall, length and benchmarks" not in text
    assert not (study / "report" / "evaluation.csv").exists()


def test_paired_items_and_mcnemar():
    rng = np.random.default_rng(0)
    one = (rng.random(300) < 0.6).astype(float)
    other = np.where(rng.random(300) < 0.8, one, 1 - one)
    null = [
        paired_items(a, b, draws=200).p
        for a, b in ((rng.random(50), rng.random(50)) for _ in range(200))
    ]
    assert np.mean(np.array(null) < 0.05) < 0.1
    alone = paired_items(one, other)
    together = paired_items(one, other, np.repeat(np.arange(20), 15))
    assert alone.value == together.value
    assert paired_items(one, one).p == 1.0
    better = np.where(rng.random(300) < 0.2, 1.0, one)
    assert paired_items(better, one).p < 0.01
    assert mcnemar(better, one) < 1e-3
    assert mcnemar(one, one) == 1.0
    assert mcnemar([1, 1, 1, 0], [0, 0, 0, 1]) == pytest.approx(0.625)
    whole = paired_items(np.repeat([1.0, 0.0], 50), np.zeros(100), np.repeat([0, 1], 50))
    assert whole.p > 0.3  # one document, however many questions it has


def test_a_folder_lists_its_evaluations(tmp_path: Path):
    run = RunFolder(tmp_path)
    assert run.evaluations() == []
    run.write_evaluation("b", {})
    run.write_evaluation("a", {})
    assert run.evaluations() == ["a", "b"]


def test_arms_are_told_apart_by_seeds_and_not_by_texts_alone(evaluated: Path):
    found = Evaluations.read(analyse(load_study(evaluated)), evaluated)
    arms = list(found.tasks["phonebook"])
    assert found.against("phonebook", arms[0])["side"].tolist() == ["", *["higher"] * 3]
    assert found.against("phonebook", arms[3])["side"].tolist()[2:] == ["", ""]  # 90% and 95%
    cell = found.against("phonebook", arms[2], "entries=20")
    assert cell["side"][arms[0]] == "lower"
    assert cell["value"][arms[0]] < 0.2
    told = {v.text.split(",")[0]: v for v in found.verdicts()}
    assert set(told) == {"phonebook", "passkey"}  # of recall tasks alone
    assert "; higher: " in told["phonebook"].text
    assert "lower: " not in told["phonebook"].text
    for own in found.tasks["passkey"].values():
        for content in own:
            content["cells"] = {k: {**c, "verdict": "floor"} for k, c in content["cells"].items()}
    told = {v.text.partition(":")[0]: v for v in found.verdicts()}
    assert told["passkey"].text == "passkey: every arm is at floor, which tells nothing."
    assert told["passkey"].kind == "null"
    # one seed far off: texts tell the arms apart, seeds do not
    for content in found.tasks["phonebook"][arms[1]]:
        low = content["seed"] == 0
        content["items"]["exact_match"] = [0.0 if low else 1.0] * 80
    alone = found.against("phonebook", arms[0])
    assert alone["value"][arms[1]] == 0.5
    assert alone["side"].tolist() == ["", "", "", ""]


def test_what_has_more_values_takes_the_colour(synthetic, tmp_path: Path):
    arms = {f"{kind}, d_state={n}": n for kind in ("a", "b", "c") for n in (16, 128)}
    cells = [
        (
            arm,
            {"arch.mamba2.d_state": n, "arch.attention_share": "abc".index(arm[0]) / 10},
            seed,
            synthetic.result(loss=2.0),
            {},
        )
        for seed in (0, 1)
        for arm, n in arms.items()
    ]
    look = looks(analyse(load_study(synthetic.write_cells(tmp_path / "study", cells))))
    assert len({own.colour for own in look.values()}) == 3
    for kind in "abc":
        small, large = look[f"{kind}, d_state=16"], look[f"{kind}, d_state=128"]
        assert (small.colour, small.marker) == (large.colour, large.marker)
        assert (small.dash, large.dash) == ("--", "-")


def test_where_nothing_can_be_tested_nothing_is_claimed(evaluated: Path):
    found = Evaluations.read(analyse(load_study(evaluated)), evaluated)
    arms = list(found.tasks["phonebook"])
    for arm, own in found.tasks["phonebook"].items():
        for content in own:
            content["items"]["exact_match"] = [float(arm != arms[0])] * 80
    told = {v.text.split(",")[0]: v for v in found.verdicts()}["phonebook"]
    assert told.kind == "null"
    assert told.text.endswith("no spread between seeds: no test.")


def test_only_what_every_run_was_asked_counts(evaluated: Path):
    found = Evaluations.read(analyse(load_study(evaluated)), evaluated)
    arms = list(found.tasks["phonebook"])
    content = found.tasks["phonebook"][arms[3]][0]
    del content["cells"]["entries=20"]
    content["items"] = {name: values[:40] for name, values in content["items"].items()}
    whole, five = (found.against("phonebook", arms[0], c) for c in (None, "entries=5"))
    assert whole.equals(five)
    twenty = found.against("phonebook", arms[0], "entries=20")
    assert [len(seeds) for seeds in twenty["by_seed"]] == [2, 2, 2, 1]
    assert found.against("phonebook", "nobody").empty


def test_arms_that_were_asked_nothing_in_common(evaluated: Path):
    for run in find_runs(evaluated):
        if run.key.startswith("00"):
            content = run.evaluation("phonebook")
            content["cells"] = {"entries=3": {**content["cells"]["entries=5"], "x": 3}}
            content["items"] = {name: values[:40] for name, values in content["items"].items()}
            content["items"] |= {"cell": ["entries=3"] * 40, "x": [3] * 40}
            run.write_evaluation("phonebook", content)
    told = [v.text for v in Evaluations.read(analyse(load_study(evaluated)), evaluated).verdicts()]
    assert "phonebook: arms were asked at no size in common: no test." in told
    assert main(["report", str(evaluated)]) == 0
