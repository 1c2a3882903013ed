"""Runs lm-eval tasks on a subject, and keeps what each item scored."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ablate.evaluate
from ablate.errors import UserError
from ablate.evaluate import squad, suites
from ablate.evaluate.local_data import NoLocalData, local_data
from ablate.evaluate.subjects import Subject
from ablate.evaluate.suites import Entry

TASKS = Path(ablate.evaluate.__file__).parent / "tasks"
SHOT_SEED = 1234  # lm-eval's own default


class Skipped(Exception):
    """A task that could not be run; its text is one line for the user."""


def need_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("benchmarks and recall tasks need `pip install 'ablate-hybrids[eval]'`")


def run_suite_entry(
    entry: Entry, *, data: Path | None, limit: int | None, lm: Any
) -> dict[str, Any]:
    """The content of evaluation/<entry.name>.json; `Skipped` where its data is not to be had."""
    name = "mmlu" if entry.task == suites.MMLU_TEXT else entry.task
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / entry.folder
    reading: Any = local_data(data) if data else contextlib.nullcontext([])
    with _quiet(), reading as notes:
        loaded = _load(folder, name, entry.task, data=data)
        for task in loaded["tasks"].values():
            if entry.task == suites.MMLU_TEXT:
                suites.as_choice_text(task)
            if entry.task == suites.SQUAD.task:
                squad.score_by_document(task)
            if task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=entry.shots)
            task.set_fewshot_seed(seed=SHOT_SEED)
        try:
            found = _evaluate(lm, loaded, limit)
        except UserError as error:  # its answers are longer than the model's context, say
            raise Skipped(f"{entry.task}: skipped, {error}") from None
        tasks = loaded["tasks"].values()
        shots_from_training = entry.shots > 0 and any(
            t.get_config("training_split") and not t.get_config("fewshot_split") for t in tasks
        )
    figures = _figures(found, name, entry.metric)
    items = [
        _item(task, sample, entry.metric)
        for task, samples in found["samples"].items()
        for sample in samples
    ]
    return {
        "task": entry.task,
        "shots": entry.shots,
        "metric": entry.metric.split(",")[0],
        "value": figures["value"],
        "metrics": figures["all"],
        "by_subtask": figures["parts"],
        "notes": sorted(set(notes)) if shots_from_training else [],
        "limit": limit,
        "items": _columns(items),
    }


def run_recall(
    subject: Subject, task: str, *, sizes: Mapping[str, Any], limit: int | None, lm: Any
) -> dict[str, Any]:
    """The content of evaluation/<task>.json: cells with their accuracy, and every item.

    cut: items of a cell whose text is longer than the model reads, so that its start is missing.
    """
    with _quiet(), subject.tokenizer_file() as tokenizer:
        loaded = _load(TASKS, task, task, metadata={**sizes, "tokenizer": tokenizer})
        for task_object in loaded["tasks"].values():
            task_object.set_config(key="num_fewshot", value=0)
            room = lm.max_length - task_object.config.generation_kwargs["max_gen_toks"]
        found = _evaluate(lm, loaded, limit)
    samples = next(iter(found["samples"].values()))
    items = []
    for sample in samples:
        document, response = sample["doc"], sample["filtered_resps"][0]
        scores = {m: sample[m] for m in sample["metrics"] if "@" not in m}
        kept = {k: document[k] for k in ("cell", "x", "depth", "tokens", "cluster", "target")}
        items.append(
            {**kept, "response": str(response)[:200], **scores, "others": document["others"]}
        )
    names = [m for m in samples[0]["metrics"] if "@" not in m]
    cells: dict[str, dict[str, Any]] = {}
    for cell in dict.fromkeys(item["cell"] for item in items):
        own = [item for item in items if item["cell"] == cell]
        cells[cell] = {
            "x": own[0]["x"],
            "items": len(own),
            "tokens": sum(item["tokens"] for item in own) / len(own),
            "cut": sum(item["tokens"] > room for item in own),
            **{m: sum(item[m] for item in own) / len(own) for m in names},
        }
    return {
        "task": task,
        "metric": "exact_match",
        "value": sum(item["exact_match"] for item in items) / len(items),
        "chance": chance(task, items),
        "cells": cells,
        "limit": limit,
        "items": _columns(items),
    }


def chance(task: str, items: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy of an answer taken from the text blindly: one of the numbers or values in it.

    0 where an answer is more than a choice between them: a text with one number asks whether the
    number is found at all.
    """
    if task in ("induction", "copying", "passkey"):
        return 0.0
    wanted = [len(item["target"].split(", ")) for item in items]
    there = [k + len(item["others"]) for k, item in zip(wanted, items, strict=True)]
    return sum(1 / math.comb(n, k) for n, k in zip(there, wanted, strict=True)) / len(items)


# --- lm-eval ----------------------------------------------------------------------------------


def _load(
    folder: Path,
    name: str,
    shown: str,
    *,
    data: Path | None = None,
    metadata: dict[str, Any] | None = None,
) -> Any:
    """lm-eval's tasks of a name; `Skipped`, with the name that is `shown`, without their data."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[folder], include_defaults=False, metadata=metadata)
    try:
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            documents = list(task.eval_docs)
            if not documents:
                raise ValueError("there are no documents in it")
            # lm-eval asks for them time and again, and each time they would be decoded anew
            name_of = "test_docs" if task.has_test_docs() else "validation_docs"
            setattr(task, name_of, functools.partial(list.copy, documents))
            task.doc_to_text(documents[0]), task.doc_to_target(documents[0])  # it has the fields
        return loaded
    except UserError:
        raise
    except NoLocalData as error:
        raise Skipped(f"{shown}: skipped, {error}") from None
    except Exception as error:  # datasets raises many kinds for what it cannot reach or use
        reason = f"({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        why = f"lm-eval cannot use its data in {data} {reason}"
        if folder == TASKS:
            why = f"its data could not be made {reason}"
        elif data is None:
            why = f"its data cannot be had from the hub {reason}; give evaluate.local_data=FOLDER"
        raise Skipped(f"{shown}: skipped, {why}") from None


def _evaluate(lm: Any, loaded: Any, limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    result: dict[str, Any] = evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    return result


def _figures(found: Mapping[str, Any], name: str, metric: str) -> dict[str, Any]:
    results = found["results"]
    whole = found.get("groups", {}).get(name) or results[name]
    kept = {k: float(v) for k, v in whole.items() if _is_figure(k, v)}
    parts = {t: float(r[metric]) for t, r in results.items() if t != name and metric in r}
    return {"value": float(whole[metric]), "all": kept, "parts": parts}


def _is_figure(name: str, value: Any) -> bool:
    number = isinstance(value, int | float) or hasattr(value, "dtype")
    return "," in name and "stderr" not in name and number


def _item(task: str, sample: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """One document: which, what it scored, and where documents share a text, the cluster."""
    value = sample[metric.split(",")[0]]
    document = sample["doc"]
    shared = document.get("passage") or document.get("article") or document.get("context")
    name = f"{task}:{sample['doc_id']}"
    item = {
        "id": name,
        "cluster": f"{task}:{hash_of(shared)}" if shared else name,
        "score": float(value[0] if isinstance(value, tuple | list) else value),
    }
    answers = sample["filtered_resps"]
    if answers and isinstance(answers[0], tuple | list):
        item["loglikelihoods"] = [round(float(a[0]), 4) for a in answers]
    else:
        item["response"] = str(answers[0])[:200] if answers else ""
    return item


def hash_of(text: Any) -> str:
    return hashlib.blake2b(str(text).encode(), digest_size=6).hexdigest()


def _columns(items: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for item in items for name in item)
    return {name: [item.get(name) for item in items] for name in names}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets say much that is not for our reader; and nothing is uploaded.

    lm-eval also compiles a task's templates again for every document, which takes longer than
    scoring a small model on a GPU does; here each template is compiled once.
    """
    import datasets
    from lm_eval.api import task as lm_eval_task
    from lm_eval.utils import env

    shown = lm_eval_task.tqdm
    lm_eval_task.tqdm = functools.partial(shown, disable=None)  # none where stderr is no terminal
    env.from_string = functools.lru_cache(maxsize=256)(env.from_string)

    loggers = [logging.getLogger(n) for n in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        lm_eval_task.tqdm = shown
        del env.from_string  # the instance's own; the method is under it
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def adapter(subject: Subject, *, batch_tokens: int, whole: bool, check: Callable[[], None]) -> Any:
    """lm-eval's face of a subject. whole: nothing of a prompt is cut, where a model has no end of
    its own, as ours have none."""
    from ablate.evaluate.adapter import UNLIMITED, SubjectLM

    lm = SubjectLM(subject, batch_tokens=batch_tokens, check=check)
    if whole and not subject.bounded:
        lm.max_length = UNLIMITED
    return lm
