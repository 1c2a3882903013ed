"""The report's tables as frames, and as CSV, Parquet and Markdown files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ablate.arch.certificate import Certificate
from ablate.report.frames import load_certificates, load_evaluation, records
from ablate.report.stats import Estimate, adjust, bootstrap_ratio, fit_arms
from ablate.report.verdicts import LOSS, LOSS_A, RECALL, Analysis, Metric
from ablate.run import atomic_write

COMPARED = (RECALL, LOSS, LOSS_A)  # metrics with a table of differences
_ITEMS = {RECALL.column: "mqar", LOSS.column: "val_b", LOSS_A.column: "val_a"}
_NO_PARQUET = "pyarrow is not installed: the tables are written as CSV and Markdown, not as Parquet"


def arm_table(analysis: Analysis) -> pd.DataFrame:
    """One row an arm: where it stands, its architecture and cost, and each metric's mean with the
    95% interval (`<metric>`, `<metric>_low`, `<metric>_high`, `<metric>_n`); `keys`: its runs."""
    table = analysis.arms.drop(columns=["series"]).rename(columns={"n": "runs"})
    for column, comparison in analysis.comparisons.items():
        fit = comparison.fit
        means = {arm: fit.mean(arm) for arm in fit.arms}
        table[column] = pd.Series({a: m.value for a, m in means.items()})
        table[f"{column}_low"] = pd.Series({a: m.low for a, m in means.items()})
        table[f"{column}_high"] = pd.Series({a: m.high for a, m in means.items()})
        table[f"{column}_n"] = pd.Series(dict(zip(fit.arms, fit.counts, strict=True)))
    table["keys"] = analysis.runs.groupby("arm")["key"].agg(" ".join)
    return table.reset_index()


def difference_table(analysis: Analysis, path: Path) -> pd.DataFrame:
    """Each arm minus the reference for recall and loss (`ArmFit.against`), with `among_best`;
    `items_low`, `items_high`: the interval over documents (loss) or rows (recall) alone, which
    takes these runs as given and asks about other texts; `holm_all_p` and `fdr_q`: the p-values
    adjusted over all claims of the table, every arm and metric; of the loss, where the study has a
    margin, `equivalence_p`: two one-sided tests, by Holm over arms."""
    parts: list[pd.DataFrame] = []
    for metric in COMPARED:
        comparison = analysis.comparisons.get(metric.column)
        if comparison is None or comparison.table.empty or (metric is LOSS_A and parts):
            continue
        part = comparison.table.copy()
        part.insert(0, "metric", metric.column)
        part["among_best"] = part["arm"].isin(comparison.best)
        items = _over_items(analysis, metric, path, comparison.reference)
        part["items_low"] = [items[a].low if a in items else math.nan for a in part["arm"]]
        part["items_high"] = [items[a].high if a in items else math.nan for a in part["arm"]]
        part["equivalence_p"] = math.nan
        if analysis.margin is not None and metric is not RECALL:
            tests = [comparison.equivalence(a, analysis.margin).p for a in part["arm"]]
            part["equivalence_p"] = adjust(tests)
        parts.append(part)
    columns = ["metric", "arm", "reference", "difference"]
    if not parts:
        return pd.DataFrame(columns=columns)
    table = pd.concat(parts, ignore_index=True)
    table["holm_all_p"] = adjust(table["p"])
    table["fdr_q"] = adjust(table["p"], "bh")
    return table


def _over_items(
    analysis: Analysis, metric: Metric, path: Path, reference: str
) -> dict[str, Estimate]:
    """Differences from the reference with a bootstrap interval over documents or recall rows.

    Empty where runs kept no items, or did not score the same ones.
    """
    scores = load_evaluation(path, _ITEMS[metric.column])
    totals: dict[str, list[np.ndarray]] = {}
    weight: np.ndarray | None = None
    for row in records(analysis.runs):
        items = _items(scores.get(row["key"], {}), metric)
        if items is None or (weight is not None and not np.array_equal(items[1], weight)):
            return {}
        totals.setdefault(str(row["arm"]), []).append(items[0])
        weight = items[1]
    if weight is None or reference not in totals:
        return {}
    mean = {arm: np.mean(values, axis=0) for arm, values in totals.items()}
    return {
        arm: bootstrap_ratio(total - mean[reference], weight, draws=1000)
        for arm, total in mean.items()
        if arm != reference
    }


def _items(score: dict[str, Any], metric: Metric) -> tuple[np.ndarray, np.ndarray] | None:
    """Per item the total and the weight whose ratio is the metric: (nats, tokens) of documents, or
    (correct, queries) of recall rows."""
    try:
        if metric is RECALL:
            groups = list(score["by_pairs"].values())
            parts = [(g["correct"], [g["queries_per_row"]] * len(g["correct"])) for g in groups]
        else:
            parts = [(score["nats"], score["tokens"])]
        totals, weights = np.concatenate([np.asarray(part, dtype=float) for part in parts], axis=1)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # none kept, or damaged
        return None
    return (totals, weights) if len(totals) else None


def equal_budgets(analysis: Analysis, metrics: pd.DataFrame) -> pd.DataFrame:
    """Validation A loss of each arm where all runs have used the same tokens, FLOPs or seconds.

    Seconds are of training without the first steps, which compile, or wait for who does.
    Long: budget ('tokens', 'flops', 'seconds'), at (the most that every run used), arm, loss, low,
    high. Interpolated between validations in the logarithm of the budget. Empty where fewer than
    two validations were logged, or for a budget that some run lacks.
    """
    rows = []
    lines = metrics[metrics["key"].isin(set(analysis.runs["key"]))]
    if "val_a_loss" not in lines or len(analysis.arms) < 2:
        return pd.DataFrame(columns=["budget", "at", "arm", "loss", "low", "high"])
    first = analysis.runs.set_index("key")["seconds_first_step"].fillna(0.0)
    curves = {key: with_seconds(run) for key, run in lines.groupby("key")}
    for key, track in curves.items():
        track["seconds"] -= first[key]
    runs = analysis.runs[analysis.runs["key"].isin(set(curves))]
    for budget in ("tokens", "flops", "seconds"):
        tracks = {
            k: curves[k][curves[k][budget].between(0, np.inf, "neither")] for k in runs["key"]
        }
        sound = [len(t) > 1 and t[budget].is_monotonic_increasing for t in tracks.values()]
        if not sound or not all(sound):
            continue
        at = min(float(t[budget].iloc[-1]) for t in tracks.values())
        losses = [
            float(np.interp(np.log(at), np.log(tracks[k][budget]), tracks[k]["val_a_loss"]))
            for k in runs["key"]
        ]
        fit = fit_arms(runs["arm"].tolist(), runs["seed"].tolist(), losses)
        for arm in analysis.arms.index:
            mean = fit.mean(str(arm))
            rows.append((budget, at, str(arm), mean.value, mean.low, mean.high))
    return pd.DataFrame(rows, columns=["budget", "at", "arm", "loss", "low", "high"])


def rate_table(analysis: Analysis) -> pd.DataFrame:
    """One row an arm of a study that tunes: the learning rate that was chosen, the optimum with its
    95% interval (`open`: it goes beyond what was tried), what half an octave below and above costs
    in nats with half of its interval, and the problem where there is no optimum."""
    columns = ["arm", "chosen", "optimum", "low", "high", "open"]
    columns += ["minus", "minus_half", "plus", "plus_half", "problem"]
    rows = [{name: getattr(fit, name) for name in columns} for fit in analysis.rate_fits()]
    return pd.DataFrame(rows, columns=columns)


def certificate_table(analysis: Analysis, path: Path) -> pd.DataFrame:
    """One row a matched arm: quantity, target and whose figure it is, relative errors as configured
    and as matched, the widths that changed, and each quantity before and after."""
    certificates = load_certificates(path)
    rows = []
    for arm in analysis.arms.index:
        keys = analysis.runs.loc[analysis.runs["arm"] == arm, "key"]
        plain = next((certificates[k] for k in keys if k in certificates), None)
        if plain is None:
            continue
        c = Certificate(**plain)
        row = {
            "arm": arm,
            "quantity": c.quantity,
            "target": c.target,
            "reference": c.reference,
            "error_configured": c.error_before,
            "error_matched": c.error,
            "tolerance": c.tolerance,
            "forced": c.forced,
            "changes": c.widths(),
        }
        for name in c.before:
            row |= {f"{name}_configured": c.before[name], f"{name}_matched": c.after[name]}
        rows.append(row)
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else ["arm"])


def with_seconds(run: pd.DataFrame) -> pd.DataFrame:
    """A run's validation lines in order, the seconds taken from the training lines around them."""
    run = run.sort_values("step", kind="stable")
    validations = run[run["val_a_loss"].notna()].drop_duplicates("step", keep="last").copy()
    timed = run[run["seconds"].notna()] if "seconds" in run else run.iloc[:0]
    validations["seconds"] = (
        np.interp(validations["step"], timed["step"], timed["seconds"]) if len(timed) else math.nan
    )
    return validations


# --- files ---------------------------------------------------------------------------------------


def write_tables(
    tables: dict[str, pd.DataFrame], folder: Path, say: Callable[[str], object]
) -> None:
    """`<name>.csv`, `.md` and `.parquet` of each; without pyarrow `say` gets one line instead."""
    parquet = True
    for name, table in tables.items():
        atomic_write(folder / f"{name}.csv", table.to_csv(index=False, float_format=_digits))
        atomic_write(folder / f"{name}.md", _markdown(table))
        if parquet:
            try:
                _plain(table).to_parquet(folder / f"{name}.parquet", index=False)
            except ImportError:
                parquet = False
                say(_NO_PARQUET)


def _digits(value: Any) -> str:
    """As many as another machine's arithmetic gives too; of p-values near zero few are known."""
    return f"{value:.4g}" if abs(value) < 1e-6 else f"{value:.10g}"


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Columns of one type each, as Parquet wants them: numbers mixed with words become text."""
    table = table.copy()
    table.attrs = {}
    for column in table.columns:
        if table[column].dtype == object and len({type(v) for v in table[column].dropna()}) > 1:
            table[column] = table[column].map(lambda v: v if v is None else str(v))
    return table


def _markdown(table: pd.DataFrame) -> str:
    def show(value: Any) -> str:
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.6g}"
        return str(value).replace("|", "\\|")

    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|---" * len(table.columns) + "|"]
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join(show(v) for v in row) + " |")
    return "\n".join(lines) + "\n"
