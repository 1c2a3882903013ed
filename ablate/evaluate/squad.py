"""Exact match and F1 of SQuAD 2.0 (Rajpurkar et al. 2018, arXiv 1806.03822), document by document.

lm-eval's task leaves them to a script that it would download and run, and has figures of all
documents alone.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Of an answer: lower case, without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def scores(answer: str, golds: Sequence[str]) -> dict[str, float]:
    """`exact` (0 or 1) and `f1` (0 to 1) of an answer, each the best over the gold answers. Where
    there are none the question cannot be answered, and nothing is right but no words."""
    given = words(answer)
    best = {"exact": 0.0, "f1": 0.0}
    for wanted in [w for gold in golds if (w := words(gold))] or [[]]:
        same = float(given == wanted)
        shared = (Counter(given) & Counter(wanted)).total()
        f1 = 2 * shared / (len(given) + len(wanted)) if given and wanted else same
        best = {"exact": max(best["exact"], same), "f1": max(best["f1"], f1)}
    return best


def score_by_document(task: Any) -> None:
    """Give lm-eval's squadv2 these scores. An answer counts as it stands, as with lm-eval's
    threshold of 1: how likely a model finds " unanswerable" changes nothing."""
    from lm_eval.api.metrics import mean

    task.process_results = lambda doc, results: scores(results[0], doc["answers"]["text"])
    task.aggregation = lambda: {"exact": mean, "f1": mean}
    task.higher_is_better = lambda: {"exact": True, "f1": True}
