"""Loss over length: by position within the training length, and at multiples of it.

Scoring other tokens at each length compares texts, not lengths (the trap in Samba's table). Here
the last half training length of each document's first stretch is the target at every multiple: the
same tokens, with 1, 2, 4, … training lengths of text up to and with them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ablate.config import DataConfig
from ablate.data import Split, corpus
from ablate.errors import UserError
from ablate.evaluate.subjects import Subject

MOST_DOCUMENTS = 64


def long_documents(subject: Subject, path: str) -> list[np.ndarray]:
    """The documents of a file or folder, each as ids after an end-of-text."""
    data = DataConfig(source="files", path=path)
    try:
        files = corpus.sources(data)["text"].files
    except UserError as error:
        raise UserError(str(error).replace("data.path", "evaluate.long_documents")) from None
    texts = [t for chunk in corpus.read_chunks(files) for t, _ in corpus.documents(chunk)]
    encoded = subject.encode(texts, special=False)
    return [np.array([subject.prefix_id, *ids]) for ids in encoded]


def split_documents(split: Split) -> list[np.ndarray]:
    """The documents of a tokenised split, each after its end-of-text."""
    ends = split.doc_offsets
    return [split.tokens[a:b].astype(np.int64) for a, b in itertools.pairwise(ends)]


def loss_by_length(
    subject: Subject,
    documents: Sequence[np.ndarray],
    *,
    length: int,
    multiples: Sequence[int],
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The content of evaluation/length.json; nats a token.

    length: of training. Only documents that hold the longest multiple count, MOST_DOCUMENTS of
    them. `UserError` when there is none.
    """
    multiples = sorted(set(multiples))
    need = multiples[-1] * length + 1
    if subject.positions is not None and need - 1 > subject.positions:
        raise UserError(
            f"evaluate.length: {multiples[-1]} times {length} tokens are more than the "
            f"{subject.positions} positions of the model"
        )
    kept = [d[:need] for d in documents if len(d) >= need][:MOST_DOCUMENTS]
    if not kept:
        check_longest(max(map(len, documents), default=0), length, multiples[-1])
    scored = max(1, length // 2)
    by_multiple: dict[str, list[float]] = {str(m): [] for m in multiples}
    position = []
    for document in kept:
        check()
        for multiple in multiples:
            context = document[need - multiple * length - 1 :]
            nats = token_nats(subject, context, scored)
            by_multiple[str(multiple)].append(float(nats.mean()))
        position.append(token_nats(subject, document[: length + 1], length))
    edges = _edges(length)
    nats_DB = np.stack([[p[a:b].mean() for a, b in itertools.pairwise(edges)] for p in position])
    means = {m: float(np.mean(v)) for m, v in by_multiple.items()}
    return {
        "task": "length",
        "metric": "loss",
        "value": means[str(multiples[-1])],
        "training_length": length,
        "scored_tokens": scored,
        "documents": len(kept),
        "by_multiple": means,
        "by_position": {
            "first": [a + 1 for a in edges[:-1]],
            "last": list(edges[1:]),
            "loss": [float(x) for x in nats_DB.mean(axis=0)],
        },
        "items": {**by_multiple, "position": nats_DB.round(5).tolist()},
    }


def check_longest(longest: int, length: int, multiple: int) -> None:
    """UserError when no document holds so many training lengths; longest: tokens of the longest."""
    need = multiple * length + 1
    if longest < need:
        raise UserError(
            f"evaluate.length: {multiple} times {length} tokens need documents of {need} "
            f"tokens, but the longest has {longest}; give evaluate.long_documents or less"
        )


@torch.no_grad()
def token_nats(subject: Subject, ids: np.ndarray, scored: int) -> np.ndarray:
    """Negative log-likelihoods of the last `scored` ids, given all before them; float64."""
    tokens = torch.from_numpy(ids[:-1].astype(np.int64))[None].to(subject.device)
    keep = torch.zeros(tokens.shape, dtype=torch.bool, device=subject.device)
    keep[:, -scored:] = True
    targets = torch.from_numpy(ids[-scored:].astype(np.int64)).to(subject.device)
    parts, first = [], 0
    for logits in subject.logits(tokens, keep):
        wanted = targets[first : first + len(logits)]
        parts.append(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none"))
        first += len(logits)
    return np.asarray(torch.cat(parts).double().cpu().numpy())


def _edges(length: int) -> list[int]:
    """Bounds of the position ranges: powers of two, the last at the training length."""
    powers = [2**i for i in range(int(math.log2(length)) + 1)]
    return sorted({0, *powers, length})


def check_long_documents(path: str | None) -> None:
    """UserError before compute when evaluate.long_documents is not there."""
    if path is not None and not Path(path).expanduser().exists():
        raise UserError(f"evaluate.long_documents '{path}' is not there")
