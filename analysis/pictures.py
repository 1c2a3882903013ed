"""The README's two pictures, from exported studies alone."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from findings import KINDS, TASKS, Study, set_up, widest
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from ablate.report.evaluation import SEEDS_DRAWN, by_size, draw_seeds, error_bars
from ablate.report.frames import load_details
from ablate.report.plots import (
    BLUE,
    CYCLE,
    GREEN,
    MARKERS,
    STYLE,
    VERMILLION,
    Plot,
    accuracy_axis,
    legend_below,
    save,
)
from ablate.report.published import ATTENTION_SHARE


def attention_share(found: dict[str, Study], folder: Path) -> Plot | None:
    """Loss less that without attention, over the share of attention, beside the published curve."""
    shown = [
        (found[name], label, colour, marker)
        for name, label, colour, marker in (
            ("attn_ratio", "Mamba-2 and attention", BLUE, "o"),
            ("attn_ratio_mlp", "the same, half of the layers MLPs", VERMILLION, "s"),
            ("attn_ratio_60m", "Mamba-2 and attention, larger", GREEN, "^"),
        )
        if name in found and found[name].loss is not None
    ]
    # one seed beside several would be looked at as if it were known as well
    shown = [entry for entry in shown if entry[0].loss.has_interval] or shown
    if not shown:
        return None
    told = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        ax = figure.subplots()
        ax.axhline(0, color="#555555", linewidth=0.8)
        for k, (study, label, colour, marker) in enumerate(shown):
            fit, places = study.loss.fit, study.analysis.arms["x"]
            arms = study.main_series
            reference = arms[0]
            anchors = [a for a in study.arms(name="transformer") if a in fit.arms]
            # simultaneous: a bar that leaves zero out is a difference that Dunnett's test finds
            table = fit.against(reference).set_index("arm")
            for group, form in ((arms, marker), (anchors, "*")):
                x = [places[a] + 0.005 * (k - (len(shown) - 1) / 2) for a in group]
                d = table.reindex(group)
                y = d["difference"].fillna(0.0).tolist()
                half = (d["dunnett_high"] - d["difference"]).tolist()
                name = label if form == marker else "Transformer (attention and MLPs in turn)"
                if group:
                    line = "-" if form == marker else "none"
                    ax.errorbar(x, y, yerr=[0 if h != h else h for h in half], label=name,
                                color=colour, marker=form, markersize=8 if form == "*" else 4.5,
                                linestyle=line, linewidth=0.9, elinewidth=1.2)  # fmt: skip
                told += [
                    f"{label}, {places[a]:.1%}: {v:+.4f}" for a, v in zip(group, y, strict=True)
                ]
            on_a = study.analysis.runs.groupby("arm")["val_a_loss"].mean().reindex(arms)
            if on_a.notna().all():
                ax.plot([places[a] for a in arms], on_a - on_a[reference], linestyle=":",
                        color=colour, linewidth=1.2)  # fmt: skip
        ax.plot([], [], linestyle=":", color="#555555", linewidth=1.2, label="on validation A")
        base = ATTENTION_SHARE[0.0]
        ax.plot(list(ATTENTION_SHARE), [v - base for v in ATTENTION_SHARE.values()], "--",
                color="#999999", linewidth=1.1, zorder=1,
                label="published, 350M, 48 layers (Dao and Gu 2024)")  # fmt: skip
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_xlabel("share of layers that are attention")
        ax.set_ylabel("loss less that\nwithout attention\n(nats a token)")
        legend_below(figure, ax, columns=1)
        sizes = "; ".join(f"{label}: {set_up(study)}" for study, label, _, _ in shown)
        caption = (
            "Differences within paired seeds on validation B, with simultaneous 95% intervals "
            "(Dunnett); below zero, attention helps. Intervals cover seeds, not text: dotted, "
            "validation A. Markers are shifted sideways where studies overlap. "
            f"{sizes}."
        )
        return save(figure, folder, "attention_share", "; ".join(told) + ".", caption)


def recall(study: Study | None, folder: Path) -> Plot | None:
    """Exact match by size of each task at the largest state, and of one size over the state."""
    tasks = [t for t in TASKS if study is not None and t in study.evaluations.tasks]
    if study is None or not tasks:
        return None
    told = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.4 * ((len(tasks) + 1) // 2) + 0.6), layout="constrained")
        axes = figure.subplots((len(tasks) + 1) // 2, 2, squeeze=False, sharey=True).flat
        for ax, task in zip(axes, tasks, strict=False):
            arms = study.evaluations.tasks[task]
            for i, (kind, label) in enumerate(KINDS.items()):
                for arm in widest(study, kind):
                    if arm not in arms:
                        continue
                    sizes, marks, seeds = by_size(arms[arm])
                    y = [m.value for m in marks]
                    ax.errorbar(sizes, y, yerr=error_bars(marks), label=label, color=CYCLE[i],
                                markersize=4, marker=MARKERS[i], linewidth=1.1,
                                elinewidth=0.9)  # fmt: skip
                    draw_seeds(ax, sizes, seeds, CYCLE[i])
                    values = ", ".join(f"{s}: {v:.0%}" for s, v in zip(sizes, y, strict=True))
                    told.append(f"{TASKS[task]}, {label}: {values}")
                    ax.set_xscale("log", base=2)
                    ax.set_xticks(sizes, [str(s) for s in sizes])
            ax.xaxis.set_minor_locator(NullLocator())
            accuracy_axis(ax)
            ax.set_xlabel(TASKS[task])
        for ax in list(axes):  # an odd number of tasks leaves one panel empty
            ax.set_visible(False)
        first = figure.axes[0]
        first.set_ylabel("exact match")
        legend_below(figure, first, columns=5)
        state = f"{study.analysis.arms['x'].max():.0f}"
        taught = f"{load_details(study.path)['config.data.recall.share'].mean():.0%}"
        among = _seeds({label: widest(study, k) for k, label in KINDS.items()}, study)
        caption = (
            f"Exact match by size of the task, Mamba-2 layers with a state of {state}, {among}, "
            f"with 95% intervals.{SEEDS_DRAWN} Of the rows that they were trained "
            f"on, {taught} hold such documents, in other templates."
        )
        return save(figure, folder, "recall", "; ".join(told) + ".", caption)


def _seeds(shown: dict[str, list[str]], study: Study) -> str:
    """'the mean of 2 seeds', with the lines that have fewer."""
    count = study.analysis.runs.groupby("arm")["seed"].nunique()
    own = {label: int(count[arms[0]]) for label, arms in shown.items() if arms}
    most = max(own.values())
    fewer = [f"{label}: {n}" for label, n in own.items() if n < most]
    mean = f"the mean of {most} seeds" if most > 1 else "one seed"
    return mean + (f" ({', '.join(fewer)})" if fewer else "")


def state_size(study: Study | None, folder: Path, task: str = "phonebook") -> Plot | None:
    """Exact match over all sizes of a task, against the state size of the Mamba-2 layers."""
    if study is None or task not in study.evaluations.tasks:
        return None
    arms, told = study.evaluations.tasks[task], []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.6), layout="constrained")
        ax = figure.subplots()
        for i, (kind, label) in enumerate(KINDS.items()):
            own = [a for a in study.arms(name=f"{kind},") if a in arms]
            if not own:
                continue
            y = [sum(c["value"] for c in arms[a]) / len(arms[a]) for a in own]
            if kind == "transformer":
                ax.axhline(y[-1], color=CYCLE[i], linestyle="--", linewidth=1.0, label=label)
            else:
                x = [study.analysis.arms["x"][a] for a in own]
                ax.plot(x, y, color=CYCLE[i], marker=MARKERS[i], markersize=4, label=label)
                ax.set_xscale("log", base=2)
                ax.set_xticks(x, [f"{v:.0f}" for v in x])
            told.append(f"{label}: {', '.join(f'{v:.0%}' for v in y)}")
        ax.xaxis.set_minor_locator(NullLocator())
        accuracy_axis(ax)
        ax.set_xlabel("state size of the Mamba-2 layers")
        ax.set_ylabel(f"{task}, exact match")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right center")
        caption = "Exact match over all sizes of the task; a Transformer has no such state."
        return save(figure, folder, "state_size", "; ".join(told) + ".", caption)
