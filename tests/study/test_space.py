"""Cells: what a grid, arms, seeds and a search come to."""

from __future__ import annotations

from typing import Any

import pytest

from ablate.errors import UserError
from ablate.study.space import cells, proposed


def test_grid_times_arms_times_seeds(make: Any) -> None:
    tree = make(
        **{
            "study.arms": {"mamba": {"arch.pattern": "M-"}, "mixed": {"arch.pattern": "M*"}},
            "study.grid": {"train.lr": [1e-3, 2e-3]},
            "study.seeds": [5, 6],
        }
    )
    found = cells(tree)
    labels = ["mamba, lr=0.001", "mamba, lr=0.002", "mixed, lr=0.001", "mixed, lr=0.002"]
    # Seed by seed, so that a study that is stopped early has whole replicates.
    assert [(cell.seed, cell.arm) for cell in found] == [(s, a) for s in (5, 6) for a in labels]
    assert found[3].factors == {"train.lr": 2e-3, "arch.pattern": "M*"}
    assert all(cell.trial.config.seed == cell.seed for cell in found)
    assert len({cell.key for cell in found}) == 8


def test_without_factors_there_is_one_cell(make: Any) -> None:
    (cell,) = cells(make(seed=7))
    assert (cell.arm, cell.factors, cell.seed) == ("tiny", {}, 7)


def test_cells_that_are_one_run_are_merged(make: Any) -> None:
    shares = [0.0, 0.1, 0.5]
    made = {"arch.pattern": None, "arch.n_layers": 2, "arch.mlp_share": 0.0}
    tree = make(**made, **{"study.grid": {"arch.attention_share": shares}, "study.seeds": [0, 1]})
    found = cells(tree)
    assert [(c.arm, c.also) for c in found[:2]] == [
        ("attention_share=0", ("attention_share=0.1",)),
        ("attention_share=0.5", ()),
    ]
    assert len(found) == 4


def test_labels_tell_like_names_apart(make: Any) -> None:
    grid = {"arch.attention.head_dim": [8], "arch.mamba2.head_dim": [8, 16]}
    assert [c.arm for c in cells(make(**{"study.grid": grid}))] == [
        "attention.head_dim=8, mamba2.head_dim=8",
        "attention.head_dim=8, mamba2.head_dim=16",
    ]


def test_options_left_at_their_default_can_be_factors(make: Any) -> None:
    found = cells(make(**{"study.grid": {"arch.mamba2.d_conv": [2, 4]}}))
    assert [c.trial.architecture.options["mamba2"].d_conv for c in found] == [2, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study.grid": {"train.learning_rate": [1e-3]}}, r"train\.learning_rate"),
        ({"study.grid": {"train.lr": []}}, "matches nothing"),
        ({"study.grid": {"train.lr": [1e-3, -1.0]}}, r"cell 'lr=-1': field 'train\.lr'"),
        ({"study.grid": {"arch.mamba2.d_stat": [8]}}, r"d_stat"),
        ({"study.grid": {"seed": [1, 2]}}, r"study\.seeds"),
        ({"study.grid": {"study.workers": [1, 2]}}, r"study\.workers"),
        (
            {"study.grid": {"train.lr": [1e-3]}, "study.arms": {"a": {"train.lr": 2e-3}}},
            r"train\.lr.*study\.arms\.a",
        ),
        (
            {"study.search": {"train.lr": {"low": 1e-3, "high": 20.0}}, "study.n_trials": 3},
            r"cell 'lr=20'",
        ),
        (
            {"study.search": {"train.nope": {"low": 1e-3, "high": 2.0}}, "study.n_trials": 3},
            r"train\.nope",
        ),
    ],
)
def test_mistakes_name_the_cell_and_the_field(
    make: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        cells(make(**changes))


def test_a_proposal_is_a_cell_for_every_seed(make: Any) -> None:
    tree = make(
        **{
            "study.search": {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
            "study.n_trials": 2,
            "study.seeds": [1, 2],
        }
    )
    assert cells(tree) == []
    found = proposed(tree, {"train.lr": 0.00123456789})
    assert [(c.arm, c.seed) for c in found] == [("lr=0.00123457", 1), ("lr=0.00123457", 2)]
    assert found[0].factors == {"train.lr": 0.00123456789}
