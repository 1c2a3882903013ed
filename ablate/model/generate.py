"""Generation with caches: prefill the prompt, then one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ablate.model.lm import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_BL: Tensor,
    n_tokens: int,
    *,
    temperature: float = 0.0,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Tensor:
    """`n_tokens` new tokens after prompts of equal length, (B, n_tokens).

    temperature: 0 takes the likeliest token.
    vocab_size: entries that may be generated; the rest is padding of the embedding. None: all.
    """
    batch, length = prompt_BL.shape
    state = model.init_state(batch, length + n_tokens, cache_dtype)
    logits_BV = model.prefill(prompt_BL, state)
    tokens: list[Tensor] = []
    while True:
        logits_BV = logits_BV[:, :vocab_size]
        if temperature > 0:
            p_BV = torch.softmax(logits_BV / temperature, -1)
            token_B = torch.multinomial(p_BV, 1, generator=generator)[:, 0]
        else:
            token_B = logits_BV.argmax(-1)
        tokens.append(token_B)
        if len(tokens) == n_tokens:
            return torch.stack(tokens, 1)
        logits_BV = model.step(token_B, state)
