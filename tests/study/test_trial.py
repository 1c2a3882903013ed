"""What a config must be as a whole, and what names its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ablate import config
from ablate.errors import UserError
from ablate.run import RunFolder
from ablate.study.trial import resolve


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch.pattern": "M*Q"}, ["arch.pattern", "'Q'"]),
        ({"arch.pattern": "S-", "arch.swa": {"window": 64, "head_dim": 8}}, ["window", "seq_len"]),
        ({"arch.attention": {"head_dim": 8, "n_heads": 3, "n_kv_heads": 2}}, ["n_kv_heads"]),
        ({"arch.mamba2": {"d_stat": 8}}, ["arch.mamba2.d_stat", "d_state"]),
        ({"arch.layers": ["no.such.module"]}, ["arch.layers", "no.such.module"]),
        ({"arch.vocab_size": 64}, ["arch.vocab_size", "257"]),
        ({"data.path": "/no/such/folder"}, ["data.path", "/no/such/folder"]),
        ({"data.val_a_path": "/no/such/file"}, ["data.val_a_path"]),
        (
            {"data.tokenizer": {"kind": "file", "path": "/no/tokenizer.json"}},
            ["data.tokenizer.path", "/no/tokenizer.json"],
        ),
        ({"data.mqar": {"share": 0.5, "pairs": 9}}, ["data.mqar.pairs", "36"]),
        ({"data.mqar": {"share": 0.01, "pairs": 2}}, ["data.mqar.share", "train.batch_size"]),
        ({"evaluate.mqar_rows": 4, "evaluate.mqar_pairs": [9]}, ["evaluate.mqar_pairs"]),
        (
            {"evaluate.mqar_rows": 4, "evaluate.mqar_pairs": [], "data.mqar": {"pairs": 9}},
            ["data.mqar.pairs", "36"],
        ),
        (
            {"evaluate.recall": ["induction"], "evaluate.sizes": {"lengths": [3]}},
            ["induction", "length 3"],
        ),
        (
            {"evaluate.recall": ["phonebook"], "evaluate.sizes": {"phonebook": {"items": 0}}},
            ["phonebook", "items is 0"],
        ),
        ({"evaluate.recall": ["needle_multivalue"]}, ["length 512 has no room"]),
        ({"evaluate.suites": ["pika"]}, ["evaluate.suites", "piqa"]),
        ({"evaluate.local_data": "/no/such/folder"}, ["evaluate.local_data"]),
        ({"train.micro_batch": 8}, ["train.micro_batch", "train.batch_size"]),
        ({"train.micro_batch": 3}, ["train.micro_batch", "divide"]),
        ({"train.micro_batch": 0}, ["micro_batch", "1 or more", "'auto'", "0"]),
        ({"train.micro_batch": "all"}, ["train.micro_batch", "'all'", "integer", "'auto'"]),
        ({"train.devices": 3}, ["train.devices is 3", "train.batch_size 4"]),
        ({"train.devices": 2, "train.micro_batch": 4}, ["micro_batch is 4", "a device's share"]),
        (
            {"train.branch_from": "/no/run", "train.schedule": "wsd"},
            ["train.branch_from", "/no/run"],
        ),
    ],
)
def test_what_does_not_fit_together(make: Any, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve(make(**changes))
    for word in words:
        assert word in str(caught.value)


def test_a_gpu_that_is_not_there(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.device"):
        resolve(make(**{"train.device": "cuda"}))


def test_short_rows_for_a_window_are_a_warning(make: Any) -> None:
    swa = {"window": 20, "head_dim": 8}
    trial = resolve(make(**{"arch.pattern": "S-", "arch.swa": swa}))
    assert any("seq_len" in warning and "20" in warning for warning in trial.warnings)
    assert not resolve(make(**{"arch.pattern": "S-", "arch.swa": {**swa, "window": 16}})).warnings


def test_the_key_is_what_decides_the_figures(make: Any) -> None:
    key = resolve(make()).key
    assert len(key) == 16
    assert int(key, 16) >= 0
    same = [
        {"train.threads": 2},
        {"train.device": "auto"},
        {"study.name": "other"},
        {"arch.pattern": "M.*.-"},
        {"arch.name": "a name"},
        {"arch.mamba1": {"d_state": 4}},  # no such layer in the pattern
        {"arch.attention": {"head_dim": 8, "n_heads": 2}},  # the default, written out
    ]
    other = [
        {"seed": 1},
        {"train.lr": 1e-3},
        {"arch.pattern": "M-*"},
        {"arch.mamba2": {"d_state": 16, "head_dim": 8}},
        {"data.seq_len": 64},
        {"evaluate.tokens": 1000},
    ]
    for changes in same:
        assert resolve(make(**changes)).key == key, changes
    assert len({key, *(resolve(make(**changes)).key for changes in other)}) == 1 + len(other)


def test_shares_that_give_one_pattern_are_one_run(make: Any) -> None:
    made = {"arch.pattern": None, "arch.n_layers": 8, "arch.mlp_share": 0.5}
    keys = [
        resolve(make(**made, **{"arch.attention_share": share})).key for share in (0.12, 0.13, 0.25)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_the_tree_is_enough_to_run_it_again(make: Any) -> None:
    trial = resolve(make(**{"study.grid": {"train.lr": [1e-3]}, "study.question": "Why?"}))
    again = resolve(json.loads(json.dumps(trial.tree)))
    assert again.key == trial.key
    assert again.config.study.question == "Why?"
    assert not again.config.study.grid  # a run is one trial, whatever study asked for it
    assert config.science(again.config) == config.science(trial.config)


def test_a_trunk_is_checked_and_may_move(make: Any, tmp_path: Path) -> None:
    wsd = {"train.schedule": "wsd"}
    trunk = resolve(make(**wsd))
    keys = []
    for place in ("here", "there"):
        folder = tmp_path / place / trunk.key
        step = folder / "checkpoint" / "step-00000008"
        RunFolder(folder).create(trunk.tree)
        branch = {**wsd, "train.branch_from": str(folder)}
        with pytest.raises(UserError, match="no checkpoint"):
            resolve(make(**branch))
        step.mkdir(parents=True)
        keys.append(resolve(make(**branch)).key)
        with pytest.raises(UserError, match=r"train\.branch_at is 5.*steps 8"):
            resolve(make(**branch, **{"train.branch_at": 5}))
        with pytest.raises(UserError, match="another architecture"):
            resolve(make(**branch, **{"arch.pattern": "MM"}))
        with pytest.raises(UserError, match="the trunk has another seed"):
            resolve(make(**branch, seed=1))
        with pytest.raises(UserError, match="which counts the trunk's part"):
            resolve(make(**branch, **{"train.tokens": 8}))
    assert keys[0] == keys[1] != trunk.key
