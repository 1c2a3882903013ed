"""Evaluation as part of a trial, of a finished run folder, and of any transformers model.

train_and_evaluate(cfg, folder)   `train`, with cfg.evaluate's tasks before its result
evaluate(subject, options, …)     the tasks themselves; each one's content goes to `write`
command(words)                    python -m ablate evaluate TARGET [name=value …]
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ablate import config
from ablate.config import Config, DataConfig, EvaluateConfig, RecallTask
from ablate.data import TokenSet, prepare
from ablate.errors import UserError, did_you_mean
from ablate.evaluate import harness, length, local_data, recall, suites
from ablate.evaluate.fuzzy import fuzzy
from ablate.evaluate.recall import DEFAULTS, first_answer
from ablate.evaluate.subjects import OwnModel, Subject, load
from ablate.model import LanguageModel
from ablate.run import RunFolder
from ablate.train.loop import train
from ablate.train.validation import uninformative

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TASKS = get_args(RecallTask)

Write = Callable[[str, Mapping[str, Any]], None]


def check(options: EvaluateConfig, data: DataConfig | None = None) -> None:
    """UserError, before any compute, for what cannot be evaluated.

    data: of the model; without it, or before its tokenizer is made, a token is taken to be four
        characters.
    """
    tokenizer = "byte" if data is not None and data.tokenizer.kind == "byte" else None
    for name in options.suites:
        suites.entries_of(name)
    _check_sizes(options.sizes)
    for task in options.recall:
        recall.check(task, tokenizer, _sizes_of(options, task))
    if options.local_data is not None:
        local_data.check(options.local_data)
    length.check_long_documents(options.long_documents)
    if options.suites or options.recall:
        harness.need_lm_eval()


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    """Sizes are for every task that has them, or under a task's name for it alone."""
    known = {size for own in DEFAULTS.values() for size in own} | {"seed", "digit_tokens"}
    for name, value in sizes.items():
        if name in TASKS and not isinstance(value, dict):
            raise UserError(f"evaluate.sizes: '{name}' is a task, so sizes are to follow, {{…}}")
        for size in value if name in TASKS else [name]:
            if size not in known:
                near = did_you_mean(size, {*known, *TASKS})
                raise UserError(f"evaluate.sizes: unknown size '{size}'{near}")


def _sizes_of(options: EvaluateConfig, task: str) -> dict[str, Any]:
    """What is given for all tasks, and over it what is given for this one."""
    shared = {n: v for n, v in options.sizes.items() if n not in TASKS}
    return shared | options.sizes.get(task, {})


def train_and_evaluate(
    cfg: Config, folder: RunFolder | None = None, **hooks: Any
) -> dict[str, Any]:
    """`ablate.train`, with the tasks of cfg.evaluate run before the result is written."""
    check(cfg.evaluate, cfg.data)
    return train(cfg, folder, evaluate=_of_trial, **hooks)


def _of_trial(
    cfg: Config,
    folder: RunFolder,
    model: LanguageModel,
    token_set: TokenSet,
    *,
    bf16: bool,
    check: Callable[[], None],
) -> dict[str, Any]:
    subject = OwnModel(
        model, token_set.tokenizer, max_length=cfg.data.seq_len, name=folder.key, bf16=bf16
    )
    model.eval()
    try:
        return evaluate(
            subject,
            cfg.evaluate,
            write=folder.write_evaluation,
            documents=lambda: length.split_documents(token_set.splits["val_b"]),
            training_length=cfg.data.seq_len,
            between=check,
        )
    finally:
        model.train()


def evaluate(
    subject: Subject,
    options: EvaluateConfig,
    *,
    write: Write,
    documents: Callable[[], list[Any]],
    training_length: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run every task that `options` asks for; {name: value, metric, …} of those that ran. A line is
    printed for each that is skipped.

    write: takes each task's name and whole content, items included.
    documents: those of validation B, for `options.length` where no file is given.
    """
    summary: dict[str, Any] = {}
    data = None if options.local_data is None else local_data.check(options.local_data)
    adapter = functools.partial(
        harness.adapter, subject, batch_tokens=options.batch_tokens, check=between
    )

    def keep(name: str, content: dict[str, Any], **more: Any) -> None:
        write(name, content)
        summary[name] = {"value": content["value"], "metric": content["metric"], **more}

    for task in options.recall:
        between()
        lm = adapter(whole=True)
        sizes = _sizes_of(options, task)
        content = harness.run_recall(subject, task, sizes=sizes, limit=None, lm=lm)
        _judge_recall(content)
        keep(task, content, verdict=content["verdict"])
    if options.length:
        between()
        given = options.long_documents
        texts = length.long_documents(subject, given) if given else documents()
        content = length.loss_by_length(
            subject, texts, length=training_length, multiples=options.length, check=between
        )
        keep("length", content)
    entries = {e.name: (s, e) for s in options.suites for e in suites.entries_of(s)}
    lm = None
    for name, (suite, entry) in entries.items():
        between()
        lm = lm or adapter(whole=False)
        try:
            content = harness.run_suite_entry(entry, data=data, limit=options.limit, lm=lm)
        except harness.Skipped as error:
            print(error)
            continue
        content["published"] = suites.published(suite, entry)
        keep(name, content)
    return summary


def _judge_recall(content: dict[str, Any]) -> None:
    """Add to a recall task: which cells tell nothing, and where numbers were asked for whether
    wrong ones are fuzzy.

    "unended" is a floor that the right numbers would have left, had the model stopped after them.
    """
    items = content["items"]
    columns = (items[name] for name in ("cell", "response", "target"))
    runs_on = Counter(c for c, r, t in zip(*columns, strict=True) if t.isdigit() and
                      first_answer(r, t)[:-1] == t)  # fmt: skip
    for label, cell in content["cells"].items():
        n, chance = cell["items"], content["chance"]
        verdict = uninformative(cell["exact_match"], n, chance)
        ended = cell["exact_match"] + runs_on[label] / n
        if verdict == "floor" and uninformative(ended, n, chance) != "floor":
            verdict = "unended"
        cell["verdict"] = "cut" if cell["cut"] else verdict
    told = [cell["verdict"] for cell in content["cells"].values()]
    content["verdict"] = told[0] if told[0] is not None and len(set(told)) == 1 else None
    targets = items["target"]
    if targets[0].isdigit():
        answers = [first_answer(r, t) for r, t in zip(items["response"], targets, strict=True)]
        content["fuzzy"] = fuzzy(answers, targets, items["others"]).summary()
    del items["others"]  # as large as the texts, and made again from the seed


# --- the verb ------------------------------------------------------------------------------------


def command(
    words: Sequence[str],
    tables: Callable[[Mapping[str, Mapping[str, Any]]], Iterable[Table | str]],
    console: Console | None = None,
) -> int:
    """`python -m ablate evaluate TARGET [name=value …]`; prints the `tables` of what was found, 0
    when all went well."""
    from rich.console import Console

    console = console or Console()
    if not words or "=" in words[0]:
        raise UserError("evaluate needs a run folder or a transformers model, before name=value")
    target, given = words[0], _words(words[1:])
    device, out = str(given.pop("device", "auto")), given.pop("out", None)
    of_model = {n: given.pop(n) for n in ("max_length", "remote_code") if n in given}
    folder = RunFolder(Path(target).expanduser())
    tree = folder.config()
    own = config.load(tree) if tree is not None else None
    nothing = EvaluateConfig().model_dump()
    before = own.evaluate.model_dump() if own else nothing
    named = {"recall", "suites", "length"}
    if given.keys() & named:  # then these alone, whatever the run had besides
        before |= {name: nothing[name] for name in named}
    options = _options({**before, **given})
    if not (options.suites or options.recall or options.length):
        options = options.model_copy(update={"recall": list(DEFAULTS)})
    check(options, None if own is None else own.data)
    contents: dict[str, Mapping[str, Any]] = {}
    place = folder if out is None else RunFolder(Path(str(out)).expanduser())
    kept = own is not None or out is not None
    if own is not None and out is None and folder.result() is None:
        raise UserError(
            f"'{target}' has not finished, and scores of its weights so far would stand there as "
            "those of the finished run: out=FOLDER keeps them elsewhere"
        )
    if kept:
        place.check_writable()
    subject = load(target, device=device, **of_model)

    def write(name: str, content: Mapping[str, Any]) -> None:
        contents[name] = content
        if not kept:
            return
        before = place.evaluation(name)
        if before and before != json.loads(json.dumps(content)):
            console.print(f"the scores of {name} so far are kept as {place.set_aside(name)}")
        place.write_evaluation(name, content)

    def documents() -> list[Any]:
        if own is None:
            raise UserError("evaluate.length on this model needs long_documents=FILE")
        return length.split_documents(prepare(own.data).splits["val_b"])

    training_length = own.data.seq_len if own else subject.max_length
    evaluate(subject, options, write=write, documents=documents, training_length=training_length)
    if not contents:
        console.print("nothing was evaluated: every task was skipped")
        return 1
    for table in tables(contents):
        console.print(table, highlight=False, markup=False)
    if kept:
        console.print(f"written to {place.path / 'evaluation'}", highlight=False)
    else:
        console.print("nothing was written: give out=FOLDER to keep the items", highlight=False)
    return 0


# Settings that are not the config's: what is right, and how that is said.
_OWN_WORDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "device": (lambda v: v in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
    "out": (lambda v: isinstance(v, str), "a folder"),
    "max_length": (lambda v: type(v) is int and v > 1, "a whole number of tokens above 1"),
    "remote_code": (lambda v: isinstance(v, bool), "true or false"),
}


def _words(words: Iterable[str]) -> dict[str, Any]:
    known = {*EvaluateConfig.model_fields, *_OWN_WORDS}
    given = {}
    for word in words:
        name, equals, value = word.removeprefix("evaluate.").partition("=")
        if not equals:
            raise UserError(f"'{word}' has no value: settings are written name=value")
        if name not in known:
            raise UserError(f"unknown setting '{name}'{did_you_mean(name, known)}")
        given[name] = config.value_of(f"{name}={value}")
    for name, (right, told) in _OWN_WORDS.items():
        if name in given and not right(given[name]):
            raise UserError(f"{name} is {given[name]!r}; it must be {told}")
    return given


def _options(values: dict[str, Any]) -> EvaluateConfig:
    """A checked section, with the sentences of `config.load`."""
    return config.load({"train": {"tokens": 1}, "evaluate": values}).evaluate
