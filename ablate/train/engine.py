"""A config made ready to train on one device: model, optimiser, and steps of a micro-batch."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable

import torch

from ablate.arch.spec import Architecture
from ablate.config import Config
from ablate.data import Batch
from ablate.model import LanguageModel, check_causal, param_groups
from ablate.train.environment import uses_bf16
from ablate.train.optim import STATE, load_state_tensors, make_adamw, state_tensors
from ablate.train.ranks import Ranks
from ablate.train.step import Stepper
from ablate.train.stop import is_out_of_memory

MEMORY_SHARE = 0.92  # of the free memory, that a micro-batch may need: the rest is fragments
_MEASURED_SECONDS = 0.4


class Engine:
    """Everything that `cfg.train` says about how a step is computed, without a loop.

    compiled, captured: what null stands for here in `train.compile` and `train.capture`.
    """

    def __init__(
        self, cfg: Config, arch: Architecture, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.cfg, self.arch, self.device, self.ranks = cfg, arch, device, ranks or Ranks()
        on_gpu = device.type == "cuda"
        self.bf16 = uses_bf16(cfg.train, device)
        self.compiled = on_gpu if cfg.train.compile is None else cfg.train.compile
        self.captured = on_gpu and cfg.train.capture is not False
        torch.manual_seed(cfg.seed)  # nothing of ours draws from it; a user's layer may
        self.model = LanguageModel(arch, seed=cfg.seed).to(device)
        autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=self.bf16)
        check_causal(self.model, cfg.data.seq_len, cfg.data.reset_documents, autocast)
        self.model.activation_checkpointing = cfg.train.activation_checkpointing
        self.groups = param_groups(self.model, cfg.train.weight_decay)
        self.optimizer = make_adamw(self.groups, cfg.train)
        if self.compiled:
            self.model.compile_layers()

    def stepper(self, micro_batch: int) -> Stepper:
        """Steps over `train.batch_size` rows, `micro_batch` of them a forward pass and rank."""
        return Stepper(
            self.model,
            self.optimizer,
            self.cfg.train,
            self.bf16,
            self.captured,
            micro_batch=micro_batch,
            ranks=self.ranks,
        )

    def speed(self, batch: Batch, micro_batch: int) -> float | None:
        """Tokens a second, forward and backward, in micro-batches of so many rows of `batch`.

        None where such a step would not fit the memory, optimiser state included.
        """
        try:
            with torch.random.fork_rng([self.device]):
                return self._speed(batch, micro_batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _speed(self, batch: Batch, micro_batch: int) -> float | None:
        stepper = self.stepper(micro_batch)
        part = batch.split(micro_batch)[0].to(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        room = MEMORY_SHARE * (free + torch.cuda.memory_reserved(self.device))
        # AdamW's moments, where they are not there yet, and the copy that ranks add up.
        more = (0 if self.optimizer.state else 8) + (4 if self.ranks.world > 1 else 0)
        needed = more * self.arch.num_params()
        with stepper.side_stream():
            for _ in range(2):
                stepper.forward_backward(part)  # leaves gradients, which the next ones add to
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()  # as before the capture of a step
        torch.cuda.reset_peak_memory_stats(self.device)
        work: Callable[[], object] = functools.partial(stepper.forward_backward, part)
        if self.captured:
            work = stepper.captured(work).replay
        work()
        torch.cuda.synchronize(self.device)
        if torch.cuda.max_memory_reserved(self.device) + needed > room:
            return None
        n, begun = 0, time.perf_counter()
        while n < 4 or time.perf_counter() - begun < _MEASURED_SECONDS:
            work()
            work()
            torch.cuda.synchronize(self.device)
            n += 2
        return n * part.tokens_BL.numel() / (time.perf_counter() - begun)

    def share_state(self, stepper: Stepper) -> None:
        """Rank 0's weights, moments and figures to all."""
        moments = self.ranks.agree(bool(self.optimizer.state))
        if moments and self.ranks.rank:
            scalar = torch.zeros((), device=self.device)
            empty = {
                f"{name}/{key}": scalar if key == "step" else torch.zeros_like(p)
                for name, p in self.model.named_parameters()
                for key in STATE
            }
            load_state_tensors(self.model, self.optimizer, empty)
        tensors = [t.detach() for t in self.model.state_dict(keep_vars=True).values()]
        if moments:
            tensors += state_tensors(self.model, self.optimizer).values()
        self.ranks.copy_from_first([*tensors, stepper.running])
