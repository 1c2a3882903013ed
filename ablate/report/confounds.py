"""What differs between arms besides the factors, found from configs, results and environments.

A comparison is about one thing only if everything else is the same. This reads what was really
there, not what was meant: a budget in seconds that gave one arm fewer tokens shows up here, and so
does a commit made in the middle of a study.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ablate.report.frames import operational_fields, usable, varies
from ablate.report.stats import ALPHA, interaction
from ablate.report.verdicts import p_value
from ablate.study.show import si

# Set by the study for every run, by the seed, or of no influence on what is computed.
_IGNORED_CONFIG = ("study.", "tracker.", "match.", "arch.published", "arch.name")
_IGNORED_ENVIRONMENT = (
    *("host", "platform", "versions.wandb", "versions.optuna"),
    "gpu_id",  # of one type, whose arithmetic is the same: for speeds alone (`page`)
    *("hardware", "commit", "dirty", "data."),  # told by columns of the frame
    "micro_batch",  # how a batch is cut changes the order of its sum
    "parameter_groups",  # how many parameters each has differs with the layers
)

_PATTERN_FIELDS = {  # what makes the pattern: told by the pattern itself
    *(f"arch.{n}" for n in ("pattern", "unit", "attention_share", "mlp_share", "placement")),
    *(f"arch.{n}" for n in ("positions", "mixer_letter", "attention_letter", "mlp_letter")),
}

_OF_LAYERS = {"attention": "what computes attention", "layers": "source of own layers"}

_NAMES = {
    "fingerprint": "text (fingerprint)",
    "tokenizer": "tokenizer",
    "tokens": "training tokens",
    "text_tokens": "training tokens of text",
    "steps": "training steps",
    "unique_tokens": "unique tokens",
    "lr": "learning rate used",
    "val_b_tokens": "validation tokens scored",
    "commit": "commit",
    "hardware": "hardware",
}


@dataclass(frozen=True)
class Confound:
    """Something besides the factors that is not the same everywhere.

    `between_arms`: arms differ in it, or their differences change with it, so that a difference may
    come from it (red on the page). Otherwise only seeds differ in it: it widens the noise and
    favours no arm.
    """

    name: str
    text: str
    between_arms: bool


def confounds(frame: pd.DataFrame, details: pd.DataFrame) -> list[Confound]:
    """All confounds among the usable runs, the ones between arms first.

    frame: `load_study`; details: `load_details` of the same folder.
    """
    runs = usable(frame)
    factors = set(frame.attrs.get("study", {}).get("factors") or [])
    if runs["arm"].nunique() < 2:
        return []
    table = runs.merge(details, on="key", how="left")
    tuned = bool((frame.attrs.get("study", {}).get("tuned") or {}).get("fit"))
    hidden = operational_fields() | factors | ({"train.lr"} if tuned else set())
    if factors & _PATTERN_FIELDS or varies(runs["pattern"]):
        hidden |= _PATTERN_FIELDS
    matched = "config.match.by" in table and table["config.match.by"].notna().any()
    found = []
    for column in table.columns:
        if column in _NAMES:
            name = _NAMES[column]
            if column == "lr" and (tuned or "train.lr" in factors):
                continue
        elif column.startswith("config."):
            name = column.removeprefix("config.")
            if name == "seed" or name in hidden or name.startswith(_IGNORED_CONFIG):
                continue
            if matched and name.startswith("arch.overrides"):
                continue  # widths that make the arms equal: the certificates list them
        elif column.startswith("environment."):
            name = column.removeprefix("environment.")
            if name.startswith(_IGNORED_ENVIRONMENT) or name == "attention":
                continue
            start, _, which = name.partition(".")
            if which and start in _OF_LAYERS:  # no entry where there are no such layers
                name = f"{_OF_LAYERS[start]} ({which})"
                there = table[column].map(lambda value: isinstance(value, str) and value != "")
                found += _difference(table[there], column, name)
                continue
        else:
            continue
        found += _difference(table, column, name)
    found += _size(runs)
    found += _forced(table)
    found += _first_layer(runs)
    found += _changed_together(runs, sorted(factors))
    found += [] if tuned else _shared_rate(runs, factors)
    return sorted(found, key=lambda c: not c.between_arms)


def _difference(table: pd.DataFrame, column: str, name: str) -> list[Confound]:
    values = table[column].map(_show)
    if values.nunique() < 2:
        return []
    # Compared where it counts, between the arms within a seed; an arm without that seed, whole.
    within = values.groupby(table["seed"]).nunique()
    arms = values.groupby(table["arm"]).agg(lambda v: " and ".join(sorted(set(v))))
    between = bool((within > 1).any()) or varies(arms)
    if not between:
        text = f"{name} differs between seeds: {_list(values)}"
        scored = table[table["val_b_loss"].notna()]
        groups = values[scored.index].tolist()
        p = interaction(
            scored["arm"].tolist(), scored["seed"].tolist(), groups, scored["val_b_loss"]
        )
        if p < ALPHA:
            text += f"; differences between arms are not the same in each (p = {p_value(p)})"
        elif p >= ALPHA:
            text += f"; no sign that differences between arms change with it (p = {p_value(p)})"
        return [Confound(name, text, p < ALPHA)]
    if varies(arms):
        parts = [f"{v} in {_names(g.index)}" for v, g in arms.groupby(arms, sort=False)]
        return [Confound(name, f"{name} differs between arms: {'; '.join(parts)}", True)]
    return [Confound(name, f"{name} differs between runs of a seed: {_list(values)}", True)]


def _size(runs: pd.DataFrame) -> list[Confound]:
    found = []
    if "match.arms" in runs:  # unmatched swaps differ in size on purpose
        runs = runs[runs["match.arms"] != "unmatched"]
    for column, name in (
        ("non_embedding_params", "non-embedding parameters"),
        ("train_flops_per_token", "training FLOPs a token"),
    ):
        by_arm = runs.groupby("arm", sort=False)[column].mean().dropna()
        if len(by_arm) < 2 or by_arm.min() <= 0:
            continue
        spread = by_arm.max() / by_arm.min() - 1
        if spread > 0.01:
            text = (
                f"{name} are not matched: {si(by_arm.min())} in {by_arm.idxmin()} to "
                f"{si(by_arm.max())} in {by_arm.idxmax()} ({100 * spread:.0f}% more)"
            )
            found.append(Confound(name, text, True))
    return found


def _forced(table: pd.DataFrame) -> list[Confound]:
    """Arms that were matched beyond the tolerance, because somebody said so."""
    prefix = "config.match.certificate."
    if f"{prefix}quantity" not in table:
        return []
    found = []
    for arm, row in table.groupby("arm", sort=False).first().iterrows():
        quantity, target = row[f"{prefix}quantity"], row[f"{prefix}target"]
        if not isinstance(quantity, str):
            continue
        off = row[f"{prefix}after.{quantity}"] / target - 1
        if abs(off) > row[f"{prefix}tolerance"]:
            text = f"{arm} was run although its {quantity} is {off:+.1%} from the target"
            found.append(Confound("match.force", text, True))
    return found


def _first_layer(runs: pd.DataFrame) -> list[Confound]:
    first = runs.groupby("arm", sort=False)["pattern"].first().str[:1]
    first = first[first != ""]
    if first.nunique() < 2 or first.nunique() == len(first):
        return []  # the same in all, or so different that the layers are the question
    parts = [f"{letter} in {_names(group.index)}" for letter, group in first.groupby(first)]
    return [Confound("first layer", f"the first layer differs: {'; '.join(parts)}", True)]


def _changed_together(runs: pd.DataFrame, factors: list[str]) -> list[Confound]:
    arms = runs.drop_duplicates("arm")
    shown = {f: arms[f].map(_show) for f in factors if f in arms}
    moving = {f: v for f, v in shown.items() if varies(v)}
    together = [
        f
        for f, v in moving.items()
        for g, w in moving.items()
        if g != f and v.groupby(w).nunique().max() == 1 and w.groupby(v).nunique().max() == 1
    ]
    names = list(dict.fromkeys(together))
    if not names:
        return []
    text = f"{' and '.join(names)} change together, so their effects cannot be told apart"
    return [Confound("factors", text, True)]


def _shared_rate(runs: pd.DataFrame, factors: set[str]) -> list[Confound]:
    rates = runs["lr"].dropna().unique()
    if "train.lr" in factors or len(rates) != 1:
        return []
    text = (
        f"one learning rate, {rates[0]:.3g}, serves all arms and was not tuned for each of them "
        "here: an arm that would like another is at a disadvantage"
    )
    return [Confound("learning rate", text, True)]


def _show(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)) or value == "":
        return "none"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def _list(values: pd.Series) -> str:
    return ", ".join(f"{v} ({n} runs)" for v, n in values.value_counts().items())


def _names(index: pd.Index) -> str:
    names = [str(name) for name in index]
    return (
        ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
    )
