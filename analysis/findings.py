"""Published findings beside ours: one row a claim, every figure of ours taken from the frames.

A study that has not been run leaves its rows saying so. What follows from a row is decided by a
rule on its interval, never by hand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import f, ttest_1samp, ttest_ind

from ablate.report import analyse, load_study
from ablate.report.evaluation import Evaluations
from ablate.report.export import is_export
from ablate.report.frames import load_details, load_evaluation, load_metrics
from ablate.report.published import (
    ATTENTION_SHARE,
    GROUPED_QUERIES,
    ONE_FOR_FOUR,
    ROUNDING,
    TRANSFORMER,
)
from ablate.report.stats import ALPHA, ArmFit, Estimate, fit_arms, paired_items
from ablate.report.verdicts import LOSS, Analysis, Comparison, p_value, percent, signed
from ablate.study.show import si

RESULTS = Path(__file__).parent / "results"
NOT_RUN = "not run yet"
KINDS = {  # arms of the recall study, by how their names start
    "transformer": "Transformer",
    "mamba2": "Mamba-2",
    "hybrid_4": "4% attention",
    "hybrid_8": "8% attention",
    "hybrid_25": "25% attention",
}
TASKS = {
    "phonebook": "phonebook (entries)",
    "phonebook_reversed": "phonebook, query first (entries)",
    "needle": "needle (tokens)",
    "mqar_text": "associative recall (pairs)",
}
SAME = "same direction"
# What no attention at all costs, as published: an interval that reaches beyond says nothing of a
# claim that something costs nothing.
LARGE = ATTENTION_SHARE[0.0] - ATTENTION_SHARE[4 / 48]


def fit_of(runs: pd.DataFrame, values: pd.Series) -> ArmFit:
    """`fit_arms` of values, one a row of runs with columns arm and seed."""
    return fit_arms(runs["arm"].tolist(), runs["seed"].tolist(), values)


@dataclass(frozen=True)
class Study:
    """An exported study with its statistics."""

    path: Path
    analysis: Analysis

    @classmethod
    def read(cls, path: Path) -> Study:
        return cls(path, analyse(load_study(path)))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def loss(self) -> Comparison | None:
        return self.analysis.comparisons.get(LOSS.column)

    @cached_property
    def on_a(self) -> ArmFit | None:
        """The fit of `loss` for validation A instead of B; None where no run has that."""
        runs = self.analysis.runs.dropna(subset=["val_a_loss"])
        if runs.empty:
            return None
        return fit_of(runs, runs["val_a_loss"])

    @cached_property
    def evaluations(self) -> Evaluations:
        return Evaluations.read(self.analysis, self.path)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """`Evaluations.table`, or an empty frame with its first columns."""
        table = self.evaluations.table()
        return table if len(table) else pd.DataFrame(columns=["task", "cell", "arm", "value"])

    @property
    def done(self) -> pd.DataFrame:
        """The finished runs, a row each."""
        frame = self.analysis.frame
        return frame[frame["state"] == "done"]

    @property
    def main_series(self) -> list[str]:
        """The arms that curves go through, the one with least of what is varied first."""
        assert self.loss is not None
        known, places = self.loss.fit.arms, self.analysis.arms["x"]
        return sorted((a for a in self.loss.drawn or known if a in known), key=lambda a: places[a])

    def arms(self, **where: float | str) -> list[str]:
        """Arms whose column is near a share, or whose name starts with a text."""
        table = self.analysis.arms
        keep = pd.Series(True, index=table.index)
        for column, value in where.items():
            if isinstance(value, str):
                keep &= table.index.to_series().map(lambda a, v=value: str(a).startswith(v))
            else:
                keep &= (table[column] - value).abs() < 0.5 / table["n_layers"]
        if "match.arms" in self.analysis.runs:
            keep &= ~table.index.to_series().str.endswith("unmatched")
        return [str(a) for a in table.index[keep]]

    def keys(self, arms: Iterable[str]) -> str:
        runs = self.analysis.runs
        return " ".join(runs.loc[runs["arm"].isin(list(arms)), "key"])


def studies(root: Path = RESULTS) -> dict[str, Study]:
    """Exported studies by name; those without a finished run are left out."""
    found = [Study.read(p) for p in sorted(root.iterdir()) if is_export(p)] if root.is_dir() else []
    return {study.name: study for study in found if len(study.analysis.runs)}


@dataclass(frozen=True)
class Row:
    """One claim. `arms` and `keys` lead a figure back to its runs; `figure` is the first of ours,
    where one says enough."""

    claim: str
    published: str
    ours: str = NOT_RUN
    follows: str = ""
    study: str = ""
    arms: str = ""
    keys: str = ""
    figure: str = ""


# --- figures and rules ---------------------------------------------------------------------------


def show(e: Estimate, digits: int = 4) -> str:
    if not math.isfinite(e.low):
        return f"{signed(e.value, digits)} (no interval)"
    return f"{signed(e.value, digits)} ({signed(e.low, digits)} to {signed(e.high, digits)})"


def lowest(fit: ArmFit) -> str:
    """The arm with the lowest mean, which need not be told from others."""
    return fit.arms[int(np.argmin(fit.means))]


def verdict(ours: Estimate, published: float, rounding: float = 0.0) -> str:
    """What an interval says of a published difference, known within `rounding`; of a published zero
    (no cost, in nats), with {high} for the interval's end."""
    if not math.isfinite(ours.low):
        return "decides nothing: one seed"
    inside = ours.low - rounding <= published <= ours.high + rounding
    if ours.low <= 0 <= ours.high:
        if published == 0:
            found = "decides nothing:" if ours.high > LARGE else "none found, but"
            return f"{found} a cost of up to {{high}} nats is not excluded"
        if inside:
            return "decides nothing: zero and the published figure are both inside"
        return "none found, and the published size is excluded"
    if published == 0:
        return "disagrees: a cost" if ours.value > 0 else "agrees: a gain, not a cost"
    if ours.low <= published <= ours.high:
        return f"{SAME}; the published figure is inside"
    if inside:
        return f"{SAME}; inside within the rounding of the published figure ({rounding:g})"
    if (ours.value > 0) != (published > 0):
        return "disagrees: the other way"
    size = "larger" if abs(ours.value) > abs(published) else "smaller"
    return f"{SAME}; {size} than the published figure, whose own noise is not known"


def no_cost(figures: Sequence[Estimate]) -> str:
    """`verdict` of a published zero by several intervals: what none of them excludes."""
    highest = max(figures, key=lambda e: e.high)
    return verdict(highest, 0.0).format(high=f"{highest.high:.4f}")


def rate_of(study: Study | None, rate: float | None, whose: str = "its") -> str:
    """How well a learning rate is known by a study of rates: "its rate is the best of 4 tried with
    1 seed, whose neighbours end 0.148 and 0.095 nats higher", or nothing."""
    if study is None or study.loss is None or rate is None:
        return ""
    runs = study.analysis.runs
    loss = runs.groupby("lr")["val_b_loss"].mean()
    tried = f"of {len(loss)} tried with {seed_counts(runs).partition(',')[0]}"
    best = int(np.argmin(loss))
    if loss.index[best] != rate:
        return f"{whose} rate is not the best {tried}, {loss.index[best]:.2g}"
    beside = [loss.iloc[i] - loss.iloc[best] for i in (best - 1, best + 1) if 0 <= i < len(loss)]
    if len(beside) < 2:
        return f"{whose} rate is the best {tried}, at the edge of them"
    higher = " and ".join(f"{v:.3f}" for v in beside)
    return f"{whose} rate is the best {tried}, whose neighbours end {higher} nats higher"


def within(study: Study, arms: Sequence[str]) -> str:
    """What the study's margin, set before it ran, says of two arms: two one-sided tests on B and A,
    of which the worse counts."""
    margin = study.analysis.margin
    assert study.loss is not None
    assert margin is not None
    fits = [fit for fit in (study.loss.fit, study.on_a) if fit is not None]
    p = max(fit.equivalence(*arms, margin).p for fit in fits if set(arms) <= set(fit.arms))
    told = f"equal within the study's margin of {margin:g} nats (p = {p:.2g})"
    return f"{told};" if p < ALPHA else f"decides nothing: not shown {told}, and"


def unlike(study: Study, who: str, arm: str, reference: str) -> str:
    """What else sets an arm apart from another: '; who has +34% FLOPs a token', or nothing."""
    runs = study.analysis.runs
    one, other = (runs[runs["arm"] == a] for a in (arm, reference))
    told = []
    for column, name in (
        ("non_embedding_params", "parameters"),
        ("train_flops_per_token", "FLOPs a token"),
    ):
        more = 100 * (one[column].iloc[0] / other[column].iloc[0] - 1)
        if abs(more) >= 1:
            told.append(f"{signed(more, 0)}% {name}")
    rates = [float(r["lr"].iloc[0]) for r in (one, other)]
    if rates[0] != rates[1]:
        told.append("a learning rate of {:.2g} against {:.2g}".format(*rates))
    return f"; {who} has {', '.join(told)}" if told else ""


def of_loss(
    study: Study | None, claim: str, published: str, size: float, arm: Callable[[Study], list[str]],
    reference: Callable[[Study], list[str]], *, also: Sequence[Study] = (), note: str = "",
) -> Row:  # fmt: skip
    """A row about the difference in loss of one arm from another, in nats, paired within seeds.
    also: studies that trained the same arms; note: what else has to be known of them."""
    if study is None or study.loss is None:
        return Row(claim, published)
    known = study.loss.fit.arms
    one, other = ([a for a in pick(study) if a in known] for pick in (arm, reference))
    if not one or not other or one[0] == other[0]:
        return Row(claim, published, "its arms are not finished", study=study.name)
    arms = [one[0], other[0]]
    found = study.loss.fit.difference(*arms)
    ours = f"{show(found)} nats"
    # Seeds are not all that an interval should hold: other documents may tell another size, and so
    # may the same trials on another machine, by other code.
    others = {}
    if study.on_a is not None and set(arms) <= set(study.on_a.arms):
        others["on validation A"] = study.on_a.difference(*arms)
    for twin in also:
        if twin.loss is not None and set(arms) <= set(twin.loss.fit.arms):
            others[f"in {twin.name}"] = twin.loss.fit.difference(*arms)
    ours += "".join(f"; {show(e)} {where}" for where, e in others.items())
    ours += unlike(study, arms[0], *arms)
    if note:
        ours += f"; {note}"
    figures = [found, *others.values()]
    said: dict[str, list[str]] = {}  # what follows, and where
    for where, e in {"on validation B": found, **others}.items():
        if math.isfinite(e.low) or not math.isfinite(found.low):
            said.setdefault(verdict(e, size, ROUNDING), []).append(where)
    follows = verdict(found, size, ROUNDING)
    if size == 0 and all(not e.low > 0 for e in figures):
        said, follows = {}, no_cost(figures)
        if study.analysis.margin is not None and math.isfinite(found.low):
            highest = max(e.high for e in figures)
            cost = f"a cost of up to {highest:.4f} nats is not excluded"
            follows = f"{within(study, arms)} {cost if highest > 0 else 'a gain, not a cost'}"
    if len(said) > 1:
        follows = "not settled: figures differ"
        if all(told.startswith(SAME) for told in said):
            parts = [
                f"{told.removeprefix(f'{SAME}; ').partition(', ')[0]} {' and '.join(places)}"
                for told, places in said.items()
            ]
            follows = f"{SAME}; its size is not settled: {'; '.join(parts)}"
    own = study.name, "; ".join(arms), study.keys(arms)
    return Row(claim, published, ours, follows, *own, figure=f"{show(found)} nats")


# --- the rows ------------------------------------------------------------------------------------


def in_short(found: dict[str, Study]) -> str:
    """What attention does to loss and to recall, for who reads no further; empty without either."""
    told = loss_by_share(found)
    study = found.get("recall")
    if study is not None and len(study.scores):
        arms = {KINDS[kind]: arm for kind in KINDS for arm in widest(study, kind)}
        lines = [f"| exact match, all sizes (each seed) | {' | '.join(arms)} |"]
        lines += ["|---" * (len(arms) + 1) + "|"]
        for task, name in TASKS.items():
            own = study.scores[study.scores["task"] == task]
            rows = [own.loc[own["arm"] == arm, "by_seed"].str.split() for arm in arms.values()]
            if all(map(len, rows)):
                each = [np.array(r.tolist(), dtype=float).mean(axis=0) for r in rows]
                cells = [f"{v.mean():.0%} ({', '.join(f'{s:.0%}' for s in v)})" for v in each]
                lines.append(f"| {name.partition(' (')[0]} | {' | '.join(cells)} |")
        if len(lines) > 2:
            taught = f"{load_details(study.path)['config.data.recall.share'].mean():.0%}"
            state = f"{study.analysis.arms['x'].max():.0f}"
            told.append(
                f"**Recall**, of models of which {taught} of the training rows are such documents, "
                f"in other templates; Mamba-2 has a state of {state} (others, some of which do "
                "better, are in the study):"
            )
            told.append("\n".join(lines))
    return "".join(f"{paragraph}\n\n" for paragraph in told)


def loss_by_share(found: dict[str, Study]) -> list[str]:
    """A table of losses less that without attention, a row a study and text, and what to know of
    it. Differences have Dunnett's intervals, so that picking the lowest flatters nothing."""
    names = ("attn_ratio", "attn_ratio_mlp", "attn_ratio_60m")
    known = [(found[n], loss) for n in names if n in found and (loss := found[n].loss) is not None]
    known = [(study, loss) for study, loss in known if loss.has_interval and len(loss.fit.arms) > 1]
    if not known or known[0][0].name != names[0]:
        return []
    rows: list[tuple[str, dict[float, str], str]] = []
    best = []
    for study, loss in known:
        places = study.analysis.arms["x"]
        none, *arms = study.main_series
        best.append(percent(places[lowest(loss.fit)]))
        for fit in (loss.fit, study.on_a):
            if fit is None or not {none, *arms} <= set(fit.arms):
                continue
            table = fit.against(none).set_index("arm").loc[arms]
            same = fit.not_worse_than_best()
            shown = table["difference"].map(lambda v: signed(v, 3))
            cells = {places[a]: f"**{v}**" if a in same else v for a, v in shown.items()}
            half = (table["dunnett_high"] - table["difference"]).max()
            whose = "the same on A" if fit is study.on_a else in_row(study)
            rows.append((whose, cells, f"±{half:.3f}"))
    shares = sorted({share for _, cells, _ in rows for share in cells})
    header = ["layers that are attention", *map(percent, shares), "95%"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for whose, cells, half in rows:
        lines.append(f"| {' | '.join([whose, *(cells.get(x, '') for x in shares), half])} |")
    where = f"at {best[0]} in each" if len(set(best)) == 1 else f"at {', '.join(best)}"
    notes = (
        f"On B it is lowest {where}. Bold: not told from the lowest (Hsu's comparisons with the "
        "best); ±: half of a simultaneous interval over seeds (Dunnett). Tokens are equal, FLOPs "
        f"are not; parameters are those beside the embedding.{elsewhere(found, known[0][0])}"
    )
    if known[-1][0].name == names[-1]:
        notes += f" The larger models: {short_of(known[-1][0], known[0][0])}."
    head = (
        "**Loss** less that without attention, in nats a token, within paired seeds, on validation "
        "B and on another text, A:"
    )
    return [head, "\n".join(lines), notes]


def in_row(study: Study) -> str:
    """'13.9M parameters, 120M tokens, 6 seeds'."""
    done = study.done
    size, tokens = (si(done[c].median()) for c in ("non_embedding_params", "tokens"))
    mlps = done["mlp_of_layers"].max()
    text = f"{size} parameters, {tokens} tokens, {seed_counts(done)}"
    return f"{text}, {mlps:.0%} of the layers MLPs" if mlps > 0 else text


def not_told(study: Study, arms: Sequence[str] | None = None) -> str:
    """The arms (of some) that Hsu's comparisons cannot tell from the best, on B and on A."""
    assert study.loss is not None
    short, places, parts = study.analysis.short, study.analysis.arms["x"], []
    for where, fit in (("B", study.loss.fit), ("A", study.on_a)):
        if fit is None or not fit.df > 0 or not set(study.loss.fit.arms) <= set(fit.arms):
            continue
        best = lowest(fit)
        same = [a for a in fit.not_worse_than_best() if a != best and (arms is None or a in arms)]
        same.sort(key=lambda a: places[a])
        at = f", where {short(best)} is lowest" if where == "A" else ""
        parts.append(f"{', '.join(map(short, same)) or 'no other'} on {where}{at}")
    return "; ".join(parts)


def short_of(larger: Study, study: Study) -> str:
    """What else than its size sets a study apart from a smaller one, for who compares them."""
    one, other = larger.analysis.runs, study.analysis.runs
    each, fewer = ((r["tokens"] / r["non_embedding_params"]).median() for r in (one, other))
    flops = one["train_flops_per_token"]
    column = "config.data.tokenizer.vocab_size"
    sizes = [set(load_details(s.path).get(column, pd.Series()).dropna()) for s in (larger, study)]
    told = f"{each:.1f} tokens for each of these parameters, {fewer:.1f} in the smaller models"
    if len(rates := set(one["lr"])) == 1:
        told += f", one learning rate of {rates.pop():g}, not tuned at this size"
    if flops.notna().all():
        told += f", equal tokens but up to {100 * (flops.max() / flops.min() - 1):.0f}% more FLOPs"
    if all(sizes) and sizes[0] != sizes[1]:
        entries = " for ".join(" and ".join(f"{v:,.0f}" for v in sorted(own)) for own in sizes)
        told += f", a vocabulary of {entries}, so that a token is another"
    return told


def twins(found: dict[str, Study]) -> list[Study]:
    """Studies that trained arms of `attn_ratio` by another commit, named by it."""
    return [s for name, s in found.items() if re.fullmatch("attn_ratio_[0-9a-f]{7}", name)]


def elsewhere(found: dict[str, Study], study: Study) -> str:
    """What the lowest arm gains over none in a study, and what it did by other code."""
    assert study.loss is not None
    fit, short = study.loss.fit, study.analysis.short
    best, none = lowest(fit), study.analysis.arms["x"][list(fit.arms)].idxmin()
    told, sizes = [], [fit.difference(best, none)]
    for twin in twins(found):
        if twin.loss is not None and {best, none} <= set(twin.loss.fit.arms):
            sizes.append(twin.loss.fit.difference(best, none))
            where = " and ".join(sorted(set(twin.analysis.runs["hardware"])))
            told.append(f"{show(sizes[-1])} (commit {twin.name.rpartition('_')[2]}, {where})")
    if not told or best == none:
        return ""
    text = (
        f" {short(best)} less {short(none)} in the first row (95%, each on its own): "
        f"{show(sizes[0])}; by other code {' and '.join(told)}"
    )
    if max(e.low for e in sizes) > min(e.high for e in sizes):
        settled = all(e.high < 0 for e in sizes) or all(e.low > 0 for e in sizes)
        text += f": the {'direction is settled, the ' if settled else ''}size is not"
    return f"{text}."


def best_share(study: Study | None, claim: str, published: str) -> Row:
    if study is None or study.loss is None:
        return Row(claim, published)
    loss, analysis = study.loss, study.analysis
    best = lowest(loss.fit)
    rates = analysis.runs.groupby("arm")["lr"].first()
    alike = [a for a in loss.fit.arms if rates[a] == rates[best]]  # others have rows of their own
    shares = {analysis.arms["attention_of_layers"][a] for a in alike}
    ours = f"at equal tokens lowest of {len(shares)} shares at {analysis.short(best)}"
    if not loss.has_interval:
        return Row(claim, published, ours, "decides nothing: one seed", study.name)
    ours += f"; not told from the lowest: {not_told(study, alike)}"
    p = loss.fit.worse_than_best()
    out = [f"{analysis.short(a)} ({p_value(p[a])})" for a in alike if a not in loss.best]
    follows = f"worse than that (p), on B: {', '.join(out)}"
    if not out:
        follows = "decides nothing: no share is excluded"
    keys, figure = study.keys(loss.fit.arms), f"lowest at {analysis.short(best)}"
    return Row(claim, published, ours, follows, study.name, "all", keys, figure)


def mlp_cost(study: Study | None) -> Row:
    """Every share of MLPs from 30% to 50% against none, with Dunnett's intervals: one share alone,
    chosen afterwards, would say less than the claim."""
    claim, published = "30 to 50% of the layers can be MLPs", "no cost (130M)"
    if study is None or study.loss is None:
        return Row(claim, published)
    table, known = study.analysis.arms, study.loss.fit.arms
    near = 0.5 / table["n_layers"]
    inside = table["mlp_of_layers"].between(0.3 - near, 0.5 + near)
    arms = [str(a) for a in table.index[inside] if a in known]
    none = [a for a in study.arms(mlp_of_layers=0.0) if a in known]
    if not arms or not none:
        return Row(claim, published, "its arms are not finished", study=study.name)

    def each(fit: ArmFit) -> list[Estimate]:
        rows = fit.only([none[0], *arms]).against(none[0]).itertuples()
        return [Estimate(r.difference, low=r.dunnett_low, high=r.dunnett_high) for r in rows]

    figures = each(study.loss.fit)
    parts = [
        f"{table['mlp_of_layers'][a]:.1%}: {show(e)}" for a, e in zip(arms, figures, strict=True)
    ]
    ours = f"less none, simultaneous over these (Dunnett): {'; '.join(parts)} nats"
    if study.on_a is not None and {*arms, none[0]} <= set(study.on_a.arms):
        on_a = each(study.on_a)
        ours += f"; on validation A {', '.join(map(show, on_a))}"
        figures += on_a
    ours += unlike(study, f"{table['mlp_of_layers'][arms[-1]]:.0%}", arms[-1], none[0])
    follows = no_cost(figures)
    if any(e.low > 0 for e in figures):
        follows = "disagrees: a cost at some share"
    arms = [*arms, none[0]]
    return Row(claim, published, ours, follows, study.name, "; ".join(arms), study.keys(arms))


def mlp_speed(study: Study | None) -> Row:
    claim, published = "Half of the layers as MLPs train faster than 5%", "20% faster"
    if study is None:
        return Row(claim, published)
    runs = study.analysis.runs
    few = study.analysis.arms["mlp_of_layers"]
    few = few[few > 0]
    half = study.arms(mlp_of_layers=0.5)
    if few.empty or not half or few.idxmin() == half[0]:
        return Row(claim, published, "its arms are not finished", study=study.name)
    arms = [half[0], str(few.idxmin())]
    speeds = runs.pivot_table(index="seed", columns="arm", values="tokens_per_second")
    speeds = speeds.reindex(columns=arms).dropna()
    if speeds.empty:
        return Row(claim, published, "its arms share no seed", study=study.name)
    more = 100 * (speeds[arms[0]] / speeds[arms[1]] - 1)
    where = " and ".join(sorted(set(runs["hardware"])))
    ours = (
        f"{', '.join(signed(v, 1) for v in more)} per cent in tokens/s against {few.min():.0%} "
        f"MLPs, by seed, on {where}"
    )
    # which GPU of its type a run had is not known of all of them
    spread = 100 * (speeds.max() / speeds.min() - 1).max()
    if spread > 1:
        ours += f", whose runs of one arm differ by {spread:.1f} per cent"
    ours += unlike(study, "half", *arms)
    follows = "decides nothing: seeds differ in sign"
    if len(speeds) < 2:
        follows = "decides nothing: one seed"
    elif (more > 0).all():
        follows = "same direction; no interval, as it is not seeds alone that differ"
        follows = follows if spread > 1 else "same direction"
    elif (more < 0).all():
        follows = "disagrees: slower"
    return Row(claim, published, ours, follows, study.name, "; ".join(arms), study.keys(arms))


def longer(study: Study | None) -> Row:
    claim = "Attention without positions holds beyond the training length"
    published = "16K after 4K: 53.4 without, 52.6 with RoPE (points, 840M)"
    if study is None:
        return Row(claim, published)
    own = study.evaluations.tasks.get("length", {})
    none = [arm for arm in own if "null" in arm]
    # means of each seed as they are: those of `Evaluations.table` are rounded
    means = pd.DataFrame(
        [
            {"arm": arm, "seed": c["seed"], "times": times, "loss": loss}
            for arm, contents in own.items()
            for c in contents
            for times, loss in c["by_multiple"].items()
        ]
    )
    asked = {tuple(c["seed"] for c in contents) for contents in own.values()}
    if len(none) != 1 or len(own) != 2 or len(asked) > 1:
        return Row(claim, published, "its arms are not finished", study=study.name)
    (rope,) = set(own) - set(none)
    found = {
        times: fit_of(rows, rows["loss"]).difference(none[0], rope)
        for times, rows in means.groupby("times", sort=False)
    }
    parts = [f"{times}×: {show(e)}" for times, e in found.items()]
    last = list(found.values())[-1]
    if last.high < 0:
        follows = "same direction at the longest, in loss: lower without RoPE"
    elif last.low > 0:
        follows = "disagrees at the longest, in loss: higher without RoPE"
    else:
        follows = "decides nothing at the longest"
    ours = f"loss without less that with RoPE, {'; '.join(parts)} nats"
    arms = list(own)
    return Row(claim, published, ours, follows, study.name, "; ".join(arms), study.keys(arms))


def passes(study: Study | None, note: str) -> Row:
    """The 8% hybrid less the Transformer at the first validation and at the end."""
    claim = "Early in training a hybrid trails the Transformer, then passes it"
    published = "direction alone"
    if study is None:
        return Row(claim, published)
    arms = [a for name in ("hybrid, attention_share=0.0833", "transformer")
            for a in study.arms(name=name)[:1]]  # fmt: skip
    logged = load_metrics(study.path).reindex(columns=["arm", "seed", "tokens", "val_a_loss"])
    logged = logged.dropna()
    runs = len(logged[["arm", "seed"]].drop_duplicates())
    at = [group for _, group in logged.groupby("tokens") if len(group) == runs]
    if len(arms) < 2 or len(at) < 2:
        return Row(claim, published, "its arms are not finished", study=study.name)
    early, late = (fit_of(g, g["val_a_loss"]).difference(*arms) for g in (at[0], at[-1]))
    first, last = (si(group["tokens"].iloc[0]) for group in (at[0], at[-1]))
    ours = (
        f"the 8% hybrid with MLPs less the Transformer on validation A: {show(early)} nats at the "
        f"first validation ({first} tokens), {show(late)} at the end ({last})"
        f"{unlike(study, 'hybrid', *arms)}{f'; {note}' if note else ''}"
    )
    follows = "decides nothing"
    if early.high < 0 and late.high < 0:
        follows = "not seen: ahead from the first validation on"
    elif early.low > 0 and late.high < 0:
        follows = "agrees: behind at first, ahead at the end"
    elif late.low > 0:
        follows = "disagrees: behind at the end"
    return Row(claim, published, ours, follows, study.name, "; ".join(arms), study.keys(arms))


def widest(study: Study, kind: str) -> list[str]:
    """The arm of a kind with the largest state."""
    return by_state(study, kind)[-1:]


def by_state(study: Study, kind: str) -> list[str]:
    """The arms of a kind, the smallest state first."""
    return sorted(study.arms(name=kind), key=lambda a: study.analysis.arms["state_bytes"][a])


def copy_gap(study: Study | None) -> Row:
    """The phonebook at the largest size that the Transformer gets half right: exact match of it, of
    Mamba-2 and of the 8% hybrid with the largest state."""
    claim = "SSMs fail the phonebook, hybrids match the Transformer"
    published = "SSMs fail beyond about 500 tokens (8B)"
    if study is None:
        return Row(claim, published)
    table = study.scores[study.scores["task"] == "phonebook"]
    arms = [a for kind in ("transformer", "hybrid_8", "mamba2") for a in widest(study, kind)]
    own = table[table["arm"].isin(arms)].set_index(["cell", "arm"])
    if len(arms) < 3 or set(arms) - set(own.index.get_level_values("arm")):
        return Row(claim, published, "its arms are not finished", study=study.name)
    cells = list(dict.fromkeys(own.index.get_level_values("cell")))
    able = [c for c in cells if own.loc[(c, arms[0]), "value"] >= 0.5]
    cell = able[-1] if able else cells[0]

    def told(arm: str) -> str:
        r, name = own.loc[(cell, arm)], arm.partition(",")[0]
        each = [f"{v:.0%}" for v in seeds(r)]
        several = f"; seeds {', '.join(each)}" if len(each) > 1 else ""
        return (
            f"{name} {r['value']:.0%} ({max(0, r['low']):.0%} to {min(1, r['high']):.0%}{several})"
        )

    def size(cell: str) -> str:
        tokens = own.loc[cell, "tokens"].mean()
        entries = cell.removeprefix("entries=")
        return f"{entries} entries" + (f" ({tokens:,.0f} tokens)" if tokens > 0 else "")

    ours = f"{size(cell)}: " + ", ".join(told(a) for a in arms)
    smallest = own.loc[(cells[0], arms[2])]
    if smallest["value"] < 0.5:
        ours += f"; Mamba-2 already at {size(cells[0])} {smallest['value']:.0%}"
        if len(seeds(smallest)) > 1:
            ours += f" (seeds {', '.join(f'{v:.0%}' for v in seeds(smallest))})"
    ours += unlike(study, "transformer", arms[0], arms[1])
    apart = study.evaluations.against("phonebook", arms[0], cell)
    if not able:
        follows = "decides nothing: the Transformer does not learn the task"
    elif not math.isfinite(apart["p"][arms[2]]):
        follows = "decides nothing: one seed, or no spread between seeds"
    elif apart["side"][arms[2]] != "lower":
        follows = "decides nothing: Mamba-2 cannot be told from the Transformer"
    else:
        kept = "is between" if apart["side"][arms[1]] == "lower" else "does not"
        follows = (
            f"same direction, in models taught with such texts: Mamba-2 fails, the hybrid {kept}"
        )
    return Row(claim, published, ours, follows, study.name, "; ".join(arms), study.keys(arms))


def seeds(row: pd.Series) -> list[float]:
    """Each seed's own value, of a row of `Evaluations.table`."""
    return [float(v) for v in row["by_seed"].split()]


def right(study: Study, arm: str, task: str) -> pd.DataFrame:
    """What was answered right over all sizes of a task: a row a text, a column a seed (run key)."""
    contents = load_evaluation(study.path, task)
    return pd.DataFrame(
        {
            key: pd.Series(items["exact_match"], index=items["cluster"]).groupby(level=0).mean()
            for key in study.keys([arm]).split()
            if (items := contents.get(key, {}).get("items"))
        }
    )


def points(more: pd.DataFrame, less: pd.DataFrame) -> Estimate:
    """Difference of two means over the same texts, in points, with an interval over texts."""
    found = paired_items(more.mean(axis=1), less.mean(axis=1).reindex(more.index))
    return Estimate(100 * found.value, low=100 * found.low, high=100 * found.high)


def query_first(study: Study | None) -> Row:
    """Phonebooks of all sizes with the question before the book, against the same books with it
    after: Mamba-2 with the largest state, and whether it is still behind the Transformer."""
    claim, published = "Naming the query first helps SSMs, who still trail", "figure unverified"
    if study is None:
        return Row(claim, published)
    arms = [a for kind in ("mamba2", "transformer") for a in widest(study, kind) or [""]]
    first, other = (right(study, arm, "phonebook_reversed") for arm in arms)
    last = right(study, arms[0], "phonebook")
    both = first.columns.intersection(last.columns)  # seeds that were asked both
    if both.empty or other.empty:
        return Row(claim, published, "its arms are not finished", study=study.name)
    first, last = first[both], last[both]
    found, gained = points(first, last), (first - last).mean()
    each = f"; seeds {', '.join(signed(100 * v, 1) for v in gained)}" if len(gained) > 1 else ""
    ours = (
        f"Mamba-2, all sizes: {last.mean().mean():.0%} with the query last, "
        f"{first.mean().mean():.0%} with it first, {show(found, 1)} points over texts{each}; "
        f"Transformer {other.mean().mean():.0%}"
    )
    trails = first.mean().max() < other.mean().min()
    p = ttest_1samp(gained, 0.0).pvalue if len(gained) > 1 else math.nan  # NaN: one seed
    if found.low <= 0 <= found.high or (gained.min() < 0 < gained.max()):
        follows = "decides nothing: zero is between the seeds or inside the interval over texts"
    elif not p < 0.05:
        follows = "decides nothing: too few seeds"
    elif found.low > 0:
        follows = f"agrees that it helps; {'still behind' if trails else 'no longer behind'}"
    else:
        follows = "disagrees: it harms"
    return Row(claim, published, ours, follows, study.name, "; ".join(arms), study.keys(arms))


def more_state(study: Study | None) -> Row:
    """Mamba-2 with the smallest and with the largest state, on the same texts."""
    claim = "An SSM recalls more with a larger state"
    published = "direction alone (Arora et al. 2024, abstract)"
    if study is None:
        return Row(claim, published)
    arms = by_state(study, "mamba2")
    arms = [arms[0], arms[-1]] if len(arms) > 1 else ["", ""]
    told, said = [], []
    for task in ("phonebook", "needle"):
        small, large = (right(study, arm, task) for arm in arms)
        if small.empty or large.empty:
            return Row(claim, published, "its arms are not finished", study=study.name)
        each = ", ".join(f"{v:.0%}" for v in large.mean())
        means = f"{small.mean().mean():.0%} to {large.mean().mean():.0%} (seeds {each})"
        told.append(f"{task} {means}, {show(points(large, small), 1)} points over texts")
        # these two arms' own seeds alone: others, near the ceiling, vary less
        p = math.nan
        if min(small.shape[1], large.shape[1]) > 1:
            p = ttest_ind(large.mean(), small.mean(), equal_var=False).pvalue
        more = large.mean().mean() > small.mean().mean()
        if not p < 0.05:
            said.append(f"{task}: decides nothing, seeds differ too much or are too few")
        else:
            said.append(f"{task}: {'agrees' if more else 'disagrees'}")
    low, high = (f"{study.analysis.arms['x'][a]:.0f}" for a in arms)
    ours = (
        f"state {low} to {high}: {'; '.join(told)}{unlike(study, 'the larger', arms[1], arms[0])}"
    )
    follows = "; ".join(said)
    return Row(claim, published, ours, follows, study.name, "; ".join(arms), study.keys(arms))


def fuzzy(study: Study | None) -> Row:
    claim, published = (
        "Wrong numbers of an SSM share digits with the right one",
        "several digits agree (figure unverified)",
    )
    if study is None:
        return Row(claim, published)
    contents = load_evaluation(study.path, "phonebook")
    arms = widest(study, "mamba2")
    keys = study.keys(arms).split()
    found = [contents[k].get("fuzzy") or {} for k in keys if k in contents]
    found = [f for f in found if f.get("wrong") and f.get("agreement") is not None]
    if not found:
        return Row(claim, published, "no wrong numbers to look at", study=study.name)
    mean = {
        k: float(np.mean([f[k] for f in found])) for k in ("agreement", "permuted", "neighbours")
    }
    worst = {k: max(f[f"{k}_p"] for f in found) for k in ("permuted", "neighbours")}
    ours = (
        f"{mean['agreement']:.1%} of digits agree where the answer is no other number of the book, "
        f"all sizes; permuted answers {mean['permuted']:.1%}, other numbers of the book "
        f"{mean['neighbours']:.1%} (p at most {max(worst.values()):.2g})"
    )
    beyond = max(worst.values()) < 0.05
    follows = "agrees: beyond both nulls" if beyond else "not found beyond chance in every seed"
    return Row(claim, published, ours, follows, study.name, arms[0], " ".join(keys))


def rows(found: dict[str, Study]) -> list[Row]:
    """The table, in the order of the questions."""
    share, mlps = found.get("attn_ratio"), found.get("attn_ratio_mlp")
    large, same_at = found.get("attn_ratio_60m"), "The same at scale=60m, without MLPs"
    again = twins(found)
    curve = ATTENTION_SHARE
    eighth = curve[4 / 48]

    def at(value: float) -> Callable[[Study], list[str]]:
        return lambda s: s.arms(attention_of_layers=value)

    def named(text: str) -> Callable[[Study], list[str]]:
        return lambda s: [str(a) for a in s.analysis.arms.index if str(a).endswith(text)]

    none, half, behind = (v - eighth for v in (curve[0.0], curve[0.5], TRANSFORMER))
    rate = ""
    if mlps is not None:
        own = mlps.analysis.runs.set_index("arm")["lr"]
        own = own[own.index.isin(mlps.arms(name="transformer"))]
        tried = None if own.empty else float(own.iloc[0])
        rate = rate_of(found.get("lr_transformer"), tried, "the Transformer's")
    one_for_four = ", ".join(f"{name} {signed(v, 3)}" for name, v in ONE_FOR_FOUR.items())
    near = [share for share, excess in curve.items() if excess < 0.008]
    hybrid = "hybrid, attention_share=0.0833"
    return [
        best_share(share, "Loss is lowest with few attention layers: about 8% (130M), 12.5% (350M)",
                   f"lowest at 12.5%; {min(near):.0%} to {max(near):.0%} within 0.008 nats"),
        best_share(mlps, "The same where half of the layers are MLPs", "about 8% (130M)"),
        best_share(large, same_at, "about 8% (130M), 12.5% (350M)"),
        of_loss(share, "No attention costs loss, against 8%", f"{signed(none, 3)} nats (350M)",
                none, at(0.0), at(2 / 24), also=again),
        of_loss(mlps, "The same where half of the layers are MLPs",
                f"{signed(none, 3)} nats (350M, without MLPs)", none, at(0.0), at(2 / 24)),
        of_loss(large, same_at, f"{signed(none, 3)} nats (350M)", none, at(0.0), at(2 / 24)),
        of_loss(share, "Half of the layers as attention cost loss, against 8%",
                f"{signed(half, 3)} nats (350M)", half, at(0.5), at(2 / 24), also=again),
        of_loss(large, same_at, f"{signed(half, 3)} nats (350M)", half, at(0.5), at(2 / 24)),
        of_loss(mlps, "A Transformer is behind an 8% hybrid with MLPs",
                f"{signed(behind, 3)} nats (350M, without MLPs in the hybrid)",
                behind, lambda s: s.arms(name="transformer"), lambda s: s.arms(name=hybrid),
                note=rate),
        passes(mlps, rate),
        mlp_cost(found.get("mlp_ratio")),
        mlp_speed(found.get("mlp_ratio")),
        of_loss(found.get("gqa"), "Grouped queries cost almost nothing (two key/value heads)",
                f"{signed(GROUPED_QUERIES)} nats", 0.0, named("heads=2"), named("heads=null")),
        of_loss(found.get("gqa"), "One key/value head (MQA)",
                f"one less four of twelve: {one_for_four} nats (430M)", 0.0, named("heads=1"),
                named("heads=null")),
        of_loss(found.get("rope"), "A hybrid needs no positions in its attention",
                "4K: 52.2 without, 52.4 with RoPE (points, 840M)", 0.0, named("base=null"),
                named("base=10000")),
        longer(found.get("rope")),
        copy_gap(found.get("recall")),
        query_first(found.get("recall")),
        more_state(found.get("recall")),
        fuzzy(found.get("recall")),
    ]  # fmt: skip


def seed_counts(done: pd.DataFrame) -> str:
    """'3 seeds', or '4 to 6 seeds' where arms have different numbers, of a frame of done runs."""
    counts = done.groupby("arm")["seed"].nunique()
    fewest, most = int(counts.min()), int(counts.max())
    if most == 1:
        return "1 seed, no interval"
    return f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"


def set_up(study: Study) -> str:
    """'24 layers, 13.9M parameters beside the embedding, 120M tokens a trial, 6 seeds'."""
    done = study.done
    return (
        f"{done['n_layers'].max():.0f} layers, "
        f"{si(done['non_embedding_params'].median())} parameters beside the embedding, "
        f"{si(done['tokens'].median())} tokens a trial, {seed_counts(done)}"
    )


def repeated(study: Study, other: Study) -> str:
    """What a study says whose trials another one has trained too; empty where not all have been."""
    a, b = (s.analysis.runs.dropna(subset=["val_b_loss"]) for s in (study, other))
    b = b[b["key"].isin(a["key"])]
    if study.loss is None or len(b) < len(a) or (b["val_b_loss"].isin(a["val_b_loss"])).any():
        return ""
    both = a.merge(b[["key", "val_b_loss"]], on="key", suffixes=("", "_there"))
    p, changed = arms_differ(both), changes(both)
    fits = [fit_of(runs, runs["val_b_loss"]) for runs in (a, b)]
    short, places = study.analysis.short, study.analysis.arms["x"]
    best = [lowest(fit) for fit in fits]
    first = str(places[list(fits[0].arms)].idxmin())
    where = "there too" if best[0] == best[1] else f"in {other.name} at {short(best[1])}"
    depend = "are not the same" if p < ALPHA else "show no sign of not being the same"
    apart = show(changed.difference(first, best[0]))
    less = " and ".join(
        f"{show(fit.difference(first, best[0]))} {at}"
        for fit, at in zip(fits, ("here", "there"), strict=True)
    )
    return (
        f"Lowest at {short(best[0])}, {where}. Against {other.name}, whose runs are of the same "
        f"{len(b)} trials, differences between arms {depend}"
        f"{f' (p = {p_value(p)})' if math.isfinite(p) else ''}: {short(first)} less "
        f"{short(best[0])} is {less}, {apart} apart, in nats."
    )


def unmatched(study: Study) -> str:
    """What arms as configured lose or gain against arms of the same pattern that were made as large
    as the first; empty for a study without such pairs."""
    runs = study.analysis.runs
    if study.loss is None or study.on_a is None:
        return ""
    if set(runs.get("match.arms", [])) != {"matched", "unmatched"}:
        return ""
    runs = runs.dropna(subset=["val_a_loss", "val_b_loss"])
    told = []
    for _, rows in runs.sort_values("attention_of_layers").groupby("pattern", sort=False):
        as_it_is, made = (rows[rows["match.arms"] == which] for which in ("unmatched", "matched"))
        if len(as_it_is) and len(made):
            pair = as_it_is["arm"].iloc[0], made["arm"].iloc[0]
            params = [r["non_embedding_params"].iloc[0] for r in (as_it_is, made)]
            on_b, on_a = (fit.difference(*pair) for fit in (study.loss.fit, study.on_a))
            told.append(
                f"{study.analysis.short(pair[1])} {show(on_b)} on B and {signed(on_a.value)} on A "
                f"with {signed(100 * (params[0] / params[1] - 1), 0)}% parameters"
            )
    if not told:
        return ""
    return (
        f"As configured, less what was made as large as the first arm, in nats (95%, each on its "
        f"own): {'; '.join(told)} (beside the embedding; {seed_counts(runs)})."
    )


def changes(both: pd.DataFrame) -> ArmFit:
    """How a loss changes between two trainings of the same trials, by arms and seeds."""
    return fit_of(both, both["val_b_loss"] - both["val_b_loss_there"])


def arms_differ(both: pd.DataFrame) -> float:
    """p of the F test that `changes` are alike in all arms; NaN unless every arm has every seed, or
    if no noise is left."""
    fit = changes(both)
    arms, seeds = len(fit.arms), both["seed"].nunique()
    if len(both) < arms * seeds or arms < 2 or not (fit.df > 0 and fit.sigma > 0):
        return math.nan
    ratio = seeds * np.var(fit.means, ddof=1) / fit.sigma**2
    return float(f.sf(ratio, arms - 1, fit.df))


def benchmarks(study: Study) -> str:
    """Of a study over training tokens, which benchmarks show the most of them: by more than three
    times the noise of seeds, and more than nothing over texts. Empty for another study."""
    table = study.scores[study.scores["task"].str.endswith("shot")]
    if study.analysis.axis.field != "train.tokens" or table.empty:
        return ""
    most = study.analysis.arms["x"].idxmax()
    own = table[(table["arm"] == most) & table["difference"].notna()]
    clear = (own["difference_low"] > 0) & ~(own["over_noise"] < 3)

    def told(r: pd.Series) -> str:
        points, times = signed(100 * r["difference"], 1), r["over_noise"]
        noise = f"{times:.0f} times the noise" if math.isfinite(times) else "seeds do not differ"
        return f"{r['task'].rpartition('-')[0]} ({points} points, {noise})"

    shown = "; ".join(told(r) for _, r in own[clear].iterrows()) or "none"
    hidden = ", ".join(task.rpartition("-")[0] for task in own.loc[~clear, "task"])
    text = f"More tokens show in {shown}." + (f" They do not in {hidden}." if hidden else "")
    if min(len(seeds(r)) for _, r in table.iterrows()) < 2:
        text += " One of the arms has one seed so far, which decides nothing."
    return text


def table(found: dict[str, Study]) -> pd.DataFrame:
    """`rows` as a frame, with the keys of the runs that each figure is from."""
    return pd.DataFrame([vars(row) for row in rows(found)])


def as_html(found: dict[str, Study]) -> str:
    """The rows whose studies have been run, for a notebook."""
    shown = pd.DataFrame([vars(row) for row in rows(found) if row.study])
    if shown.empty:
        return "Their studies have not been run yet."
    return shown[["claim", "published", "ours", "follows"]].to_html(index=False)
