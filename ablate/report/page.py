"""The report: one self-contained HTML page, its tables and figures as files.

    <study>/report/
        index.html                         the page; nothing is loaded from outside
        outcomes.png .svg                  loss and recall over the arms
        learning_curves.png .svg
        learning_rates.png .svg            of a study that tunes: loss over the rate, an arm a panel
        table.csv .md .parquet             one row an arm: means and 95% intervals
        differences.csv .md .parquet       every arm minus the reference
        equal_budgets.csv .md .parquet     loss at equal tokens, FLOPs and seconds
        learning_rates.csv .md .parquet    rates tuned, with intervals and sensitivity
        certificates.csv .md .parquet      how each arm was matched
        runs.csv .md .parquet              one row a run, as `load_study` gives it
        recall.png .svg  needle.png .svg  positions.png .svg     where runs were evaluated, with
        evaluation.csv .md .parquet                              one row a task, cell and arm

What is uncertain, missing, failed or confounded stands on the page; nothing is dropped in silence.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from ablate.arch.certificate import QUANTITIES
from ablate.report.confounds import Confound, confounds
from ablate.report.evaluation import Evaluations
from ablate.report.export import command_of
from ablate.report.frames import load_details, load_metrics, load_study, missing_cells, records
from ablate.report.plots import Plot, plot_curves, plot_outcomes, plot_rates
from ablate.report.stats import Estimate
from ablate.report.tables import (
    COMPARED,
    arm_table,
    certificate_table,
    difference_table,
    equal_budgets,
    rate_table,
    write_tables,
)
from ablate.report.verdicts import (
    BITS,
    LOSS,
    LOSS_A,
    PERPLEXITY,
    RECALL,
    Analysis,
    Comparison,
    Metric,
    Verdict,
    analyse,
    judge,
    signed,
)
from ablate.run import atomic_write
from ablate.study.show import si

__all__ = ["summary", "write_report"]

_SHOWN = (RECALL, LOSS, BITS, PERPLEXITY)


def write_report(
    path: str | Path,
    *,
    reference: str | None = None,
    say: Callable[[str], object] = print,
    shown: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Write `<path>/report/` from the run folders at `path`; returns the page's path.

    Works on an unfinished study and says what is missing. `reference`: the arm that the others are
    compared with (default: the lowest on a numeric axis, else the first). `say` gets one line where
    Parquet files cannot be written; `shown`: how the page calls the folder, if not `path`;
    `console`: where the arms and the sentences are printed too. Raises UserError where no run
    folder is.
    """
    path = Path(path)
    frame = load_study(path)
    analysis = analyse(frame, reference=reference)
    folder = path / "report"
    folder.mkdir(parents=True, exist_ok=True)

    metrics = load_metrics(path)
    tables = {
        "table": arm_table(analysis),
        "differences": difference_table(analysis, path),
        "equal_budgets": equal_budgets(analysis, metrics),
        "runs": frame,
    }
    evaluations = Evaluations.read(analysis, path)
    optional = {
        "learning_rates": rate_table(analysis),
        "certificates": certificate_table(analysis, path),
        "evaluation": evaluations.table(),
    }
    tables |= {name: table for name, table in optional.items() if len(table)}
    write_tables(tables, folder, say)
    plots = [
        plot_outcomes(analysis, folder),
        plot_curves(analysis, metrics, folder),
        plot_rates(analysis, folder),
        *evaluations.plots(folder),
    ]
    details = load_details(path)
    found = confounds(frame, details)
    lines = judge(analysis, evaluations.verdicts())
    text = _page(analysis, lines, [p for p in plots if p], found, details, tables, shown or path)
    page = folder / "index.html"
    atomic_write(page, text)
    if console is not None:
        console.print(summary(analysis))
        for line in lines:
            console.print(f"• {line.text}", highlight=False)
    return page


def summary(analysis: Analysis) -> Table:
    """The arms as a table for a terminal: runs, recall, loss, bits a byte, parameters."""
    metrics = [analysis.comparisons[m.column] for m in analysis.shown(_SHOWN)]
    title = analysis.study.get("question") or analysis.study.get("name") or None
    note = _interval_note(metrics)
    table = Table(title=title, title_justify="left", caption=note, box=box.SIMPLE_HEAD)
    table.caption_justify = "left"
    plain = analysis.axis.numeric and (analysis.arms["series"] == "").all()
    name = str(analysis.axis.field).rpartition(".")[2].replace("_", " ") if plain else "arm"
    table.add_column(name, overflow="fold", justify="right" if plain else "left")
    table.add_column("runs", justify="right")
    for comparison in metrics:
        table.add_column(_heading(comparison), justify="right")
    table.add_column("params", justify="right")
    for arm, row in analysis.arms.iterrows():
        cells = [_mean(c, str(arm)) for c in metrics]
        table.add_row(
            analysis.short(str(arm)), str(int(row["n"])), *cells, si(row["non_embedding_params"])
        )
    return table


# --- the page ------------------------------------------------------------------------------------


def _page(
    analysis: Analysis,
    lines: Sequence[Verdict],
    plots: Sequence[Plot],
    found: Sequence[Confound],
    details: pd.DataFrame,
    tables: dict[str, pd.DataFrame],
    path: Path,
) -> str:
    study = analysis.study
    name = str(study.get("name") or path.name)
    question = str(study.get("question") or f"Runs of {name}")
    css = Path(__file__).with_name("page.css").read_text()
    by_name = {plot.name: plot for plot in plots}
    sections = [
        _verdict_section(lines),
        _figure(by_name.get("outcomes")),
        _section("Results", _results(analysis) + _differences(analysis, tables["differences"])),
        _section("Learning curves", _figure(by_name.get("learning_curves"))),
        _section(
            "Recall, length and benchmarks",
            "".join(_figure(by_name.get(n)) for n in ("recall", "needle", "positions"))
            + _evaluation(tables.get("evaluation")),
        ),
        _section("At equal budgets", _budgets(analysis, tables["equal_budgets"])),
        _section(
            "Learning rates",
            _figure(by_name.get("learning_rates")) + _rates(tables.get("learning_rates"), analysis),
        ),
        _section("Matching", _matching(tables.get("certificates"), analysis)),
        _section("Confounds", _confounds(found, analysis)),
        _section("Failures and gaps", _failures(analysis)),
        _section("Cost", _cost(analysis)),
        _section("Noise", _noise(analysis)),
        _section("Environment", _environment(details)),
        _section("To reproduce", _reproduce(study, name, path)),
    ]
    kicker = f"Study <b>{_e(name)}</b>"
    if study.get("finding"):
        kicker += f" · tests the finding <b>{_e(str(study['finding']))}</b>"
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{_e(question)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{css}</style></head>\n<body><main>\n"
        f'<header><p class="kicker">{kicker}</p><h1>{_e(question)}</h1></header>\n'
        + "\n".join(s for s in sections if s)
        + "\n</main></body></html>\n"
    )


def _verdict_section(lines: Sequence[Verdict]) -> str:
    if not lines:
        lines = [Verdict("state", "No run has finished yet: there is nothing to say.")]
    items = "".join(f'<li class="{v.kind}">{_e(v.text)}</li>' for v in lines)
    return f'<section aria-label="Verdicts"><ul class="verdicts">{items}</ul></section>'


def _figure(plot: Plot | None) -> str:
    if plot is None:
        return ""
    data = base64.b64encode(plot.svg.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{_e(plot.alt)}">'
        f"<figcaption>{_e(plot.caption)}</figcaption></figure>"
    )


def _results(analysis: Analysis) -> str:
    metrics = [analysis.comparisons[m.column] for m in analysis.shown(_SHOWN)]
    if not metrics:
        return "<p>No finished run has a figure to show.</p>"
    heading = analysis.axis.label.capitalize() if analysis.axis.numeric else "Arm"
    rows = []
    for arm, r in analysis.arms.iterrows():
        row = {heading: _name(analysis, arm), "Runs": str(int(r["n"]))}
        row |= {_heading(c): _best_mark(c, str(arm)) for c in metrics}
        if analysis.arms["attention_of_layers"].max() > 0:
            row["Attention, of layers"] = _share(r["attention_of_layers"])
            row["of mixers"] = _share(r["attention_of_mixers"])
        if analysis.arms["mlp_of_layers"].max() > 0:
            row["MLP, of layers"] = _share(r["mlp_of_layers"])
        rows.append({**row, "Pattern": f"<code>{_e(_breakable(str(r['pattern'])))}</code>"})
    note = _interval_note(metrics)
    if any("<b>" in cell for row in rows for cell in row.values()):
        note += " Bold: not distinguishable from the best."
    return _table(rows) + f"<p class='note'>{_e(note)}</p>"


def _differences(analysis: Analysis, table: pd.DataFrame) -> str:
    parts = []
    for metric in COMPARED:
        comparison = analysis.comparisons.get(metric.column)
        own = table[table["metric"] == metric.column]
        if comparison is None or not comparison.has_interval or own.empty:
            continue
        items = bool(own["items_low"].notna().any())
        rows = [_difference_row(analysis, metric, row, items) for row in records(own)]
        unit = "points" if metric.percent else "nats a token"
        reference = comparison.reference
        if analysis.axis.numeric:
            reference = f"the arm {analysis.describe(reference)}"
        title = f"{metric.name}: difference from {reference}, in {unit}"
        parts.append(_listing(title, rows))
    if not parts:
        return ""
    apart = ""
    if table["items_low"].notna().any():
        apart = (
            " Intervals over other documents only are those of these trained models: the noise of "
            "seeds, which others would have, is not in them."
        )
    return "".join(parts) + (
        "<p class='note'>Differences are taken within seeds (paired) where arms share seeds, with "
        "one noise variance pooled over all arms. The verdict is Dunnett's at 5%, within a metric; "
        f"Holm's p and the false discovery rate count every arm of every table here.{apart}</p>"
    )


def _difference_row(
    analysis: Analysis, metric: Metric, row: dict[str, Any], items: bool
) -> dict[str, str]:
    digits = 1 if metric.percent else metric.digits((row["dunnett_high"] - row["dunnett_low"]) / 2)
    scale = 100.0 if metric.percent else 1.0

    def shown(value: float) -> str:
        if not math.isfinite(value):
            return "–"
        if metric.percent:  # accuracies differ by 100 points at most
            value = min(max(value, -1.0), 1.0)
        return signed(scale * value, digits)

    def between(name: str) -> str:
        return f"{shown(row[f'{name}low'])} to {shown(row[f'{name}high'])}"

    other = f"95%, other {'rows' if metric is RECALL else 'documents'} only"
    return {
        "Arm": _name(analysis, row["arm"]),
        "Difference": shown(row["difference"]),
        "95% interval": between(""),
        "95%, all together (Dunnett)": between("dunnett_"),
        "p (Dunnett)": _p(row["dunnett_p"]),
        "p (Holm, all claims)": _p(row["holm_all_p"]),
        "q (false discovery)": _p(row["fdr_q"]),
        **({other: between("items_")} if items else {}),
        "Verdict": "different" if row["dunnett_p"] < 0.05 else "not\u00a0distinguishable",
    }


def _budgets(analysis: Analysis, table: pd.DataFrame) -> str:
    if table.empty:
        return ""
    at = table.drop_duplicates("budget").set_index("budget")["at"].to_dict()
    shown = {
        "tokens": f"Loss at {si(at.get('tokens'))} tokens",
        "flops": f"Loss at {si(at.get('flops'))} FLOPs",
        "seconds": f"Loss after {_duration(at.get('seconds', math.nan))}",
    }
    rows = []
    for arm, own in table.groupby("arm", sort=False):
        row = {"Arm": _name(analysis, arm)}
        for r in records(own):
            mean = Estimate(r["loss"], low=r["low"], high=r["high"])
            row[shown[r["budget"]]] = _e(LOSS.show_mean(mean))
        rows.append(row)
    return _table(rows) + (
        "<p class='note'>Validation A loss, in nats a token, where the run that had least of a "
        "budget ends; the others are read there between two validations, before their learning "
        "rate has come down, which is to their disadvantage. Seconds: on the hardware below"
        f"{_pace(analysis)}.</p>"
    )


def _pace(analysis: Analysis) -> str:
    """How far speeds of one arm lie apart, where that is more than timing's own noise: one GPU of a
    type is faster than another."""
    speeds = analysis.runs.groupby("arm")["tokens_per_second"]
    spread = (speeds.max() / speeds.min() - 1).max()
    return f", where runs of one arm differ in speed by {spread:.1%}" if spread > 0.02 else ""


def _rates(table: pd.DataFrame | None, analysis: Analysis) -> str:
    if table is None:
        return ""
    names = ("Rate", "95% interval of the optimum", "Half an octave below (nats)",
             "Half an octave above (nats)", "Problem")  # fmt: skip
    rows = []
    for r in records(table):
        cells = ["–", "–", "–", "–", _e(str(r["problem"]))]
        if not r["problem"]:
            interval = "–"
            if math.isfinite(r["low"]):
                interval = f"{r['low']:.3g} to {r['high']:.3g}{' or beyond' if r['open'] else ''}"
            costs = [_cost_of(r[side], r[f"{side}_half"]) for side in ("minus", "plus")]
            cells = [f"{r['chosen']:.3g}", interval, *costs, "–"]
        rows.append({"Arm": _name(analysis, r["arm"]), **dict(zip(names, cells, strict=True))})
    if all(row["Problem"] == "–" for row in rows):
        for row in rows:
            del row["Problem"]
    tuned = analysis.study.get("tuned") or {}
    fit = tuned.get("fit") or {}
    form = "cubic" if fit.get("degree") == 3 else "quadratic"
    note = (
        f"Fitted on validation A with seeds of their own: a {form} in the logarithm of the rate, "
        "through the five rates nearest the lowest of each arm. Results above are from the second "
        "stage, with fresh seeds, on validation B."
    )
    if fit.get("smooth") not in (None, "none"):
        note += f" The rates are those of a {fit['smooth']} model of the optimum over the arms."
    return _table(rows) + f"<p class='note'>{_e(note)}</p>"


def _cost_of(value: float, half: float) -> str:
    if not math.isfinite(half):
        return signed(value)
    digits = LOSS.digits(half)
    return f"{signed(value, digits)} ± {half:.{digits}f}"


def _matching(table: pd.DataFrame | None, analysis: Analysis) -> str:
    if table is None:
        return ""
    first = table.iloc[0]
    quantity = str(first["quantity"])
    rows = []
    for r in records(table):
        error = f"{signed(100 * r['error_matched'], 2)}%"
        if abs(r["error_matched"]) > r["tolerance"]:
            error = f'<b class="bad">{error} (forced)</b>'
        rows.append(
            {
                "Arm": _name(analysis, r["arm"]),
                QUANTITIES[quantity].capitalize(): si(r[f"{quantity}_matched"]),
                "From the target": error,
                "As configured": f"{signed(100 * r['error_configured'], 2)}%",
                **{
                    name: f"{si(r[f'{n}_matched'], u)} ({si(r[f'{n}_configured'], u)})"
                    for name, n, u in (
                        ("Training FLOPs a token", "train_flops", ""),
                        ("Bytes to decode a token", "decode_bytes", "B"),
                        ("State", "state_bytes", "B"),
                    )
                },
                "Widths changed": _e(str(r["changes"])),
            }
        )
    note = (
        f"Arms are matched by construction in {QUANTITIES[quantity]}, to the "
        f"{si(float(first['target']))} of {first['reference']}, within "
        f"{100 * float(first['tolerance']):g}%. In brackets, and under 'as configured': the "
        "unmatched swap. Each arm's certificate is in its runs' result.json."
    )
    return f"<p class='note'>{_e(note)}</p><div class='long'>{_table(rows)}</div>"


def _evaluation(table: pd.DataFrame | None) -> str:
    if table is None:
        return ""
    rows = []
    told = {"floor": "at floor", "unended": "right, but not ended"}
    told |= {"ceiling": "at ceiling", "cut": "texts cut"}
    for r in records(table):
        scale, digits = (1.0, 4) if r["metric"] == "loss" else (100.0, 1)
        figures = ("value", "low", "high", "difference", "difference_low", "difference_high")
        value, low, high, *difference = (_fixed(scale * r[name], digits) for name in figures)
        seeds = [f"{scale * float(v):.{digits}f}" for v in r["by_seed"].split()]
        fuzzy = f"; fuzzy in {r['fuzzy']} of {len(seeds)} seeds" if r["fuzzy"] else ""
        against = "{} ({} to {})".format(*difference) if math.isfinite(r["difference"]) else "–"
        rows.append(
            {
                **{name.capitalize(): _e(r[name]) for name in ("task", "cell", "arm", "metric")},
                "Items": str(r["items"]),
                "Tokens": _fixed(r["tokens"], 0),
                "Value (95%)": f"{value} ({low} to {high})",
                "By seed": ", ".join(seeds) if len(seeds) > 1 else "–",
                "Against the reference (95%)": against,
                "Over seeds' noise": _fixed(r["over_noise"], 1),
                "p": _p(r["p"]),
                "p (McNemar)": _p(r["mcnemar_p"]),
                "": (told.get(r["verdict"], "") + fuzzy).removeprefix("; "),
            }
        )
    return _table(rows) + (
        "<p class='note'>Intervals and p over documents (those that share a text together, seeds "
        "averaged): they speak of other documents, not of other seeds, whose own values stand "
        "beside; over their noise: the difference in standard deviations between seeds. McNemar's "
        "exact test where "
        "there is one seed an arm and no shared text. At floor or ceiling a task cannot tell arms "
        "apart. Fuzzy: wrong numbers agree with the right one in more digits than with permuted "
        "ones and than with others of their text.</p>"
    )


def _confounds(found: Sequence[Confound], analysis: Analysis) -> str:
    if len(analysis.arms) < 2:
        return "<p>Fewer than two arms have finished runs: nothing to compare yet.</p>"
    if not found:
        return (
            "<p>None found: configs, data, budgets, commit and hardware are the same in every arm, "
            "but for the factors.</p>"
        )
    items = "".join(
        f'<li class="{"red" if c.between_arms else "mild"}">{_e(c.text)}.</li>' for c in found
    )
    return (
        "<p>Besides the factors, this is not the same everywhere; a difference between arms may "
        f'come from what is red.</p><ul class="confounds">{items}</ul>'
    )


def _failures(analysis: Analysis) -> str:
    frame = analysis.frame
    own, orphans = frame[~frame["orphan"]], frame[frame["orphan"]]
    bad = own[(own["state"] != "done") | (own["cause"] != "")]
    sizes = {"Rows before": "out_of_memory", "Rows after": "micro_batch"}

    def listing(title: str, runs: pd.DataFrame, shown: Callable[..., dict[str, str]]) -> str:
        rows = [
            {
                "Arm": _e(f"{r['arm']}{' (tuning)' if r['stage'] == 'tune' else ''}"),
                "Seed": str(r["seed"]),
                **shown(r),
                "Run": f"<code>{_e(r['key'])}</code>",
            }
            for r in records(runs)
        ]
        return _listing(title, rows)

    parts = [
        listing(
            "Runs without a usable result",
            bad,
            lambda r: {
                "State": "done, not finite" if r["state"] == "done" else _e(r["state"]),
                "Cause": _e(str(r["cause"] or "–")),
            },
        ),
        listing(
            "Runs that skipped steps (a gradient was not finite)",
            own[own["skipped_steps"] > 0],
            lambda r: {"Steps": str(int(r["skipped_steps"]))},
        ),
        listing(
            "Runs that ran out of memory, and went on with fewer rows a pass",
            own[own["out_of_memory"].notna()],
            lambda r: {name: f"{r[column]:.0f}" for name, column in sizes.items()},
        ),
        listing("Planned, not started", missing_cells(frame), lambda r: {}),
        listing(
            "Orphans: runs that the study no longer asks for, left out above",
            orphans,
            lambda r: {"State": _e(r["state"]), "Loss": LOSS.show(r["val_b_loss"])},
        ),
    ]
    return "".join(parts) or "<p>None: every planned run finished with finite figures.</p>"


def _cost(analysis: Analysis) -> str:
    rows = [
        {
            "Arm": _name(analysis, arm),
            "Parameters beside the embedding": si(r["non_embedding_params"]),
            "All parameters": si(r["params"]),
            "Training FLOPs a token": si(r["train_flops_per_token"]),
            "Training FLOPs": si(r["train_flops"]),
            "State": si(r["state_bytes"], "B"),
            "Tokens": si(r["tokens"]),
            "Seconds, compiling left out": si(r["seconds_train"]),
            "Tokens/s": si(r["tokens_per_second"]),
            "MFU": _share(r["mfu"]),
        }
        for arm, r in analysis.arms.iterrows()
    ]
    if not rows:
        return ""
    total = analysis.frame["seconds"].sum()
    flops = analysis.frame["train_flops"].sum()
    note = (
        f"<p class='note'>Means over seeds. State: bytes that a decoder keeps for one sequence of "
        f"the training length. All finished runs together: {_duration(total)} of training, "
        f"{si(flops)} FLOPs.</p>"
    )
    return _table(rows) + note


def _of_arms(analysis: Analysis, comparison: Comparison) -> str:
    """The smallest and the largest standard deviation that an arm's seeds have."""
    values = analysis.runs.groupby("arm")[comparison.metric.column].std()
    own = values.reindex(list(comparison.fit.arms)).dropna()
    if own.empty:
        return "–"
    low, high = (comparison.metric.show_size(v, own.max()) for v in (own.min(), own.max()))
    return f"{low.partition(' ')[0]} to {high}"


def _noise(analysis: Analysis) -> str:
    rows = []
    for metric in analysis.shown(_SHOWN):
        comparison = analysis.comparisons[metric.column]
        fit = comparison.fit
        if metric not in COMPARED or not comparison.has_interval or len(fit.arms) < 2:
            continue
        correlation = fit.seed_correlation()
        told = "–"
        if math.isfinite(correlation.value):
            told = f"{correlation.value:.2f} ({correlation.low:.2f} to {correlation.high:.2f})"
        one = fit.minimum_detectable()
        all_arms = fit.minimum_detectable(comparisons=len(fit.arms) - 1)
        rows.append(
            {
                "Metric": metric.name,
                "Seed noise (SD)": metric.show_size(fit.total_sigma(), fit.total_sigma()),
                "Of single arms (SD)": _of_arms(analysis, comparison),
                "After pairing (SD)": metric.show_size(fit.sigma, fit.sigma),
                "Seed correlation": told.replace("-", "−"),
                "Detectable, 2 arms": metric.show_size(one, one),
                "Detectable, all arms": metric.show_size(all_arms, all_arms),
            }
        )
    if not rows:
        return ""
    note = (
        "<p class='note'>Seed noise: with one variance for all arms, of which the smallest and the "
        "largest of an arm's own stand beside it. Detectable: the true difference that this design "
        "finds with 80% power at 5%, for one planned comparison and for all arms against the "
        "reference (Bonferroni). Seed correlation: the share of a run's variance that its seed "
        "carries into every arm.</p>"
    )
    return _table(rows) + note


def _environment(details: pd.DataFrame) -> str:
    rows = []
    for column in details.columns:
        if column.startswith("environment.") and "parameter_groups" not in column:
            values = details[column].dropna()
            shown = list(dict.fromkeys(str(v) for v in values))
            if shown:
                told = _e("; ".join(shown[:6]) + (" …" if len(shown) > 6 else ""))
                rows.append({"Recorded": _e(column.removeprefix("environment.")), "Value": told})
    if not rows:
        return "<p>No run recorded its environment.</p>"
    return f"<details><summary>{len(rows)} recorded values</summary>{_table(rows)}</details>"


def _reproduce(study: dict[str, Any], name: str, path: Path) -> str:
    shown = path.name if path.is_absolute() else path.as_posix()
    lines = [command_of({"name": name, **study}), f"python -m ablate report {shown}"]
    return f"<pre>{_e(chr(10).join(lines))}</pre>"


# --- small parts ---------------------------------------------------------------------------------


def _heading(comparison: Comparison) -> str:
    metric = comparison.metric
    if metric is RECALL:
        return "Recall (MQAR)"
    return f"{metric.name} (nats)" if metric in (LOSS, LOSS_A) else metric.name


def _interval_note(metrics: Sequence[Comparison]) -> str:
    if any(c.has_interval for c in metrics):
        note = (
            "± is half of a 95% t interval of the arm's mean over seeds like these, with one "
            "variance pooled over arms."
        )
        if any(c.fit.paired and min(c.fit.counts) < c.fit.n_seeds for c in metrics):
            note += (
                " Arms lack seeds that others have, so means are those of an additive model of arm "
                "and seed, at the average seed."
            )
        return note
    if not metrics:
        return "No finished run yet."
    return f"{metrics[0].too_few}: no interval can be given."


def _mean(comparison: Comparison, arm: str) -> str:
    fit = comparison.fit
    return comparison.metric.show_mean(fit.mean(arm)) if arm in fit.arms else "–"


def _best_mark(comparison: Comparison, arm: str) -> str:
    text = _e(_mean(comparison, arm))
    told = comparison.has_interval and len(comparison.best) < len(comparison.fit.arms)
    return f"<b>{text}</b>" if told and arm in comparison.best else text


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_e(title)}</h2>{body}</section>" if body else ""


_WORDS = ("Arm", "Cell", "Metric", "Cause", "Run", "Pattern", "Verdict", "Problem",
          "Widths changed", "Value", "")  # fmt: skip


def _table(rows: Sequence[dict[str, str]], *words: str) -> str:
    """A table in a box that scrolls sideways on a phone: column -> cell, which is HTML already.

    The first column, `_WORDS` and `words` are set as text, the others as numbers.
    """
    header = list(rows[0])
    text = {header[0], *_WORDS, *words}
    kind = {name: "text" if name in text else "number" for name in header}
    head = "".join(f'<th scope="col" class="{kind[h]}">{_e(h)}</th>' for h in header)
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind[h]}">{row[h]}</td>' for h in header) + "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _listing(title: str, rows: Sequence[dict[str, str]]) -> str:
    return f"<h3>{_e(title)}</h3>{_table(rows, 'State')}" if rows else ""


def _name(analysis: Analysis, arm: Any) -> str:
    """An arm in a table: its place on a numeric axis, else its label."""
    name = str(arm)
    known = analysis.axis.numeric and name in analysis.arms.index
    return _e(analysis.short(name) if known else name)


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−") if math.isfinite(value) else "–"


def _share(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{100 * value:.1f}%"


def _p(p: float) -> str:
    if not math.isfinite(p):
        return "–"
    return f"{p:.3f}" if p >= 0.001 else "&lt; 0.001"


def _breakable(pattern: str) -> str:
    """A long pattern in groups of 24, so that a narrow column can break it."""
    return "\u200b".join(pattern[i : i + 24] for i in range(0, len(pattern), 24))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _e(text: str) -> str:
    return html.escape(text, quote=True)
