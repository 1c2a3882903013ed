"""Figures in one style, made to be read in a paper: PNG and SVG of each.

Colours are Okabe and Ito's, safe for colour-blind readers; ordered arms take a sequential map and
differ in lightness, so a grey print still tells them apart. Nothing here touches pyplot's state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from ablate.report.verdicts import LOSS, LOSS_A, PRIMARY, Analysis, Comparison, Metric
from ablate.study.show import si
from ablate.study.tune import RateFit

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "errorbar.capsize": 2.5,
    "savefig.dpi": 200,
    "svg.hashsalt": "ablate",  # the same figures give the same file
    "svg.fonttype": "path",
}
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
CYCLE = (BLUE, VERMILLION, GREEN, "#CC79A7", ORANGE, "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLUMN = 4.4  # inches: between one and two columns of a paper; on a phone the letters still read


@dataclass(frozen=True)
class Plot:
    """A figure on disk, with what it shows in words."""

    name: str
    svg: Path
    png: Path
    alt: str
    caption: str


def plot_outcomes(analysis: Analysis, folder: Path) -> Plot | None:
    """Loss and recall over the arms: means with 95% intervals, single seeds as faint dots."""
    metrics = sorted(analysis.shown(PRIMARY), key=lambda m: m not in (LOSS, LOSS_A))
    if not metrics:
        return None
    lay = _Layout(analysis)
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(COLUMN, 2.05 * len(metrics) + 0.35 + lay.extra + lay.legend),
            layout="constrained",
        )
        axes = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
        for ax, metric in zip(axes, metrics, strict=True):
            _outcome(ax, analysis, analysis.comparisons[metric.column], lay)
        lay.finish(axes[-1])
        if lay.legend:
            legend_below(figure, axes[0], columns=4)
        elif lay.names != [""]:
            axes[0].legend(loc="best")
        alt = _outcome_alt(analysis, metrics)
        first = analysis.comparisons[metrics[0].column]
        caption = (
            "Means over seeds with 95% intervals for new seeds; faint dots are single runs. "
            "Seeds are paired, so arms can be told apart although these intervals overlap: "
            "the table of differences decides."
            if first.has_interval
            else f"{first.too_few}: single runs, without intervals."
        )
        if first.told_curves:
            dashed, dotted = first.told_curves
            caption += f" Dashed: {dashed.formula}; dotted: {dotted.formula}."
            if first.flat() is not None:
                caption += " Shaded: shares that the curves cannot tell from the best."
        return save(figure, folder, "outcomes", alt, caption)


class _Layout:
    """Where each arm stands on the horizontal axis, and how the axis is labelled."""

    def __init__(self, analysis: Analysis) -> None:
        self.axis, arms = analysis.axis, analysis.arms
        self.names = list(dict.fromkeys(arms["series"]))
        numeric = self.axis.numeric
        places = (
            arms["x"] if numeric else pd.Series(range(len(arms)), index=arms.index, dtype=float)
        )
        self.x: dict[str, float] = {str(a): float(v) for a, v in places.items()}
        self.series: dict[str, str] = {str(a): str(v) for a, v in arms["series"].items()}
        values = self.values = sorted({v for v in self.x.values() if math.isfinite(v)})
        gap = float(np.diff(values).min()) if len(values) > 1 else 1.0
        self.log = numeric and self.axis.log and values[0] > 0
        self.gap = 0.0 if self.log else gap
        self.labels = [analysis.short(str(a)) for a in arms.index]
        longest = max((len(label) for label in self.labels), default=0)
        self.tilted = not numeric and longest * len(self.labels) > 48
        self.extra = 0.05 * min(longest, 30) if self.tilted else 0.0
        # inches below the axes: a longer legend would lie on the data
        self.legend = 0.25 * math.ceil(len(self.names) / 4) if len(self.names) > 3 else 0.0

    def at(self, arm: str) -> float:
        """Series stand side by side, a little apart, so that error bars do not hide each other."""
        k, n = self.names.index(self.series[arm]), len(self.names)
        return self.x[arm] + (k - (n - 1) / 2) * 0.08 * self.gap

    def finish(self, ax: Axes) -> None:
        ax.set_xlabel(self.axis.label if self.axis.label != "arm" else "")
        if not self.axis.numeric:
            ax.set_xticks(range(len(self.labels)))
            turn: dict[str, Any] = (
                {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if self.tilted else {}
            )
            ax.set_xticklabels([cut(label, 30) for label in self.labels], **turn)
            ax.set_xlim(-0.5, len(self.labels) - 0.5)
        elif self.axis.share:
            ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        elif self.log:
            ax.set_xscale("log", base=10 if self.axis.field == "train.lr" else 2)
            near = 0.09 * math.log(self.values[-1] / self.values[0])  # labels would overlap
            labels, last = [], 0.0
            for t in self.values:
                told = not last or math.log(t / last) >= near
                labels.append("" if not told else f"{t:.4g}" if t < 1e4 else si(t))
                last = t if told else last
            ax.set_xticks(self.values, labels)
            ax.xaxis.set_minor_locator(NullLocator())


def _outcome(ax: Axes, analysis: Analysis, comparison: Comparison, lay: _Layout) -> None:
    metric, fit = comparison.metric, comparison.fit
    runs = analysis.runs
    for k, name in enumerate(lay.names):
        arms = [a for a in fit.arms if lay.series[a] == name]
        if not arms:
            continue
        colour, marker = CYCLE[k % len(CYCLE)], MARKERS[k % len(MARKERS)]
        for arm in [a for a in arms if math.isnan(lay.x[a])]:  # the axis is of layers it lacks
            mean = fit.mean(arm)
            ax.axhline(mean.value, color=colour, linestyle="-.", linewidth=1.1, label=name)
            if comparison.has_interval:
                ax.axhspan(mean.low, mean.high, color=colour, alpha=0.12, linewidth=0, zorder=0)
        arms = [a for a in arms if math.isfinite(lay.x[a])]
        if not arms:
            continue
        for arm in arms:
            single = runs.loc[runs["arm"] == arm, metric.column].dropna()
            ax.update_datalim([(lay.at(arm), float(v)) for v in single])
            beside = ax.transData + ScaledTranslation(5 / 72, 0, ax.figure.dpi_scale_trans)
            ax.scatter(
                [lay.at(arm)] * len(single),
                single,
                s=11,
                color=colour,
                alpha=0.4,
                linewidths=0,
                zorder=2,
                transform=beside,
            )
        x = [lay.at(arm) for arm in arms]
        means = [fit.mean(arm) for arm in arms]
        y = [m.value for m in means]
        if analysis.axis.numeric and not comparison.told_curves:
            ax.plot(x, y, color=colour, alpha=0.55, linewidth=1.1, zorder=1)
        bars = None
        if comparison.has_interval:
            low = [m.value - max(m.low, 0.0 if metric.percent else -math.inf) for m in means]
            high = [min(m.high, 1.0 if metric.percent else math.inf) - m.value for m in means]
            bars = np.maximum(np.array([low, high]), 0.0)
        ax.errorbar(
            x,
            y,
            yerr=bars,
            fmt=marker,
            markersize=4.5,
            color=colour,
            elinewidth=1.1,
            zorder=3,
            label=name or None,
        )
    for curve, dash in zip(comparison.told_curves, ("--", ":"), strict=False):
        places = [lay.x[arm] for arm in comparison.drawn]
        s = np.linspace(min(places), max(places), 300)
        ax.plot(s, curve(s), dash, color="#555555", linewidth=1.0, zorder=1)
    flat = comparison.flat()
    if flat is not None and comparison.told_curves:
        ax.axvspan(*flat, color=BLUE, alpha=0.08, linewidth=0, zorder=0)
    ax.set_ylabel("validation loss (nats a token)" if metric is LOSS else metric.name)
    if metric.percent:
        ax.set_ylabel("MQAR accuracy")
        accuracy_axis(ax)


def _outcome_alt(analysis: Analysis, metrics: list[Metric]) -> str:
    parts = []
    for metric in metrics:
        comparison = analysis.comparisons[metric.column]
        told = [
            f"{analysis.short(a)}: {metric.show_mean(comparison.fit.mean(a))}"
            for a in comparison.fit.arms
        ]
        parts.append(f"{metric.name} by {analysis.axis.label}: {', '.join(told)}.")
    return " ".join(parts)


def plot_curves(analysis: Analysis, metrics: pd.DataFrame, folder: Path) -> Plot | None:
    """Learning curves: validation A and recall where logged, else the training loss; the mean over
    seeds of each arm, single runs faint."""
    lines = metrics[metrics["key"].isin(set(analysis.runs["key"]))]
    if lines.empty or "tokens" not in lines:
        return None
    panels = [
        (column, label)
        for column, label in (
            ("val_a_loss", "validation A loss (nats)"),
            ("loss", "training loss (nats)"),
            ("mqar_accuracy", "MQAR accuracy"),
        )
        if column in lines and lines[column].notna().any()
    ]
    if panels and panels[0][0] == "val_a_loss":
        panels = [p for p in panels if p[0] != "loss"]
        lines, reference = _less_reference(analysis, lines)
        if reference is not None:
            panels.insert(1, ("less", f"less that of {cut(analysis.short(reference), 18)}"))
    if not panels:
        return None
    arms = [str(a) for a in analysis.arms.index]
    look = looks(analysis)
    with mpl.rc_context(STYLE):
        widest = max(len(analysis.short(a)) for a in arms)
        columns = max(1, min(4, len(arms), 72 // (widest + 8)))
        rows = math.ceil(len(arms) / columns)
        figure = Figure(
            figsize=(COLUMN, 2.05 * len(panels) + 0.35 + 0.19 * rows), layout="constrained"
        )
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (column, label) in zip(axes, panels, strict=True):
            for arm in arms:
                own = lines[(lines["arm"] == arm) & lines[column].notna()]
                if own.empty:
                    continue
                _learning(ax, own, column, look[arm], analysis.short(arm))
            ax.set_ylabel(label)
            if column == "less":
                _trim_first(ax, lines)
            if column == "mqar_accuracy":
                accuracy_axis(ax)
            elif column == "loss":
                _trim(ax, lines[column].dropna())
        axes[-1].set_xlabel("training tokens")
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda v, _: si(v)))
        if len(arms) > 1:
            title = analysis.axis.label if analysis.axis.label != "arm" else None
            legend_below(figure, axes[0], columns, title)
        names = " and ".join(label for _, label in panels)
        alt = f"Learning curves of {len(arms)} arms: {names} over training tokens."
        caption = "Mean over seeds of each arm; faint lines are single runs."
        if any(column == "less" for column, _ in panels):
            caption += " Differences are taken within seeds, at the same tokens."
        return save(figure, folder, "learning_curves", alt, caption)


def _less_reference(analysis: Analysis, lines: pd.DataFrame) -> tuple[pd.DataFrame, str | None]:
    """Lines with `less`: validation A less that of the reference arm at the same seed and tokens.

    Without a second arm, or seeds and tokens in common, there is no reference.
    """
    comparison = analysis.comparisons.get(LOSS.column) or analysis.comparisons.get(LOSS_A.column)
    if comparison is None or len(comparison.fit.arms) < 2:
        return lines, None
    scored = lines[lines["val_a_loss"].notna()].drop_duplicates(["key", "tokens"], keep="last")
    own = scored[scored["arm"] == comparison.reference]
    base = own[["seed", "tokens", "val_a_loss"]].rename(columns={"val_a_loss": "base"})
    joined = scored.merge(base, on=["seed", "tokens"], how="inner")
    if len(joined) <= len(base):
        return lines, None
    joined = joined.assign(less=joined["val_a_loss"] - joined["base"])
    return pd.concat([lines.assign(less=math.nan), joined.assign(val_a_loss=math.nan, loss=math.nan,
                      mqar_accuracy=math.nan)]), comparison.reference  # fmt: skip


def _trim_first(ax: Axes, lines: pd.DataFrame) -> None:
    """The first validation differs most and matters least: the axis is that of the others."""
    own = lines[lines["less"].notna()]
    values = own.loc[own["tokens"] > own["tokens"].min(), "less"]
    if len(values) and values.max() > values.min():
        pad = 0.1 * (values.max() - values.min())
        ax.set_ylim(values.min() - pad, values.max() + pad)


def _learning(ax: Axes, own: pd.DataFrame, column: str, look: Look, label: str) -> None:
    sparse = own.groupby("key").size().max() <= 30
    for _, run in own.groupby("key"):
        y = run[column] if sparse else run[column].ewm(span=len(run) / 40).mean()
        ax.plot(run["tokens"], y, look.dash, color=look.colour, alpha=0.25, linewidth=0.7)
    mean = own.groupby("tokens")[column].mean()
    if not sparse:
        mean = mean.ewm(span=len(mean) / 40).mean()
    style = {**look.style, "marker": "o" if sparse else None}
    ax.plot(mean.index, mean, label=label, markersize=2.5, **style)


def plot_rates(analysis: Analysis, folder: Path) -> Plot | None:
    """The first stage of a study that tunes: validation A over the learning rate, a panel an arm,
    with the fit, the interval of the optimum, the rate chosen, and half an octave to both sides."""
    frame = analysis.frame
    runs = frame[(frame["stage"] == "tune") & ~frame["orphan"] & (frame["state"] == "done")]
    runs = runs[np.isfinite(runs["val_a_loss"].astype(float)) & runs["lr"].notna()]
    if runs.empty:
        return None
    order = [*map(str, analysis.arms.index), *dict.fromkeys(runs["arm"])]
    arms = [arm for arm in dict.fromkeys(order) if (runs["arm"] == arm).any()]
    fits = {fit.arm: fit for fit in analysis.rate_fits()}
    columns = 1 if len(arms) == 1 else 2 if len(arms) <= 8 else 3
    rows = math.ceil(len(arms) / columns)
    rates = sorted(set(runs["lr"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 1.45 * rows + 0.45), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for ax, arm in zip(axes.flat, arms, strict=False):
            _rates(ax, runs[runs["arm"] == arm], fits.get(arm))
            size, length = ((9, 60), (8, 28), (7, 20))[columns - 1]
            ax.set_title(cut(_known(analysis, arm), length), fontsize=size)
        for ax in axes.flat[len(arms) :]:
            ax.set_visible(False)
        last = axes[-1, 0]
        last.set_xscale("log", base=2)
        shown = [rates[0], rates[len(rates) // 2], rates[-1]]
        last.set_xticks(shown, [_rate(r) for r in shown])
        last.xaxis.set_minor_locator(NullLocator())
        low = float(runs["val_a_loss"].min())
        near = [f.loss(end) for f in fits.values() if f.coefficients for end in f.window]
        top = max([*near, float(runs["val_a_loss"].quantile(0.75))])
        last.set_ylim(low - 0.08 * (top - low), top + 0.12 * (top - low))
        figure.supxlabel("peak learning rate", fontsize=9)
        figure.supylabel("validation A loss (nats a token)", fontsize=9)
        told = [f"{_known(analysis, a)}: {fits[a].chosen:.3g}" for a in arms if a in fits]
        alt = f"Validation A loss over the learning rate for {len(arms)} arms. Rates chosen: "
        alt += f"{', '.join(told) or 'none yet'}."
        caption = (
            "Dots are runs of the first stage. Line: the fit in the logarithm of the rate. Shaded: "
            "the 95% interval of its optimum. Diamond: the rate that the second stage uses, with "
            "what half an octave below and above would cost."
        )
        return save(figure, folder, "learning_rates", alt, caption)


def _rates(ax: Axes, runs: pd.DataFrame, fit: RateFit | None) -> None:
    ax.scatter(runs["lr"], runs["val_a_loss"], s=12, color=BLUE, linewidths=0, alpha=0.8, zorder=3)
    if fit is None or not fit.coefficients:
        return
    x = np.geomspace(*fit.window, 200)
    ax.plot(x, [fit.loss(r) for r in x], color="#555555", linewidth=1.1, zorder=2)
    if math.isfinite(fit.low):
        ax.axvspan(fit.low, fit.high, color=BLUE, alpha=0.1, linewidth=0, zorder=0)
    if math.isfinite(fit.chosen):
        at = fit.loss(fit.chosen)
        sides = [fit.chosen * 2**-0.5, fit.chosen * 2**0.5]
        ax.plot(
            sides,
            [at + fit.minus, at + fit.plus],
            linestyle="none",
            marker="|",
            markersize=7,
            color=VERMILLION,
            zorder=4,
        )
        ax.plot([fit.chosen], [at], marker="D", markersize=4.5, color=VERMILLION, zorder=5)


def _rate(rate: float) -> str:
    """0.00075 as '7.5e-4': a panel is narrow."""
    digits, _, power = f"{rate:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def _known(analysis: Analysis, arm: str) -> str:
    """An arm's short name, also before it has a run that counts."""
    return analysis.short(arm) if arm in analysis.arms.index else arm


def _trim(ax: Axes, values: pd.Series) -> None:
    """The first steps are far above the rest: let the axis begin where arms can differ."""
    top = float(values.quantile(0.9))
    low = float(values.min())
    if float(values.max()) - low > 4 * (float(values.median()) - low) > 0:
        ax.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low))


@dataclass(frozen=True)
class Look:
    """How an arm's line is drawn."""

    colour: str
    dash: str
    marker: str

    @property
    def style(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": self.dash, "marker": self.marker}


def looks(analysis: Analysis) -> dict[str, Look]:
    """By arm. Of several series over a number, what has more values takes the colour and the other
    the dash: two state sizes of five architectures are dashed and solid lines in five colours."""
    arms = [str(a) for a in analysis.arms.index]
    series = [str(s) for s in analysis.arms["series"]]
    names = list(dict.fromkeys(series))
    if not analysis.axis.numeric or names == [""]:
        shades = _shades(len(arms), few=not analysis.axis.numeric)
        return {a: Look(shades[i], "-", MARKERS[i % len(MARKERS)]) for i, a in enumerate(arms)}
    places = sorted(set(analysis.arms["x"].dropna()), reverse=True)  # the largest is drawn whole
    found = {}
    for arm, own, x in zip(arms, series, analysis.arms["x"], strict=True):
        k, place = names.index(own), places.index(x) if math.isfinite(x) else 0
        if len(names) > len(places):
            colour, dash = _shades(len(names), few=True)[k], _DASHES[place % len(_DASHES)]
        else:
            colour, dash = _shades(len(places))[-1 - place], _DASHES[k % len(_DASHES)]
        found[arm] = Look(colour, dash, MARKERS[k % len(MARKERS)])
    return found


_DASHES = ("-", "--", ":", "-.")


def _shades(n: int, *, few: bool = False) -> list[str]:
    """Colours that are told apart by their hue where there are few, else by their lightness."""
    if few and n <= len(CYCLE):
        return list(CYCLE[:n])
    return [mpl.colors.to_hex(c) for c in mpl.colormaps["viridis"](np.linspace(0.0, 0.88, n))]


def accuracy_axis(ax: Axes) -> None:
    """From 0 to 100%, with room for the markers at both ends."""
    ax.set_ylim(-0.04, 1.04)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def legend_below(figure: Figure, ax: Axes, columns: int, title: str | None = None) -> None:
    """The legend of one panel for all of them, under the figure."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=columns)


def cut(text: str, length: int) -> str:
    """A text that is longer than this ends in an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def save(figure: Figure, folder: Path, name: str, alt: str, caption: str) -> Plot:
    FigureCanvasAgg(figure)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    figure.savefig(png, metadata={"Software": None})
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return Plot(name, svg, png, alt, caption)
