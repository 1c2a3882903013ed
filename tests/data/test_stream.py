from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ablate.config import DataConfig
from ablate.data import (
    Batch,
    TokenSet,
    TrainStream,
    bits,
    check_epochs,
    eval_batches,
    model_vocab,
    prefetched,
    prepare,
    recall_rows,
)
from ablate.data.stream import document_starts
from ablate.errors import UserError
from tests.data.conftest import data_config, write_jsonl


@pytest.fixture
def token_set(data: DataConfig) -> TokenSet:
    return prepare(data)


def change(data: DataConfig, **fields: object) -> DataConfig:
    return DataConfig.model_validate({**data.model_dump(), **fields})


def equal(a: Batch, b: Batch) -> bool:
    pairs = zip(a._map(lambda t: t).__dict__.values(), b.__dict__.values(), strict=True)
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def starts_by_hand(offsets: np.ndarray, start: int, length: int) -> list[int]:
    """For each position, the last document start in the row at or before it, else 0."""
    return [
        max([0, *(int(o) - start for o in offsets if start <= o <= start + t)])
        for t in range(length)
    ]


def test_a_row_is_a_window_and_its_targets_are_the_next_tokens(
    data: DataConfig, token_set: TokenSet
) -> None:
    batch = TrainStream(token_set, data, batch_size=4, seed=0).batch(3)
    assert batch.tokens_BL.shape == batch.targets_BL.shape == (4, 64)
    assert batch.tokens_BL.dtype == batch.targets_BL.dtype == torch.int64
    assert batch.doc_start_BL is None
    assert batch.tokens_BL.is_contiguous()
    assert torch.equal(batch.tokens_BL[:, 1:], batch.targets_BL[:, :-1])
    stream = token_set.splits["train"].tokens
    rows = {bytes(stream[i * 64 : i * 64 + 65].tobytes()) for i in range(len(stream) // 64)}
    both = torch.cat([batch.tokens_BL, batch.targets_BL[:, -1:]], 1).numpy().astype(stream.dtype)
    assert all(row.tobytes() in rows for row in both)


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(
    data: DataConfig, token_set: TokenSet
) -> None:
    stream = TrainStream(token_set, data, batch_size=3, seed=0)
    n = stream.n_windows
    order = np.concatenate([stream._order(step) for step in range(n)])
    epochs = order.reshape(3, n)  # n steps of 3 rows
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[0] != np.arange(n)).any()


def test_order_is_the_seeds_alone_and_resuming_needs_no_history(
    data: DataConfig, token_set: TokenSet
) -> None:
    data = change(data, mqar={"share": 0.25, "pairs": 4, "length": 32}, reset_documents=True)
    one = TrainStream(token_set, data, batch_size=8, seed=5)
    ahead = [one.batch(step) for step in range(200)]
    for step in (199, 0, 77, 150, 3):
        fresh = TrainStream(token_set, data, batch_size=8, seed=5)
        assert equal(fresh.batch(step), ahead[step])
        assert equal(one.batch(step), ahead[step])
    assert not equal(TrainStream(token_set, data, batch_size=8, seed=6).batch(0), ahead[0])


def test_the_order_is_pinned() -> None:
    """A change here gives the same config another data order: stored runs could not be rerun."""
    assert bits.permutation(1, 0, 12).tolist() == [4, 1, 8, 10, 0, 5, 9, 2, 7, 3, 11, 6]
    assert bits.bits(3, bits.RECALL_TRAIN, np.array([7]), 1)[0, 0] == 15735501687060453182


def test_document_starts_are_the_last_start_in_the_row(
    data: DataConfig, token_set: TokenSet
) -> None:
    data = change(data, reset_documents=True, seq_len=300)
    stream = TrainStream(token_set, data, batch_size=5, seed=0)
    offsets = token_set.splits["train"].doc_offsets
    batch = stream.batch(2)
    assert batch.doc_start_BL is not None
    assert batch.doc_start_BL.dtype == torch.int32
    for row, window in enumerate(stream._order(2)):
        want = starts_by_hand(offsets, int(window) * 300, 300)
        assert batch.doc_start_BL[row].tolist() == want
        marks = (batch.tokens_BL[row] == 256).nonzero().ravel().tolist()
        assert marks == sorted({s for s in want if s} | {s for s in [0] if 0 in marks})


def test_document_starts_at_the_edges() -> None:
    offsets = np.array([0, 4, 8, 9, 20])
    starts = document_starts(offsets, np.array([0, 4, 3, 10, 16]), 4)
    assert starts.tolist() == [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 1, 1, 1],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    assert document_starts(offsets, np.array([7]), 4).tolist() == [[0, 1, 2, 2]]


def test_recall_rows_are_spread_packed_and_never_the_same(
    data: DataConfig, token_set: TokenSet
) -> None:
    mqar = {"share": 0.5, "pairs": 4, "length": 24}
    stream = TrainStream(
        token_set, change(data, mqar=mqar, reset_documents=True), batch_size=8, seed=0
    )
    batches = [stream.batch(step) for step in range(3)]
    scored = (batches[0].targets_BL != -100).sum(1)
    assert scored.tolist()[1::2] == [64] * 4
    for row in range(0, 8, 2):
        targets = batches[0].targets_BL[row]
        by_document = [int((targets[i : i + 24] != -100).sum()) for i in (0, 24)]
        assert by_document == [4, 4]
        assert batches[0].doc_start_BL is not None
        assert batches[0].doc_start_BL[row].tolist() == [0] * 24 + [24] * 24 + [48] * 16
        at = (targets[:-1] != -100).nonzero().ravel()
        assert torch.equal(targets[at], batches[0].tokens_BL[row][at + 1])
    rows = torch.cat([batch.tokens_BL[::2] for batch in batches])
    assert len({tuple(row.tolist()) for row in rows}) == 12


@pytest.mark.parametrize(
    ("share", "batch_size", "rows"), [(0.0, 4, 0), (0.25, 16, 4), (0.5, 3, 2), (1.0, 5, 5)]
)
def test_share_of_recall_rows(data: DataConfig, share: float, batch_size: int, rows: int) -> None:
    assert recall_rows(change(data, mqar={"share": share}), batch_size) == rows


@pytest.mark.parametrize(("share", "batch_size"), [(0.01, 16), (0.9, 4), (0.3, 1)])
def test_a_share_that_rounds_away_is_refused(
    data: DataConfig, share: float, batch_size: int
) -> None:
    with pytest.raises(UserError, match=rf"data.mqar.share={share}.*batch_size={batch_size}"):
        recall_rows(change(data, mqar={"share": share}), batch_size)


def test_only_recall_needs_no_long_text(data: DataConfig, token_set: TokenSet) -> None:
    data = change(data, seq_len=1 << 20, mqar={"share": 1.0, "pairs": 2, "length": 1 << 20})
    assert TrainStream(token_set, data, batch_size=1, seed=0).text_tokens(10) == 0


def test_a_text_shorter_than_a_row_is_refused(data: DataConfig, token_set: TokenSet) -> None:
    with pytest.raises(UserError, match=r"data.seq_len=1000000 is longer than"):
        TrainStream(token_set, change(data, seq_len=1_000_000), batch_size=1, seed=0)


def test_more_than_four_epochs_are_refused(data: DataConfig, token_set: TokenSet) -> None:
    unique = token_set.splits["train"].n_tokens
    assert check_epochs(token_set, data, 4 * unique) == 4
    with pytest.raises(UserError, match=r"train.tokens.*unique.*5.0 epochs.*data.allow_repeats"):
        check_epochs(token_set, data, 5 * unique)
    assert check_epochs(token_set, change(data, allow_repeats=True), 5 * unique) == 5
    half = change(data, mqar={"share": 0.5, "pairs": 4})
    stream = TrainStream(token_set, half, batch_size=4, seed=0)
    assert stream.text_tokens(1000 * 4 * 64) == 1000 * 2 * 64
    assert stream.epochs(1000 * 4 * 64) == pytest.approx(1000 * 2 * 64 / unique)


class TestEval:
    @pytest.mark.parametrize("reset", [False, True])
    def test_every_token_is_scored_once_with_its_document(
        self, data: DataConfig, token_set: TokenSet, reset: bool
    ) -> None:
        split = token_set.splits["val_a"]
        data = change(data, reset_documents=reset)
        scored, documents, previous = [], [], []
        for batch, index in eval_batches(split, data, batch_size=4):
            assert batch.tokens_BL.shape == index.shape == (4, 64)
            inside = batch.targets_BL != -100
            assert torch.equal(inside, index >= 0)
            scored += batch.targets_BL[inside].tolist()
            previous += batch.tokens_BL[inside].tolist()
            documents += index[inside].tolist()
            assert (batch.doc_start_BL is not None) == reset
        assert scored == split.tokens[1:].tolist()
        assert previous == split.tokens[:-1].tolist()
        lengths = np.bincount(documents)
        assert lengths.tolist() == (split.doc_bytes + 1).tolist()
        first = documents.index(1)
        assert (previous[first], scored[first - 1]) == (256, 256)

    def test_starts_are_of_the_documents(self, data: DataConfig, token_set: TokenSet) -> None:
        split = token_set.splits["val_b"]
        data = change(data, reset_documents=True)
        for i, (batch, index) in enumerate(eval_batches(split, data, batch_size=2)):
            assert batch.doc_start_BL is not None
            for row in range(2):
                start = (2 * i + row) * 64
                want = starts_by_hand(split.doc_offsets, start, 64)
                valid = int((index[row] >= 0).sum())
                assert batch.doc_start_BL[row, :valid].tolist() == want[:valid]

    def test_a_cap_is_the_same_documents_for_any_shape(
        self, data: DataConfig, token_set: TokenSet
    ) -> None:
        split = token_set.splits["val_a"]
        want = None
        for seq_len, batch_size in ((64, 4), (33, 1), (512, 7)):
            batches = eval_batches(
                split, change(data, seq_len=seq_len), batch_size=batch_size, max_tokens=2000
            )
            scored = [t for b, _ in batches for t in b.targets_BL[b.targets_BL != -100].tolist()]
            assert want in (None, scored)
            want = scored
        assert want is not None
        assert len(want) == split.doc_offsets[split.head(2000)] <= 2000
        assert len(want) > 1000


def test_prefetched_gives_the_same_batches(data: DataConfig, token_set: TokenSet) -> None:
    stream = TrainStream(token_set, data, batch_size=2, seed=0)
    with prefetched(TrainStream(token_set, data, batch_size=2, seed=0), 3, 20) as ahead:
        batches = list(ahead)
    assert len(batches) == 17
    assert all(equal(batch, stream.batch(3 + i)) for i, batch in enumerate(batches))
    with prefetched(stream, 5, 5) as ahead:
        assert list(ahead) == []


def test_prefetched_stops_early_and_hands_on_exceptions(
    data: DataConfig, token_set: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = TrainStream(token_set, data, batch_size=2, seed=0)
    before = threading.active_count()
    with prefetched(stream, 0, 10**9) as ahead:
        next(ahead)
    assert threading.active_count() == before

    real = stream.batch

    def fail(step: int, written: object = None) -> Batch:
        if step == 2:
            raise OSError("disk gone")
        return real(step)

    monkeypatch.setattr(stream, "batch", fail)
    with prefetched(stream, 0, 10) as batches:
        assert equal(next(batches), real(0))
        assert equal(next(batches), real(1))
        with pytest.raises(OSError, match="disk gone"):
            next(batches)
    assert threading.active_count() == before


def test_micro_batches_are_the_rows_in_order(data: DataConfig, token_set: TokenSet) -> None:
    data = change(data, reset_documents=True)
    batch = TrainStream(token_set, data, batch_size=5, seed=0).batch(0)
    parts = batch.split(2)
    assert [len(part.tokens_BL) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.targets_BL for part in parts]), batch.targets_BL)
    assert sum(part.n_targets() for part in parts) == batch.n_targets() == 5 * 64
    moved = batch.to("cpu")
    assert equal(moved, batch)


def test_model_vocab_is_a_multiple_of_64() -> None:
    assert [model_vocab(n) for n in (1, 64, 257, 16384, 50277)] == [64, 64, 320, 16384, 50304]


def test_unicode_text_survives(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [f"☃ {i} naïve" for i in range(100)])
    token_set = prepare(data_config(tmp_path, source="files", path=str(path), seq_len=8))
    split = token_set.splits["train"]
    assert "☃ 1" in token_set.tokenizer.decode(split.tokens.tolist())
    assert split.n_bytes == split.n_tokens - split.n_docs
