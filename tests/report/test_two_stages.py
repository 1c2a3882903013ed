"""The page of a study that is matched and tunes its learning rates."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from ablate.report.confounds import confounds
from ablate.report.frames import load_details, load_study, usable
from ablate.report.page import write_report
from ablate.report.tables import difference_table
from ablate.report.verdicts import analyse, verdicts
from ablate.run import RunFolder, write_json


@pytest.fixture(scope="module")
def two(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_two_stages(tmp_path_factory.mktemp("runs") / "two", margin=0.01)


def text_of(page: Path) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page.read_text()).split())


def test_arms_are_compared_by_the_second_stage_alone(two: Path) -> None:
    frame = load_study(two)
    assert set(frame["stage"]) == {"tune", "confirm"}
    runs = usable(frame)
    assert set(runs["stage"]) == {"confirm"}
    assert set(runs["seed"]) == {0, 1, 2}
    analysis = analyse(frame)
    fit = analysis.comparisons["val_b_loss"].fit
    assert set(fit.counts) == {3}
    assert list(analysis.arms["series"].unique()) == ["matched", "unmatched"]
    lines = verdicts(frame)
    assert any(line.startswith("Loss falls from") for line in lines)
    assert not any("Incomplete" in line for line in lines)


def test_the_page_shows_rates_and_certificates(two: Path) -> None:
    page = write_report(two)
    text = text_of(page)
    for words in (
        *("Learning rates", "Half an octave below (nats)", "95% interval of the optimum"),
        *("Matching", "n_heads and n_kv_heads of attention 4 to", "q (false discovery)"),
        "Arms are matched by construction in parameters beside the embedding",
        "a quadratic in the logarithm of the rate",
    ):
        assert words in text, words
    folder = page.parent
    for name in ("learning_rates", "certificates"):
        assert {p.suffix for p in folder.glob(f"{name}.*")} >= {".csv", ".md", ".parquet"}
    assert (folder / "learning_rates.png").exists()
    rates = pd.read_csv(folder / "learning_rates.csv").set_index("arm")
    assert rates["chosen"].between(2.2e-3, 3.1e-3).all()
    assert (rates["low"] < rates["chosen"]).all()
    assert (rates["minus"] - 0.005).abs().max() < 0.004
    table = pd.read_csv(folder / "certificates.csv").set_index("arm")
    assert (table["error_matched"].abs() <= 0.01).all()
    assert table.loc["attention_share=0.5", "error_configured"] < -0.1
    for arm, row in table.to_dict("index").items():
        key = load_study(two).set_index(["arm", "stage"]).loc[(arm, "confirm"), "key"].iloc[0]
        result = RunFolder(two / str(key)).result()
        assert result is not None
        assert result["architecture"]["non_embedding_params"] == row["non_embedding_params_matched"]
        assert result["architecture"]["match"]["after"]["state_bytes"] == row["state_bytes_matched"]
    images = re.findall(r'<img [^>]*alt="([^"]*)"', page.read_text())
    assert any("Rates chosen: 0%: 0.002" in alt for alt in images)


def test_rates_and_widths_that_differ_on_purpose_are_no_confounds(two: Path) -> None:
    found = confounds(load_study(two), load_details(two))
    assert [c.text for c in found if c.between_arms] == []


def test_arms_within_the_margin_are_called_equal(synthetic: ModuleType, tmp_path: Path) -> None:
    path = synthetic.write_two_stages(tmp_path / "m", noise=0.0005, margin=0.05)
    lines = verdicts(load_study(path))
    assert any("Loss within 0.05 nats of the arm without attention: 12.5%" in v for v in lines)
    table = difference_table(analyse(load_study(path)), path)
    assert (table["equivalence_p"] < 0.05).all()
    assert (table["holm_all_p"] >= table["p"]).all()
    assert (table["fdr_q"] <= table["holm_all_p"] + 1e-12).all()


def test_a_first_stage_alone_says_how_far_it_is(synthetic: ModuleType, tmp_path: Path) -> None:
    path = synthetic.write_two_stages(tmp_path / "edge", best=1e-4)
    lines = verdicts(load_study(path))
    assert any("second stage has not begun: arm 'attention_share=0'" in v for v in lines)
    assert any("lowest learning rate that was tried" in v for v in lines)
    text = text_of(write_report(path))
    assert "has not begun" in text
    assert "Learning rates" in text
    index = json.loads((path / "study.json").read_text())
    index["tuned"] = None
    write_json(path / "study.json", index)
    shutil.rmtree(path / next(iter(index["cells"])))
    lines = verdicts(load_study(path))
    assert lines[0].startswith("Learning rates are being tuned: 34 of 35 runs of the first stage")


def test_a_forced_match_is_a_confound(synthetic: ModuleType, tmp_path: Path) -> None:
    path = synthetic.write_two_stages(
        tmp_path / "forced", shares=(0.0, 0.25, 0.5), tolerance=0.0005, force=True
    )
    texts = [c.text for c in confounds(load_study(path), load_details(path)) if c.between_arms]
    assert any("was run although its non_embedding_params is" in t for t in texts)
    assert "(forced)" in write_report(path).read_text()
