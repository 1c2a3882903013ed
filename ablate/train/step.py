"""One optimiser step, with everything it measures left on the device.

The host reads `Stepper.note` at log steps only, after the next step is under way, and nothing here
waits for the device. On a GPU the step is captured as one CUDA graph after a few ordinary ones:
forward, backward, clipping, skipping and AdamW, its batch, its learning rate and its number of
targets in tensors that stay in place. A small model is bound by its launches otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ablate.config import TrainConfig
from ablate.data import Batch
from ablate.data.tokens import usable_cores
from ablate.errors import UserError
from ablate.kernels.precompile import compile_together
from ablate.model.lm import LanguageModel
from ablate.train.optim import AdamW, rehearse, set_lr
from ablate.train.ranks import Ranks
from ablate.train.stop import TrialFailed, is_out_of_memory

log = logging.getLogger(__name__)

# Positions in the vector of running figures; those before _NORM begin anew with each reading.
_LOSS, _COUNT, _NORM, _SKIPPED, _STREAK, _WORST = range(6)
_ORDINARY_STEPS = 2  # before the capture: they compile kernels and make AdamW's moments


@dataclass(frozen=True)
class Reading:
    """What happened since the last reading; `skipped` counts from the start of the run."""

    loss: float  # mean over the steps that were taken; NaN when none was
    grad_norm: float  # of the last step, before clipping
    skipped: int
    streak: int  # skipped steps in a row up to the last one
    worst_streak: int  # most skipped steps in a row


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Stepper:
    """Forward, backward, clipping and AdamW over batches of one shape.

    capture: run as a CUDA graph. Raises UserError where the model cannot be captured.
    micro_batch: rows a forward pass; None: all at once. ranks: who shares the rows of a batch.

    Layers that compile anew after the first steps, and more often than there are kinds of them,
    raise TrialFailed: a step that compiles is a hundred times slower, and nothing would say so.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: AdamW,
        cfg: TrainConfig,
        bf16: bool,
        capture: bool = False,
        *,
        micro_batch: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.cfg = cfg
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.device = self.params[0].device
        self.bf16 = bf16
        self.capture = capture
        self.ranks = ranks or Ranks()
        self.micro_batch = micro_batch or cfg.batch_size
        self.compilations = 0
        self.steps = 0
        self.running = torch.zeros(6, dtype=torch.float64, device=self.device)
        self.taken = 0
        self._batch: Batch | None = None  # the graph's input
        self._scored = torch.ones((), device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = _stream(self.device) if capture else None
        self.cold_steps = _ORDINARY_STEPS + 1 if capture else 1  # these are slower than the rest

    def autocast(self) -> torch.autocast:
        # The cache of casted weights would keep what a graph's memory pool owns.
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=not self.capture
        )

    def __call__(self, batch: Batch, lr: float) -> None:
        """One step over a batch of the CPU's.

        A loss or gradient that is not finite leaves weights and moments as they were. The loss is
        the mean over the scored targets of all micro-batches together, so that it does not depend
        on how the batch was cut.
        """
        self.steps += 1
        set_lr(self.optimizer, lr)
        self._scored.fill_(max(batch.n_targets(), 1))
        batch = self.ranks.part(batch)
        if self._stream is None:
            self._work(batch.to(self.device))
            return
        self._load(batch)
        assert self._batch is not None
        self.taken += 1
        if self.taken <= _ORDINARY_STEPS:
            with self.side_stream():
                self._work(self._batch)
            return
        if self._graph is None:
            self._graph = self.captured(functools.partial(self._work, self._batch))
        self._graph.replay()

    def release(self) -> None:
        """Give back what a captured step holds: its memory, and NCCL's communicator, which ends
        after the last graph that uses it. A step after that is captured anew."""
        if self._graph is not None:
            self._graph.reset()
            self._graph, self.taken = None, 0
            torch.cuda.empty_cache()

    def _load(self, batch: Batch) -> None:
        """Copy a batch to where the graph reads it."""
        if self._batch is None:
            self._batch = batch.to(self.device)
            return
        self._batch.tokens_BL.copy_(batch.tokens_BL, non_blocking=True)
        self._batch.targets_BL.copy_(batch.targets_BL, non_blocking=True)
        if self._batch.doc_start_BL is not None:
            assert batch.doc_start_BL is not None
            self._batch.doc_start_BL.copy_(batch.doc_start_BL, non_blocking=True)

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """The stream that a capture will use: gradients belong to where they were first made."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def captured(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """What `work` does on the device, as a graph; it has run in the ordinary way before."""
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()  # the graph's pool takes what the ordinary steps used
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that load batches, and NCCL's, may call CUDA meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                "train.capture: this model's step cannot be captured as a CUDA graph "
                f"({str(error).splitlines()[0]}); use train.capture=false"
            ) from error
        return graph

    def warm_up(self, batch: Batch) -> None:
        """Compile what the steps need, on the first rows of a batch of the CPU's.

        Weights, gradients and random state stay as they are.
        """
        on_gpu = self.device.type == "cuda"
        part = batch.split(self.micro_batch)[0].to(self.device)
        with (
            torch.random.fork_rng([self.device] if on_gpu else []),
            self.side_stream(),
            compile_together(usable_cores()) as dry_run,
        ):
            if on_gpu:
                with dry_run():
                    self._one_of_each(part)
                    rehearse(self.cfg, self.device)
            with self._counted():
                self.forward_backward(part)
        self.optimizer.zero_grad(set_to_none=True)

    def _one_of_each(self, part: Batch) -> None:
        """Forward and backward of one layer a kind, as it is without torch.compile."""
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.model.one_layer_a_kind())
                if self.model.compiles:  # or else this would import the compiler, which is slow
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                self.forward_backward(part)
        except RuntimeError as error:  # the step itself will say it, if it is more than memory
            log.info("kernels compile one after the other: %s", error)

    def forward_backward(self, part: Batch) -> Tensor:
        """The loss of one micro-batch on the device, its gradients added to those there are."""
        with self.autocast():
            loss: Tensor = self.model.loss(
                part.tokens_BL,
                part.targets_BL,
                part.doc_start_BL,
                z_loss=self.cfg.z_loss,
                reduction="sum",
            )
            loss = loss / self._scored
        loss.backward()
        return loss.detach()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        before = self.model.compilations()
        yield
        new = self.model.compilations() - before
        self.compilations += new
        expected = self.model.expected_compilations
        late = self.steps > _ORDINARY_STEPS
        if late and new and expected is not None and self.compilations > expected:
            raise TrialFailed(
                f"the layers were compiled {self.compilations} times, where {expected} were "
                "expected; use train.compile=false, and report it"
            )

    def _work(self, batch: Batch) -> None:
        loss = torch.zeros((), device=self.device)
        with self._counted():
            for part in batch.split(self.micro_batch):
                loss += self.forward_backward(part)
        self.ranks.add_up([p.grad for p in self.params if p.grad is not None], loss)
        norm, bad = self.optimizer.clipped_step(loss, self.cfg.clip)
        self.optimizer.zero_grad(set_to_none=True)
        self._count(loss, norm, bad)

    def _count(self, loss: Tensor, norm: Tensor, bad: Tensor) -> None:
        run = self.running
        skip = bad.double()
        run[_LOSS] += torch.where(bad, 0.0, loss)
        run[_COUNT] += 1 - skip
        run[_NORM] = norm
        run[_SKIPPED] += skip
        run[_STREAK] = (run[_STREAK] + 1) * skip
        run[_WORST] = torch.maximum(run[_WORST], run[_STREAK])

    def note(self) -> Callable[[], Reading]:
        """Begin a new interval; what is returned waits for this moment and reads the last one."""
        event = None
        if self.device.type == "cuda":
            figures = torch.empty(len(self.running), dtype=torch.float64, pin_memory=True)
            figures.copy_(self.running, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            figures = self.running.clone()
        self.running[:_NORM].zero_()  # an assignment of a number would wait for the device

        def read() -> Reading:
            if event is not None:
                event.synchronize()
            total, count, norm, *counts = figures.tolist()
            return Reading(total / count if count else math.nan, norm, *map(int, counts))

        return read

    def read(self) -> Reading:
        """Wait for the device, read the figures, and begin a new interval."""
        return self.note()()
