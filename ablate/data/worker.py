"""Processes that tokenise chunks of text, or write the rows of recall documents.

Plain child processes with pipes instead of `multiprocessing`: nothing of the caller's main module
is imported again, and no thread or CUDA context is forked.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ablate.data.corpus import Chunk, document_hash, documents
from ablate.data.tokenizer import Tokenizer
from ablate.errors import UserError
from ablate.run import python_path

T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """Documents of one chunk: an end-of-text and the text's ids each, one after the other."""

    tokens: np.ndarray
    lengths: np.ndarray  # int64, tokens of each document with its end-of-text
    n_bytes: np.ndarray  # int64, UTF-8 bytes of each document
    hashes: np.ndarray  # uint64, of each document's content
    disk_bytes: int


def encode(chunk: Chunk, tokenizer: Tokenizer, lenient: bool) -> Encoded:
    """Tokenise one chunk."""
    pairs = list(documents(chunk, lenient))
    ids = tokenizer.encode_documents([text for text, _ in pairs], [raw for _, raw in pairs])
    mark = np.array([tokenizer.eos_id], tokenizer.dtype)
    pieces = [piece for document in ids for piece in (mark, document)]
    return Encoded(
        tokens=np.concatenate(pieces) if pieces else mark[:0],
        lengths=np.array([len(document) + 1 for document in ids], np.int64),
        n_bytes=np.array([len(raw) for _, raw in pairs], np.int64),
        hashes=np.array([document_hash(raw) for _, raw in pairs], np.uint64),
        disk_bytes=chunk.disk_bytes,
    )


def encode_all(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, lenient: bool, workers: int
) -> Iterator[Encoded]:
    """`encode` of every chunk in order, by so many processes (1: this one).

    At most two chunks a process are in memory. Raises the UserError that a process raised.
    """
    task = functools.partial(encode, tokenizer=tokenizer, lenient=lenient)
    if workers == 1:
        yield from map(task, chunks)
        return
    with Pool(task, workers) as pool:
        yield from in_order(map(pool.submit, chunks), ahead=2 * workers)


def in_order(futures: Iterable[Future[T]], ahead: int) -> Iterator[T]:
    """The results of futures, which are drawn so many before the one that is waited for."""
    pending: deque[Future[T]] = deque()
    for future in futures:
        pending.append(future)
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class ProcessEnded(RuntimeError):
    """A process ended before it had answered."""


class Pool:
    """Processes that answer what a task makes of an item; they end with the `with` or the caller.

    task: a function that pickles: one of a module of this package, or a `functools.partial` of it.
    """

    def __init__(self, task: Callable[[Any], Any], processes: int) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(processes, "pool")
        try:
            for _ in range(processes):
                self.processes.append(_start())
        except BaseException:
            self.close()
            raise
        for process in self.processes:  # by a thread: until a process reads, its pipe holds 64 KB
            self._threads.submit(self._tell, process, task)

    def submit(self, item: Any) -> Future[Any]:
        """The answer to come. Its result raises the UserError that the task raised, and
        ProcessEnded when the process was killed or the task had another error, which it prints."""
        return self._threads.submit(self._ask, item)

    def close(self) -> None:
        """Kill the processes; answers still to come raise ProcessEnded or are cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.kill()
            process.wait()
        self._threads.shutdown()
        for process in self.processes:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # bytes that it will not read any more
                    pipe.close()  # type: ignore[union-attr]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell(self, process: subprocess.Popen[bytes], task: Callable[[Any], Any]) -> None:
        try:
            _send(process.stdin, task)
        except OSError:
            pass  # it is gone, as the first who asks it will notice
        finally:
            self._free.put(process)

    def _ask(self, item: Any) -> Any:
        process = self._free.get()
        keep = True
        try:
            _send(process.stdin, item)
            answer = pickle.load(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError):
            code = process.wait()
            # Without the last of them, who asks next would wait for ever.
            keep = all(other.poll() is not None for other in self.processes)
            raise ProcessEnded(f"a process of the loader ended, exit code {code}") from None
        finally:
            if keep:
                self._free.put(process)
        if isinstance(answer, UserError):
            raise answer
        return answer


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: what lies in the current folder must not shadow a module of the standard library
        [sys.executable, "-P", "-c", "from ablate.data.worker import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": python_path(),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        },
    )


def _send(pipe: Any, value: Any) -> None:
    pickle.dump(value, pipe, protocol=5)
    pipe.flush()


def main() -> None:
    """Read a task, then answer items until stdin ends, which it also does when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get between the answers
    task = _read()
    while True:
        item = _read()
        try:
            answer = task(item)
        except UserError as error:
            answer = error
        try:
            _send(answers, answer)
        except BrokenPipeError:
            os._exit(0)  # the parent is gone; nothing is left to flush to


def _read() -> Any:
    try:
        return pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        os._exit(0)
