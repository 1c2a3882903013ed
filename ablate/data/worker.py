"""Tokenising processes: `main` reads chunks from stdin and answers on stdout.

Plain child processes with pipes instead of `multiprocessing`: nothing of the caller's main module
is imported again, and no thread or CUDA context is forked.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ablate.data.corpus import Chunk, document_hash, documents
from ablate.data.tokenizer import Tokenizer
from ablate.errors import UserError
from ablate.run import python_path


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
    if workers == 1:
        for chunk in chunks:
            yield encode(chunk, tokenizer, lenient)
        return
    free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    processes = [_start(tokenizer, lenient) for _ in range(workers)]
    pool = ThreadPoolExecutor(workers)

    def ask(chunk: Chunk) -> Encoded:
        process = free.get()
        try:
            _send(process.stdin, chunk)
            answer = pickle.load(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError):
            raise RuntimeError(f"a tokenising process ended, exit code {process.wait()}") from None
        finally:
            free.put(process)
        if isinstance(answer, UserError):
            raise answer
        return answer

    try:
        for process in processes:
            free.put(process)
        pending: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            pending.append(pool.submit(ask, chunk))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # bytes that it will not read any more
                    pipe.close()  # type: ignore[union-attr]
        pool.shutdown()


def _start(tokenizer: Tokenizer, lenient: bool) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        # -P: what lies in the current folder must not shadow a module of the standard library
        [sys.executable, "-P", "-c", "from ablate.data.worker import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": python_path(), "TOKENIZERS_PARALLELISM": "false"},
    )
    _send(process.stdin, (tokenizer.name, tokenizer.definition, lenient))
    return process


def _send(pipe: Any, value: Any) -> None:
    pickle.dump(value, pipe, protocol=5)
    pipe.flush()


def main() -> None:
    """Answer chunks until stdin ends, which it also does when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get between the answers
    name, definition, lenient = pickle.load(sys.stdin.buffer)
    tokenizer = Tokenizer(name, definition)
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except (EOFError, pickle.UnpicklingError):
            return
        answer: Encoded | UserError
        try:
            answer = encode(chunk, tokenizer, lenient)
        except UserError as error:
            answer = error
        try:
            _send(answers, answer)
        except BrokenPipeError:
            os._exit(0)  # the parent is gone; nothing is left to flush to
