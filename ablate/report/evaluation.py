"""What evaluation/ says of a study's arms: recall by size, needles, loss over length, benchmarks.

Scores are kept by item, so arms are compared on the same items (`stats.paired_items`); seeds of an
arm are averaged item by item first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from ablate.report.frames import evaluated, load_evaluation, records
from ablate.report.plots import COLUMN, STYLE, Plot, accuracy_axis, cut, legend_below, looks, save
from ablate.report.stats import (
    NAN,
    Estimate,
    fit_arms,
    mcnemar,
    paired_items,
    share_of_items,
)
from ablate.report.verdicts import Analysis, Verdict
from ablate.study.show import si

_OF_TRAINING = {"val_a", "val_b", "mqar"}  # shown elsewhere on the page
_HEAT = ("passkey", "needle", "needle_multivalue")


@dataclass(frozen=True)
class Evaluations:
    """tasks: task -> arm -> the contents of its runs' files, one a seed."""

    analysis: Analysis
    tasks: dict[str, dict[str, list[dict[str, Any]]]] = field(repr=False)

    @classmethod
    def read(cls, analysis: Analysis, path: Path) -> Evaluations:
        """Of the runs that count in the analysis; each file with the `seed` of its run."""
        runs = records(analysis.runs.sort_values("seed", kind="stable"))
        tasks: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for name in sorted(set(evaluated(path)) - _OF_TRAINING):
            found = load_evaluation(path, name)
            arms: dict[str, list[dict[str, Any]]] = {str(arm): [] for arm in analysis.arms.index}
            for row in runs:
                content = found.get(row["key"], {})
                if "items" in content:
                    arms[str(row["arm"])].append({**content, "seed": int(row["seed"])})
            if any(arms.values()):
                tasks[name] = {arm: contents for arm, contents in arms.items() if contents}
        return cls(analysis, tasks)

    # --- the table -----------------------------------------------------------------------------

    def table(self) -> pd.DataFrame:
        """One row a task, cell and arm: value, low, high, and by_seed each seed's own; difference
        from the first arm with its interval, p and mcnemar_p; items, tokens of a text on average
        (NaN where they were not counted), verdict ('floor', 'ceiling', 'cut' or 'unended'
        where every seed has it, else ''), fuzzy (of so many seeds); over_noise, the difference in
        standard deviations between seeds, pooled over both arms (NaN with one seed an arm)."""
        rows = []
        for task, arms in self.tasks.items():
            scores = {arm: _scores(contents) for arm, contents in arms.items()}
            reference = next(iter(arms))
            runs = [content for contents in arms.values() for content in contents]
            for cell in dict.fromkeys(cell for content in runs for cell in _cells(content)):
                base = scores[reference].get(cell, _NONE)
                for arm, contents in arms.items():
                    own = scores[arm].get(cell, _NONE)  # asked of other arms only
                    rows.append(_row(task, cell, arm, contents, own, base, arm == reference))
        return pd.DataFrame(rows)

    # --- sentences -----------------------------------------------------------------------------

    def against(self, task: str, reference: str, cell: str | None = None) -> pd.DataFrame:
        """Every arm of a recall task against another, over all its sizes or in one cell: index arm;
        value, by_seed; p, Dunnett's test over seeds of the share of right answers, on the scale of
        its arcsine (where the spread hangs less on the share) with the noise pooled over arms;
        side, 'lower' or 'higher' where both this p is below 5% and the interval over texts leaves
        zero out, else ''."""
        shared = {cell} if cell is not None else self._asked_of_all(task)
        whole, runs = {}, []
        for arm, contents in self.tasks[task].items():
            own = [c for c in contents if shared and shared <= set(_cells(c))]
            scores = _whole(own, shared) if own else _NONE
            if own and np.isfinite(scores.by_seed).all():
                whole[arm] = scores
                right = [math.asin(math.sqrt(value)) for value in scores.by_seed]
                runs += [(arm, c["seed"], v) for c, v in zip(own, right, strict=True)]
        columns = ["arm", "value", "by_seed", "p", "side"]
        if reference not in whole:
            return pd.DataFrame(columns=columns).set_index("arm")
        fit = fit_arms(*zip(*runs, strict=True))
        found = fit.against(reference).set_index("arm") if len(whole) > 1 else pd.DataFrame()
        base, rows = whole[reference], []
        for arm, scores in whole.items():
            p, sign, side = NAN, 0.0, ""
            if arm != reference:
                p, sign = found["dunnett_p"][arm], math.copysign(1, found["difference"][arm])
                texts = paired_items(
                    scores.score, base.score.reindex(scores.score.index), scores.clusters
                )
                if p < 0.05 and min(sign * texts.low, sign * texts.high) > 0:
                    side = "lower" if sign < 0 else "higher"
            rows.append((arm, scores.mean().value, scores.by_seed, p, side))
        return pd.DataFrame(rows, columns=columns).set_index("arm")

    def _asked_of_all(self, task: str) -> set[str]:
        """Cells that every run of a task has."""
        return set.intersection(*(set(_cells(c)) for own in self.tasks[task].values() for c in own))

    def verdicts(self) -> list[Verdict]:
        """A sentence a recall task: which arms can be told from the first one."""
        return [
            self._about(task, next(iter(arms)))
            for task, arms in self.tasks.items()
            if len(arms) > 1 and all("cells" in c for own in arms.values() for c in own)
        ]

    def _about(self, task: str, reference: str) -> Verdict:
        runs = itertools.chain.from_iterable(self.tasks[task].values())
        ends = {cell.get("verdict") for run in runs for cell in run["cells"].values()}
        if ends in ({"floor"}, {"ceiling"}):
            return Verdict("null", f"{task}: every arm is at {ends.pop()}, which tells nothing.")
        table = self.against(task, reference)
        if table.empty:
            return Verdict("null", f"{task}: arms were asked at no size in common: no test.")
        told = {
            str(a): f"{self.analysis.short(str(a))}: {v:.1%}" for a, v in table["value"].items()
        }
        sides = table["side"].drop(reference)
        if not np.isfinite(table["p"].drop(reference)).any():
            text = f"{task}, exact match over all sizes: {'; '.join(told.values())}; "
            return Verdict("null", f"{text}one seed an arm, or no spread between seeds: no test.")
        parts = [told[reference]]
        for side in ("lower", "higher", ""):
            if (sides == side).any():
                arms = ", ".join(told[a] for a in sides.index[sides == side])
                parts.append(f"{side or 'not told from it'}: {arms}")
        text = f"{task}, exact match over all sizes: {'; '.join(parts)} (5%, Dunnett, over seeds)."
        return Verdict("result" if (sides != "").any() else "null", text)

    # --- figures -------------------------------------------------------------------------------

    def plots(self, folder: Path) -> list[Plot | None]:
        return [self._recall(folder), self._needle(folder), self._positions(folder)]

    def _recall(self, folder: Path) -> Plot | None:
        """Accuracy by size of the task, one panel a task, one line an arm."""
        tasks = {
            task: arms
            for task, arms in self.tasks.items()
            if "cells" in next(iter(arms.values()))[0]
        }
        if not tasks:
            return None
        look, told = looks(self.analysis), []
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(COLUMN, 1.9 * len(tasks) + 0.5), layout="constrained")
            axes = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
            for ax, (task, arms) in zip(axes, tasks.items(), strict=True):
                ticks: set[int] = set()
                for arm, contents in arms.items():
                    sizes, found, seeds = by_size(contents)
                    ticks.update(sizes)
                    y, bars = [e.value for e in found], error_bars(found)
                    name = self.analysis.short(arm)
                    ax.errorbar(sizes, y, yerr=bars, markersize=4, label=name, **look[arm].style)
                    draw_seeds(ax, sizes, seeds, look[arm].colour)
                    pairs = ", ".join(f"{s}: {v:.0%}" for s, v in zip(sizes, y, strict=True))
                    told.append(f"{task}, {name}: {pairs}")
                ax.set_xscale("log", base=2)
                ax.set_xticks(sorted(ticks), [_size(s) for s in sorted(ticks)])
                ax.xaxis.set_minor_locator(NullLocator())
                accuracy_axis(ax)
                ax.set_title(task)
            axes[0].set_ylabel("exact match")
            if len(look) > 1:
                legend_below(figure, axes[0], columns=3)
            caption = (
                "Exact match by size of the task (entries, pairs, words or tokens), with 95% "
                f"intervals over documents.{SEEDS_DRAWN}"
            )
            return save(figure, folder, "recall", "; ".join(told) + ".", caption)

    def _needle(self, folder: Path) -> Plot | None:
        """Heat maps of accuracy over length and depth, one an arm, the tasks one after another."""
        panels = [(task, arm) for task in _HEAT if task in self.tasks for arm in self.tasks[task]]
        if not panels:
            return None
        told, columns = [], min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        with mpl.rc_context({**STYLE, "axes.grid": False}):
            figure = Figure(figsize=(COLUMN, 1.35 * rows + 0.4), layout="constrained")
            axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
            for ax in axes.flat[len(panels) :]:
                ax.set_visible(False)
            for ax, (task, arm) in zip(axes.flat, panels, strict=False):
                grid = _heat(self.tasks[task][arm])
                image = ax.imshow(grid.to_numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis")
                ax.set_xticks(range(len(grid.columns)), [_size(c) for c in grid.columns])
                depths = [f"{float(str(d)):.0%}" for d in grid.index]
                every = max(1, math.ceil(len(depths) / 5))
                ax.set_yticks(range(0, len(depths), every), depths[::every])
                name = self.analysis.short(arm)
                size = 8 if columns < 3 else 7
                ax.set_title(cut(name, 60 // columns), fontsize=size, fontweight="normal")
                if ax in axes[:, 0]:
                    ax.set_ylabel(f"{task}: depth", fontsize=8)
                mean = float(np.nanmean(grid.to_numpy())) if grid.size else NAN
                told.append(f"{task}, {name}: {mean:.0%} on average")
            bar = figure.colorbar(image, ax=axes, shrink=0.8)
            bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            caption = (
                "Exact match by length (across, tokens) and depth (down) of the needle, seeds "
                "averaged."
            )
            return save(figure, folder, "needle", "; ".join(told) + ".", caption)

    def _positions(self, folder: Path) -> Plot | None:
        """Loss by position within the training length, and at multiples of it."""
        arms = self.tasks.get("length")
        if not arms:
            return None
        look, told = looks(self.analysis), []
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(COLUMN, 4.4), layout="constrained")
            by_position, by_multiple = figure.subplots(2, 1)
            for arm, contents in arms.items():
                places = contents[0]["by_position"]["last"]
                losses = np.mean([c["by_position"]["loss"] for c in contents], axis=0)
                label = self.analysis.short(arm)
                line = {**look[arm].style, "marker": "o"}
                by_position.plot(places, losses, markersize=2.5, **line)
                shared = [m for m in contents[0]["by_multiple"]
                          if all(m in c["by_multiple"] for c in contents)]  # fmt: skip
                multiples = [int(m) for m in shared]
                means = [np.mean([c["by_multiple"][m] for c in contents]) for m in shared]
                by_multiple.plot(multiples, means, markersize=3.5, label=label, **line)
                told.append(
                    f"{label}: "
                    + ", ".join(f"{m} times {v:.3f}" for m, v in zip(multiples, means, strict=True))
                )
                by_multiple.set_xscale("log", base=2)
                by_multiple.set_xticks(multiples, [f"{m}×" for m in multiples])
            by_multiple.xaxis.set_minor_locator(NullLocator())
            by_position.set_xscale("log", base=2)
            by_position.xaxis.set_major_formatter(FuncFormatter(lambda v, _: si(v)))
            by_position.set_xlabel("position in the training length (tokens)")
            by_position.set_ylabel("loss (nats a token)")
            by_multiple.set_xlabel("context, in training lengths")
            by_multiple.set_ylabel("loss (nats a token)")
            if len(arms) > 1:
                legend_below(figure, by_multiple, columns=3)
            n = next(iter(arms.values()))[0]["documents"]
            caption = (
                f"Loss over length in {n} long documents. Below, the same tokens are scored after "
                "more and more of the text before them."
            )
            return save(figure, folder, "positions", "; ".join(told) + ".", caption)


# --- items ---------------------------------------------------------------------------------------


def _size(value: Any) -> str:
    """A number of tokens or entries: 1024 as it is, 131k short."""
    number = float(value)
    return f"{number:.0f}" if number < 1e5 else si(number)


@dataclass(frozen=True)
class _Scores:
    """Of one arm: score by item, seeds averaged; clusters; the mean of each seed."""

    score: pd.Series
    clusters: pd.Series
    by_seed: list[float]

    def mean(self) -> Estimate:
        """With an interval over documents."""
        return share_of_items(self.score, self.clusters)


_NONE = _Scores(pd.Series(dtype=float), pd.Series(dtype=object), [])


def _cells(content: dict[str, Any]) -> list[str]:
    if "cells" in content:
        return list(content["cells"])
    return list(content["by_multiple"]) if "by_multiple" in content else [""]


def _items(content: dict[str, Any]) -> pd.DataFrame:
    """Columns cell, id, cluster, score; an id names the same item of a cell in every run."""
    items = content["items"]
    if "by_multiple" in content:
        own = {multiple: items[multiple] for multiple in content["by_multiple"]}
        table = pd.DataFrame(own).melt(var_name="cell", value_name="score")
        table["id"] = table["cluster"] = table.groupby("cell").cumcount().astype(str)
        return table
    if "cells" in content:
        table = pd.DataFrame({k: items[k] for k in ("cell", "cluster", "exact_match")})
        table["id"] = table["cluster"] + "#" + table.groupby("cluster").cumcount().astype(str)
        return table.rename(columns={"exact_match": "score"})
    return pd.DataFrame({"cell": "", **{k: items[k] for k in ("id", "cluster", "score")}})


def _scores(contents: list[dict[str, Any]]) -> dict[str, _Scores]:
    """By cell."""
    seeds = [dict(iter(_items(content).groupby("cell", sort=False))) for content in contents]
    found = {}
    for cell in dict.fromkeys(cell for seed in seeds for cell in seed):
        own = [seed[cell] for seed in seeds if cell in seed]
        groups = pd.concat(own).groupby("id", sort=False)
        by_seed = [float(items["score"].mean()) for items in own]
        found[str(cell)] = _Scores(groups["score"].mean(), groups["cluster"].first(), by_seed)
    return found


def _whole(contents: list[dict[str, Any]], cells: set[str]) -> _Scores:
    """Some cells of a recall task together; every one of `contents` has them."""
    parts = {cell: part for cell, part in _scores(contents).items() if cell in cells}
    score = pd.concat({cell: part.score for cell, part in parts.items()})
    clusters = pd.concat({cell: part.clusters for cell, part in parts.items()})
    items = [pd.DataFrame({k: c["items"][k] for k in ("cell", "exact_match")}) for c in contents]
    by_seed = [float(own.loc[own["cell"].isin(cells), "exact_match"].mean()) for own in items]
    return _Scores(score, clusters, by_seed)


def _row(
    task: str,
    cell: str,
    arm: str,
    contents: list[dict[str, Any]],
    own: _Scores,
    base: _Scores,
    is_reference: bool,
) -> dict[str, Any]:
    content = contents[0]
    mean = own.mean()
    difference, exact = Estimate(NAN), NAN
    shared = own.score.index.intersection(base.score.index)
    if not is_reference and len(shared):
        one, other = own.score[shared], base.score[shared]
        difference = paired_items(one, other, own.clusters[shared])
        binary = bool(one.isin([0.0, 1.0]).all() and other.isin([0.0, 1.0]).all())
        single = len(own.by_seed) == len(base.by_seed) == 1 and own.clusters[shared].is_unique
        if binary and single:
            exact = mcnemar(one, other)
    cells = [c["cells"][cell] for c in contents if "cells" in c and cell in c["cells"]]
    verdicts = {c.get("verdict") for c in cells}
    tokens = [c["tokens"] for c in cells if c.get("tokens", -1) > 0]
    fuzzy = [bool((c.get("fuzzy") or {}).get("is_fuzzy")) for c in contents]
    return {
        "task": task,
        "cell": f"{cell} training lengths" if "by_multiple" in content else cell,
        "arm": arm,
        "metric": content["metric"],
        "items": len(own.score),
        "tokens": float(np.mean(tokens)) if tokens else NAN,
        "value": mean.value,
        "low": mean.low,
        "high": mean.high,
        "by_seed": " ".join(f"{value:.4f}" for value in own.by_seed),
        "difference": difference.value,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "p": difference.p,
        "mcnemar_p": exact,
        "over_noise": difference.value / noise if (noise := _noise(own, base)) else NAN,
        "verdict": (verdicts.pop() or "") if len(verdicts) == 1 else "",
        "fuzzy": sum(fuzzy),
    }


def _noise(one: _Scores, other: _Scores) -> float:
    """Standard deviation between seeds, pooled; 0 where no arm has two that differ."""
    several = [arm.by_seed for arm in (one, other) if len(arm.by_seed) > 1]
    freedom = sum(len(seeds) - 1 for seeds in several)
    squares = sum(float(np.var(seeds)) * len(seeds) for seeds in several)
    return math.sqrt(squares / freedom) if freedom else 0.0


SEEDS_DRAWN = " Small points are single seeds; intervals are over texts, for these models alone."


def by_size(
    contents: list[dict[str, Any]],
) -> tuple[list[int], list[Estimate], list[list[float]]]:
    """Sizes of a task, accuracy at each (cells of one size together, seeds averaged), and that of
    every seed."""
    sizes = sorted({int(x) for c in contents for x in c["items"]["x"]})
    items = [pd.DataFrame({k: c["items"][k] for k in ("x", "exact_match")}) for c in contents]
    seeds = [own.groupby("x")["exact_match"].mean() for own in items]
    names = {name: cell["x"] for c in contents for name, cell in c["cells"].items()}
    scores = _scores(contents)
    found = []
    for size in sizes:
        parts = [scores[name] for name, x in names.items() if x == size]
        whole = _Scores(
            pd.concat([p.score for p in parts]), pd.concat([p.clusters for p in parts]), []
        )
        found.append(whole.mean())
    return sizes, found, [[float(own[s]) for own in seeds if s in own] for s in sizes]


def error_bars(estimates: Sequence[Estimate]) -> np.ndarray:
    """(2, n): lengths below and above; 0 where there is no interval."""
    lengths = np.array([(e.value - e.low, e.high - e.value) for e in estimates]).T
    return np.nan_to_num(np.maximum(lengths, 0.0))


def draw_seeds(ax: Axes, sizes: list[int], seeds: list[list[float]], colour: str) -> None:
    """Each seed as a small point, where there are several."""
    if max(map(len, seeds), default=0) > 1:
        x = [size for size, own in zip(sizes, seeds, strict=True) for _ in own]
        y = [value for own in seeds for value in own]
        ax.plot(x, y, "o", color=colour, markersize=2.2, alpha=0.6, linestyle="none")


def _heat(contents: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean exact match, depths down and lengths across."""
    names = ("x", "depth", "exact_match")
    joined = pd.concat([pd.DataFrame({k: c["items"][k] for k in names}) for c in contents])
    return joined.pivot_table(index="depth", columns="x", values="exact_match", aggfunc="mean")
