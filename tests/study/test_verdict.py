"""A small real study from end to end: a planted difference is found, a repeated arm is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ablate.report import load_study
from ablate.report.frames import usable
from ablate.report.page import write_report
from ablate.report.verdicts import analyse, judge
from ablate.run import RunFolder
from ablate.study.space import cells
from ablate.study.supervisor import run_study
from ablate.train import train


def test_a_wider_mlp_is_different_and_a_repeated_arm_is_not(make: Any, console: Any) -> None:
    """`again` is `base` but for AdamW's epsilon, which changes the run and not what it learns."""
    tree = make(
        **{
            "arch.pattern": "-*-",
            "arch.attention": {"head_dim": 8, "n_heads": 2},
            "arch.mlp": {"d_hidden": 8},
            "train.tokens": 32 * 8 * 120,
            "train.batch_size": 8,
            "train.lr": 1e-2,
            "data.allow_repeats": True,
            "study.arms": {
                "base": {"arch.mlp.d_hidden": 8},
                "again": {"train.eps": 2e-8},
                "wide": {"arch.mlp.d_hidden": 256},
            },
            "study.seeds": [0, 1, 2],
        }
    )
    path = Path(tree["study"]["folder"]) / "tiny"
    for cell in cells(tree):  # here, as nine processes would each import torch
        train(cell.trial.config, RunFolder(path / cell.key))
    assert run_study(tree, console=console).exit_code == 0
    frame = load_study(path)
    assert len(usable(frame)) == 9
    analysis = analyse(frame)
    comparison = analysis.comparisons["val_b_loss"]
    assert comparison.reference == "base"
    table = comparison.table.set_index("arm")
    assert table.loc["wide", "dunnett_p"] < 0.05
    assert table.loc["wide", "difference"] < 0
    assert table.loc["again", "dunnett_p"] > 0.05
    assert set(comparison.different()["arm"]) == {"wide"}
    assert comparison.best == ["wide"]
    texts = [v.text for v in judge(analysis) if v.kind == "result"]
    assert any(re.search(r"Loss falls from .*d_hidden 8 .*d_hidden 256", t) for t in texts)
    page = write_report(path).read_text()
    assert page.count(">different<") == 1
    assert page.count(">not\u00a0distinguishable<") == 1
