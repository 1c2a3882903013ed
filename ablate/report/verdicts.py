"""From runs to sentences: which arms differ, in what, and what cannot be said.

`analyse` fits the statistics of each metric, `verdicts` puts them in plain sentences, the most
important first. Every number in a sentence comes from `stats.py`; where the design allows no
interval, none is given and the sentence says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from ablate.config import is_number
from ablate.report.frames import arm_label, missing_cells, usable, varies
from ablate.report.stats import ArmFit, Curve, Equivalence, Estimate, adjust, fit_arms, fit_curve
from ablate.study.show import si
from ablate.study.tune import RateFit, Tuning


@dataclass(frozen=True)
class Metric:
    column: str
    name: str
    unit: str
    lower_is_better: bool = True
    percent: bool = False

    def show(self, value: float, half_width: float = math.nan) -> str:
        """A value with as many digits as its interval is wide."""
        if not math.isfinite(value):
            return "–"
        if self.percent:
            wide = not half_width < 0.01  # NaN: wide
            return f"{100 * value:.{0 if wide else 1}f}%"
        return f"{value:.{self.digits(half_width)}f}"

    def digits(self, half_width: float) -> int:
        if not math.isfinite(half_width) or half_width <= 0:
            return 3
        return int(np.clip(1 - math.floor(math.log10(half_width)), 1, 5))

    def show_mean(self, mean: Estimate) -> str:
        """'88% ± 5' or '2.301 ± 0.012'; without an interval the value alone."""
        value = self.show(mean.value, mean.half_width)
        if not math.isfinite(mean.half_width):
            return value
        half = mean.half_width * (100 if self.percent else 1)
        decimals = (0 if half >= 1 else 1) if self.percent else self.digits(mean.half_width)
        return f"{value} ± {half:.{decimals}f}"

    def show_size(self, difference: float, half_width: float = math.nan) -> str:
        """The size of a difference: '79 points' or '0.012 nats'."""
        if self.percent:
            points = 100 * abs(difference)
            return f"{points:.{0 if points >= 10 else 1}f} points"
        return f"{abs(difference):.{self.digits(half_width)}f} {self.unit.split(' ')[0]}".strip()

    def show_range(self, low: float, high: float) -> str:
        if self.percent:  # accuracies differ by 100 points at most, whatever the t interval says
            decimals = 0 if high - low >= 0.1 else 1
            return f"{100 * max(low, -1):.{decimals}f} to {100 * min(high, 1):.{decimals}f}"
        digits = self.digits((high - low) / 2)
        return f"{low:.{digits}f} to {high:.{digits}f}"


LOSS = Metric("val_b_loss", "Loss", "nats a token")
BITS = Metric("val_b_bits_per_byte", "Bits per byte", "bits a byte")
PERPLEXITY = Metric("val_b_perplexity", "Perplexity", "")
RECALL = Metric("mqar_accuracy", "Recall", "MQAR accuracy", lower_is_better=False, percent=True)
LOSS_A = Metric("val_a_loss", "Loss (validation A)", "nats a token")
PRIMARY = (RECALL, LOSS)

_SHARES = {  # the share that came out, instead of the one asked for
    "arch.attention_share": ("attention_of_layers", "attention"),
    "arch.mlp_share": ("mlp_of_layers", "MLP"),
}
LETTERS = {  # as in the registry, which needs torch
    "mamba2": "M",
    "mamba1": "m",
    "gated_deltanet": "G",
    "gla": "L",
    "retnet": "R",
    "attention": "*",
    "swa": "S",
    "mlp": "-",
}

_AXES = {
    "data.seq_len": "sequence length (tokens)",
    "train.lr": "peak learning rate",
    "train.tokens": "training tokens",
    "train.batch_size": "batch size (rows)",
    "arch.n_layers": "layers",
    "arch.d_model": "width",
    "arch.mamba2.d_state": "Mamba-2 state size",
    "arch.mamba1.d_state": "Mamba-1 state size",
    "arch.attention.n_kv_heads": "key/value heads",
    "arch.swa.window": "window (tokens)",
}


@dataclass(frozen=True)
class Axis:
    """What the arms are laid out along."""

    field: str | None  # the dotted factor; None: no factor
    label: str
    numeric: bool  # False: one place an arm, in order
    share: bool = False
    kind: str = ""  # of a share: 'attention', 'MLP'

    @property
    def log(self) -> bool:
        return self.field in {"train.lr", "train.tokens", "data.seq_len"} or (
            self.field is not None and self.field.endswith(("d_state", "window", "batch_size"))
        )


@dataclass(frozen=True)
class Comparison:
    """One metric over the arms that have it."""

    metric: Metric
    fit: ArmFit
    reference: str
    table: pd.DataFrame  # `ArmFit.against(reference)`
    best: list[str]  # not distinguishable from the best
    curves: list[Curve] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)  # the arms that the curves go through

    @property
    def has_interval(self) -> bool:
        return self.fit.sigma > 0  # NaN without degrees of freedom

    @property
    def too_few(self) -> str:
        """Why there is no noise to go by, where `has_interval` is false for want of seeds."""
        several = max(self.fit.counts) > 1
        return "Too few seeds that arms share" if several else "One seed an arm"

    @property
    def told_curves(self) -> list[Curve]:
        """The curves, where arms differ at all: one through noise has an optimum too."""
        return self.curves if self.fit.omnibus() < 0.05 else []

    @property
    def doubt(self) -> str:
        """Why the curves decide nothing; empty where they do."""
        return next((c.doubt for c in self.curves if c.doubt), "")

    def flat(self) -> tuple[float, float] | None:
        """Shares not distinguishable from the best, over both forms of the curve; None in doubt."""
        if not self.curves or self.doubt:
            return None
        low = min(min(c.flat[0], c.optimum.low) for c in self.curves)
        return low, max(max(c.flat[1], c.optimum.high) for c in self.curves)

    def equivalence(self, arm: str, margin: float) -> Equivalence:
        """Two one-sided tests of an arm against the reference."""
        return self.fit.equivalence(arm, self.reference, margin)

    def different(self) -> pd.DataFrame:
        """Arms that differ from the reference, Dunnett-adjusted."""
        return self.table[self.table["dunnett_p"] < 0.05]


@dataclass(frozen=True)
class Analysis:
    frame: pd.DataFrame  # every run
    runs: pd.DataFrame  # the usable ones
    arms: pd.DataFrame  # index arm, in order; x, series, n and figures of the architecture
    axis: Axis
    comparisons: dict[str, Comparison]  # by metric column

    @property
    def study(self) -> dict[str, Any]:
        return dict(self.frame.attrs.get("study", {}))

    def shown(self, metrics: Sequence[Metric]) -> list[Metric]:
        """Those that runs have; where none has a validation B loss, validation A at the end."""
        found = [m for m in metrics if m.column in self.comparisons]
        return found + [LOSS_A] * (LOSS not in found and LOSS_A.column in self.comparisons)

    @property
    def margin(self) -> float | None:
        """Nats a token below which a difference does not matter, where the study has said so."""
        margin = self.study.get("margin")
        return float(margin) if margin else None

    def rate_fits(self) -> list[RateFit]:
        """The fitted learning rates of a study that tunes; empty before its first stage has ended,
        and without one."""
        tuned = self.study.get("tuned")
        return list(Tuning.of(tuned["fit"]).fits) if tuned else []

    def describe(self, arm: str) -> str:
        """'without attention', 'with one attention layer of 6 (16.7%)', 'at window 512'."""
        if not self._placed(arm):
            name = self.short(arm) if self.axis.numeric else arm
            return f"with {name}" if "=" in name else f"in {name}"
        x, series, layers = (self._of(arm, name) for name in ("x", "series", "n_layers"))
        named = f" and {series}" if "=" in series else f", {series}"
        rest = {"": "", "matched": "", "unmatched": ", unmatched"}.get(series, named)
        if not self.axis.share:
            return f"at {self.axis.label} {_number(x)}{rest}"
        kind, count = self.axis.kind, round(x * layers)
        if count == 0:
            return f"without {kind}{rest.replace(' and ', ' and with ')}"
        number = "one" if count == 1 else str(count)
        many = f"layer{'s' * (count > 1)} of {int(layers)}"
        return f"with {number} {kind} {many} ({percent(x)}){rest}"

    def short(self, arm: str) -> str:
        """'16.7%', '512', '16.7% at mlp_share=0.25', or the arm's name."""
        if not self.axis.numeric:
            return arm.removeprefix(self._prefix())
        x, series = self._of(arm, "x"), self._of(arm, "series")
        if not self._placed(arm):
            return str(series)
        name = percent(x) if self.axis.share else _number(x)
        if series in ("", "matched", "unmatched"):
            return f"{name}, unmatched" if series == "unmatched" else name
        return f"{name} at {series}" if "=" in series else f"{name} ({series})"

    def _placed(self, arm: str) -> bool:
        """Whether the arm has a place on a numeric axis: without such layers it has none."""
        return self.axis.numeric and math.isfinite(self._of(arm, "x"))

    def _of(self, arm: str, column: str) -> Any:
        return self.arms[column].to_dict()[arm]

    def _prefix(self) -> str:
        """'placement=' when every arm's name is that and a value."""
        start = str(self.axis.field).rpartition(".")[2] + "="
        return start if all(str(a).startswith(start) for a in self.arms.index) else ""


def analyse(frame: pd.DataFrame, *, reference: str | None = None) -> Analysis:
    """The statistics of every metric over the finished runs of `load_study`'s frame.

    reference: the arm that the others are compared with; None: the lowest on a numeric axis, else
    the first of the study.
    """
    runs = usable(frame)
    study = frame.attrs.get("study", {})
    planned = [str(c.get("arm")) for c in (study.get("cells") or {}).values()]
    known = set(runs["arm"])
    order = [arm for arm in dict.fromkeys([*planned, *runs["arm"]]) if arm in known]
    axis, x = _axis(runs, study)
    arms = _arms(runs, order, axis, x, list(study.get("factors") or []))
    comparisons = {}
    for metric in (RECALL, LOSS, BITS, PERPLEXITY, LOSS_A):
        comparison = _compare(runs, arms, axis, metric, reference)
        if comparison is not None:
            comparisons[metric.column] = comparison
    return Analysis(frame, runs, arms, axis, comparisons)


def _axis(runs: pd.DataFrame, study: dict[str, Any]) -> tuple[Axis, pd.Series]:
    factors = list(study.get("factors") or [])
    name = study.get("x") or (factors[0] if factors else None)
    places = pd.Series(math.nan, index=runs.index)
    if name is None or name not in runs:
        return Axis(name, "arm", False), places
    if name in _SHARES:
        column, kind = _SHARES[name]
        share = pd.to_numeric(runs[column], errors="coerce")
        if share.notna().all() and varies(share):
            return Axis(name, f"share of layers that are {kind}", True, True, kind), share
    applies = _applies(name, runs["pattern"])
    values = runs[name]
    numbers = pd.to_numeric(values.where(values.map(is_number) & applies), errors="coerce")
    numeric = bool(numbers[applies].notna().all()) and varies(numbers)
    label = _AXES.get(name, name)
    if not numeric:
        return Axis(name, "arm" if len(factors) > 1 else label, False), places
    return Axis(name, label, True), numbers.astype(float)


def _applies(field: str, patterns: pd.Series) -> pd.Series:
    """Where a field of one kind of layer does something: where the pattern has such layers."""
    letter = LETTERS.get(field.removeprefix("arch.").partition(".")[0])
    if letter is None:
        return pd.Series(True, index=patterns.index)
    return (patterns == "") | patterns.str.contains(letter, regex=False)


def _arms(
    runs: pd.DataFrame, order: Sequence[str], axis: Axis, x: pd.Series, factors: list[str]
) -> pd.DataFrame:
    """One row an arm: x (NaN where the axis is of layers that it lacks), series (the other factors
    that vary), n, figures of its architecture."""
    others = [f for f in factors if f != axis.field and f in runs]
    others = [f for f in others if len(set(runs[f].map(repr))) > 1]  # null is a value too
    rows = []
    for arm in order:
        own = runs[runs["arm"] == arm]
        series = _series(arm, axis, {f: own[f].iloc[0] for f in others}) if axis.numeric else ""
        place = float(x[own.index].mean())
        if axis.numeric and math.isnan(place):
            series = _elsewhere(arm, axis) or arm
        row = {"arm": arm, "x": place, "series": series, "n": len(own)}
        row["pattern"] = own["pattern"].iloc[0]
        for column in (
            *("n_layers", "attention_of_layers", "attention_of_mixers", "mlp_of_layers"),
            *("params", "non_embedding_params", "train_flops_per_token", "state_bytes"),
            *("train_flops", "tokens", "seconds_train", "tokens_per_second", "mfu"),
        ):
            row[column] = float(own[column].mean())
        rows.append(row)
    table = pd.DataFrame(rows, columns=list(rows[0]) if rows else ["arm", "x", "series", "n"])
    table = table.set_index("arm")
    if axis.numeric:
        names = list(dict.fromkeys(table["series"]))
        table = table.sort_values("x", kind="stable")
        table = table.sort_values("series", key=lambda s: s.map(names.index), kind="stable")
    return table


def _series(arm: str, axis: Axis, others: dict[str, Any]) -> str:
    """What tells arms at one place of the axis apart: the arm's name without its place there."""
    rest = _elsewhere(arm, axis)
    if not others or list(others) == ["match.arms"] or rest == arm:
        return arm_label(others) if others else ""
    return rest


def _elsewhere(arm: str, axis: Axis) -> str:
    """The arm's name without its place on the axis."""
    place = f"{str(axis.field).rpartition('.')[2]}="
    return ", ".join(part for part in arm.split(", ") if not part.startswith(place))


def _main_series(series: pd.Series) -> list[str]:
    """The arms that a curve can go through: all of one series, beside single arms (anchors) and
    unmatched swaps; none where several series are drawn."""
    sizes = series.value_counts()
    if set(sizes.index) == {"matched", "unmatched"}:
        return [str(a) for a in series.index[series == "matched"]]
    large = sizes.index[sizes > 1]
    return [str(a) for a in series.index[series == large[0]]] if len(large) == 1 else []


def _compare(
    runs: pd.DataFrame, arms: pd.DataFrame, axis: Axis, metric: Metric, reference: str | None
) -> Comparison | None:
    rows = runs[np.isfinite(runs[metric.column].astype(float))]
    present = [arm for arm in arms.index if (rows["arm"] == arm).any()]
    if not present:
        return None
    rows = pd.concat([rows[rows["arm"] == arm] for arm in present])
    fit = fit_arms(rows["arm"].tolist(), rows["seed"].tolist(), rows[metric.column])
    first = reference if reference in present else present[0]
    curves = []
    drawn = _main_series(arms["series"][present])
    if axis.share and metric is LOSS and arms["x"][drawn].nunique() >= 5:
        places = {arm: float(arms["x"][arm]) for arm in drawn}
        forms = ("exponential", "hyperbolic")
        curves = [fit_curve(fit.only(drawn), places, form=form) for form in forms]
    best = fit.not_worse_than_best(metric.lower_is_better)
    return Comparison(metric, fit, str(first), fit.against(str(first)), best, curves, drawn)


# --- sentences -----------------------------------------------------------------------------------

Kind = Literal["state", "result", "null", "limit"]


@dataclass(frozen=True)
class Verdict:
    """One sentence: about the study's state, a difference, the absence of one, or a limit."""

    kind: Kind
    text: str


def verdicts(frame: pd.DataFrame) -> list[str]:
    """The sentences of `judge`, for a terminal."""
    return [v.text for v in judge(analyse(frame))]


def judge(analysis: Analysis, recalled: Sequence[Verdict] = ()) -> list[Verdict]:
    """Plain sentences: what is unfinished, what differs, what does not, what cannot be known.

    recalled: those of `evaluation.Evaluations.verdicts`, which go before the limits.
    """
    lines = _progress(analysis)
    shown = analysis.shown(PRIMARY)
    if LOSS_A in shown:
        text = "No run has a validation B loss: validation A is shown instead."
        lines.append(Verdict("limit", text))
    for metric in shown:
        lines += _about(analysis, analysis.comparisons[metric.column])
    lines += _on_another_text(analysis)
    return [*lines, *recalled, *(Verdict("limit", text) for text in _limits(analysis))]


def _on_another_text(analysis: Analysis) -> list[Verdict]:
    """Arms whose difference from the reference is another on validation A than on B: within runs,
    so that seeds cancel, and differences between texts alone remain."""
    on_b, on_a = (analysis.comparisons.get(m.column) for m in (LOSS, LOSS_A))
    if on_b is None or on_a is None or not on_b.has_interval:
        return []
    reference = on_b.reference
    runs = analysis.runs[analysis.runs[[LOSS.column, LOSS_A.column]].notna().all(axis=1)]
    between = runs[LOSS.column] - runs[LOSS_A.column]
    fit = fit_arms(runs["arm"].tolist(), runs["seed"].tolist(), between)
    if set(fit.arms) != set(on_a.fit.arms) or reference not in fit.arms:
        return []
    table = fit.against(reference)
    apart = table[table["dunnett_p"] < 0.05].sort_values("difference", key=abs, ascending=False)
    if apart.empty:
        return []
    parts = [
        f"{analysis.short(arm)}: {signed(on_b.fit.difference(arm, reference).value)} on B, "
        f"{signed(on_a.fit.difference(arm, reference).value)} on A"
        for arm in apart["arm"][:3]
    ]
    parts += [f"and {len(apart) - 3} more"] * (len(apart) > 3)
    how = "; ".join(filter(None, ["nats, within runs", _dunnett(fit)]))
    text = (
        "How much arms differ depends on the text: loss less that "
        f"{analysis.describe(reference)}, {'; '.join(parts)} ({how})."
    )
    return [Verdict("limit", text)]


def _progress(analysis: Analysis) -> list[Verdict]:
    lines = _tuning(analysis)
    own = ~analysis.frame["orphan"] & (analysis.frame["stage"] == "confirm")
    frame = analysis.frame[own]
    counts = frame["state"].value_counts().to_dict()
    missing = int((missing_cells(analysis.frame)["stage"] == "confirm").sum())
    planned = len(frame) + missing
    broken = int(((frame["state"] == "done") & (frame["cause"] != "")).sum())
    done = counts.pop("done", 0) - broken
    if done == planned:
        return lines
    parts = [f"{n} {state}" for state, n in counts.items()]
    parts += [f"{missing} not started"] * bool(missing)
    parts += [f"{broken} without a finite loss"] * bool(broken)
    rest = "; what follows rests on those." if done else "."
    text = f"Incomplete: {done} of {planned} runs have a usable result ({', '.join(parts)}){rest}"
    return [*lines, Verdict("state", text)]


def _tuning(analysis: Analysis) -> list[Verdict]:
    """Where a study that tunes learning rates stands, and what its optima leave open."""
    frame = analysis.frame
    runs = frame[(frame["stage"] == "tune") & ~frame["orphan"]]
    tuned = analysis.study.get("tuned")
    if not tuned:
        missing = int((missing_cells(frame)["stage"] == "tune").sum())
        if runs.empty and not missing:
            return []
        ended = int(runs["state"].isin(["done", "failed"]).sum())
        text = (
            f"Learning rates are being tuned: {ended} of {len(runs) + missing} runs of the first "
            "stage have ended; arms are compared in the second."
        )
        return [Verdict("state", text)]
    lines = [
        Verdict("state", f"The second stage has not begun: {problem}.")
        for problem in tuned.get("problems") or []
    ]
    fits = analysis.rate_fits()
    open_ended = [f.arm for f in fits if f.open and not f.problem]
    if open_ended:
        text = f"The learning rate of {_join(open_ended)} is not pinned down: its interval goes "
        lines.append(Verdict("limit", f"{text}beyond the rates that were tried."))
    smooth_p = Tuning.of(tuned["fit"]).smooth_p
    if smooth_p < 0.05:
        text = "The arms' best learning rates scatter about the smooth model of them more than "
        lines.append(Verdict("limit", f"{text}noise does (p = {p_value(smooth_p)})."))
    return lines


def _about(analysis: Analysis, comparison: Comparison) -> list[Verdict]:
    metric, fit = comparison.metric, comparison.fit
    if len(fit.arms) == 1:
        mean = metric.show_mean(fit.mean(fit.arms[0]))
        text = f"{metric.name} is {mean} ({_seeds(fit)}); one arm alone compares with nothing."
        return [Verdict("null", text)]
    if not comparison.has_interval:
        return [_without_interval(analysis, comparison)]
    different = comparison.different()
    if different.empty:
        return _nothing(analysis, comparison) + _equivalent(analysis, comparison)
    lines = [_difference(analysis, comparison, different)]
    lines += _best(analysis, comparison)
    return lines + _equivalent(analysis, comparison)


def _equivalent(analysis: Analysis, comparison: Comparison) -> list[Verdict]:
    """Arms whose loss is the reference's within the study's margin."""
    margin, fit = analysis.margin, comparison.fit
    if margin is None or comparison.metric not in (LOSS, LOSS_A):
        return []
    others = [arm for arm in fit.arms if arm != comparison.reference]
    p = adjust([comparison.equivalence(arm, margin).p for arm in others])
    same = [analysis.short(a) for a, value in zip(others, p, strict=True) if value <= 0.05]
    reference = f"the arm {analysis.describe(comparison.reference)}"
    tests = f"two one-sided tests{', Holm' if len(others) > 1 else ''}, {_seeds(fit)}"
    if same:
        text = f"{comparison.metric.name} within {margin:g} nats of {reference}: {_join(same)} "
        return [Verdict("result", f"{text}({tests}).")]
    text = f"{comparison.metric.name}: no arm can be called equal to {reference} within "
    return [Verdict("null", f"{text}{margin:g} nats ({tests}).")]


def _without_interval(analysis: Analysis, comparison: Comparison) -> Verdict:
    metric, fit = comparison.metric, comparison.fit
    low, high = int(np.argmin(fit.means)), int(np.argmax(fit.means))
    ends = sorted((low, high))
    told = " and ".join(
        f"{metric.show(fit.means[i])} {analysis.describe(fit.arms[i])}" for i in ends
    )
    alike = low == high  # of means that are all equal
    if alike:
        told = f"{metric.show(fit.means[low])} in every arm"
    if fit.df > 0:
        text = (
            f"{metric.name}: arms differ by the same in every seed ({told}), so that no interval "
            "can be given."
        )
    else:
        text = (
            f"{metric.name} {'is' if alike else 'ranges between'} {told}. "
            f"{comparison.too_few}: no interval can be given, "
            "and a difference may be noise."
        )
    return Verdict("null", text)


def _nothing(analysis: Analysis, comparison: Comparison) -> list[Verdict]:
    metric, fit = comparison.metric, comparison.fit
    p = fit.omnibus()
    effect = fit.minimum_detectable(comparisons=len(fit.arms) - 1)
    detect = metric.show_size(effect, effect)
    if p < 0.05:
        text = (
            f"{metric.name}: the arms are not all equal (F test, p = {p_value(p)}), but none can "
            f"be told from the one {analysis.describe(comparison.reference)} ({_seeds(fit)})."
        )
        return [Verdict("result", text), *_best(analysis, comparison)]
    text = (
        f"{metric.name}: the arms are not distinguishable at this size ({_seeds(fit)}): a "
        f"difference from the arm {analysis.describe(comparison.reference)} would have had to be "
        f"{detect} to be found with 80% power."
    )
    return [Verdict("null", text)]


def _difference(analysis: Analysis, comparison: Comparison, different: pd.DataFrame) -> Verdict:
    """The first arm along a number that differs from the reference in the strongest difference's
    direction; the strongest where arms have no order, or several."""
    metric, fit, reference = comparison.metric, comparison.fit, comparison.reference
    strongest = different.iloc[int(different["difference"].abs().argmax())]
    same_sign = different[np.sign(different["difference"]) == np.sign(strongest["difference"])]
    along = analysis.axis.numeric and len(set(analysis.arms["series"])) == 1
    chosen = same_sign.iloc[0] if along else strongest
    arm = str(chosen["arm"])
    verb = "rises" if chosen["difference"] > 0 else "falls"
    sign = np.sign(chosen["difference"])
    ends = sorted((sign * chosen["dunnett_low"], sign * chosen["dunnett_high"]))
    half = (ends[1] - ends[0]) / 2
    text = (
        f"{metric.name} {verb} from {metric.show_mean(fit.mean(reference))} "
        f"{analysis.describe(reference)} to {metric.show_mean(fit.mean(arm))} "
        f"{analysis.describe(arm)}; difference {metric.show_size(chosen['difference'], half)}, "
        f"95% interval {metric.show_range(*ends)}{_simultaneous(fit)}, "
        f"{_seeds(fit, reference, arm)}."
    )
    return Verdict("result", text)


def _best(analysis: Analysis, comparison: Comparison) -> list[Verdict]:
    metric, fit = comparison.metric, comparison.fit
    worst_first = fit.means if metric.lower_is_better else -fit.means
    best = fit.arms[int(np.argmin(worst_first))]
    word = "lowest" if metric.lower_is_better else "highest"
    lead = f"{metric.name} is {word}, {metric.show_mean(fit.mean(best))}, {analysis.describe(best)}"
    if len(comparison.best) == 1:
        told = f"{lead}, and every other arm is worse"
    elif len(comparison.best) == len(fit.arms):
        told = f"{metric.name}: no arm can be excluded from being the best"
    else:
        others = [analysis.short(a) for a in comparison.best if a != best]
        names = (
            f"{len(others)} other arms (bold in the table)" if len(others) > 5 else _join(others)
        )
        told = f"{lead}; not distinguishable from it: {names}"
    lines = [Verdict("result", f"{told} (95%, multiple comparisons with the best).")]
    x = analysis.arms["x"]
    # An arm inside that is as good as the best says that the optimum need not lie beyond.
    at_one_edge = set(x[comparison.best]) in ({x.min()}, {x.max()})
    if analysis.axis.log and metric is not RECALL and at_one_edge:
        text = (
            f"The {word} {metric.name.lower()} is at the edge of the values tried: the optimum may"
        )
        lines.append(Verdict("limit", f"{text} lie beyond {analysis.short(best)}."))
    if comparison.told_curves:
        lines.append(Verdict("result", curve_sentence(comparison)))
    return lines


def curve_sentence(comparison: Comparison) -> str:
    """Where the fitted curves have their minimum: both forms, and both intervals together; or why
    they do not tell."""
    flat = comparison.flat()
    if flat is None:
        return (
            f"Fitted curves do not tell which shares are as good as the best: {comparison.doubt}."
        )
    told = []
    for curve in comparison.curves:
        o = curve.optimum
        told.append(
            f"{percent(o.value)} (95% interval {percent(o.low)} to {percent(o.high)}) by "
            f"{curve.formula}"
        )
    return (
        f"Fitted curves put the lowest loss at {' and at '.join(told)}; over both forms, shares "
        f"from {percent(flat[0])} to {percent(flat[1])} are not distinguishable from the best."
    )


def _limits(analysis: Analysis) -> Iterator[str]:
    """What results of this size cannot prove."""
    runs = analysis.runs
    if runs.empty:
        return
    reasons = []
    params = runs["non_embedding_params"]
    text = runs["text_tokens"].notna().all()
    rates = runs["text_tokens" if text else "tokens"] / params.where(params > 0)
    if params.min() < 1e6:
        small = " (below 1M)" if params.max() < 1e6 else ""
        told = _range(params, si)
        reasons.append(f"the models have {told} parameters beside the embedding{small}")
    if rates.min() < 20:
        kind = "text tokens" if text else "tokens"
        told = _range(rates, "{:.2g}".format)
        much = "below one" if rates.max() < 1 else "a compute-optimal run has about 20"
        reasons.append(f"they saw {told} {kind} a parameter ({much})")
    mixed = runs["mqar_share"]
    if mixed.max() > 0:
        told = _range(100 * mixed, "{:.0f}".format)
        reasons.append(f"{told}% of the training rows are recall rows, not text")
    scored = runs["val_b_tokens"]
    if scored.min() < 100_000:
        reasons.append(f"the loss is scored on {_range(scored, '{:,.0f}'.format)} tokens")
    if reasons:
        yield (
            "What the loss here cannot prove: which arm is better at a size that people use. "
            f"{_sentence(reasons)}"
        )
    epochs = runs["epochs"].max()
    if epochs > 4:
        yield f"The text was seen {epochs:.1f} times: arms may differ in how they overfit."
    seeds = min((c.fit.n_seeds for c in analysis.comparisons.values()), default=0)
    if seeds == 1 and len(analysis.arms) > 1:
        yield (
            "One seed: no interval is shown anywhere on this page, as none can be known; give "
            "study.seeds at least two."
        )
    elif seeds == 2 and len(analysis.arms) > 1:
        most = max(max(c.fit.counts) for c in analysis.comparisons.values())
        few = "Two seeds only" if most == 2 else "Some arms have two seeds or one"
        yield f"{few}: intervals rest on the assumption that all arms are equally noisy."


def _range(values: pd.Series, show: Callable[[float], str]) -> str:
    """The least and the most, or the one that both are."""
    return " to ".join(dict.fromkeys(show(v) for v in (values.min(), values.max())))


def _seeds(fit: ArmFit, *arms: str) -> str:
    """'n = 3 paired seeds', of these arms or of all."""
    own = dict(zip(fit.arms, fit.counts, strict=True))
    counts = [own[arm] for arm in arms or fit.arms]
    n = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0])
    kind = "paired seeds" if fit.paired else "seeds"
    return f"n = {n} {kind if n != '1' else 'seed'}"


def _dunnett(fit: ArmFit) -> str:
    k = len(fit.arms) - 1
    return f"Dunnett, {k} comparisons" if k > 1 else ""


def _simultaneous(fit: ArmFit) -> str:
    return f" ({_dunnett(fit)})" if _dunnett(fit) else ""


def _number(x: float) -> str:
    return f"{x:.6g}" if x < 1e4 else si(x)


def percent(share: float) -> str:
    return "–" if not math.isfinite(share) else f"{100 * share:.1f}".removesuffix(".0") + "%"


def signed(value: float, digits: int = 4) -> str:
    """A difference, with a sign that is as wide as the other."""
    return f"{value:+.{digits}f}".replace("-", "−")


def p_value(p: float) -> str:
    """As it stands in a sentence."""
    return f"{p:.2g}" if p >= 0.001 else "below 0.001"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."
