"""Cells: what a grid, arms, seeds and a search come to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ablate.errors import UserError
from ablate.study.space import cells, proposed
from ablate.study.trial import resolve


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
        ("attention_share=0", ()),  # 0.1 of two layers is none, and called so
        ("attention_share=0.5", ()),
    ]
    assert len(found) == 4
    same = {"a": {"arch.mlp_share": 0.0}, "b": {"arch.mlp_share": 0.1}}
    found = cells(make(**made, **{"study.arms": same, "arch.attention_share": 0.5}))
    assert [(c.arm, c.also) for c in found] == [("a", ("b",))]


def test_a_field_that_changes_no_run_is_no_factor(make: Any) -> None:
    grid: dict[str, Any] = {"arch.attention_share": [0.0, 0.5], "arch.swa.window": [8, 16]}
    with pytest.raises(UserError, match=r"arch\.swa\.window: 8, 16 give the same run in every arm"):
        cells(make(**{"arch.pattern": None, "arch.mlp_share": 0.0, "study.grid": grid}))


def test_arms_are_called_by_the_shares_that_came_out(make: Any) -> None:
    made = {"arch.pattern": None, "arch.n_layers": 12}
    grid = {"arch.attention_share": [0.0, 0.17], "arch.mlp_share": [0.25, 0.3]}
    found = cells(make(**made, **{"study.grid": grid}))
    assert [c.arm for c in found] == [
        *("attention_share=0, mlp_share=0.25", "attention_share=0, mlp_share=0.333"),
        *("attention_share=0.167, mlp_share=0.25", "attention_share=0.167, mlp_share=0.333"),
    ]
    assert found[-1].factors["arch.mlp_share"] == 0.3
    named = {"match.by": "mlp_width", "match.target": "attention_share=0.167, mlp_share=0.25"}
    matched = cells(make(**made, **named, **{"study.grid": grid, "match.force": True}))
    assert matched[0].certificate.reference == "'attention_share=0.167, mlp_share=0.25'"


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


# --- matched arms --------------------------------------------------------------------------------

MATCHED = {
    "arch.pattern": None,
    "arch.n_layers": 8,
    "arch.mlp_share": 0.0,
    "arch.d_model": 32,
    "arch.mamba2": {"d_state": 16, "head_dim": 16},
    "arch.attention": {"head_dim": 8, "n_heads": 3},
    "match.by": "attention_inner",
    "match.tolerance": 0.02,
    "study.grid": {"arch.attention_share": [0.0, 0.25, 0.5]},
    "study.seeds": [0, 1],
}


def test_arms_are_matched_with_the_first_and_the_swap_runs_beside(make: Any) -> None:
    found = cells(make(**MATCHED))
    labels = ["attention_share=0", "attention_share=0.25", "attention_share=0.25, unmatched"]
    labels += ["attention_share=0.5", "attention_share=0.5, unmatched"]
    assert [c.arm for c in found] == 2 * labels
    sizes = {c.arm: c.trial.architecture.non_embedding_params() for c in found}
    assert sizes["attention_share=0.5"] == pytest.approx(sizes["attention_share=0"], rel=0.02)
    assert sizes["attention_share=0.5, unmatched"] < 0.9 * sizes["attention_share=0"]
    assert [c.factors["match.arms"] for c in found[:3]] == ["matched", "matched", "unmatched"]
    certificate = found[3].certificate
    assert certificate is not None
    assert certificate.reference == "'attention_share=0'"
    assert certificate.after["non_embedding_params"] == sizes["attention_share=0.5"]
    assert certificate.before["non_embedding_params"] == sizes["attention_share=0.5, unmatched"]
    assert found[4].certificate is None
    # what a child gets is enough to make the same architecture and key
    again = resolve(json.loads(json.dumps(found[3].trial.tree)))
    assert (again.key, again.architecture) == (found[3].key, found[3].trial.architecture)


def test_the_unmatched_swap_is_the_study_without_matching(make: Any) -> None:
    plain = {c.key: c.arm for c in cells(make(**{**MATCHED, "match.by": None}))}
    both = {c.key: c.arm for c in cells(make(**MATCHED))}
    alone = {c.key for c in cells(make(**MATCHED, **{"match.arms": "unmatched"}))}
    assert set(plain) == alone
    assert set(plain) < set(both)
    assert {both[k] for k in plain} == {a for a in both.values() if "un" in a or a.endswith("=0")}
    only = cells(make(**MATCHED, **{"match.arms": "matched"}))
    assert [c.arm for c in only[:3]] == [f"attention_share={s}" for s in ("0", "0.25", "0.5")]
    assert "match.arms" not in only[0].factors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match.tolerance": 1e-5}, r"cell 'attention_share=0\.25': match\.quantity.*nearest"),
        (
            {"match.target": "attention_share=1"},
            r"match\.target is 'attention_share=1', but no arm",
        ),
        ({"match.quantity": "state_bytes", "match.by": "layers"}, "beyond match.tolerance"),
        ({"study.grid": {}}, r"match\.target must be a figure"),
        ({"study.grid": {"match.by": ["state"]}}, r"'match\.by' cannot be a factor"),
        (
            {
                "study.grid": {},
                "study.search": {"train.lr": {"low": 1e-4, "high": 1e-2}},
                "study.n_trials": 2,
            },
            r"match\.target must be a figure with study\.search",
        ),
    ],
)
def test_matching_mistakes(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cells(make(**{**MATCHED, **changes}))


def test_a_target_can_be_a_figure_or_an_arm(make: Any) -> None:
    given = cells(make(**{**MATCHED, "match.target": 24_000, "match.force": True}))
    assert given[1].certificate is not None
    assert given[1].certificate.target == 24_000
    last = cells(make(**{**MATCHED, "match.target": "attention_share=0.5", "match.force": True}))
    assert last[-1].certificate is not None
    assert not last[-1].certificate.changes
