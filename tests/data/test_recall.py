from __future__ import annotations

import numpy as np
import pytest
import torch

from ablate.config import load
from ablate.data import mqar_rows
from ablate.data.recall import FIRST_ID, packed_recall, recall_tokens
from ablate.errors import UserError

CASES = [
    # pairs, length, vocabulary, queries
    (8, 64, 257, None),
    (1, 4, 257, None),
    (2, 8, 257, None),
    (126, 504, 257, None),  # every key and every slot is used
    (4, 33, 257, 10),  # more queries than pairs, an odd length
    (8, 64, 50277, 3),
]


@pytest.mark.parametrize(("pairs", "length", "vocab_size", "queries"), CASES)
def test_a_document_can_be_answered_and_only_queries_are_scored(
    pairs: int, length: int, vocab_size: int, queries: int | None
) -> None:
    n = 50
    tokens, targets = recall_tokens(0, np.arange(n), pairs, length, vocab_size, queries)
    asked = queries or pairs
    n_ids = min(vocab_size - 1 - FIRST_ID, 8192) // 2 * 2
    half = FIRST_ID + n_ids // 2
    assert tokens.shape == targets.shape == (n, length)
    assert tokens.min() >= FIRST_ID
    assert tokens.max() < FIRST_ID + n_ids
    for row, target in zip(tokens, targets, strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.max() < half <= values.min()
        bound = dict(zip(keys, values, strict=True))
        (at,) = np.nonzero(target != -100)
        assert len(at) == asked
        assert (at >= 2 * pairs).all()
        for t in at:
            assert bound[row[t]] == target[t] == row[t + 1]
        # a bound key appears nowhere but in its pair and its queries: it has one value
        assert sum(token in bound for token in row) == pairs + asked
        times = [list(row[at]).count(key) for key in keys]
        assert max(times) - min(times) <= 1


def test_a_row_is_a_function_of_seed_number_and_stream() -> None:
    whole, _ = recall_tokens(3, np.arange(100), 8, 64, 257)
    part, _ = recall_tokens(3, np.array([70, 5]), 8, 64, 257)
    assert (whole[[70, 5]] == part).all()
    assert len({row.tobytes() for row in whole}) == 100
    others = [
        recall_tokens(seed, np.arange(100), 8, 64, 257, held_out=held_out)[0]
        for seed, held_out in ((3, False), (4, True), (4, False))
    ]
    everything = {row.tobytes() for rows in (whole, *others) for row in rows}
    assert len(everything) == 400


def test_draws_are_uniform_where_they_should_be() -> None:
    n, pairs = 20_000, 16
    tokens, targets = recall_tokens(0, np.arange(n), pairs, 128, 67, None)  # 31 keys, 31 values
    for first in (0, 1):
        for place in (0, pairs - 1):
            ids = tokens[:, 2 * place + first] - FIRST_ID - 31 * first
            counts = np.bincount(ids, minlength=31)
            assert len(counts) == 31
            # chi-squared with 30 degrees of freedom: 60 has a probability of 0.001
            assert ((counts - n / 31) ** 2 / (n / 31)).sum() < 60
    # which pair a query asks does not depend on where the query is
    first_query = (targets != -100).argmax(1)
    asked = tokens[np.arange(n), first_query]
    pair = (tokens[:, 0 : 2 * pairs : 2] == asked[:, None]).argmax(1)
    counts = np.bincount(pair, minlength=pairs)
    assert ((counts - n / pairs) ** 2 / (n / pairs)).sum() < 42  # 15 degrees, 0.0002


def test_queries_follow_the_power_law() -> None:
    n = 50_000
    _, targets = recall_tokens(1, np.arange(n), 1, 42, 257)
    slot = ((targets != -100).argmax(1) - 2) // 2
    want = np.arange(1, 21) ** (0.01 - 1)
    want *= n / want.sum()
    counts = np.bincount(slot, minlength=20)
    assert ((counts - want) ** 2 / want).sum() < 46  # 19 degrees of freedom, 0.0005


@pytest.mark.parametrize(
    ("pairs", "length", "vocab_size", "queries", "words"),
    [
        (8, 31, 257, None, "needs 32 tokens, more than the 31"),
        (8, 32, 257, 9, "with 9 queries needs 34"),
        (127, 2048, 257, None, "needs as many keys, but the vocabulary has 126"),
        (5000, 1 << 16, 50277, None, "the vocabulary has 4096"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    pairs: int, length: int, vocab_size: int, queries: int | None, words: str
) -> None:
    with pytest.raises(UserError, match=f"data.mqar.pairs={pairs}.*{words}"):
        recall_tokens(0, np.arange(2), pairs, length, vocab_size, queries)


def test_packed_rows_are_full_of_documents_of_their_own() -> None:
    tree = {"seq_len": 100, "mqar": {"share": 0.5, "pairs": 4, "length": 32}}
    data = load({"data": tree, "train": {"tokens": 1}}).data
    tokens, targets = packed_recall(0, np.array([2, 9]), data, 257)
    assert tokens.shape == targets.shape == (2, 100)
    alone, _ = recall_tokens(0, np.arange(8, 12), 4, 32, 257, held_out=False)
    assert (tokens[0] == alone.ravel()[:100]).all()
    assert ((targets[:, :96] != -100).reshape(2, 3, 32).sum(2) == 4).all()


def test_mqar_rows_is_a_batch_of_held_out_rows() -> None:
    batch = mqar_rows(0, 6, 4, 32, 257)
    assert batch.tokens_BL.shape == (6, 32)
    assert batch.tokens_BL.dtype == batch.targets_BL.dtype == torch.int64
    assert batch.n_targets() == 24
    later = mqar_rows(0, 3, 4, 32, 257, start=3)
    assert torch.equal(later.tokens_BL, batch.tokens_BL[3:])
