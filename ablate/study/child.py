"""The process that trains one trial: `python -m ablate.study.child`, spoken to in JSON lines.

    in    {"folder": path, "config": tree, "generation": n, "prune": bool}     what to train
          {"stop": true}                                                       checkpoint and end
          {"pruned": bool}                                                     answer to a report
    out   {"event": "ready"}                              torch and its compiler are imported
          {"event": "refused", "why": ...}                another process has it, or has ended it
          {"event": "progress", ...}                      figures; the first one: the trial is ours
          {"event": "report", "step": n, "value": x}      asks whether to prune
          {"event": "end", "state": ..., "cause": ...}    the last line

One trial a process: a poisoned GPU context or a leak dies with it. The end of stdin means that the
parent is gone, and this process goes at once. Whatever the trial prints goes to its log.txt.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import Timeout

from ablate import config
from ablate.run import RunFolder, StaleWriter, State, process_age, python_path

Train = Callable[..., dict[str, Any]]

ANSWER_SECONDS = 20.0


def child_environment(
    cfg: config.Config, gpus: str | None = None, cores: int | None = None
) -> dict[str, str]:
    """Environment of a process that trains: its threads, its GPUs, its share of the cores, this
    very package, and caches of what is compiled that all processes of this machine share, unless
    the user has set others."""
    threads = str(cfg.train.threads)
    share = {} if cores is None else {"ABLATE_CORES": str(cores), "RAYON_NUM_THREADS": str(cores)}
    cache = Path(cfg.data.cache).expanduser().resolve()
    bytecode = _bytecode(cache)
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        **bytecode,
        **os.environ,
        # what it is set for, that nothing is written beside the sources, holds
        **({"PYTHONDONTWRITEBYTECODE": ""} if bytecode else {}),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONPATH": python_path(),
        **({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}),
        **share,  # Rayon's threads are those of `tokenizers`
    }


def _bytecode(cache: Path) -> dict[str, str]:
    """A place for bytecode where torch came without, as in many a container: each process would
    compile its thousands of files again, which takes several seconds."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return {}
    if os.path.exists(importlib.util.cache_from_source(torch.origin)):
        return {}
    return {"PYTHONPYCACHEPREFIX": str(cache / "bytecode")}


def _preload() -> None:
    """Import what the first step on a GPU needs, while the trial before still trains."""
    import torch

    if not torch.cuda.is_available():
        return
    for name in ("triton", "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


class Channel:
    """What the parent says, and the way to answer it."""

    def __init__(self) -> None:
        # The pipes get descriptors of their own; 1 becomes the log, and nothing reads 0.
        self._in, self._out = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)
        # with the age of this process when it came
        self.assignments: queue.Queue[tuple[dict[str, Any], float]] = queue.Queue()
        self._answers: queue.Queue[bool] = queue.Queue()
        self._stopped = False
        self._loading = True
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="parent", daemon=True).start()

    def send(self, event: str, **fields: Any) -> None:
        # The first newline ends a line that an interrupt may have cut short.
        data = f"\n{json.dumps({'event': event, **fields})}\n".encode()
        with self._lock:
            try:
                while data:
                    data = data[os.write(self._out, data) :]
            except BrokenPipeError:
                os._exit(1)

    def should_prune(self, step: int, value: float) -> bool:
        self.send("report", step=step, value=value)
        try:
            return self._answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            return False

    def stop(self) -> None:
        """Interrupt the training, once: it checkpoints on the first signal, not on a second.

        Not while libraries load: one that is cut short in its import, and swallows that, leaves a
        process whose trial would fail."""
        with self._lock:
            if not self._stopped and not self._loading:
                os.kill(os.getpid(), signal.SIGINT)
            self._stopped = True

    def loaded(self) -> None:
        """All is imported: KeyboardInterrupt if the parent has said to stop meanwhile."""
        with self._lock:
            self._loading = False
            if self._stopped:
                raise KeyboardInterrupt

    def _listen(self) -> None:
        rest = b""
        while True:
            data = os.read(self._in, 1 << 16)
            if not data:
                os._exit(1)  # the parent is gone: whoever comes next resumes from the checkpoint
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "folder" in message:
                    self.assignments.put((message, process_age()))
                elif "pruned" in message:
                    self._answers.put(message["pruned"])
                elif "stop" in message:
                    self.stop()


def main(train: Train | None = None) -> None:
    """Train the trials that come in until one has ended. Does not return.

    Runs in a process group of its own, so that Ctrl-C reaches the parent alone; a SIGTERM from
    outside and the parent's word to stop are the same single interrupt.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads to come inherit it
    # a shell ignores it for what it starts with &, and so would `Channel.stop`
    signal.signal(signal.SIGINT, signal.default_int_handler)
    channel = Channel()
    threading.Thread(target=_wait_for_term, args=(channel,), daemon=True).start()
    loaded = None
    if train is None:
        _preload()
        from ablate.evaluate.trial import train_and_evaluate as imported
        from ablate.train.loop import set_loading_time

        train, loaded = imported, process_age()
    channel.send("ready")
    try:
        channel.loaded()
        while True:
            assignment, came = channel.assignments.get()
            if loaded is not None:
                set_loading_time(max(0.0, loaded - came))
            if _work(channel, assignment, train):
                break
    except KeyboardInterrupt:
        channel.send("end", state="interrupted", cause=None)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # no library's exit handler keeps the slot waiting


def _wait_for_term(channel: Channel) -> None:
    signal.sigwait({signal.SIGTERM})
    channel.stop()


def _work(channel: Channel, assignment: dict[str, Any], train: Train) -> bool:
    """Carry out one assignment; False when it was refused and another may follow."""
    folder = RunFolder(Path(assignment["folder"]))
    state: State
    try:
        status = folder.status()
        if folder.result() is not None or status["generation"] != assignment["generation"]:
            channel.send("refused", why="ended")
            return False
        cfg = config.load(assignment["config"])
        folder.path.mkdir(exist_ok=True)  # in the study's, which the parent has made
        _redirect(folder)
        _write_config(folder, cfg, assignment["config"])
        train(
            cfg,
            folder,
            on_progress=lambda row: channel.send("progress", **row),
            should_prune=channel.should_prune if assignment.get("prune") else None,
        )
        state, cause = "done", None
    except Timeout:
        channel.send("refused", why="held")
        return False
    except KeyboardInterrupt:
        state, cause = "interrupted", None
    except StaleWriter as error:
        state, cause = "interrupted", str(error)
    except BaseException as error:
        traceback.print_exc()
        state, cause = "failed", _cause(folder, error)
        if folder.status()["state"] == "pruned":
            state, cause = "pruned", None
    channel.send("end", state=state, cause=cause)
    return True


def _cause(folder: RunFolder, error: BaseException) -> str:
    from ablate.errors import UserError
    from ablate.train.stop import cause_of

    status = folder.status()
    if status["state"] == "failed" and status.get("cause"):
        return str(status["cause"])
    return str(error) if isinstance(error, UserError) else cause_of(error)


def _write_config(folder: RunFolder, cfg: config.Config, tree: dict[str, Any]) -> None:
    """Leave this trial's config in its folder, where the same run may have been named otherwise.

    The folder's name is the key of the run, so a config that differs means the same run: another
    share of attention that gives the same pattern, or a trunk that has moved.
    """
    there = folder.config()
    try:
        same = there is not None and config.science(config.load(there)) == config.science(cfg)
    except ValueError:
        same = False
    if not same:
        folder.create(tree, replace=True)


def _redirect(folder: RunFolder) -> None:
    """Everything that is printed from here on, by C libraries too, goes to the trial's log."""
    log = os.open(folder.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)


if __name__ == "__main__":
    main()
