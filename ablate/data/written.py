"""Recall documents as text, to mix into pretraining: phonebooks, pairs, needles, copies.

Their templates are not those of the recall tasks (`ablate/evaluate/recall.py`): what is learnt is
to look up, not a format. Names, words and numbers are made, and new in every row. A document is an
end-of-text, its text, and questions whose answers stand in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ablate.config import DataConfig
from ablate.data.made import Draw
from ablate.data.recall import IGNORE
from ablate.data.tokenizer import Tokenizer
from ablate.errors import UserError

# A text, and whether it is an answer. What ends an answer belongs to it: of a number that is not
# scored to its end a model learns all digits, and not to stop after them.
Piece = tuple[str, bool]

# An entry and its question are the same words up to the value.
_PHONE = (
    "{k} - {v}\n",
    "{k}, tel. {v}\n",
    "{k} can be reached at {v}.\n",
    "- {k} | {v}\n",
    "Call {k} on {v}.\n",
    "{k} ({v})\n",
)
_PAIRS = ("{k} => {v}\n", "{k} means {v}.\n", "{k}, {v}\n", "[{k}: {v}] ")
_CODES = (
    "Note that the code of {k} equals {v}.",
    "Someone wrote {v} next to {k}, so {k} has {v}.",
    "In room {k} there is item {v}.",
)


def _asked(draw: Draw, names: Sequence[str], each: float) -> list[str]:
    """Names to ask for, `each` times as many as there are: all of them before any again."""
    n = max(1, round(each * len(names)))
    asked: list[str] = []
    while len(asked) < n:
        asked += draw.sample(names, min(len(names), n - len(asked)))
    return asked


def _entries(draw: Draw, form: str, of: Mapping[str, str], questions: float) -> Iterator[Piece]:
    """All entries, then questions of some."""
    yield "".join(form.format(k=k, v=v) for k, v in of.items()) + "\n", False
    before, after = form.split("{v}")
    space = " " if before.endswith(" ") else ""  # a part of the answer's token
    for k in _asked(draw, list(of), questions):
        yield before.format(k=k).rstrip(" "), False
        yield f"{space}{of[k]}", True
        yield after, True


def _phonebook(draw: Draw, entries: int, questions: float) -> Iterator[Piece]:
    form = draw.one(_PHONE)
    names = draw.distinct(entries, "name")
    numbers = draw.distinct(entries, "digits", 7 + draw.below(4))
    yield from _entries(draw, form, dict(zip(names, numbers, strict=True)), questions)


def _pairs(draw: Draw, entries: int, questions: float) -> Iterator[Piece]:
    form = draw.one(_PAIRS)
    words = draw.distinct(2 * entries, "word", 2)
    of = dict(zip(words[:entries], words[entries:], strict=True))
    yield from _entries(draw, form, of, questions)


def _needle(draw: Draw, entries: int, questions: float) -> Iterator[Piece]:
    form = draw.one(_CODES)
    before, _ = form.rsplit("{v}", 1)
    keys = draw.distinct(max(1, entries // 4), "word", 3)
    of = dict(zip(keys, draw.distinct(len(keys), "digits", 5), strict=True))
    sentences = [_sentence(draw) for _ in range(entries)]
    for k, v in of.items():
        sentences.insert(draw.below(len(sentences) + 1), form.format(k=k, v=v))
    yield " ".join(sentences) + "\n", False
    for k in _asked(draw, keys, questions):
        # the question of the second form would hold its answer: it is asked from its second half on
        question = before.split("so ")[-1].format(k=k, v="").rstrip(" ")
        yield f"So {question}", False
        yield f" {of[k]}", True
        yield ".\n", True


def _copy(draw: Draw, entries: int, questions: float) -> Iterator[Piece]:
    words = " ".join(draw.word(1 + draw.below(3)) for _ in range(2 * entries))
    yield f"{words} //", False
    yield f" {words}", True
    yield "\n", True


def _sentence(draw: Draw) -> str:
    words = [draw.word(1 + draw.below(3)) for _ in range(4 + draw.below(6))]
    return f"{' '.join(words)}."


_KINDS: dict[str, Callable[[Draw, int, float], Iterator[Piece]]] = {
    "phonebook": _phonebook,
    "pairs": _pairs,
    "needle": _needle,
    "copying": _copy,
}


def document(seed: int, row: int, number: int, data: DataConfig) -> list[Piece]:
    """A document's pieces; a function of (seed, row, number) and the sizes of data.recall."""
    draw = Draw(seed, "written", row, number)
    low, high = data.recall.entries
    kind = draw.one(data.recall.kinds)
    entries = int(low * ((high + 1) / low) ** draw.unit())  # log-uniform
    return list(_KINDS[kind](draw, entries, data.recall.questions))


def written_rows(
    seed: int, rows: np.ndarray, data: DataConfig, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, targets, doc_start), each (len(rows), seq_len), of rows full of documents.

    Targets are -100 but at answers where data.recall.scored is "answers". The last document of a
    row is cut.
    """
    length = data.seq_len
    tokens = np.empty((len(rows), length), np.int64)
    targets = np.empty((len(rows), length), np.int64)
    starts = np.empty((len(rows), length), np.int32)
    for i, row in enumerate(rows.tolist()):
        ids: list[int] = []
        scored: list[bool] = []
        start: list[int] = []
        number = 0
        while len(ids) <= length:
            made: list[list[Piece]] = []  # as many letters as tokens are missing, encoded together
            letters = 0
            while letters <= length - len(ids):
                made.append(document(seed, row, number, data))
                letters += sum(len(text) for text, _ in made[-1])
                number += 1
            texts = list(dict.fromkeys(text for pieces in made for text, _ in pieces))
            encoded = dict(zip(texts, tokenizer.encode_all(texts), strict=True))
            for pieces in made:
                begun = len(ids)
                ids.append(tokenizer.eos_id)
                scored.append(data.recall.scored == "all")
                for text, answer in pieces:
                    piece = encoded[text]
                    ids += piece
                    scored += [answer or data.recall.scored == "all"] * len(piece)
                start += [begun] * (len(ids) - begun)
        tokens[i] = ids[:length]
        targets[i] = np.where(scored[1 : length + 1], ids[1 : length + 1], IGNORE)
        starts[i] = start[:length]
    return tokens, targets, starts


def written_count(data: DataConfig, batch_size: int, recall_rows: int) -> int:
    """Rows of a batch that are recall documents: data.recall.share of them, rounded.

    recall_rows: those that MQAR takes. UserError when the share leaves none, or nothing else.
    """
    share = data.recall.share
    rows = round(share * batch_size)
    if rows == 0 and share > 0:
        raise UserError(
            f"data.recall.share={share} of train.batch_size={batch_size} rounds to no row; "
            "change one of the two"
        )
    if rows + recall_rows > batch_size or (rows == batch_size and share < 1):
        raise UserError(
            f"data.recall.share={share} and data.mqar.share={data.mqar.share} of "
            f"train.batch_size={batch_size} leave no row of text; change one of the three"
        )
    return rows
