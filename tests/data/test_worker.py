"""The loader's processes: what they make is what is made inline, and they never outlive or hang."""

from __future__ import annotations

import functools
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ablate.config import DataConfig, WrittenConfig
from ablate.data import Batch, TrainStream, prefetched, prepare, stream, tokens, writers
from ablate.data.worker import Pool, ProcessEnded
from ablate.data.written import written_count
from ablate.errors import UserError
from ablate.train.loop import _writers
from ablate.train.ranks import Ranks


@pytest.fixture
def mixed(data: DataConfig) -> TrainStream:
    recall = WrittenConfig(share=0.4, entries=[2, 10])
    data = data.model_copy(update={"recall": recall, "reset_documents": True})
    return TrainStream(prepare(data), data, batch_size=5, seed=3)


@pytest.fixture
def count() -> Iterator[Pool]:
    """One process that gives `written_count` of a batch size at share 0.5."""
    data = DataConfig(recall=WrittenConfig(share=0.5))
    with Pool(functools.partial(written_count, data, recall_rows=0), 1) as pool:
        yield pool


def same(batch: Batch, other: Batch) -> bool:
    assert batch.doc_start_BL is not None
    assert other.doc_start_BL is not None
    return (
        torch.equal(batch.tokens_BL, other.tokens_BL)
        and torch.equal(batch.targets_BL, other.targets_BL)
        and torch.equal(batch.doc_start_BL, other.doc_start_BL)
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_are_those_made_inline_also_from_the_middle(
    mixed: TrainStream, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = [mixed.batch(step) for step in range(12)]
    with Pool(mixed.write, processes) as pool:
        monkeypatch.setattr(mixed, "write", lambda rows: pytest.fail("made inline"))
        for first in (0, 7):
            with prefetched(mixed, first, 12, pool=pool) as batches:
                made = list(batches)
            assert len(made) == 12 - first
            assert all(map(same, made, inline[first:]))


def test_killed_processes_are_replaced_by_the_thread(
    mixed: TrainStream, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        Pool(mixed.write, 2) as pool,
        prefetched(mixed, 0, 100, pool=pool) as batches,
    ):
        for step, batch in enumerate(batches):
            if step in (5, 40):
                pool.processes[step == 40].kill()
            assert same(batch, mixed.batch(step))
    assert step == 99
    assert len(caplog.records) == 1
    assert "exit code -9" in caplog.text


def test_none_is_left_where_the_consumer_raises(mixed: TrainStream) -> None:
    def consume() -> None:
        with writers(mixed) as pool, prefetched(mixed, 0, 10**9, pool=pool) as batches:
            assert pool is not None
            pools.append(pool)
            next(batches)
            raise KeyboardInterrupt

    pools: list[Pool] = []
    with pytest.raises(KeyboardInterrupt):
        consume()
    assert all(process.poll() is not None for process in pools[0].processes)


def test_closed_before_they_have_started(mixed: TrainStream) -> None:
    begun = time.monotonic()
    with Pool(mixed.write, 2) as pool:
        answers = [pool.submit(mixed.written(step)) for step in range(10)]
    assert time.monotonic() - begun < 10
    assert all(process.poll() is not None for process in pool.processes)
    assert all(answer.done() for answer in answers)


def test_a_mistake_of_the_user_comes_back_and_an_interrupt_does_not_end_it(count: Pool) -> None:
    with pytest.raises(UserError, match=r"data\.recall\.share=0\.5 of train\.batch_size=1"):
        count.submit(1).result()
    count.processes[0].send_signal(signal.SIGINT)
    assert count.submit(8).result() == 4


def test_after_a_bug_in_the_only_process_nobody_waits(count: Pool) -> None:
    for _ in range(2):
        with pytest.raises(ProcessEnded, match="exit code 1"):
            count.submit("no number").result(timeout=20)


def test_they_end_when_the_parent_is_killed() -> None:
    code = (
        "import functools; from ablate.config import DataConfig;"
        "from ablate.data.worker import Pool; from ablate.data.written import written_count;"
        "pool = Pool(functools.partial(written_count, DataConfig(), recall_rows=0), 1);"
        "pool.submit(8).result(); print('answered', flush=True); input()"
    )
    pipe = subprocess.PIPE
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"answered\n"
    parent.kill()
    parent.communicate(timeout=20)  # the end of stderr, which the process has too


def test_as_many_as_keep_up_within_the_cores(
    mixed: TrainStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(stream, "Pool", lambda task, n: started.append(n))
    for cores, trainers in ((64, 1), (64, 16), (4, 1), (2, 1), (1, 1), (2, 8)):
        monkeypatch.setenv("ABLATE_CORES", str(cores))
        assert tokens.usable_cores() == cores
        writers(mixed, trainers)
    assert started == [5, 3, 3, 1, 1, 1]


def test_text_alone_and_a_cpu_have_none(
    data: DataConfig, mixed: TrainStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "Pool", lambda *_: pytest.fail("started"))
    with writers(TrainStream(prepare(data), data, batch_size=5, seed=3)) as pool:
        assert pool is None
    with _writers(mixed, torch.device("cpu"), Ranks()) as pool:
        assert pool is None
