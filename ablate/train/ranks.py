"""Several processes that train one run, one on each device (`train.devices`).

Rank 0 is the run: it has the folder, validates, prunes, and says before every step that there is
one, so that all obey its one decision. The others do nothing but steps. Each rank makes the same
batch and takes its share of the rows; gradients of the summed loss are added up, so that a step is
that of one process to rounding.

`train` starts ranks 1 and up itself, or finds them when it was started by torchrun.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ablate.config import Config, TrainConfig
from ablate.data import Batch
from ablate.errors import UserError
from ablate.run import die_with_parent, python_path
from ablate.train.stop import OUT_OF_MEMORY, TrialFailed, is_out_of_memory

log = logging.getLogger(__name__)

GRACE = 10.0  # seconds in which rank 0 may itself notice that another one is gone
_STEP, _END = 1.0, 0.0
_NO_MEMORY = errno.ENOMEM  # exit code of a process whose memory ran out


@dataclass
class Ranks:
    """This process's place among those that train a run; one alone unless told."""

    rank: int = 0
    world: int = 1
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    listening: bool = False  # the others wait for rank 0's word, and for nothing else
    ended: bool = False

    def part(self, batch: Batch) -> Batch:
        """This rank's rows."""
        return batch.split(len(batch.tokens_BL) // self.world)[self.rank]

    def add_up(self, gradients: list[Tensor], loss: Tensor) -> None:
        """Sums over all ranks, in place."""
        if self.world == 1:
            return
        flat = torch.cat([*(g.flatten() for g in gradients), loss.flatten()])
        dist.all_reduce(flat)
        tensors = [*gradients, loss]
        parts = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's content of all these tensors."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def agree(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def listen(self) -> None:
        """All ranks wait for each other, and the others for rank 0's word from here on."""
        self.agree(None)
        self.listening = True

    @contextlib.contextmanager
    def step(self, lr: float) -> Iterator[None]:
        """Of rank 0: the others take the step that is taken inside."""
        if self.world > 1:
            self.listening = False
            dist.broadcast(torch.tensor([_STEP, lr], dtype=torch.float64), 0)
        yield
        self.listening = True

    def awaited(self) -> float | None:
        """Of the others: the learning rate of the next step, None after the last."""
        message = torch.zeros(2, dtype=torch.float64)
        dist.broadcast(message, 0)
        return float(message[1]) if message[0] == _STEP else None

    def lost(self, patience: float = 0.0) -> str | None:
        """What became of the others, where one that this process started is gone too early.

        patience: seconds to wait for it, as a connection ends a moment before the process does.
        """
        end = time.monotonic() + patience
        while not (gone := [p.returncode for p in self.started if p.poll() is not None]):
            if not self.started or time.monotonic() >= end:
                break
            time.sleep(0.05)
        if not gone or self.ended:
            return None
        if _NO_MEMORY in gone:
            return (
                f"{OUT_OF_MEMORY} in another process of this run, try a smaller train.micro_batch"
            )
        return f"a process of the {self.world} of this run ended with exit code {gone[0]}"

    def end(self, result: dict[str, Any] | None) -> None:
        """Of rank 0: release the others, who return this result; None says that there is none."""
        if self.world == 1 or self.ended:
            return
        told = self.listening and self.lost() is None
        self.ended = True
        try:
            if told:
                dist.broadcast(torch.tensor([_END, 0.0], dtype=torch.float64), 0)
                self.agree(result)
                dist.destroy_process_group()  # NCCL's ends on all ranks together or on none
                for process in self.started:
                    process.wait(GRACE)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            log.warning("the other processes were not released: %s", error)
        finally:
            for process in self.started:
                process.kill()
                process.wait()
            # NCCL would wait for those that are gone
            if dist.is_initialized() and not torch.cuda.is_available():
                dist.destroy_process_group()

    def leave(self) -> None:
        """Of the others, once released: a group that is left to the interpreter's end aborts it."""
        dist.destroy_process_group()


def from_torchrun(cfg: TrainConfig) -> Ranks:
    """The place that torchrun's variables give this process; alone where there are none.

    Raises UserError when torchrun started another number of processes than `train.devices`.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "MASTER_ADDR" not in os.environ:
        return Ranks()
    if cfg.devices != world:
        raise UserError(
            f"train.devices is {cfg.devices}, but torchrun started {world} processes; "
            f"give train.devices={world}"
        )
    return _join(cfg)


def launch(cfg: Config, lost: Callable[[str], None]) -> Ranks:
    """Start the other ranks of `cfg.train.devices` and join them as rank 0.

    lost: called with the cause when one of them is gone and this process has not noticed: it waits
        for a device that will never answer, and cannot be woken.
    """
    world = cfg.train.devices
    if world == 1:
        return Ranks()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    place["PYTHONPATH"] = python_path()
    started = []
    for rank in range(1, world):
        process = subprocess.Popen(
            [sys.executable, "-c", "from ablate.train import ranks; ranks.main()"],
            stdin=subprocess.PIPE,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        assert process.stdin is not None
        process.stdin.write((cfg.model_dump_json() + "\n").encode())
        process.stdin.flush()  # and stays open: its end tells them that this process is gone
        started.append(process)
    before = {name: os.environ.get(name) for name in (*place, "RANK", "LOCAL_RANK")}
    os.environ |= {**place, "RANK": "0", "LOCAL_RANK": "0"}
    try:
        ranks = _join(cfg.train)
    except BaseException:
        for process in started:
            process.kill()
        raise
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    ranks.started = started
    threading.Thread(target=_watch, args=(ranks, lost), daemon=True, name="ranks").start()
    return ranks


def _join(cfg: TrainConfig) -> Ranks:
    backend = "gloo"
    if cfg.device != "cpu" and torch.cuda.is_available():
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"train.devices is {cfg.devices}, but torch sees {there} GPUs here")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    # Others wait as long as a validation or an evaluation of rank 0 takes.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    return Ranks(dist.get_rank(), dist.get_world_size())


def _watch(ranks: Ranks, lost: Callable[[str], None]) -> None:
    while not ranks.ended:
        cause = ranks.lost()
        if cause is not None:
            time.sleep(GRACE)
            if not ranks.ended:
                lost(cause)
            return
        time.sleep(0.5)


def ignore_signals() -> None:
    """Rank 0 decides when to stop."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def main() -> None:
    """A rank that `launch` started: its config comes as the first line of stdin."""
    from ablate.config import load
    from ablate.train import train

    line = bytearray()
    while not line.endswith(b"\n"):  # not buffered, as the rest of stdin is the parent's life
        line += os.read(0, 1) or sys.exit("rank 0 is gone")
    die_with_parent()
    try:
        train(load(json.loads(line)))
    except TrialFailed:
        os._exit(0)  # rank 0 knows why
    except Exception as error:
        traceback.print_exc()
        os._exit(_NO_MEMORY if is_out_of_memory(error) else 1)
