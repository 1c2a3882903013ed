"""Multi-query associative recall rows (MQAR): Arora et al. 2023, arXiv:2312.04927, section 3.

A recall document is `pairs` key-value pairs, then slots of two tokens. Some slots are queries: a
key of a pair and then its value, which is what is to be predicted; the others hold filler. As in
the authors' code (zoology), keys and values come from the two halves of an id range, without
replacement within a document; the slots of the queries are drawn without replacement with
probability proportional to (slot + 1) ** (0.01 - 1), so most queries are near the pairs; filler is
uniform over the ids. Differences: filler is never a key of the document, so every key has one
value, and the value also stands in the input after its query. At most 8192 ids are used, as there,
from 3 on: vocabularies keep their special tokens below that, or at their end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ablate.config import DataConfig
from ablate.data import bits
from ablate.errors import UserError

if TYPE_CHECKING:
    from ablate.data.stream import Batch

FIRST_ID = 3
MAX_IDS = 8192
POWER = 0.01
IGNORE = -100  # a target that is not scored


def check_recall(pairs: int, length: int, queries: int | None, vocab_size: int) -> int:
    """The ids used, or UserError where pairs, queries, length and vocabulary do not fit."""
    asked = queries or pairs
    if 2 * (pairs + asked) > length:
        raise UserError(
            f"data.mqar.pairs={pairs} with {asked} queries needs {2 * (pairs + asked)} tokens, "
            f"more than the {length} of data.mqar.length (or data.seq_len)"
        )
    n_ids = min(vocab_size - 1 - FIRST_ID, MAX_IDS) // 2 * 2
    if pairs > n_ids // 2:
        raise UserError(
            f"data.mqar.pairs={pairs} needs as many keys, but the vocabulary has {n_ids // 2}; "
            "use fewer pairs or a larger vocabulary"
        )
    return n_ids


def recall_rows(data: DataConfig, batch_size: int) -> int:
    """Rows of a training batch that are recall rows: data.mqar.share of them, rounded.

    UserError when that leaves none though the share is above 0, or only them though it is below 1.
    """
    share = data.mqar.share
    rows = round(share * batch_size)
    if (rows == 0 and share > 0) or (rows == batch_size and share < 1):
        raise UserError(
            f"data.mqar.share={share} of train.batch_size={batch_size} rounds to {rows} rows, "
            f"which leaves none of {'recall' if rows == 0 else 'text'}; change one of the two"
        )
    return rows


def recall_tokens(
    seed: int,
    rows: np.ndarray,
    pairs: int,
    length: int,
    vocab_size: int,
    queries: int | None = None,
    *,
    held_out: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Recall documents number `rows`: (tokens, targets), int64 (len(rows), length).

    targets[i, t] is the value after a query at t, -100 elsewhere. A document is a function of
    (seed, its number, held_out) and the sizes alone.
    """
    n_ids = check_recall(pairs, length, queries, vocab_size)
    asked = queries or pairs
    half, n = n_ids // 2, len(rows)
    slots = (length - 2 * pairs) // 2
    stream = bits.RECALL_HELD_OUT if held_out else bits.RECALL_TRAIN
    sizes = [2 * pairs, 2 * pairs, pairs, asked, slots, length]
    drawn = bits.words(seed, stream, rows, sum(sizes))
    key_bits, value_bits, pair_bits, order_bits, slot_bits, filler_bits = np.split(
        drawn, np.cumsum(sizes)[:-1], axis=1
    )
    each = np.arange(n)[:, None]
    keys_NK = _distinct(key_bits, half)
    values_NK = _distinct(value_bits, half) + half

    tokens = bits.below(filler_bits, n_ids)
    is_key = np.zeros((n, n_ids), bool)
    is_key[each, keys_NK] = True
    tokens += half * is_key[each, tokens]
    tokens[:, 0 : 2 * pairs : 2] = keys_NK
    tokens[:, 1 : 2 * pairs : 2] = values_NK

    # Exponential races: the first `asked` to finish are a draw without replacement by these rates.
    rate = np.arange(1, slots + 1) ** (POWER - 1)
    race = -np.log(bits.unit(slot_bits)) / rate
    chosen = np.argpartition(race, asked - 1, axis=1)[:, :asked]
    chosen.sort(axis=1)
    # Every pair is asked once before any is asked again, and any slot may ask any pair.
    which = np.argsort(pair_bits, axis=1)[:, np.arange(asked) % pairs]
    if asked > pairs:
        which = which[each, np.argsort(order_bits, axis=1)]
    at = 2 * pairs + 2 * chosen
    tokens += FIRST_ID
    keys_NK += FIRST_ID
    values_NK += FIRST_ID
    targets = np.full((n, length), IGNORE, np.int64)
    answers = values_NK[each, which]
    tokens[each, at] = keys_NK[each, which]
    tokens[each, at + 1] = answers
    targets[each, at] = answers
    return tokens, targets


def _distinct(words: np.ndarray, n: int) -> np.ndarray:
    """int64 (rows, K): K distinct numbers below n in random order, from (rows, 2K) words.

    Floyd's sampling (Bentley and Floyd 1987) finds the set, an argsort shuffles it.
    """
    count = words.shape[1] // 2
    tops = np.arange(n - count, n)
    result = bits.below(words[:, :count], tops + 1)
    for i in range(1, count):
        seen = (result[:, :i] == result[:, i : i + 1]).any(axis=1)
        result[seen, i] = tops[i]
    return np.take_along_axis(result, np.argsort(words[:, count:], axis=1), axis=1)


def packed_recall(
    seed: int, rows: np.ndarray, data: DataConfig, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training rows of seq_len full of recall documents: (tokens, targets), (len(rows), seq_len).

    Where data.mqar.length does not divide seq_len, a row's last document is cut.
    """
    length = data.mqar.length or data.seq_len
    per_row = -(-data.seq_len // length)
    documents = (rows[:, None] * per_row + np.arange(per_row)).ravel()
    both = recall_tokens(
        seed, documents, data.mqar.pairs, length, vocab_size, data.mqar.queries, held_out=False
    )
    tokens, targets = (
        part.reshape(len(rows), per_row * length)[:, : data.seq_len] for part in both
    )
    return tokens, targets


def mqar_rows(
    seed: int, n: int, pairs: int, length: int, vocab_size: int, *, start: int = 0
) -> Batch:
    """Held-out recall documents number start … start + n - 1, one a row of `length` tokens.

    Each pair is asked once. They share nothing with the training rows of any seed. vocab_size: the
    tokenizer's.
    """
    import torch

    from ablate.data.stream import Batch

    rows = np.arange(start, start + n)
    tokens, targets = recall_tokens(seed, rows, pairs, length, vocab_size)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), None)
