"""make analysis: the README's table, pictures and notebooks, from exported frames alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from ablate.evaluate.suites import SUITES
from ablate.report import analyse, load_study
from ablate.report.export import export_study
from ablate.report.frames import load_metrics
from ablate.report.published import ATTENTION_SHARE
from ablate.run import write_json

ROOT = Path(__file__).resolve().parents[2]


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


synthetic = load("report_synthetic", ROOT / "tests" / "report" / "synthetic.py")


def published(share: float) -> float:
    return float(np.interp(share, list(ATTENTION_SHARE), list(ATTENTION_SHARE.values())))


def task(rng: np.random.Generator, name: str, sizes: dict[int, float]) -> dict[str, Any]:
    """A recall task's file: 40 documents at each size, answered with the accuracy given."""
    columns: dict[str, list[Any]] = {"cell": [], "x": [], "cluster": [], "exact_match": []}
    cells = {}
    for size, accuracy in sizes.items():
        hits = (rng.random(40) < accuracy).astype(float)
        columns["cell"] += [f"entries={size}"] * 40
        columns["x"] += [size] * 40
        columns["cluster"] += [f"{size}:{i}" for i in range(40)]
        columns["exact_match"] += hits.tolist()
        cells[f"entries={size}"] = {"x": size, "items": 40, "exact_match": 0.5, "verdict": None}
    items = {**columns, "depth": [0.5] * len(columns["x"])}
    null = {"wrong": 30, "agreement": 0.31, "permuted": 0.1, "neighbours": 0.12}
    fuzzy = {**null, "permuted_p": 0.001, "neighbours_p": 0.002, "is_fuzzy": True}
    value = float(np.mean(columns["exact_match"]))
    content = {"task": name, "metric": "exact_match", "value": value, "cells": cells}
    return {**content, "items": items, "fuzzy": fuzzy}


def recall_study(path: Path) -> Path:
    rng = np.random.default_rng(3)
    cells = []
    kinds = {"transformer": 12, "mamba2": 0, "hybrid_8": 2}
    for seed in (0, 1):
        for kind, attention in kinds.items():
            for state in (16, 128) if kind != "transformer" else (16,):
                content = synthetic.result(loss=2.3, attention=attention, layers=24)
                content["architecture"]["state_bytes"] = 1000 * state + 50_000 * attention
                level = 0.97 if attention else 0.05 + 0.0025 * state
                sizes = {n: level * (1 if attention > 1 else 0.9**i) for i, n in enumerate((5, 20))}
                names = ("phonebook", "phonebook_reversed", "needle")
                found = {name: task(rng, name, sizes) for name in names}
                factors = {"arch.mamba2.d_state": state}
                cells.append((f"{kind}, d_state={state}", factors, seed, content, found))
    return synthetic.write_cells(path, cells)


def by_mlps(path: Path) -> Path:
    rng = np.random.default_rng(4)
    cells = []
    for seed in (0, 1, 2):
        for attention in (0, 2, 4, 12):
            share = attention / 24
            arm = f"{'transformer' if attention == 12 else 'hybrid'}, attention_share={share:.3g}"
            loss = 2.9 + published(share)
            content = synthetic.result(
                loss=loss + rng.normal(0, 0.003), attention=attention, mlp=12, layers=24
            )
            factors = {"arch.attention_share": share}
            factors |= {"arch.unit": "*-" if attention == 12 else None}
            cells.append((arm, factors, seed, content, {}))
    return synthetic.write_cells(path, cells)


def mlps(path: Path) -> Path:
    rng = np.random.default_rng(5)
    cells = []
    for seed in (0, 1, 2):
        for n in (0, 2, 7, 12):
            content = synthetic.result(loss=3 + rng.normal(0, 0.003), attention=2, mlp=n, layers=24)
            content["train"]["tokens_per_second"] *= 1 + 0.015 * n + rng.normal(0, 0.004)
            cells.append((f"mlp_share={n / 24:.3g}", {"arch.mlp_share": n / 24}, seed, content, {}))
    return synthetic.write_cells(path, cells)


def choice(path: Path, field: str, values: list[Any], evaluations: Callable[..., Any]) -> Path:
    rng = np.random.default_rng(6)
    cells = []
    for seed in (0, 1, 2):
        for value in values:
            content = synthetic.result(loss=3 + rng.normal(0, 0.002), attention=2, layers=24)
            shown = "null" if value is None else f"{value:g}"
            arm = f"{field.rpartition('.')[2]}={shown}"
            cells.append((arm, {field: value}, seed, content, evaluations(rng, value)))
    return synthetic.write_cells(path, cells)


def lengths(rng: np.random.Generator, base: float | None) -> dict[str, Any]:
    level = np.linspace(2.8, 3.2, 16)  # the same documents in every run
    far = 0.5 if base else 0.0
    items = {m: (level + far * (m == "4") + rng.normal(0, 0.01, 16)).tolist() for m in "124"}
    means = {m: float(np.mean(v)) for m, v in items.items()}
    content = {"task": "length", "metric": "loss", "value": means["4"], "documents": 16}
    position = {"first": [1, 2], "last": [1, 2], "loss": [4.0, 3.0]}
    return {"length": {**content, "by_multiple": means, "by_position": position, "items": items}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which every study of the table has been run and exported."""
    root = tmp_path_factory.mktemp("checkout")
    results = root / "analysis" / "results"
    for name in ("findings.py", "pictures.py", "build.py", "attention_share.ipynb", "recall.ipynb"):
        (root / "analysis").mkdir(exist_ok=True)
        shutil.copy(ROOT / "analysis" / name, root / "analysis" / name)
    (root / "docs").mkdir()
    for name in ("findings.md", "reproduction.md"):
        shutil.copy(ROOT / "docs" / name, root / "docs")
    shutil.copy(ROOT / "README.md", root)
    runs = root / "runs"
    shares = [n / 24 for n in (0, 1, 2, 3, 4, 6, 8, 12)]
    losses = [3 + published(share) for share in shares]
    same = {"losses": losses, "layers": 24, "accuracies": None, "noise": 0.003}
    folder = synthetic.write_study(runs / "attn_ratio", shares=shares, seeds=range(3), **same)
    again = {"old": {"val_b": 3.1}, "new": {"val_b": 3.1}, "tolerance": 0.0, "why": "bit for bit"}
    rerun = {"task": "rerun", "reruns": {"1": {**again, "same": True}}}
    write_json(folder / "0000aaaaaaaa" / "evaluation" / "rerun.json", rerun)
    shares, same["losses"] = [0.0, 2 / 24, 0.5], [3.03, 3.0, 3.02]
    large = synthetic.write_study(runs / "attn_ratio_60m", shares=shares, seeds=(0, 1), **same)
    made = [
        *(folder, large, by_mlps(runs / "attn_ratio_mlp"), mlps(runs / "mlp_ratio")),
        choice(runs / "gqa", "arch.attention.n_kv_heads", [None, 2, 1], lambda *_: {}),
        choice(runs / "rope", "arch.attention.rope_base", [10000.0, None], lengths),
        recall_study(runs / "recall"),
    ]
    for path in made:
        export_study(path, results)
    shutil.rmtree(runs)  # the frames are all there is
    done = build(root)
    assert done.returncode == 0, done.stderr
    return root


def build(root: Path, what: str = "") -> subprocess.CompletedProcess[str]:
    """build.py without notebooks, or some Python with its names."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    code = what or "sys.exit(main(['--no-notebooks']))"
    command = [sys.executable, "-c", f"from build import *; {code}"]
    place = root / "analysis"
    return subprocess.run(
        command, env=environment, cwd=place, capture_output=True, text=True, check=False
    )


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_everything_is_made_from_the_frames_and_the_second_time_the_same(root: Path) -> None:
    first = snapshot(root)
    assert build(root).returncode == 0
    assert snapshot(root) == first
    for name in ("docs/attention_share.png", "docs/recall.png"):
        assert name in first
    text = (root / "README.md").read_text() + (root / "docs" / "findings.md").read_text()
    assert "not run yet" not in text
    assert "docs/attention_share.png" in text
    assert not re.search(r"\bnan\b", text)
    cost = (root / "docs" / "reproduction.md").read_text()
    assert "| attn_ratio | 24 | 2,457,600 | 1.0 |" in cost
    assert "| attn_ratio | `0000aaaaaaaa` | 3.100000 | 3.100000 | 0 | 0: bit for bit |" in cost
    assert str(root) not in text + cost


BOOKS = ("phonebook", "phonebook_reversed")


def recalled(root: Path, arm: str, task: str) -> pd.DataFrame:
    """Items of a task, by hand: a row a text, a column a seed."""
    folder = root / "analysis" / "results" / "recall"
    frame = load_study(folder)
    items = pd.read_parquet(folder / "scores" / f"{task}.parquet")
    keys = frame.loc[frame["arm"] == arm, "key"]
    own = {k: items.loc[items["key"] == k, "exact_match"].to_numpy() for k in keys}
    return pd.DataFrame(own)


def test_figures_of_the_table_lead_back_to_their_runs(root: Path) -> None:
    table = pd.read_csv(root / "analysis" / "results" / "findings.csv", keep_default_na=False)
    rows = table.set_index("claim")
    row = rows.loc["No attention costs loss, against 8%"]
    frame = load_study(root / "analysis" / "results" / "attn_ratio")
    fit = analyse(frame).comparisons["val_b_loss"].fit
    found = fit.difference("attention_share=0", "attention_share=0.0833")
    assert row["ours"].startswith(f"+{found.value:.4f} (+{found.low:.4f} to +{found.high:.4f})")
    assert f"| {row['ours']} |" in (root / "docs" / "findings.md").read_text()
    readme = (root / "README.md").read_text()
    assert f"| {row['figure']}; {row['follows']} |" in readme
    assert all(f"{told} |" in readme for told in rows["follows"])
    arms = ["attention_share=0", "attention_share=0.0833"]
    assert row["keys"].split() == frame.loc[frame["arm"].isin(arms), "key"].tolist()
    assert row["follows"] == "same direction; the published figure is inside"
    cost = rows.loc["30 to 50% of the layers can be MLPs"]
    frame = load_study(root / "analysis" / "results" / "mlp_ratio")
    means = frame.groupby("arm")["val_b_loss"].mean()
    for share in ("0.292", "0.5"):  # all of the claim's shares, not one
        less = means[f"mlp_share={share}"] - means["mlp_share=0"]
        assert f"{float(share):.1%}: {less:+.4f} (".replace("-", "−") in cost["ours"]
    fit = analyse(frame).comparisons["val_b_loss"].fit
    own = fit.difference("mlp_share=0.5", "mlp_share=0")
    told = re.search(r"50\.0%: (\S+) \((\S+) to (\S+)\)", cost["ours"].replace("−", "-"))
    assert told
    assert float(told[3]) - float(told[2]) > own.high - own.low  # simultaneous
    highest = max(float(v.replace("−", "-")) for v in re.findall(r" to (\S+)\)", cost["ours"]))
    end = re.fullmatch(
        r"none found, but a cost of up to (\S+) nats is not excluded", cost["follows"]
    )
    assert end
    assert float(end[1]) >= highest
    assert rows.loc["Half of the layers as MLPs train faster than 5%", "ours"].startswith("+1")
    early = rows.loc["Early in training a hybrid trails the Transformer, then passes it"]
    curves = load_metrics(root / "analysis" / "results" / "attn_ratio_mlp").dropna(
        subset=["val_a_loss"]
    )
    at = curves[curves["tokens"] == curves["tokens"].min()].groupby("arm")["val_a_loss"].mean()
    less = at["hybrid, attention_share=0.0833"] - at["transformer, attention_share=0.5"]
    assert f"{less:+.4f} (".replace("-", "−") in early["ours"]
    assert early["follows"] == "not seen: ahead from the first validation on"
    gap = rows.loc["SSMs fail the phonebook, hybrids match the Transformer"]
    assert (
        gap["follows"]
        == "same direction, in models taught with such texts: Mamba-2 fails, the hybrid does not"
    )
    smallest = recalled(root, "mamba2, d_state=128", BOOKS[0])[:40].mean().mean()
    assert f"; Mamba-2 already at 5 entries {smallest:.0%}" in gap["ours"]
    one, other = (recalled(root, "mamba2, d_state=128", t) for t in BOOKS)
    first = rows.loc["Naming the query first helps SSMs, who still trail"]
    told = re.search(r"seeds (\S+), (\S+);", first["ours"].replace("−", "-"))
    by_seed = 100 * (other.mean() - one.mean())
    assert told
    assert [float(v) for v in told.groups()] == pytest.approx(list(by_seed), abs=0.051)
    assert (
        first["follows"]
        == "decides nothing: zero is between the seeds or inside the interval over texts"
    )
    more = rows.loc["An SSM recalls more with a larger state"]
    gain = 100 * (one.mean().mean() - recalled(root, "mamba2, d_state=16", BOOKS[0]).mean().mean())
    assert f"{gain:+.1f}" in more["ours"]
    assert more["follows"].startswith("phonebook: agrees; needle: ")
    beyond = rows.loc["Attention without positions holds beyond the training length"]
    assert beyond["follows"] == "same direction at the longest, in loss: lower without RoPE"
    folder = root / "analysis" / "results" / "rope"
    items = pd.read_parquet(folder / "scores" / "length.parquet")
    means = items.groupby("key")["4"].mean()
    runs = load_study(folder).set_index("key").assign(far=means)
    far = runs.pivot_table(index="seed", columns="arm", values="far")
    changed = far["rope_base=null"] - far["rope_base=10000"]
    low, high = t.interval(0.95, len(changed) - 1, changed.mean(), changed.sem())
    shown = f"4×: {changed.mean():+.4f} ({low:+.4f} to {high:+.4f}) nats".replace("-", "−")
    assert shown in beyond["ours"]
    assert all(row["keys"] for _, row in rows.iterrows())


def test_a_reader_of_the_first_lines_is_told_of_loss_and_recall(root: Path) -> None:
    text = (root / "README.md").read_text().partition("![")[0]
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    lines = [line for line in lines if len(line) > 1]
    header = next(line for line in lines if line[0] == "layers that are attention")
    for name, first in (("attn_ratio", 0), ("attn_ratio_mlp", 2), ("attn_ratio_60m", 4)):
        frame = load_study(root / "analysis" / "results" / name)
        own = lines[lines.index(header) + 2 + first :][:2]
        assert f"{frame['seed'].nunique()} seeds" in own[0][0]
        hybrids = frame[~frame["arm"].str.startswith("transformer")]
        for row, column in zip(own, ("val_b_loss", "val_a_loss"), strict=True):
            means = hybrids.groupby("attention_of_layers")[column].mean()
            for share, value in (means - means[0]).drop(0.0).items():
                at = header.index(f"{100 * share:.1f}".removesuffix(".0") + "%")
                assert row[at].strip("*") == f"{value:+.3f}".replace("-", "−")
            bold = {header[i] for i, cell in enumerate(row) if cell.startswith("**")}
            lowest = f"{100 * means.idxmin():.1f}".removesuffix(".0") + "%"
            assert lowest in bold
    fit = analyse(load_study(root / "analysis" / "results" / "attn_ratio"))
    rows = fit.comparisons["val_b_loss"].fit.against("attention_share=0").set_index("arm")
    r = rows.loc["attention_share=0.125"]
    row = lines[lines.index(header) + 2]
    assert row[-1] == f"±{r['dunnett_high'] - r['difference']:.3f}"
    best = fit.comparisons["val_b_loss"].best
    assert {header[i] for i, cell in enumerate(row) if cell.startswith("**")} == {
        fit.short(arm) for arm in best
    }
    assert "On B it is lowest at 12.5%, " in text
    own = recalled(root, "mamba2, d_state=128", "phonebook").mean()
    each = ", ".join(f"{v:.0%}" for v in own)
    assert f" {own.mean():.0%} ({each}) |" in text


def test_what_follows_from_an_interval(root: Path) -> None:
    code = """
E = lambda low, high: findings.Estimate((low + high) / 2, low=low, high=high)
for ours, published, rounding in (
    (E(-0.05, 0.1), 0, 0), (E(-0.02, 0.02), 0, 0), (E(0.01, 0.02), 0, 0), (E(-0.02, -0.01), 0, 0),
    (E(0.01, 0.03), 0.02, 0), (E(0.01, 0.03), 0.031, 0.002), (E(0.01, 0.03), 0.04, 0.002),
    (E(0.01, 0.03), -0.02, 0), (E(-0.01, 0.03), 0.02, 0), (findings.Estimate(0.1), 0, 0),
):
    print(findings.verdict(ours, published, rounding).format(high=ours.high))
print(findings.no_cost([E(-0.02, 0.02), E(-0.02, 0.03)]))
"""
    said = build(root, f"exec({code!r})")
    assert said.stdout.splitlines() == [
        # wider than what no attention at all costs: nothing is known
        "decides nothing: a cost of up to 0.1 nats is not excluded",
        "none found, but a cost of up to 0.02 nats is not excluded",
        "disagrees: a cost",
        "agrees: a gain, not a cost",
        "same direction; the published figure is inside",
        "same direction; inside within the rounding of the published figure (0.002)",
        "same direction; smaller than the published figure, whose own noise is not known",
        "disagrees: the other way",
        "decides nothing: zero and the published figure are both inside",
        "decides nothing: one seed",
        "none found, but a cost of up to 0.0300 nats is not excluded",
    ], said.stderr


def test_what_else_sets_an_arm_apart_is_told(root: Path) -> None:
    code = """
from types import SimpleNamespace as N
runs = pd.DataFrame(dict(arm=list("abc"), lr=[0.002, 0.006, 0.006],
                         non_embedding_params=[94, 100, 100.5],
                         train_flops_per_token=[134, 100, 99.5]))
study = N(analysis=N(runs=runs))
print(findings.unlike(study, "a", "a", "b"), repr(findings.unlike(study, "c", "c", "b")))
"""
    said = build(root, f"exec({code!r})")
    assert said.stdout == (
        "; a has −6% parameters, +34% FLOPs a token, a learning rate of 0.002 against 0.006 ''\n"
    ), said.stderr


def test_what_qualifies_a_figure_is_told(root: Path) -> None:
    """A margin set beforehand, a rate that is not pinned down, other code, GPUs of another pace."""
    code = """
from types import SimpleNamespace as N
from ablate.report.stats import equivalence
fit = lambda p: N(arms=["a", "b"], equivalence=lambda a, b, margin: N(p=p * margin))
for on_a in (0.1, 4.0):  # the worse of both counts
    study = N(loss=N(fit=fit(3.0)), on_a=fit(on_a), analysis=N(margin=0.015))
    print(findings.within(study, ["a", "b"]))
rates = pd.DataFrame(dict(arm=list("abcd"), seed=0, lr=[1, 2, 3, 4], val_b_loss=[3.7, 3.5, 3.6, 4]))
for rate in (2, 3, None):
    print(findings.rate_of(N(loss=1, analysis=N(runs=rates)), rate) or "-")
rates["lr"] = [2, 1, 3, 4]
print(findings.rate_of(N(loss=1, analysis=N(runs=rates)), 1))
def row(low, high, margin=0.015):
    e = findings.Estimate((low + high) / 2, low=low, high=high)
    fit = N(arms=["a", "b"], equivalence=lambda a, b, m: N(p=0.2), difference=lambda a, b: e)
    study = N(name="s", loss=N(fit=fit), on_a=None, analysis=N(margin=margin), keys=lambda a: "k")
    findings.unlike = lambda *_: ""
    return findings.of_loss(study, "c", "p", 0.0, lambda s: ["a"], lambda s: ["b"]).follows
for low, high in ((-0.1, 0.1), (-0.01, 0.02), (-0.03, -0.01), (-float("inf"), float("inf"))):
    print(row(low, high))
E = lambda low, high: findings.Estimate((low + high) / 2, low=low, high=high)
def twin(name, e):
    fit = N(arms=["a", "b"], difference=lambda a, b: e)
    return N(name=name, loss=N(fit=fit), analysis=N(runs=dict(hardware=["H100", "H100"])))
for here in (E(-0.06, -0.04), E(-0.04, -0.02), E(0.02, 0.04)):
    found = {n: twin(n, E(-0.07, -0.05)) for n in ("attn_ratio_75d3558", "attn_ratio_mlp")}
    fit = N(arms=["a", "b"], means=findings.np.array([0.0, 1.0]), difference=lambda a, b, e=here: e)
    places = dict(x=pd.Series(dict(a=0.5, b=0.0)))
    study = N(loss=N(fit=fit), analysis=N(arms=places, short=str.upper))
    print(findings.elsewhere(found, study))
runs = pd.DataFrame([
    dict(arm=f"mlp={m}", seed=s, mlp_of_layers=m, hardware="H200", lr=1, non_embedding_params=1,
         train_flops_per_token=1, tokens_per_second=v)
    for m, speeds in ((0.1, (1.0, 1.0, 1.0)), (0.5, (1.2, 1.21, 1.25)))
    for s, v in enumerate(speeds)
])
arms = runs.groupby("arm").first()
half = lambda mlp_of_layers: ["mlp=0.5"]
study = N(name="mlp_ratio", analysis=N(runs=runs, arms=arms), arms=half, keys=lambda arms: "k")
print(findings.mlp_speed(study).ours, "|", findings.mlp_speed(study).follows)
study.analysis.runs = runs[runs["seed"] == 0]
print(findings.mlp_speed(study).follows)
known = runs["tokens_per_second"].where(runs["arm"] == "mlp=0.5")
study.analysis.runs = runs.assign(tokens_per_second=known)
print(findings.mlp_speed(study).ours)
both = lambda e: N(arms=["a", "b"], difference=lambda *_: e)
for on_a in (E(0.04, 0.05), E(0.035, 0.05), findings.Estimate(0.06), E(-0.02, -0.01)):
    study = N(name="s", loss=N(fit=both(E(0.03, 0.045))), on_a=both(on_a), keys=lambda arms: "k")
    one, other = (lambda s: ["a"]), (lambda s: ["b"])
    print(findings.of_loss(study, "c", "p", 0.037, one, other).follows)
"""
    said = build(root, f"exec({code!r})")
    unequal = (
        "decides nothing: not shown equal within the study's margin of 0.015 nats (p = 0.2), and a "
        "cost of up to"
    )
    gains = [
        f" A less B in the first row (95%, each on its own): {here}; by other code −0.0600 "
        "(−0.0700 to −0.0500) (commit 75d3558, H100)"
        for here in (
            "−0.0500 (−0.0600 to −0.0400)",
            "−0.0300 (−0.0400 to −0.0200)",
            "+0.0300 (+0.0200 to +0.0400)",
        )
    ]
    assert said.stdout.splitlines() == [
        "equal within the study's margin of 0.015 nats (p = 0.045);",
        "decides nothing: not shown equal within the study's margin of 0.015 nats (p = 0.06), and",
        "its rate is the best of 4 tried with 1 seed, whose neighbours end 0.200 and 0.100 nats "
        "higher",
        "its rate is not the best of 4 tried with 1 seed, 2",
        "-",
        "its rate is the best of 4 tried with 1 seed, at the edge of them",
        f"{unequal} 0.1000 nats is not excluded",
        f"{unequal} 0.0200 nats is not excluded",
        "decides nothing: not shown equal within the study's margin of 0.015 nats (p = 0.2), and a "
        "gain, not a cost",
        "decides nothing: one seed",
        f"{gains[0]}.",
        f"{gains[1]}: the direction is settled, the size is not.",
        f"{gains[2]}: the size is not.",
        "+20.0, +21.0, +25.0 per cent in tokens/s against 10% MLPs, by seed, on H200, whose runs "
        "of one arm differ by 4.2 per cent | same direction; no interval, as it is not seeds alone "
        "that differ",
        "decides nothing: one seed",
        "its arms share no seed",
        "same direction; its size is not settled: the published figure is inside on validation B; "
        "larger than the published figure on validation A",
        "same direction; the published figure is inside",
        "same direction; the published figure is inside",  # no interval on A settles nothing
        "not settled: figures differ",
    ], said.stderr


def test_a_table_without_its_markers_is_told(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns("results"))
    (tmp_path / "copy" / "README.md").write_text("# nothing\n")
    (tmp_path / "copy" / "analysis" / "results").mkdir()
    done = build(tmp_path / "copy")
    assert done.returncode == 2
    assert done.stderr.startswith("analysis: 'README.md' lacks the markers")


@pytest.mark.parametrize("full", [True, False])
def test_notebooks_run_with_and_without_studies(root: Path, tmp_path: Path, full: bool) -> None:
    pytest.importorskip("nbclient")
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, ignore=None if full else shutil.ignore_patterns("results"))
    (copy / "analysis" / "results").mkdir(exist_ok=True)
    done = build(copy, "[execute(Path(name)) for name in NOTEBOOKS]")
    assert done.returncode == 0, done.stderr
    for name, missing in (("attention_share", "attn_ratio and"), ("recall", "recall has")):
        notebook = json.loads((copy / "analysis" / f"{name}.ipynb").read_text())
        outputs = json.dumps([cell.get("outputs") for cell in notebook["cells"]])
        assert ("image/png" in outputs) == full
        assert (missing in outputs) == (not full)
        assert str(tmp_path) not in outputs


def test_benchmarks_that_show_more_tokens_are_named_with_their_noise(root: Path) -> None:
    code = """
from types import SimpleNamespace as N
rows = [
    ("blimp-0shot", 0.098, 0.094, 5.2, "0.67 0.68"),
    ("piqa-0shot", 0.009, -0.01, 1.7, "0.51 0.52"),
    ("arc_easy-0shot", 0.04, 0.02, 2.0, "0.29 0.30"),
    ("lambada-0shot", 0.03, 0.02, math.nan, "0.03 0.03"),
]
scores = pd.DataFrame([dict(task=t, arm="whole", difference=d, difference_low=low, over_noise=n,
                            by_seed=s) for t, d, low, n, s in rows])
arms = pd.DataFrame({"x": {"quarter": 1.0, "whole": 4.0}})
for field in ("train.tokens", "train.lr"):
    print(findings.benchmarks(N(scores=scores, analysis=N(axis=N(field=field), arms=arms))))
"""
    said = build(root, f"exec({code!r})")
    assert said.stdout == (
        "More tokens show in blimp (+9.8 points, 5 times the noise); lambada (+3.0 points, seeds "
        "do not differ). They do not in piqa, arc_easy.\n\n"
    ), said.stderr


def test_the_small_suite_is_what_the_measured_benchmarks_show() -> None:
    table = pd.read_csv(ROOT / "analysis/results/signal/report/evaluation.csv")
    own = table[table["task"].str.endswith("shot") & table["difference"].notna()]
    clear = own[(own["difference_low"] > 0) & (own["over_noise"] > 3)]
    assert len(own) >= 10
    assert {entry.name for entry in SUITES["small"]} == set(clear["task"])


def test_seeds_are_counted_by_arm(root: Path) -> None:
    code = """
for arms, seeds in (("ab", "00"), ("abab", "0011"), ("aba", "001")):
    print(findings.seed_counts(pd.DataFrame({"arm": list(arms), "seed": list(seeds)})))
"""
    said = build(root, f"exec({code!r})")
    assert said.stdout == "1 seed, no interval\n2 seeds\n1 to 2 seeds\n", said.stderr


def test_runs_of_one_trial_are_told_apart_by_their_losses(root: Path) -> None:
    code = """
import build
from types import SimpleNamespace as N
def reruns(*losses):
    runs = [dict(old=dict(val_b=3.0), new=dict(val_b=v), alike=True, tolerance={"val_b": 0.01},
                 why="w") for v in losses]
    return {"reruns": {str(i): run for i, run in enumerate(runs)}}
def study(name, kept, seconds, losses):
    frame = pd.DataFrame(dict(key=list("pq"), arm="one", state="done", trial_seconds=seconds,
                              val_a_loss=losses, val_b_loss=losses))
    return N(name=name, path=kept, analysis=N(frame=frame), done=frame)
build.load_evaluation = lambda kept, task: kept
a = study("a", {"p": reruns(3.1, 3.1, 3.1, 3.1, 2.9)}, [1.0, 2.0], [3.0, 3.1])
b = study("b", {"q": reruns(3.0, 3.0, 3.0, 3.0, 3.0)}, [1.5, 2.5], [3.0, 3.1])
c = study("c", {"p": reruns(3.25)}, [1.0, 3.0], [3.0, 3.3])
print(build._reruns({"a": a, "b": b, "c": c}))
"""
    said = build(root, f"exec({code!r}, globals())")
    assert said.stdout.split("\n\n")[:5] == [
        "| study | run | loss on B, then | now | difference | tolerance |\n"
        "|---|---|---|---|---|---|\n"
        "| c | `p` | 3.000000 | 3.250000 | +0.2500 | 0.01: w |",
        "6 runs of one (`p`), not made to be deterministic, lie within 0.2000 nats on B "
        "(SD 0.0837).",
        "6 runs of one (`q`), not made to be deterministic, agree to the last bit.",
        "2 trials were trained in a and in b, and their losses are the same to the last bit.",
        # p of c is a copy of that of a
        "1 trial was trained in a and in c: the second less the first on B +0.2000 nats on "
        "average, +0.2000 to +0.2000; none the same to the last bit.",
    ], said.stderr


def test_a_study_of_trials_that_another_has_too_is_set_against_it(root: Path) -> None:
    """The F test against statsmodels' analysis of variance."""
    code = """
import numpy as np
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
rng = np.random.default_rng(4)
arms, seeds = (v.ravel() for v in np.meshgrid(list("abcd"), range(3), indexing="ij"))
both = pd.DataFrame(dict(arm=arms, seed=seeds, val_b_loss=rng.normal(3, 0.1, 12)))
both["val_b_loss_there"] = both["val_b_loss"] + rng.normal(0, 0.01, 12) + 0.02 * (arms == "a")
both["change"] = both["val_b_loss"] - both["val_b_loss_there"]
oracle = anova_lm(ols("change ~ C(arm) + C(seed)", both).fit()).loc["C(arm)", "PR(>F)"]
print(round(findings.arms_differ(both) / oracle, 9), findings.arms_differ(both[1:]))
"""
    said = build(root, f"exec({code!r})")
    assert said.stdout == "1.0 nan\n", said.stderr
    code = """
from dataclasses import replace
one = findings.Study.read(ROOT / "analysis" / "results" / "attn_ratio")
frame = one.analysis.frame.copy()
frame["val_b_loss"] += 0.1 * (frame["arm"] == "attention_share=0") + 1e-6
two = replace(one, analysis=findings.analyse(frame))
print(findings.repeated(one, two), findings.repeated(one, one), sep="|")
"""
    said = build(root, f"exec({code!r})")
    told, nothing = said.stdout.rstrip("\n").split("|")
    assert not nothing
    assert re.fullmatch(
        r"Lowest at 12\.5%, there too\. Against attn_ratio, whose runs are of the same 24 trials, "
        r"differences between arms are not the same \(p = below 0\.001\): 0% less 12\.5% is "
        r"\+0\.0\d+ .* here and \+0\.1\d+ .* there, −0\.1000 .* apart, in nats\.",
        told,
    ), told + said.stderr


def test_arms_as_configured_are_set_against_the_matched(root: Path) -> None:
    """Differences and intervals against statsmodels; copies of a run folder are counted once."""
    code = """
import re
from pathlib import Path
from statsmodels.formula.api import ols
import build
swap, whole = (findings.Study.read(results / name) for name in ("attn_swap", "attn_ratio"))
told = findings.unmatched(swap)
runs = swap.analysis.runs
fit = ols("val_b_loss ~ 0 + C(arm) + C(seed, Sum)", runs).fit()
figure = r"([0-9.]+%) (\\S+) \\((\\S+) to (\\S+)\\) on B and (\\S+) on A with (\\S+)%"
found = re.findall(figure, told)
for share, *figures, on_a, params in found:
    arm = next(a for a in runs["arm"] if swap.analysis.short(a) == share)
    one, two = (runs[runs["arm"] == a].sort_values("seed") for a in (arm + ", unmatched", arm))
    test = fit.t_test(f"C(arm)[{arm}, unmatched] - C(arm)[{arm}]")
    want = [test.effect[0], *test.conf_int()[0]]
    want += [(one["val_a_loss"].to_numpy() - two["val_a_loss"].to_numpy()).mean()]
    got = [float(v.replace("−", "-")) for v in (*figures, on_a)]
    assert all(abs(g - w) < 6e-5 for g, w in zip(got, want)), (share, got, want)
    less = one["non_embedding_params"].iloc[0] / two["non_embedding_params"].iloc[0] - 1
    assert float(params.replace("−", "-")) == round(100 * less), (params, less)
print([f[0] for f in found], repr(findings.unmatched(whole)))
both = {"a": whole, "b": whole}
print(build._cost({"a": whole}) == build._cost(both))
"""
    committed = f"results = Path({str(ROOT / 'analysis' / 'results')!r})"
    said = build(root, f"exec({committed + code!r}, globals())")
    assert said.stdout == "['8.3%', '25%', '50%'] ''\nTrue\n", said.stderr
