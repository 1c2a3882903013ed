"""Every page, picture, notebook and table of the results, again from the committed frames alone.

    make analysis        (or: python analysis/build.py [--no-notebooks])

For each folder of analysis/results: its report. Then the README's pictures (docs/), its tables and
those of docs/findings.md and docs/reproduction.md (between markers), findings.csv, and the
notebooks, executed.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import findings
import pandas as pd
import pictures
from findings import Study

from ablate.errors import UserError
from ablate.report.export import gpu_hours
from ablate.report.frames import load_evaluation
from ablate.report.page import write_report
from ablate.report.verdicts import signed
from ablate.run import atomic_write
from ablate.study.folder import StudyFolder
from ablate.study.rerun import ENOUGH

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ("attention_share.ipynb", "recall.ipynb")
NONE_YET = "No study on a GPU is committed yet; `docs/reproduction.md` says how they are run.\n"

PROVENANCE = (
    "Published figures: Waleffe et al. 2024 (arXiv 2406.07887; 130M, 840M, 8B) and, with 350M, Dao "
    "and Gu 2024 (arXiv 2405.21060), as secondary sources give them, and Ren et al. 2024 (arXiv "
    "2406.07522; 430M), on other text and at other sizes: what agrees is a direction or a "
    "difference, not a loss."
)
MODEL = (
    "Intervals and p of losses are those of arm + seed + noise, with one normal noise "
    "for all arms of a study (so that two seeds have the degrees of freedom of all arms; an arm "
    "that varies more than others has too narrow an interval), and of 'worse than that' those "
    "of Hsu's comparisons. They cover seeds: not other text, machines, sizes or learning rates. "
    "Nothing is corrected for the number of rows."
)


def main(words: list[str]) -> int:
    """Build everything; 2 with one sentence where something is missing."""
    try:
        build(ROOT, notebooks="--no-notebooks" not in words)
    except UserError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 2
    return 0


def build(root: Path, *, notebooks: bool = True) -> None:
    results, docs = root / "analysis" / "results", root / "docs"
    found = findings.studies(results)
    for study in found.values():
        page = write_report(study.path, shown=study.path.relative_to(root))
        print(f"{study.name}: {page.relative_to(root)}")
    shown = [
        plot
        for plot in (
            pictures.attention_share(found, docs),
            pictures.recall(found.get("recall"), docs),
        )
        if plot
    ]
    table = findings.table(found)
    atomic_write(results / "findings.csv", table.to_csv(index=False))
    block = findings.in_short(found)
    block += "".join(f"![{p.caption}](docs/{p.png.name})\n\n*{p.caption}*\n\n" for p in shown)
    put(root / "README.md", "results", block or NONE_YET)
    put(root / "README.md", "findings", _claims(table, found) + "\n" + _cost(found))
    put(docs / "findings.md", "findings", _findings(table, found))
    put(docs / "reproduction.md", "cost", _costs(found) if found else NONE_YET)
    put(docs / "reproduction.md", "reruns", _reruns(found))
    for name in NOTEBOOKS if notebooks else ():
        execute(root / "analysis" / name)
        print(f"executed: analysis/{name}")


def put(path: Path, name: str, block: str) -> None:
    """Replace what stands between a text's markers."""
    start, end = f"<!-- {name}: made by `make analysis` -->\n", f"<!-- end of {name} -->"
    text = path.read_text()
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"'{path.name}' lacks the markers '{start.strip()}' and '{end}'")
    atomic_write(path, f"{before}{start}{block}{end}{after}")


# --- blocks --------------------------------------------------------------------------------------


def _claims(table: pd.DataFrame, found: dict[str, Study]) -> str:
    """The claims that a study speaks to and what follows for each."""
    lines = ["| published claim | published | what follows here | study (seeds) |"]
    lines += ["|---|---|---|---|"]
    for row in table[table["ours"] != findings.NOT_RUN].itertuples():
        study = f"{_link(row.study)} ({_seeds(found[row.study])})"
        told = "; ".join(filter(None, (row.figure, row.follows))) or row.ours
        lines.append(f"| {row.claim} | {row.published} | {told} | {study} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _findings(table: pd.DataFrame, found: dict[str, Study]) -> str:
    """The claims that a study speaks to, with our figures; other studies in a sentence each."""
    run = table[table["ours"] != findings.NOT_RUN]
    lines = []
    if len(run):
        header = ["published claim", "published", "ours (95%, each on its own)"]
        lines += [f"| {' | '.join([*header, 'what follows', 'study (seeds)'])} |"]
        lines += ["|---|---|---|---|---|"]
    for row in run.itertuples():
        lines.append(
            f"| {row.claim} | {row.published} | {row.ours} | {row.follows or '–'} | "
            f"{_link(row.study, '../')} ({_seeds(found[row.study])}) |"
        )
    if len(run):
        lines += ["", PROVENANCE, "", MODEL]
    for name in sorted(set(found) - set(run["study"])):
        question = StudyFolder(found[name].path).index().get("question")
        lines += ["", f"{_link(name, '../')}: {question} {_best(found[name], found)}"]
    if len(run) < len(table):
        left = table.loc[table["ours"] == findings.NOT_RUN, "claim"].unique()
        lines += ["", f"Not finished here: {'; '.join(left)}."]
    return "\n".join(lines).strip() + "\n"


def _seeds(study: Study) -> str:
    return findings.seed_counts(study.done)


def _link(study: str, up: str = "") -> str:
    return f"[{study}]({up}analysis/results/{study}/README.md)"


def _best(study: Study, found: dict[str, Study]) -> str:
    """What a study says that no claim is about, or else its arm with the lowest loss."""
    done = study.done
    means = done.groupby("arm")["val_b_loss"].mean()
    planned = len(StudyFolder(study.path).index().get("cells", {}))
    if len(done) < planned:
        known = {k for s in found.values() if s is not study for k in s.analysis.runs["key"]}
        again = int(done["key"].isin(known).sum())
        return f"{len(done)} of {planned} trials so far" + (
            f", {again} of them trials of another study too." if again else "."
        )
    for other in found.values():
        if other is not study and (told := findings.repeated(study, other)):
            return told
    told = findings.benchmarks(study) or findings.unmatched(study) or " ".join(_apart(study))
    if told:
        return told
    seeds = findings.seed_counts(done)
    if len(set(done["lr"])) > 1 and len(set(done["pattern"])) > 1:
        best = done.loc[done.groupby("pattern")["val_b_loss"].idxmin()].sort_values(
            "attention_of_layers"
        )
        at = [f"{r.attention_of_layers:.1%}: {r.lr:g}" for r in best.itertuples()]
        rates = sorted(set(done["lr"]))
        apart = max(b / a for a, b in itertools.pairwise(rates))
        return (
            f"Of {len(rates)} rates, {apart:.3g} times apart, the one with the lowest loss, by "
            f"share: {', '.join(at)} ({seeds})."
        )
    return (
        f"Lowest loss: {means.min():.3f} nats at {means.idxmin()}, of {len(means)} arms ({seeds})."
    )


def _cost(found: dict[str, Study]) -> str:
    if not found:
        return ""
    runs = pd.concat([study.analysis.frame for study in found.values()])
    # a trial whose folder lies in two studies was trained once
    runs = runs[runs["state"] == "done"].drop_duplicates(["key", "trial_seconds"])
    hours, keys = gpu_hours(runs), runs["key"]
    where = sorted(set(runs["hardware"].dropna().astype(str)) - {""})
    reruns = sum(len(kept) for study in found.values() for kept in _kept(study).values())
    trials = f"{len(keys)} trials"
    if len(keys) > len(set(keys)):
        trials += f" of {len(set(keys))} configs, seeds included"
    trials += f" and {reruns} reruns" if reruns else ""
    return (
        f"{trials}; {hours:.1f} hours of trials on {' and '.join(where)}. `docs/findings.md` has "
        "our figures with their intervals, what else differs between the arms, and what other "
        "studies say; `analysis/results/findings.csv` has the runs that each is from, by key.\n"
    )


def _costs(found: dict[str, Study]) -> str:
    """What each study took, and its noise over seeds, with what of it all arms share."""
    header = ["study", "trials", "tokens a trial", "minutes a trial (median)", "hours", "on"]
    header += ["seed noise, nats (SD)", "shared by arms (95%)"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for study in found.values():
        done = study.done
        noise, shared = "–", "–"
        if study.loss is not None and study.loss.has_interval:
            noise, own = f"{study.loss.fit.total_sigma():.4f}", study.loss.fit.seed_correlation()
            if math.isfinite(own.value):
                shared = f"{own.value:.2f} ({own.low:.2f} to {own.high:.2f})".replace("-", "−")
        fewest, most = done["tokens"].min(), done["tokens"].max()
        tokens = f"{fewest:,.0f}" + (f" to {most:,.0f}" if most > fewest else "")
        cells = [study.name, str(len(done)), tokens]
        cells += [
            f"{done['trial_seconds'].median() / 60:.1f}",
            f"{gpu_hours(study.analysis.frame):.2f}",
        ]
        cells += [", ".join(sorted(set(done["hardware"]))), noise, shared]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _reruns(found: dict[str, Study]) -> str:
    """Every rerun that a run folder has kept, in a row each or, where many were alike, by how far
    they lie apart; and trials that two studies have both trained."""
    lines = [
        "| study | run | loss on B, then | now | difference | tolerance |",
        "|---|---|---|---|---|---|",
    ]
    after = []
    for study in found.values():
        for key, reruns in _kept(study).items():
            summed = _alike(reruns)
            for again in reruns:
                if again in summed:
                    continue
                old, new = again["old"].get("val_b"), again["new"].get("val_b")
                allowed = again["tolerance"]
                allowed = allowed.get("val_b") if isinstance(allowed, dict) else allowed
                if old is not None and new is not None:
                    difference = signed(new - old) if new != old else "0"
                    lines.append(
                        f"| {study.name} | `{key}` | {old:.6f} | {new:.6f} | {difference} | "
                        f"{allowed:g}: {again['why']} |"
                    )
        after += _apart(study)
    after += _twice(list(found.values()))
    if len(lines) == 2:
        lines = ["No trial has been rerun yet."]
    return "\n".join([*lines, *("\n" + sentence for sentence in after)]) + "\n"


def _kept(study: Study) -> dict[str, list[dict[str, Any]]]:
    """The reruns of each of a study's runs, oldest first."""
    contents = load_evaluation(study.path, "rerun")
    return {key: list(content["reruns"].values()) for key, content in contents.items()}


def _alike(reruns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that nothing but train.deterministic=false set apart, where they are enough to tell
    how far such runs lie apart."""
    alike = [again for again in reruns if again.get("alike")]
    return alike if len(alike) >= ENOUGH else []


def _apart(study: Study) -> list[str]:
    """How far runs of one trial lie apart that were `_alike`."""
    found = []
    for key, reruns in _kept(study).items():
        alike = _alike(reruns)
        if not alike:
            continue
        losses = pd.DataFrame([alike[0]["old"], *(again["new"] for again in alike)])
        (arm,) = study.analysis.frame.loc[study.analysis.frame["key"] == key, "arm"]
        who = f"{len(losses)} runs of {arm} (`{key}`), not made to be deterministic,"
        apart = losses.max() - losses.min()
        if not apart.any():
            found.append(f"{who} agree to the last bit.")
            continue
        each = [
            f"{apart[name]:.4f} nats on {shown} (SD {losses[name].std():.4f})"
            for name, shown in (("val_a", "A"), ("val_b", "B"))
            if name in losses
        ]
        found.append(f"{who} lie within {' and '.join(each)}.")
    return found


_SAME = ["key", "val_a_loss", "val_b_loss"]


def _twice(found: list[Study]) -> list[str]:
    """What became of trials that two studies have each trained."""
    done = [s.done for s in found]
    told = []
    for i, j in itertools.combinations(range(len(found)), 2):
        two = done[j]
        for k in set(range(j)) - {i}:  # what ended as it did there is told there
            two = two[~two.set_index(_SAME).index.isin(done[k].set_index(_SAME).index)]
        both = done[i].merge(two, on="key", suffixes=("", "_two"))
        both = both[both["trial_seconds"] != both["trial_seconds_two"]]  # not a copy of the folder
        if len(both):
            told.append(_compared(found[i], found[j], both))
    return told


def _compared(one: Study, two: Study, both: pd.DataFrame) -> str:
    a, b = (both[f"{name}_two"] - both[name] for name in ("val_a_loss", "val_b_loss"))
    said = f"{len(both)} {'trial was' if len(both) == 1 else 'trials were'} trained in {one.name}"
    said += f" and in {two.name}"
    if not a.any() and not b.any():
        return f"{said}, and their losses are the same to the last bit."
    exact = int(((a == 0) & (b == 0)).sum())
    return (
        f"{said}: the second less the first on B {signed(b.mean())} nats on average, "
        f"{signed(b.min())} to {signed(b.max())}; {exact or 'none'} the same to the last bit."
    )


def execute(path: Path) -> None:
    """Run a notebook in its folder and keep its outputs; nothing that changes from run to run."""
    try:
        import nbformat
        from nbclient import NotebookClient
    except ImportError:
        raise UserError(
            "notebooks need nbclient and ipykernel: pip install 'ablate-hybrids[dev]'"
        ) from None
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        record_timing=False,
        timeout=600,
        coalesce_streams=True,  # what is printed comes in pieces that clocks decide
    )
    client.extra_arguments = ["--IPKernelApp.log_level=40"]  # no advice on the way of messages
    client.execute(cwd=str(path.parent))
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    atomic_write(path, nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
