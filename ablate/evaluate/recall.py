"""Recall tasks made offline: phonebook, needle, passkey, MQAR, induction and copying.

Every document is a function of (task, seed, cell, number): a cell is a size of the task, such as
entries, or length and depth. Names, words and numbers are made (`ablate/data/made.py`). `tasks/`
offers them to lm-eval, where a cell is a metric of its own (`exact_match@entries=20`).

A document has: prompt; target; kind of answer; cell (its label); x (entries, pairs or tokens asked
for); depth (0 to 1, or -1); tokens (of the prompt, -1 where no tokenizer was given); cluster
(documents that share a text have the same); others (the other numbers in the text).

Sources: phonebook, standard and reversed, two shots: Waleffe et al. 2024 (arXiv 2406.07887),
section 3.3, and Jelassi et al. 2024 (arXiv 2402.01032). Passkey: Mohtashami and Jaggi 2023 (arXiv
2305.16300). Needles with several keys, values and distractors: after RULER, Hsieh et al. 2024
(arXiv 2404.06654). MQAR: Arora et al. 2023 (arXiv 2312.04927), here in words. Induction: Olsson et
al. 2022 (arXiv 2209.11895). Copying: Jelassi et al. 2024, section 3.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablate.data.made import Draw
from ablate.errors import UserError
from ablate.evaluate.local_data import as_dataset

DIGITS = 10  # of a phone number
KEY_DIGITS = 5  # of a passkey (Samba's) and of a needle's value
Count = Callable[[Sequence[str]], list[int]]  # tokens of each text

DEFAULTS: dict[str, dict[str, Any]] = {
    "phonebook": {"entries": [5, 10, 20, 50], "items": 100},
    "phonebook_reversed": {"entries": [5, 10, 20, 50], "items": 100},
    "passkey": {"lengths": [512, 1024, 2048], "depths": 11, "items": 5},
    "needle": {
        "lengths": [512, 1024, 2048],
        "depths": 11,
        "items": 5,
        "keys": 4,
        "values": 1,
        "distractors": 4,
    },
    "mqar_text": {"pairs": [4, 8, 16, 32], "lengths": [512, 1024], "items": 50, "queries": 4},
    "induction": {"lengths": [128, 256, 512, 1024], "items": 100},
    "copying": {"words": [5, 10, 20, 40], "items": 100},
}
"""Sizes of each task; lm-eval's --metadata, or evaluate.recall, changes them by name."""

_LISTS = {"entries", "lengths", "pairs", "words"}
_MOST = 1_000_000  # of any size: documents are made whole, in memory


def make(task: str, *, seed: int = 0, tokenizer: str | None = None, **sizes: Any) -> list[dict]:
    """All documents of a task.

    tokenizer: "byte", the path of a tokenizer.json or a folder, or a name on the hub; it turns
        `lengths` into tokens and checks that digits are single tokens. None: a token is taken to
        be four characters, and the check is left out.
    sizes: of `DEFAULTS[task]`; `digit_tokens="any"` allows tokenizers that merge digits.
    Raises UserError for a size that cannot be.
    """
    known = DEFAULTS[task]
    given = {name: value for name, value in sizes.items() if name in known}
    o = {**known, **given}
    for name, value in o.items():
        _check_size(task, name, value)
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"{task}: seed is {seed!r}; it must be a whole number from 0 on")
    count = counter(tokenizer)
    if tokenizer is not None and sizes.get("digit_tokens", "single") != "any":
        check_digits(tokenizer)
    documents = list(_MAKERS[task](task, seed, count, o))
    tokens = count([document["prompt"] for document in documents])
    for document, n in zip(documents, tokens, strict=True):
        document["tokens"] = n if tokenizer is not None else -1
    return documents


def check(task: str, tokenizer: str | None, sizes: Mapping[str, Any]) -> None:
    """UserError for sizes that cannot be, found by making one document a cell; see `make`."""
    if task == "needle_multivalue":  # as tasks/utils.py has it
        task, sizes = "needle", {"values": 3, **sizes}
    for name in DEFAULTS[task].keys() & sizes.keys():
        _check_size(task, name, sizes[name])
    make(task, tokenizer=tokenizer, **{**sizes, "items": 1, "depths": 1})


def _check_size(task: str, name: str, value: Any) -> None:
    values = value if name in _LISTS else [value]
    least = 0 if name == "distractors" else 1
    whole = isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values
    )
    if not whole or not values or max(values) > _MOST:
        what = "a list of whole numbers" if name in _LISTS else "a whole number"
        raise UserError(f"{task}: {name} is {value!r}; it must be {what} from {least} to {_MOST}")


# --- tokens --------------------------------------------------------------------------------------


def counter(tokenizer: str | None) -> Count:
    """A function from texts to their numbers of tokens; a tokenizer takes them on all cores."""
    if tokenizer is None:
        return lambda texts: [len(text) // 4 for text in texts]
    if tokenizer == "byte":
        return lambda texts: [len(text.encode()) for text in texts]
    encode = _encoder(tokenizer)
    return lambda texts: [len(ids) for ids in encode(texts)]


@functools.lru_cache(maxsize=4)
def _encoder(tokenizer: str) -> Callable[[Sequence[str]], list[list[int]]]:
    path = Path(tokenizer)
    if path.suffix == ".json":
        from tokenizers import Tokenizer

        inner = Tokenizer.from_file(str(path))
        return lambda texts: [
            e.ids for e in inner.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    options = {"add_special_tokens": False, "verbose": False}
    return lambda texts: loaded(list(texts), **options)["input_ids"] if texts else []


def check_digits(tokenizer: str) -> None:
    """`UserError` unless every digit of a number is a token of its own.

    Digit accuracy compares digits, and a tokenizer that merges them would decide which can differ.
    """
    if tokenizer == "byte":
        return
    count = counter(tokenizer)
    for number in ("0123456789", "9988776655", "1002003004"):
        base, alone, inside = count(["Name: ", number, f"Name: {number}"])
        # a space before a number may be a token of its own or part of the first digit's
        if alone < DIGITS or inside - base < DIGITS - 1:
            raise UserError(
                f"tokenizer '{tokenizer}' merges digits: '{number}' is {alone} tokens, not "
                f"{DIGITS}; give digit_tokens='any' to measure recall all the same"
            )


# --- phonebook -----------------------------------------------------------------------------------


def _phonebook(task: str, seed: int, count: Count, o: Mapping[str, Any]) -> Iterator[dict]:
    for entries, i in itertools.product(o["entries"], range(o["items"])):
        if entries < 3:
            raise UserError(f"{task}: entries is {entries}; two shots and a query need 3 or more")
        draw = Draw(seed, "phonebook", entries, i)
        names = draw.distinct(entries, "name")
        numbers = draw.distinct(entries, "digits", DIGITS)
        book = "".join(f"{n}: {m}\n" for n, m in zip(names, numbers, strict=True))
        *shots, asked = draw.sample(range(entries), 3)
        examples = "".join(f"{names[s]}: {numbers[s]}\n" for s in shots)
        if task == "phonebook_reversed":
            prompt = f"Find the number of {names[asked]}.\n\n{book}\n"
        else:
            prompt = f"{book}\n"
        others = numbers[:asked] + numbers[asked + 1 :]
        yield _document(
            f"{prompt}{examples}{names[asked]}:",
            numbers[asked],
            x=entries,
            cell=f"entries={entries}",
            depth=asked / max(1, entries - 1),
            cluster=f"{entries}:{i}",
            others=others,
        )


# --- needle and passkey --------------------------------------------------------------------------


def filler(draw: Draw) -> str:
    """A sentence of made words."""
    words = [draw.word(1 + draw.below(3)) for _ in range(6 + draw.below(7))]
    return " ".join(words).capitalize() + "."


def _haystack(
    task: str,
    needles: Sequence[str],
    places: Sequence[float],
    tail: str,
    length: int,
    count: Count,
    draw: Draw,
) -> str:
    """Filler with needles at relative places (0: first, 1: last), then the tail; with it about
    `length` tokens, never more. UserError where the needles alone are longer."""
    room = length - sum(count([" ".join(needles), tail])) - len(needles)
    if room < 0:
        numbers = "a number" if len(needles) == 1 else f"{len(needles)} numbers"
        raise UserError(
            f"{task}: length {length} has no room for {numbers} and the question, which need "
            f"about {length - room} tokens"
        )
    sentences: list[str] = []
    while room > 0:
        some = [filler(draw) for _ in range(max(1, min(4096, room // 64)))]
        used = count([" ".join(some)])[0] + 1
        if used > room:
            some = some[: max(1, len(some) // 2)]
            used = count([" ".join(some)])[0] + 1
            if used > room:
                break
        sentences += some
        room -= used
    total = len(sentences)
    for needle, place in sorted(zip(needles, places, strict=True), key=lambda p: -p[1]):
        sentences.insert(round(place * total), needle)
    return " ".join(sentences) + tail


def _up_to(room: int, make: Callable[[], str], count: Count) -> Iterator[str]:
    """New texts that together have at most `room` tokens."""
    while room >= 0:
        some = [make() for _ in range(1 + room // 8)]
        for text, n in zip(some, count(some), strict=True):
            room -= n
            if room < 0:
                return
            yield text


def _places(o: Mapping[str, Any]) -> Iterator[tuple[int, float, int]]:
    """(length, depth, number) of each document."""
    n = o["depths"]
    depths = [0.5] if n == 1 else [i / (n - 1) for i in range(n)]
    return itertools.product(o["lengths"], depths, range(o["items"]))


def _passkey(task: str, seed: int, count: Count, o: Mapping[str, Any]) -> Iterator[dict]:
    for length, depth, i in _places(o):
        draw = Draw(seed, task, length, round(1000 * depth), i)
        key = draw.digits(KEY_DIGITS)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        tail = "\n\nWhat is the pass key? The pass key is"
        yield _document(
            _haystack(task, [needle], [depth], tail, length, count, draw),
            key,
            x=length,
            cell=f"length={length}",
            depth=depth,
            cluster=f"{length}:{depth:g}:{i}",
        )


def _needle(task: str, seed: int, count: Count, o: Mapping[str, Any]) -> Iterator[dict]:
    """One of `keys` words is asked for; every key has `values` numbers, and `distractors` more keys
    are never asked for. The asked key's first number is at the cell's depth, the rest anywhere."""
    for length, depth, i in _places(o):
        draw = Draw(seed, task, length, round(1000 * depth), i)
        keys = draw.distinct(o["keys"] + o["distractors"], "word", 3)
        per_key = o["values"]
        numbers = draw.distinct(len(keys) * per_key, "digits", KEY_DIGITS)
        of = {k: numbers[n * per_key : (n + 1) * per_key] for n, k in enumerate(keys)}
        asked = draw.one(keys[: o["keys"]])
        one = "The number" if per_key == 1 else "One of the numbers"
        needles = [f"{one} of {k} is {number}." for k in keys for number in of[k]]
        first = of[asked][0]
        places = [depth if number == first else draw.unit() for k in keys for number in of[k]]
        if per_key == 1:
            tail = f"\n\nWhat is the number of {asked}? The number of {asked} is"
        else:
            tail = f"\n\nWhat are the numbers of {asked}? The numbers of {asked} are"
        yield _document(
            _haystack(task, needles, places, tail, length, count, draw),
            ", ".join(of[asked]),
            x=length,
            cell=f"length={length}",
            depth=depth,
            cluster=f"{length}:{depth:g}:{i}",
            others=[n for k in keys if k != asked for n in of[k]],
            unordered=per_key > 1,
        )


# --- MQAR, induction, copying --------------------------------------------------------------------


def _mqar(task: str, seed: int, count: Count, o: Mapping[str, Any]) -> Iterator[dict]:
    """`pairs` of words, filler up to the length, then queries, each a document of the same text
    with the queries before it answered."""
    for pairs, length, i in itertools.product(o["pairs"], o["lengths"], range(o["items"])):
        draw = Draw(seed, task, pairs, length, i)
        words = draw.distinct(2 * pairs, "word", 2)
        keys, values = words[:pairs], words[pairs:]
        given = "".join(f"{k} {v}\n" for k, v in zip(keys, values, strict=True))
        asked = draw.sample(range(pairs), min(pairs, o["queries"]))
        rest = [f"{keys[a]} {values[a]}\n" for a in asked]
        room = length - sum(count([given, *rest]))
        if room < 0:
            raise UserError(
                f"{task}: {pairs} pairs with {len(asked)} queries do not fit "
                f"length {length}; they need about {length - room} tokens"
            )
        # words of another length than keys: filler answers nothing
        between = "".join(
            _up_to(room, lambda: f"{draw.word(3)} {draw.word(3)}\n", count)  # noqa: B023
        )
        text = given + between
        for q in asked:
            yield _document(
                f"{text}{keys[q]}",
                values[q],
                x=pairs,
                cell=f"pairs={pairs},length={length}",
                cluster=f"{pairs}:{length}:{i}",
                others=values[:q] + values[q + 1 :],
            )
            text += f"{keys[q]} {values[q]}\n"


def _induction(task: str, seed: int, count: Count, o: Mapping[str, Any]) -> Iterator[dict]:
    """Random words, one of them again at the end: what followed it?"""
    for length, i in itertools.product(o["lengths"], range(o["items"])):
        draw = Draw(seed, task, length, i)
        made = _up_to(length - 8, lambda: f" {draw.word(3)}", count)  # noqa: B023
        words = [word.strip() for word in dict.fromkeys(made)]
        if len(words) < 3:
            raise UserError(f"{task}: length {length} has no room for three words")
        at = draw.below(len(words) - 2)
        yield _document(
            f"{' '.join(words)} {words[at]}",
            words[at + 1],
            x=length,
            cell=f"length={length}",
            depth=at / len(words),
            cluster=f"{length}:{i}",
        )


def _copying(task: str, seed: int, count: Count, o: Mapping[str, Any]) -> Iterator[dict]:
    """Random words, a bar, and the first word again: copy the rest."""
    for n, i in itertools.product(o["words"], range(o["items"])):
        draw = Draw(seed, task, n, i)
        words = [draw.word(2) for _ in range(n + 1)]
        yield _document(
            f"{' '.join(words)}\n{words[0]}",
            " ".join(words[1:]),
            x=n,
            cell=f"words={n}",
            cluster=f"{n}:{i}",
        )


def _document(
    prompt: str,
    target: str,
    *,
    x: int,
    cell: str,
    cluster: str,
    depth: float = -1.0,
    others: Sequence[str] = (),
    unordered: bool = False,
) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "target": target,
        "cell": cell,
        "x": x,
        "depth": float(depth),
        "cluster": cluster,
        "others": list(others),
        "unordered": unordered,
    }


_MAKERS: dict[str, Callable[..., Iterator[dict]]] = {
    "phonebook": _phonebook,
    "phonebook_reversed": _phonebook,
    "passkey": _passkey,
    "needle": _needle,
    "mqar_text": _mqar,
    "induction": _induction,
    "copying": _copying,
}


# --- scoring -------------------------------------------------------------------------------------


def score(document: Mapping[str, Any], response: str) -> dict[str, float]:
    """Metrics of one answer, by name; shares between 0 and 1.

    exact_match, and the same under the cell's name; for numbers digit_accuracy and digit_<place>;
    for copying word_accuracy. Several values may come in any order.
    """
    target, answer = document["target"], first_answer(response, document["target"])
    if document["unordered"]:
        wanted, got = set(target.split(", ")), set(answer.replace(" ", "").split(","))
        found = len(wanted & got) / len(wanted)
        return {
            "exact_match": float(wanted == got),
            "recalled": found,
            f"exact_match@{document['cell']}": float(wanted == got),
        }
    hit = float(answer == target)
    result = {"exact_match": hit, f"exact_match@{document['cell']}": hit}
    if target.isdigit():
        right = [float(answer[i : i + 1] == digit) for i, digit in enumerate(target)]
        result["digit_accuracy"] = sum(right) / len(right)
        result |= {f"digit_{i + 1}": value for i, value in enumerate(right)}
    elif " " in target:
        words, got_words = target.split(), answer.split()
        same = sum(a == b for a, b in zip(words, got_words, strict=False))
        result["word_accuracy"] = same / len(words)
    return result


def first_answer(response: str, target: str) -> str:
    """The first line of a response, cut to its digits or words where the target is such."""
    line = response.strip().split("\n")[0].strip()
    if target.isdigit():
        digits = "".join(itertools.takewhile(str.isdigit, line))
        return digits[: len(target) + 1]  # a number that goes on is another number
    if ", " in target:
        return line.rstrip(".")
    return " ".join(line.split()[: len(target.split())])


# --- lm-eval's hooks, named by the YAML files in tasks/ ------------------------------------------


def dataset(task: str, **given: Any) -> dict[str, Any]:
    """{"test": datasets.Dataset}; `given` is the task's metadata with lm-eval's model arguments."""
    tokenizer = given.get("tokenizer") or given.get("pretrained")
    name = tokenizer if isinstance(tokenizer, str) else None
    sizes = {k: v for k, v in given.items() if k not in ("tokenizer", "pretrained", "seed")}
    documents = make(task, seed=given.get("seed", 0), tokenizer=name, **sizes)
    return {"test": as_dataset(documents)}


def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return score(document, results[0])
