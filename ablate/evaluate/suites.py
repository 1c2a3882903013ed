"""Suites of lm-eval tasks by name, with shots, the metric that is reported, and published figures.

    mamba7b      tri-ml/mamba-7b-rw's card
    btlm         the ten tasks of BTLM-3B-8K and of mamba-2.8b-slimpj
    oute         the seven tasks of Lite-Oute-2-Mamba2Attn-250M, at 0 and at 5 shots
    empirical12  the twelve tasks of Waleffe et al. 2024 (arXiv 2406.07887)
    small        what shows more training in models below 150M parameters, by more than three times
                 the noise of seeds (`+sweep=signal`, analysis/results/signal)
    mmlu         its three forms at 5 shots: the letter of a choice after a list of choices
                 (standard), the text of a choice after the list, and the text alone (cloze)

Cards that give no metric are read as lm-eval's usual one: length-normalised accuracy where choices
are whole sentences. Figures are percentages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ablate.errors import UserError, did_you_mean

ACC, NORM = "acc,none", "acc_norm,none"
MMLU_TEXT = "mmlu_text"  # lm-eval has no such task: made of `mmlu` by `as_choice_text`


@dataclass(frozen=True)
class Entry:
    """A task of a suite. task: lm-eval's name; metric: with its filter; shots; folder: where it
    stands in lm-eval's tasks."""

    task: str
    metric: str
    shots: int
    folder: str

    @property
    def name(self) -> str:
        """Of its file in evaluation/."""
        return f"{self.task}-{self.shots}shot"


HELLASWAG = Entry("hellaswag", NORM, 0, "hellaswag")
PIQA = Entry("piqa", NORM, 0, "piqa")
WINOGRANDE = Entry("winogrande", ACC, 0, "winogrande")
ARC_E = Entry("arc_easy", NORM, 0, "arc")
ARC_C = Entry("arc_challenge", NORM, 0, "arc")
OPENBOOK = Entry("openbookqa", NORM, 0, "openbookqa")
BOOLQ = Entry("boolq", ACC, 0, "super_glue")
RACE = Entry("race", ACC, 0, "race")
TRUTHFUL = Entry("truthfulqa_mc2", ACC, 0, "truthfulqa")
MMLU = Entry("mmlu", ACC, 5, "mmlu")
CLOZE = Entry("mmlu_continuation", ACC, 5, "mmlu")
CHOICE_TEXT = Entry(MMLU_TEXT, ACC, 5, "mmlu")
NQ = Entry("nq_open", "exact_match,remove_whitespace", 0, "nq_open")
SQUAD = Entry("squadv2", "f1,none", 0, "squadv2")
PUBMED = Entry("pubmedqa", ACC, 0, "pubmedqa")
LAMBADA = Entry("lambada_openai", ACC, 0, "lambada")
BLIMP = Entry("blimp", ACC, 0, "blimp")

_SEVEN = (ARC_C, ARC_E, HELLASWAG, replace(MMLU, shots=0), OPENBOOK, PIQA, WINOGRANDE)

SUITES: dict[str, tuple[Entry, ...]] = {
    "mamba7b": (HELLASWAG, PIQA, WINOGRANDE, replace(ARC_E, metric=ACC), ARC_C, MMLU),
    "btlm": (BOOLQ, PIQA, HELLASWAG, WINOGRANDE, ARC_E, ARC_C, OPENBOOK, RACE, TRUTHFUL, MMLU),
    "oute": (*_SEVEN, *(replace(entry, shots=5) for entry in _SEVEN)),
    "empirical12": (
        *(WINOGRANDE, PIQA, HELLASWAG, ARC_E, ARC_C, MMLU, OPENBOOK, TRUTHFUL, PUBMED, RACE),
        *(NQ, SQUAD),
    ),
    "small": (BLIMP, LAMBADA, ARC_E),
    "mmlu": (MMLU, CHOICE_TEXT, CLOZE),
}

_MAMBA7B = ("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "mmlu")
_OUTE = ("arc_challenge", "arc_easy", "hellaswag", "mmlu", "openbookqa", "piqa", "winogrande")


def _row(names: tuple[str, ...], figures: str) -> dict[str, float]:
    return dict(zip(names, map(float, figures.split()), strict=True))


# suite -> model -> task (with its shots where a suite has several) -> percent
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "mamba7b": {
        "Mamba-7B": _row(_MAMBA7B, "77.9 81.0 71.8 77.5 46.7 33.3"),
        "Mamba-1.4B": _row(_MAMBA7B, "59.0 73.9 61.4 65.5 32.9 25.2"),
        "Mamba-2.8B": _row(_MAMBA7B, "71.0 78.1 65.9 68.2 41.7 26.2"),
        "RWKV5-7B": _row(_MAMBA7B, "73.0 78.6 72.9 75.8 45.6 34.9"),
        "Llama2-7B": _row(_MAMBA7B, "76.0 79.1 69.1 76.3 46.3 45.9"),
        "Gemma-7B": _row(_MAMBA7B, "80.7 81.9 73.7 81.1 53.2 62.9"),
        "Mistral-7B": _row(_MAMBA7B, "81.0 82.1 74.0 80.9 53.8 62.4"),
    },
    # the rest of the table is not known here digit by digit; after 3.5T tokens
    "empirical12": {"Mamba-2-Hybrid 8B": {"mmlu": 53.60}, "Transformer 8B": {"mmlu": 50.07}},
    "oute": {
        "Lite-Oute-2 250M": {
            **_row(tuple(f"{n}-0shot" for n in _OUTE), "26.88 53.54 38.00 24.87 30.20 66.27 52.01"),
            **_row(tuple(f"{n}-5shot" for n in _OUTE), "27.22 55.51 38.17 25.59 30.40 66.59 52.49"),
        },
        "Lite-Oute-2 250M Instruct": {
            **_row(tuple(f"{n}-0shot" for n in _OUTE), "26.71 53.70 38.19 25.13 32.20 66.59 53.28"),
            **_row(tuple(f"{n}-5shot" for n in _OUTE), "27.82 57.28 37.71 25.81 31.80 66.38 51.14"),
        },
    },
}


def entries_of(name: str) -> tuple[Entry, ...]:
    """The entries of a suite, or of one lm-eval task as `task` or `task@shots`."""
    if name in SUITES:
        return SUITES[name]
    task, _, shots = name.partition("@")
    if shots and not shots.isdigit():
        raise UserError(f"evaluate.suites: '{name}' must be a suite, task or task@shots")
    known = {entry.task: entry for suite in SUITES.values() for entry in suite}
    if task not in known:
        raise UserError(
            f"evaluate.suites: there is no suite or task '{task}'"
            f"{did_you_mean(task, [*SUITES, *known])}; suites are {', '.join(SUITES)}"
        )
    entry = known[task]
    return (replace(entry, shots=int(shots)) if shots else entry,)


def published(suite: str, entry: Entry) -> dict[str, float]:
    """Published percentages of an entry, by model."""
    rows = PUBLISHED.get(suite, {})
    found = {m: row.get(entry.name, row.get(entry.task)) for m, row in rows.items()}
    return {model: value for model, value in found.items() if value is not None}


def as_choice_text(task: Any) -> None:
    """Make the answers of a standard MMLU task the choices' texts instead of their letters."""
    task.config.doc_to_choice = "{{choices}}"
    task.fewshot_cfg.doc_to_choice = "{{choices}}"
