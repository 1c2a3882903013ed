"""The page: what it says is what the runs say, and nothing is dropped in silence."""

from __future__ import annotations

import builtins
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from ablate.layers.registry import KINDS
from ablate.report import plots
from ablate.report.confounds import confounds
from ablate.report.frames import load_details, load_metrics, load_study
from ablate.report.page import summary, write_report
from ablate.report.tables import difference_table, equal_budgets
from ablate.report.verdicts import LETTERS, analyse, verdicts
from ablate.run import RunFolder, write_json
from ablate.study.show import si

MAMBA2_EXCESS = [0.0403, 0.0072, 0.0036, 0.0, 0.002, 0.006, 0.012, 0.029]


class Page(HTMLParser):
    """The text of a page and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.open: list[str] = []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(given)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def reported(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with its report, in whose making nothing was printed."""
    study: Path = synthetic.write_study(tmp_path_factory.mktemp("runs") / "attn_ratio")
    said: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "print", lambda *_, **__: pytest.fail("printed"))
        path = write_report(study, say=said.append)
    assert path == study / "report" / "index.html"
    assert said == []
    return study


def test_the_page_stands_alone_and_says_what_was_found(reported: Path) -> None:
    study, path = reported, reported / "report" / "index.html"
    page = Page(path)
    assert page.open == []
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    assert len(page.images) == 2
    assert all(len(image["alt"]) > 30 for image in page.images)
    assert "url(" not in path.read_text()
    assert "@import" not in path.read_text()
    assert "What share of the layers should be attention?" in page.text
    sentence = re.search(
        r"Recall rises from (\d+)% ± \d+ without attention to (\d+)% ± \d+ with one attention "
        r"layer of 6 \(16\.7%\); difference (\d+) points, 95% interval (\d+) to (\d+) "
        r"\(Dunnett, 3 comparisons\), n = 2 paired seeds\.",
        page.text,
    )
    assert sentence
    low, high, difference, bottom, top = map(int, sentence.groups())
    assert 5 <= low <= 13
    assert 84 <= high <= 92
    assert abs(difference - (high - low)) <= 1
    assert bottom < difference < top
    assert "Loss: the arms are not distinguishable at this size" in page.text
    assert "to be found with 80% power" in page.text
    for reason in ("below 1M", "text tokens a parameter", "75% of the training rows are recall"):
        assert reason in page.text
    assert "python -m ablate +sweep=attn_ratio" in page.text
    assert "None: every planned run finished" in page.text
    for name in ("table", "differences", "runs", "equal_budgets"):
        for kind in ("csv", "md", "parquet"):
            assert (study / "report" / f"{name}.{kind}").stat().st_size > 0
    for name in ("outcomes", "learning_curves"):
        assert (study / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (study / "report" / f"{name}.svg").read_text().startswith("<?xml")


def test_the_same_runs_give_the_same_files_without_torch(reported: Path) -> None:
    study = reported
    first = {p.name: p.read_bytes() for p in (study / "report").iterdir()}
    code = (
        "import sys; from ablate.report import load_study; from ablate.report.page import "
        f"write_report; write_report({str(study)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    second = {p.name: p.read_bytes() for p in (study / "report").iterdir()}
    assert [n for n in first if first[n] != second[n]] == []


def test_tables_hold_the_means(reported: Path) -> None:
    study = reported
    table = pd.read_parquet(study / "report" / "table.parquet").set_index("arm")
    runs = load_study(study)
    means = runs.groupby("arm")["val_b_loss"].mean()
    assert table["val_b_loss"].to_dict() == pytest.approx(means.to_dict())
    assert (table["val_b_loss_low"] < table["val_b_loss"]).all()
    assert table["x"].tolist() == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2])
    csv = pd.read_csv(study / "report" / "table.csv").set_index("arm")
    assert csv["mqar_accuracy"].to_dict() == pytest.approx(table["mqar_accuracy"].to_dict())


def test_an_unfinished_study_says_what_is_missing(synthetic: ModuleType, study: Path) -> None:
    shutil.rmtree(study / "0301aaaaaaaa")
    (study / "0001aaaaaaaa" / "result.json").unlink()
    failed = RunFolder(study / "0001aaaaaaaa")
    failed.end("failed", failed.begin(), "diverged: <loss> not finite at step 240")
    broken = RunFolder(study / "0200aaaaaaaa")
    result = broken.result()
    assert result is not None
    result["val_a"]["loss"] = result["val_b"]["loss"] = float("nan")
    result["train"]["skipped_steps"] = 7
    result["train"]["out_of_memory"] = {"from": 128, "to": 64}
    broken.write_result(result, broken.status()["generation"])
    content = synthetic.result(loss=1.0, accuracy=1.0, attention=5)
    synthetic.write_run(
        study, "0rphan000000", changes={"arch.attention_share": 0.9}, content=content
    )
    page = Page(write_report(study))
    assert "Incomplete: 5 of 8 runs have a usable result" in page.text
    assert "diverged: <loss> not finite at step 240" in page.text
    assert "finished without a finite validation loss" in page.text
    for key in ("0301aaaaaaaa", "0001aaaaaaaa", "0200aaaaaaaa", "0rphan000000"):
        assert key in page.text
    assert "Planned, not started" in page.text
    assert "Orphans" in page.text
    assert "skipped steps" in page.text
    assert "ran out of memory" in page.text
    assert "128" in page.text
    analysis = analyse(load_study(study))
    assert "attention_share=0.9" not in analysis.arms.index  # an orphan counts nowhere
    assert analysis.arms.loc["attention_share=0.333", "n"] == 1


def test_nothing_finished_yet(synthetic: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new"
    synthetic.write_run(path, "a00000000000", state="failed", cause="out of memory")
    synthetic.write_run(path, "b00000000000", state="created", seed=1)
    page = Page(write_report(path))
    assert "Incomplete: 0 of 2 runs" in page.text
    assert "out of memory" in page.text
    assert summary(analyse(load_study(path))).row_count == 0


def test_arms_of_one_seed_that_are_all_equal(synthetic: ModuleType, tmp_path: Path) -> None:
    content = synthetic.result(loss=3.0, accuracy=0.0)
    cells = [(f"lr={lr}", {"train.lr": lr}, 0, content, {}) for lr in (1e-3, 2e-3)]
    text = Page(write_report(synthetic.write_cells(tmp_path / "equal", cells))).text
    assert "Recall is 0% in every arm. One seed" in text
    assert "ranges between" not in text


def test_one_seed_shows_no_interval_and_says_so(synthetic: ModuleType, tmp_path: Path) -> None:
    path = synthetic.write_study(tmp_path / "one", seeds=[0])
    page = Page(write_report(path))
    assert "One seed: no interval is shown anywhere on this page" in page.text
    assert "a difference may be noise" in page.text
    assert "±" not in page.text
    table = pd.read_parquet(path / "report" / "table.parquet")
    assert table["val_b_loss"].notna().all()
    assert table["val_b_loss_low"].isna().all()


def test_one_arm_compares_with_nothing(synthetic: ModuleType, tmp_path: Path) -> None:
    path = synthetic.write_study(tmp_path / "single", shares=[0.5], accuracies=[0.9])
    assert any("compares with nothing" in line for line in verdicts(load_study(path)))
    assert "Fewer than two arms" in Page(write_report(path)).text


def curves_drawn(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Dashed and dotted lines in the figure of outcomes."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, *_: figures.append(figure))
    plots.plot_outcomes(analyse(load_study(path)), folder)
    (figure,) = figures
    return sum(line.get_linestyle() in ("--", ":") for line in figure.axes[0].lines)


def test_a_planted_curve_is_read_off(
    synthetic: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = np.array([0, 1, 2, 3, 4, 6, 8, 12]) / 24
    path = synthetic.write_study(
        tmp_path / "curve",
        shares=shares.tolist(),
        layers=24,
        seeds=range(6),
        losses=(2.3 + 0.05 * np.exp(-shares / 0.04) + 0.15 * shares**2).tolist(),
        accuracies=None,
        noise=0.002,
        random=3,
    )
    lines = "\n".join(verdicts(load_study(path)))
    found = re.search(r"put the lowest loss at ([\d.]+)% .* and at ([\d.]+)%", lines)
    assert found
    assert all(10 <= float(share) <= 17 for share in found.groups())
    assert "Dashed: " in write_report(path).read_text()
    assert curves_drawn(path, tmp_path, monkeypatch) == 2


def test_no_curve_is_drawn_through_noise(
    synthetic: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = synthetic.write_study(
        tmp_path / "noise",
        shares=[n / 24 for n in (0, 1, 2, 3, 4, 6, 8, 12)],
        layers=24,
        seeds=range(2),
        losses=[2.3] * 8,
        accuracies=None,
        noise=0.01,
        random=4,
    )
    comparison = analyse(load_study(path)).comparisons["val_b_loss"]
    assert comparison.curves
    assert comparison.fit.omnibus() > 0.05
    assert "Dashed: " not in write_report(path).read_text()
    assert curves_drawn(path, tmp_path, monkeypatch) == 0


def test_a_gain_before_the_first_share_has_a_set_of_the_best_and_no_curve(
    synthetic: ModuleType, tmp_path: Path
) -> None:
    path = synthetic.write_study(
        tmp_path / "curve",
        shares=[n / 24 for n in (0, 1, 2, 3, 4, 6, 8, 12)],
        layers=24,
        seeds=range(6),
        losses=[2.3 + e for e in MAMBA2_EXCESS],
        accuracies=None,
        noise=0.004,
        random=3,
    )
    lines = "\n".join(verdicts(load_study(path)))
    assert "Loss falls from" in lines
    assert "with one attention layer of 24 (4.2%)" in lines
    assert "Fitted curves do not tell which shares are as good as the best: no arm lies" in lines
    best = re.search(r"Loss is lowest.*not distinguishable from it: (.*) \(95%", lines)
    assert best
    assert "12.5%" in best.group(0)
    assert "12.5%" not in best.group(1)  # not told that it is as good as itself
    assert "50%" not in best.group(1)


def test_a_null_is_called_not_distinguishable(synthetic: ModuleType, tmp_path: Path) -> None:
    told = []
    for random in range(10):  # a 95% test calls one true null in twenty different
        path = synthetic.write_study(
            tmp_path / f"null{random}", seeds=range(4), accuracies=None, random=random
        )
        lines = verdicts(load_study(path))
        told.append(any(v.startswith("Loss: the arms are not distinguishable") for v in lines))
        assert told[-1] != any("falls" in v or "rises" in v for v in lines)
    assert sum(told) >= 8


def test_arms_without_numbers_go_by_their_names(synthetic: ModuleType, tmp_path: Path) -> None:
    path, cells = tmp_path / "placement", {}
    rng = np.random.default_rng(0)
    for i, where in enumerate(("even", "front", "back")):
        for seed in (0, 1, 2):
            key = f"{i}{seed}0000000000"
            content = synthetic.result(loss=2.3 + 0.1 * i + rng.normal(0, 0.01), attention=1)
            changes = {"arch.placement": where}
            synthetic.write_run(path, key, changes=changes, seed=seed, content=content)
            cells[key] = {"arm": f"placement={where}", "factors": changes, "seed": seed}
    study = {"name": "placement", "factors": ["arch.placement"], "cells": cells, "x": None}
    write_json(path / "study.json", study)
    lines = "\n".join(verdicts(load_study(path)))
    assert "Loss rises from" in lines
    assert "with placement=even to" in lines
    assert "every other arm is worse" in lines
    page = Page(write_report(path, reference="placement=back"))
    assert "Loss: difference from placement=back" in page.text


def test_confounds_are_found_in_configs_results_and_environments(
    synthetic: ModuleType, tmp_path: Path
) -> None:
    path, cells = tmp_path / "confounded", {}
    for i, share in enumerate((0.0, 0.5)):
        for seed in (0, 1):
            key = f"{i}{seed}0000000000"
            changes = {
                "arch.attention_share": share,
                "train.batch_size": 64 + 64 * i,
                "study.name": f"s{i}",
                "train.log_every": 10 + i,
            }
            content = synthetic.result(
                loss=2.3,
                attention=3 * i,
                params=92_000 + 5_000 * i,
                tokens=2_457_600 + 4096 * i,
                fingerprint=f"text-{seed}",
            )
            environment = {"commit": f"{i}" * 40, "host": f"host{i}", "gpu_id": f"{i}"}
            environment["numerics"] = {"precision": ("fp32", "bf16")[i]}
            environment["layers"] = {"my_pkg.my_layer": f"source {seed}"}
            synthetic.write_run(
                path, key, changes=changes, seed=seed, content=content, environment=environment
            )
            factors = {"arch.attention_share": share}
            cells[key] = {"arm": f"attention_share={share:g}", "factors": factors, "seed": seed}
    study = {"name": "c", "factors": ["arch.attention_share"], "cells": cells}
    write_json(path / "study.json", study)
    found = {c.name: c for c in confounds(load_study(path), load_details(path))}
    red = {name for name, c in found.items() if c.between_arms}
    assert red >= {
        *("train.batch_size", "training tokens", "commit", "numerics.precision"),
        *("non-embedding parameters", "learning rate"),
    }
    assert not red & {
        "arch.attention_share",
        "study.name",
        "train.log_every",
        "host",
        "gpu_id",
        "seed",
    }
    assert not found["text (fingerprint)"].between_arms  # seeds differ, arms do not
    assert "differs between seeds" in found["source of own layers (my_pkg.my_layer)"].text
    assert "64 in attention_share=0; 128 in attention_share=0.5" in found["train.batch_size"].text
    html = write_report(path).read_text()
    assert '<li class="red">train.batch_size differs between arms' in html


@pytest.mark.parametrize("shift", [0.0, 0.01])
def test_what_differs_between_seeds_is_tested_against_the_arms(
    synthetic: ModuleType, tmp_path: Path, shift: float
) -> None:
    path, cells = tmp_path / "batches", {}
    noise = iter(np.random.default_rng(0).normal(0, 0.001, 12))
    for i in range(2):
        for seed in range(6):
            key = f"{i}{seed}0000000000"
            changes = {"arch.attention_share": 0.25 * i}
            late = seed > 2
            content = synthetic.result(loss=2.3 + shift * i * late + next(noise), attention=i)
            environment = {"commit": ("a" if late else "b") * 40}
            synthetic.write_run(
                path, key, changes=changes, seed=seed, content=content, environment=environment
            )
            cells[key] = {"arm": f"arm{i}", "factors": changes, "seed": seed}
    study = {"name": "b", "factors": ["arch.attention_share"], "cells": cells}
    write_json(path / "study.json", study)
    (commit,) = (c for c in confounds(load_study(path), load_details(path)) if c.name == "commit")
    assert commit.between_arms == bool(shift)
    assert ("are not the same in each" if shift else "no sign that differences") in commit.text


@pytest.mark.parametrize("forms", ["alike", "apart"])
def test_what_computes_attention_is_compared_where_there_is_some(
    synthetic: ModuleType, tmp_path: Path, forms: str
) -> None:
    path, cells = tmp_path / "forms", {}
    for i in range(3):
        key = f"{i}00000000000"
        changes = {"arch.attention_share": 0.25 * i}
        form = "cudnn_attention" if i == 1 and forms == "apart" else "flash_attention"
        environment = {"attention": {"*": form} if i else {}}
        content = synthetic.result(loss=2.3, attention=i)
        synthetic.write_run(path, key, changes=changes, content=content, environment=environment)
        cells[key] = {"arm": f"arm{i}", "factors": changes, "seed": 0}
    study = {"name": "f", "factors": ["arch.attention_share"], "cells": cells}
    write_json(path / "study.json", study)
    found = confounds(load_study(path), load_details(path))
    texts = [c.text for c in found if "computes attention" in c.name]
    if forms == "alike":
        assert texts == []
    else:
        (text,) = texts
        assert text.startswith("what computes attention (*) differs between arms: ")
        assert "cudnn_attention in arm1" in text
        assert "arm0" not in text


@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_arms_that_differ_by_the_text_are_named(
    synthetic: ModuleType, tmp_path: Path, shift: float
) -> None:
    noise, cells = np.random.default_rng(1), []
    for seed in range(4):
        for i, luck in enumerate(noise.normal(0, 0.05, 3)):
            content = synthetic.result(loss=2.3 + 0.1 * i + luck, attention=i)
            on_a = 2.3 + 0.1 * i + luck + noise.normal(0, 0.001) + shift * (i == 2)
            content["val_a"] = {**content["val_b"], "loss": on_a}
            cells.append((f"arm{i}", {"arch.attention_share": i / 6}, seed, content, {}))
    told = verdicts(load_study(synthetic.write_cells(tmp_path / "texts", cells)))
    found = [text for text in told if "depends on the text" in text]
    assert len(found) == (shift > 0)
    if found:  # although the noise between seeds is larger than the shift
        assert "arm2: +0.2" in found[0] or "33.3%: +0.2" in found[0]
        assert "16.7%" not in found[0]


def test_letters_are_those_of_the_registry() -> None:
    assert {kind.name: letter for letter, kind in KINDS.items()} == LETTERS


def test_an_arm_without_such_layers_has_no_place_on_their_axis(
    synthetic: ModuleType, tmp_path: Path
) -> None:
    cells = [
        (arm, {"arch.mamba2.d_state": size}, seed, synthetic.result(loss=loss, attention=n), {})
        for arm, size, n, loss in [
            ("mamba2, d_state=16", 16, 0, 2.5),
            ("mamba2, d_state=128", 128, 0, 2.4),
            ("transformer, d_state=128", 128, 6, 2.2),
        ]
        for seed in (0, 1)
    ]
    path = synthetic.write_cells(tmp_path / "states", cells)
    analysis = analyse(load_study(path))
    assert analysis.axis.numeric
    assert analysis.arms["x"].dropna().to_dict() == {
        "mamba2, d_state=16": 16,
        "mamba2, d_state=128": 128,
    }
    assert analysis.short("transformer, d_state=128") == "transformer"
    assert analysis.describe("transformer, d_state=128") == "in transformer"
    page = write_report(path).read_text()
    assert "128 (transformer)" not in page
    assert ">transformer<" in page


@pytest.mark.parametrize(("at_32", "beyond"), [(2.5, True), (2.4005, False)])
def test_an_optimum_lies_beyond_the_values_only_where_none_inside_is_as_good(
    synthetic: ModuleType, tmp_path: Path, at_32: float, beyond: bool
) -> None:
    cells = [
        (
            f"d_state={size}",
            {"arch.mamba2.d_state": size},
            seed,
            synthetic.result(loss=loss + 0.001 * (seed + (seed == i))),
            {},
        )
        for i, (size, loss) in enumerate([(8, 2.6), (32, at_32), (128, 2.4)])
        for seed in range(3)
    ]
    told = verdicts(load_study(synthetic.write_cells(tmp_path / "sizes", cells)))
    assert any("the optimum may lie beyond 128" in text for text in told) == beyond


@pytest.mark.parametrize("lacking", [False, True])
def test_means_of_arms_that_lack_seeds_are_told_to_be_fitted(
    synthetic: ModuleType, tmp_path: Path, lacking: bool
) -> None:
    cells = [
        (
            f"arm{i}",
            {"arch.attention_share": i / 6},
            seed,
            synthetic.result(loss=2.3 + 0.1 * i + 0.01 * seed + 0.002 * (i == seed), attention=i),
            {},
        )
        for i in range(3)
        for seed in range(3 - (lacking and i == 2))
    ]
    page = write_report(synthetic.write_cells(tmp_path / "seeds", cells)).read_text()
    assert ("Arms lack seeds that others have" in page) == lacking


def test_factors_that_move_together_are_a_confound(synthetic: ModuleType, tmp_path: Path) -> None:
    path, cells = tmp_path / "together", {}
    for i in range(2):
        key = f"{i}00000000000"
        changes = {"arch.attention_share": 0.5 * i, "arch.tie_embeddings": bool(i)}
        content = synthetic.result(loss=2.3, attention=3 * i)
        synthetic.write_run(path, key, changes=changes, content=content)
        cells[key] = {"arm": f"arm{i}", "factors": changes, "seed": 0}
    study = {"name": "t", "factors": ["arch.attention_share", "arch.tie_embeddings"]}
    write_json(path / "study.json", {**study, "cells": cells})
    texts = [c.text for c in confounds(load_study(path), load_details(path))]
    assert any("arch.attention_share and arch.tie_embeddings change together" in t for t in texts)


def test_a_clean_study_has_only_the_shared_rate(study: Path) -> None:
    found = confounds(load_study(study), load_details(study))
    assert [c.name for c in found] == ["learning rate"]


def test_equal_budgets_read_the_dearer_arm_earlier(synthetic: ModuleType, tmp_path: Path) -> None:
    path = synthetic.write_study(
        tmp_path / "dear", shares=[0.0, 0.5], accuracies=None, params=[90_000, 180_000]
    )
    table = equal_budgets(analyse(load_study(path)), load_metrics(path))
    pivot = table.pivot_table(index="arm", columns="budget", values="loss")
    cheap, dear = pivot.loc["attention_share=0"], pivot.loc["attention_share=0.5"]
    assert cheap["flops"] == pytest.approx(cheap["tokens"])
    # Half the tokens: the synthetic curve then stands 3.2 (e^-2.5 - e^-5) above its end.
    assert dear["flops"] - dear["tokens"] == pytest.approx(0.241, abs=0.03)
    at = table.drop_duplicates("budget").set_index("budget")["at"]
    assert at["tokens"] == 2_457_600
    assert at["flops"] == pytest.approx(6.3 * 90_000 * 2_457_600)
    assert at["seconds"] == pytest.approx(58.2)


@pytest.mark.parametrize("pace", [1.0, 1.04])
def test_runs_of_one_arm_on_a_faster_gpu_are_told(
    synthetic: ModuleType, tmp_path: Path, pace: float
) -> None:
    path = synthetic.write_study(tmp_path / "pace", shares=[0.0, 0.5], seeds=range(2))
    file = next(iter(sorted(path.rglob("result.json"))))
    content = json.loads(file.read_text())
    content["train"]["tokens_per_second"] *= pace
    write_json(file, content)
    told = "where runs of one arm differ in speed by 4.0%" in write_report(path).read_text()
    assert told == (pace > 1)


def test_intervals_over_documents_stand_beside_those_over_seeds(study: Path) -> None:
    analysis = analyse(load_study(study))
    table = difference_table(analysis, study).set_index(["metric", "arm"])
    row = table.loc[("mqar_accuracy", "attention_share=0.5")]
    assert row["items_low"] < row["difference"] < row["items_high"]
    assert row["items_high"] - row["items_low"] < 0.2
    shutil.rmtree(study / "0000aaaaaaaa" / "evaluation")
    again = difference_table(analysis, study)
    assert again["items_low"].isna().all()


def test_without_pyarrow_one_line_and_csv_only_and_words_are_escaped(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("no pyarrow")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", missing)
    monkeypatch.setattr(pd, "read_parquet", missing)
    content = json.loads((study / "study.json").read_text())
    content["question"] = "Is <b>a</b> & b better?"
    write_json(study / "study.json", content)
    said: list[object] = []
    page = write_report(study, say=said.append)
    assert len(said) == 1
    assert "pyarrow" in str(said[0])
    assert (study / "report" / "table.csv").exists()
    assert not list(study.rglob("*.parquet"))
    assert "Is &lt;b&gt;a&lt;/b&gt; &amp; b better?" in page.read_text()


def test_the_summary_fits_a_terminal(study: Path) -> None:
    out = StringIO()
    Console(file=out, width=100).print(summary(analyse(load_study(study))))
    assert "16.7%" in out.getvalue()
    assert "±" in out.getvalue()
    assert "96k" not in out.getvalue()
    assert "92k" in out.getvalue()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(92_000, "", "92k"), (1_234_567, "", "1.23M"), (36_000, "B", "35.2 KiB"), (999, "", "999")],
)
def test_numbers_for_people(value: float, unit: str, text: str) -> None:
    assert si(value, unit) == text


def test_an_arm_with_several_seeds_beside_one_with_one(
    synthetic: ModuleType, tmp_path: Path
) -> None:
    path = synthetic.write_study(tmp_path / "uneven", shares=[0.0, 0.25], seeds=[0, 1])
    analysis = analyse(load_study(path))
    last = analysis.runs.loc[analysis.runs["seed"] == 1, "key"].iloc[-1]
    shutil.rmtree(path / last)
    text = Page(write_report(path)).text
    assert "Too few seeds that arms share: no interval can be given" in text
    assert "One seed" not in text
