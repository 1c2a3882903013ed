"""Generation with caches: prefill the prompts, then one token of each row at a time.

On a GPU the step is captured once as a CUDA graph and replayed: a step of a small model is far
shorter than the time Python takes to launch its kernels. The caches are the graph's own memory, so
a `Decoder` is reused for the next batch by resetting them, never by making new ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ablate.model.lm import LanguageModel

Stop = Callable[[int, list[int]], bool]  # (row, its new tokens) -> enough


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits.

    temperature: 0 takes the likeliest, and the rest but the penalty says nothing then.
    top_p: the smallest set of tokens with this much probability stays (Holtzman et al. 2020, arXiv
        1904.09751); 1: all.
    repetition_penalty: positive logits of tokens that the row has seen, prompt included, are
        divided by it, negative ones multiplied (Keskar et al. 2019, arXiv 1909.05858); 1: none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")

    def choose(
        self, logits_BV: Tensor, seen_BV: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """One token a row, (B,). seen_BV: bool, read only with a penalty."""
        if self.repetition_penalty != 1:
            factor = self.repetition_penalty
            changed = torch.where(logits_BV > 0, logits_BV / factor, logits_BV * factor)
            logits_BV = torch.where(seen_BV, changed, logits_BV)
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        p_BV = torch.softmax(logits_BV / self.temperature, -1)
        if self.top_p < 1:
            sorted_BV, order_BV = p_BV.sort(-1, descending=True)
            beyond = sorted_BV.cumsum(-1) - sorted_BV >= self.top_p
            p_BV = p_BV.scatter(1, order_BV, sorted_BV.masked_fill(beyond, 0.0))
        return torch.multinomial(p_BV, 1, generator=generator)[:, 0]


def padded_length(n: int) -> int:
    """`n` tokens rounded up, by an eighth at most, to one of a few dozen lengths."""
    step = min(256, max(8, 1 << n.bit_length() >> 4))
    return -(-n // step) * step


class Decoder:
    """Caches for `batch` rows of up to `max_len` tokens, and one step over them.

    cache_dtype: of keys, values and convolution inputs; None: the weights'.
    autocast: makes the context that prefill and step run under; None: none.
    graph: capture the step; None: on a GPU.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch: int,
        max_len: int,
        *,
        cache_dtype: torch.dtype | None = None,
        autocast: Callable[[], Any] | None = None,
        graph: bool | None = None,
    ) -> None:
        self.model, self.batch, self.max_len = model, batch, max_len
        self.device = model.embedding.device
        self.autocast = autocast or contextlib.nullcontext
        self.state = model.init_state(batch, max_len, cache_dtype)
        self.token_B = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_BV: Tensor | None = None
        if graph or (graph is None and self.device.type == "cuda"):
            self._capture()

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits after each prompt, (len(prompts), V); empties the caches first.

        Fewer prompts than rows leave the last rows idle. Raises ValueError for too many or too
        long prompts, and for an empty one.
        """
        lengths = [len(prompt) for prompt in prompts]
        if not 0 < len(prompts) <= self.batch:
            raise ValueError(f"{len(prompts)} prompts do not fit a batch of {self.batch}")
        if min(lengths) == 0:
            raise ValueError("a prompt needs at least one token")
        width = max(lengths)
        if self.device.type == "cuda":  # kernels are chosen, and memory is kept, by shape
            width = max(width, min(padded_length(width), self.max_len))
        tokens = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.as_tensor(prompt)
        ragged = None
        if min(lengths) != width:
            ragged = torch.tensor(lengths, device=self.device)
        self.state.reset()
        with self.autocast():
            return self.model.prefill(
                tokens.to(self.device), self.state.first(len(prompts)), ragged
            )

    @torch.no_grad()
    def step(self, token_B: Tensor) -> Tensor:
        """Logits after one more token of the first len(token_B) rows; valid until the next step."""
        self.token_B[: len(token_B)] = token_B
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()
        assert self.logits_BV is not None
        return self.logits_BV[: len(token_B)]

    def _step(self) -> None:
        with self.autocast():
            self.logits_BV = self.model.step(self.token_B, self.state)

    @torch.no_grad()
    def _capture(self) -> None:
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):  # compiles kernels and fills library caches
            for _ in range(3):
                self._step()
        current.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()
        self.state.reset()


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    sampling: Sampling | None = None,
    vocab_size: int | None = None,
    stop: Stop | None = None,
    generator: torch.Generator | None = None,
    decoder: Decoder | None = None,
) -> list[list[int]]:
    """Up to `n_tokens` new tokens after each prompt; prompts may differ in length.

    sampling: None: greedy.
    vocab_size: entries that may be generated; the rest is padding of the embedding. None: all.
    stop: asked after each token of a row that still goes on; the token stays.
    decoder: to reuse, with room for the prompts and the new tokens; None: made for this call.
    """
    sampling = sampling or Sampling()
    longest = max(len(prompt) for prompt in prompts)
    if decoder is None:
        decoder = Decoder(model, len(prompts), longest + n_tokens)
    elif longest + n_tokens > decoder.max_len:
        raise ValueError(
            f"{longest} tokens of prompt and {n_tokens} new ones do not fit the decoder's "
            f"{decoder.max_len}"
        )
    logits_BV = decoder.prefill(prompts)[:, :vocab_size]
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    if sampling.repetition_penalty != 1:
        for row, prompt in enumerate(prompts):
            seen_BV[row, torch.as_tensor(prompt, device=seen_BV.device)] = True
    new: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts))) if n_tokens else set()
    while going:
        token_B = sampling.choose(logits_BV, seen_BV, generator)
        for row, token in enumerate(token_B.tolist()):
            if row in going:
                new[row].append(token)
                if len(new[row]) == n_tokens or (stop is not None and stop(row, new[row])):
                    going.remove(row)
        if going:
            if sampling.repetition_penalty != 1:
                seen_BV.scatter_(1, token_B[:, None], True)
            logits_BV = decoder.step(token_B)[:, :vocab_size]
    return new


def cast_weights(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """Cast, in place, the weights that matrix products read: what a deployment does before it
    decodes. Norms, biases, taps and Mamba's A_log, D and dt_bias stay as they are."""
    products = {"matrix", "residual", "dt_proj", "embedding"}
    for parameter, role, _ in model.parameter_roles().values():
        if role in products:
            parameter.data = parameter.data.to(dtype)
    return model
