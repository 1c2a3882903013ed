"""Validation: losses by document against brute force, recall against a model that knows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ablate.arch.spec import Architecture
from ablate.data import TokenSet, model_vocab, prepare
from ablate.model import LanguageModel
from ablate.train.validation import Validator
from tests.train.conftest import Make


def validator(cfg, model: nn.Module, tokens: TokenSet) -> Validator:  # type: ignore[no-untyped-def]
    return Validator(cfg, tokens, model, contextlib.nullcontext, lambda: None, cfg.train.batch_size)


@pytest.mark.parametrize("limit", [None, 700])
def test_document_losses_are_brute_force(tiny: Make, limit: int | None) -> None:
    cfg = tiny(evaluate={"tokens": limit}, data={"seq_len": 24})
    tokens = prepare(cfg.data)
    arch = Architecture.from_config(cfg.arch, vocab_size=model_vocab(tokens.vocab_size))
    model = LanguageModel(arch, seed=0)
    score = validator(cfg, model, tokens).text("val_a")

    split = tokens.splits["val_a"]
    count = split.head(limit)
    stream = torch.from_numpy(np.array(split.tokens[: split.doc_offsets[count] + 1], np.int64))
    nats = np.zeros(count)
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 24):
            row = stream[start : start + 25]
            logits = model.logits(row[None, :-1])[0].double()
            losses = nn.functional.cross_entropy(logits, row[1:], reduction="none")
            for i, loss in enumerate(losses.tolist()):
                nats[np.searchsorted(split.doc_offsets, start + i, side="right") - 1] += loss
    np.testing.assert_allclose(score.nats, nats, rtol=1e-5)
    np.testing.assert_array_equal(score.tokens, np.diff(split.doc_offsets[: count + 1]))
    summary = score.summary()
    assert summary["tokens"] == len(stream) - 1
    assert summary["bytes"] == split.doc_bytes[:count].sum()
    assert summary["loss"] == pytest.approx(nats.sum() / (len(stream) - 1))
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))
    bits = nats.sum() / math.log(2) / summary["bytes"]
    assert summary["bits_per_byte"] == pytest.approx(bits)
    assert model.training


def test_a_perfect_byte_guesser_has_known_bits(tiny: Make) -> None:
    """Uniform over V ids is log2 V bits a token, and a document has one more than its bytes."""

    class Uniform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(()))

        def loss(self, tokens: Tensor, targets: Tensor, start: Tensor, reduction: str) -> Tensor:
            return torch.full(targets.shape, math.log(256.0))

    cfg = tiny(evaluate={"tokens": None})
    tokens = prepare(cfg.data)
    summary = validator(cfg, Uniform(), tokens).text("val_b").summary()
    documents, size = tokens.splits["val_b"].n_docs, tokens.splits["val_b"].n_bytes
    assert summary["bits_per_byte"] == pytest.approx(8 * (size + documents) / size)


class Recaller(nn.Module):
    """Answers the last value that followed the same token; wrong in the first row."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.p = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def logits(self, tokens_BL: Tensor, *, keep_BL: Tensor) -> Tensor:
        self.seen.append(tokens_BL)
        logits = torch.zeros(*tokens_BL.shape, self.vocab)
        for b, row in enumerate(tokens_BL.tolist()):
            last: dict[int, int] = {}
            for t, token in enumerate(row):
                if token in last:
                    logits[b, t, last[token]] = 50.0
                if t:
                    last[row[t - 1]] = token
        return logits[keep_BL]


def test_recall_of_one_who_knows(tiny: Make) -> None:
    cfg = tiny(evaluate={"mqar_rows": 10, "mqar_pairs": [1, 3]}, data={"seq_len": 32})
    tokens = prepare(cfg.data)
    model = Recaller(model_vocab(tokens.vocab_size))
    checker = validator(cfg, model, tokens)
    score = checker.recall(final=True)
    assert score is not None
    assert score.correct == {1: [1] * 10, 3: [3] * 10}
    assert score.summary()["accuracy"] == 1.0
    assert score.summary()["queries"] == 10 * (1 + 3)
    assert score.summary()["loss"] == pytest.approx(0.0, abs=1e-6)

    final = torch.cat(model.seen)
    model.seen.clear()
    checker.recall(final=False)
    while_training = torch.cat(model.seen)
    assert not (final[:, None] == while_training[None]).all(-1).any()


def test_recall_counts_what_is_wrong(tiny: Make) -> None:
    cfg = tiny(evaluate={"mqar_rows": 10}, data={"seq_len": 32})
    tokens = prepare(cfg.data)
    model = Recaller(model_vocab(tokens.vocab_size))
    knows: Callable[..., Tensor] = model.logits

    def half(tokens_BL: Tensor, *, keep_BL: Tensor) -> Tensor:
        all_BL = torch.ones_like(keep_BL)
        logits_BLV = knows(tokens_BL, keep_BL=all_BL).unflatten(0, keep_BL.shape)
        logits_BLV[::2] = 0.0  # the even rows know nothing
        return logits_BLV[keep_BL]

    model.logits = half  # type: ignore[method-assign]
    score = validator(cfg, model, tokens).recall(final=True)
    assert score is not None
    assert score.correct[2][1::2] == [2] * 5
    assert sum(score.correct[2][::2]) < 2
    assert score.nats[2][0] == pytest.approx(2 * math.log(model.vocab), rel=1e-5)


def test_no_recall_rows_no_recall_score(tiny: Make) -> None:
    cfg = tiny(evaluate={"mqar_rows": 0})
    tokens = prepare(cfg.data)
    assert validator(cfg, Recaller(320), tokens).recall(final=True) is None
