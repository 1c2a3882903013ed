"""Validation while training: loss on held-out text, and recall on held-out rows.

A is looked at while training and chosen on; B is looked at once, at the end, and reported. Both are
whole documents, scored in the training precision, summed in float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ablate.config import Config
from ablate.data import Batch, Split, TokenSet, eval_batches, mqar_rows
from ablate.data.recall import IGNORE


@dataclass(frozen=True)
class TextScore:
    """Negative log-likelihood of documents, in nats; arrays have one entry a document."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Totals: loss is nats a token, perplexity its exponential."""
        nats, tokens, size = float(self.nats.sum()), int(self.tokens.sum()), int(self.bytes.sum())
        loss = nats / tokens
        return {
            "loss": loss,
            "bits_per_byte": nats / math.log(2) / size if size else math.nan,
            "perplexity": math.exp(min(loss, 700.0)),
            "tokens": tokens,
            "bytes": size,
            "documents": len(self.nats),
        }

    def items(self) -> dict[str, Any]:
        """Per document, for evaluation/<task>.json."""
        return {
            "nats": [round(x, 6) for x in self.nats.tolist()],
            "tokens": self.tokens.tolist(),
            "bytes": self.bytes.tolist(),
        }


def uninformative(accuracy: float, n: int, chance: float) -> str | None:
    """ "floor" or "ceiling" where an accuracy over `n` items tells nothing of a difference.

    At the floor when its 95% Wilson interval reaches down to chance, at the ceiling when fewer than
    one item in a hundred is wrong.
    """
    z = 1.96
    centre = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    spread = accuracy * (1 - accuracy) / n + z * z / (4 * n * n)
    if accuracy <= 0 or centre - z / (1 + z * z / n) * spread**0.5 <= chance:
        return "floor"
    return "ceiling" if accuracy > 0.99 else None


@dataclass(frozen=True)
class RecallScore:
    """MQAR: per number of pairs, for each row its correct answers, and the nats of its answers."""

    queries: dict[int, int]  # in a row
    correct: dict[int, list[int]]
    nats: dict[int, list[float]]

    def summary(self) -> dict[str, Any]:
        """Accuracy and loss over all queries; by_pairs: accuracy for each number of pairs; verdict:
        "floor" or "ceiling" where the accuracy cannot tell models apart."""
        asked = {p: n * len(self.correct[p]) for p, n in self.queries.items()}
        total = sum(asked.values())
        accuracy = sum(sum(c) for c in self.correct.values()) / total
        floor = sum(n / p for p, n in asked.items()) / total  # one of the row's values, blindly
        return {
            "verdict": uninformative(accuracy, total, floor),
            "accuracy": accuracy,
            "loss": sum(sum(n) for n in self.nats.values()) / total,
            "queries": total,
            "by_pairs": {str(p): sum(c) / asked[p] for p, c in self.correct.items()},
        }

    def items(self) -> dict[str, Any]:
        """Per row, for evaluation/mqar.json."""
        return {
            "by_pairs": {
                str(p): {
                    "queries_per_row": self.queries[p],
                    "correct": self.correct[p],
                    "nats": [round(x, 6) for x in self.nats[p]],
                }
                for p in self.queries
            }
        }


@dataclass
class Validator:
    """Scores one model; `check` is called between batches and may raise to stop."""

    cfg: Config
    token_set: TokenSet
    model: Any  # an nn.Module with the `loss` and `logits` of a LanguageModel
    autocast: Callable[[], Any]
    check: Callable[[], None]
    batch_size: int

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def text(self, split: str) -> TextScore:
        """Score the first whole documents of "val_a" or "val_b", `evaluate.tokens` of them."""
        part: Split = self.token_set.splits[split]
        limit = self.cfg.evaluate.tokens
        nats_parts: list[Tensor] = []
        docs: list[np.ndarray] = []
        batches = eval_batches(part, self.cfg.data, batch_size=self.batch_size, max_tokens=limit)
        with _inference(self.model):
            for batch, doc_index_BL in batches:
                self.check()
                nats_BL, keep_BL = self._token_losses(batch)
                nats_parts.append(nats_BL[keep_BL.to(self.device)])
                docs.append(np.asarray(doc_index_BL)[keep_BL.numpy()])
        nats = torch.cat(nats_parts).double().cpu().numpy()
        index = np.concatenate(docs)
        count = int(index.max()) + 1
        tokens = np.bincount(index, minlength=count)
        return TextScore(
            np.bincount(index, weights=nats, minlength=count),
            tokens,
            np.asarray(part.doc_bytes[:count]),
        )

    def recall(self, *, final: bool) -> RecallScore | None:
        """Score held-out recall rows; `final` takes rows that no validation before has seen.

        Each pair is asked once, however often training asks, so that no answer can be copied from
        an earlier one.
        """
        cfg = self.cfg
        rows = cfg.evaluate.mqar_rows
        if not rows:
            return None
        length = cfg.data.mqar.length or cfg.data.seq_len
        score = RecallScore({}, {}, {})
        for pairs in cfg.evaluate.mqar_pairs or [cfg.data.mqar.pairs]:
            batch = mqar_rows(
                cfg.seed, rows, pairs, length, self.token_set.vocab_size, start=rows if final else 0
            )
            correct, nats = self._recall_rows(batch)
            score.queries[pairs] = int((batch.targets_BL[0] != IGNORE).sum())
            score.correct[pairs] = correct
            score.nats[pairs] = nats
        return score

    def _recall_rows(self, batch: Batch) -> tuple[list[int], list[float]]:
        correct: list[int] = []
        nats: list[float] = []
        with _inference(self.model):
            for start in range(0, len(batch.tokens_BL), self.batch_size):
                self.check()
                rows = slice(start, start + self.batch_size)
                targets_BL = batch.targets_BL[rows].to(self.device)
                keep_BL = targets_BL != IGNORE
                with self.autocast():
                    tokens_BL = batch.tokens_BL[rows].to(self.device)
                    logits_MV = self.model.logits(tokens_BL, keep_BL=keep_BL)
                target_M = targets_BL[keep_BL]
                row_M = keep_BL.nonzero()[:, 0].cpu().numpy()
                right = (logits_MV.argmax(-1) == target_M).cpu().numpy()
                loss = torch.nn.functional.cross_entropy(logits_MV, target_M, reduction="none")
                n = len(targets_BL)
                correct += np.bincount(row_M, weights=right, minlength=n).astype(int).tolist()
                nats += np.bincount(row_M, weights=loss.double().cpu(), minlength=n).tolist()
        return correct, nats

    def _token_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(nats_BL on the device, which positions count on the CPU)."""
        moved = batch.to(self.device)
        with self.autocast():
            nats = self.model.loss(
                moved.tokens_BL, moved.targets_BL, moved.doc_start_BL, reduction="none"
            )
        return nats.reshape(batch.targets_BL.shape), batch.targets_BL != IGNORE


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """No gradients and `eval` mode, undone afterwards."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
