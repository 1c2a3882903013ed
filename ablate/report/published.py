"""Published effects in nats a token, to plan by and to compare with."""

from __future__ import annotations

import math

# Validation perplexity by attention layers of 48: the Mamba-2 paper's ablation (Dao and Gu 2024,
# arXiv 2405.21060; 350M parameters, 7B tokens, one run each), and its Transformer++.
_PERPLEXITY = {0: 8.60, 1: 8.38, 2: 8.32, 3: 8.29, 4: 8.29, 5: 8.28, 6: 8.26, 7: 8.27, 9: 8.28,
               11: 8.30, 15: 8.34, 24: 8.50}  # fmt: skip
ROUNDING = 0.0012  # nats: two decimals are 0.0006 either way, in a difference of two this
_LOWEST = min(_PERPLEXITY.values())
# Nats above the best arm, by share of attention; and the Transformer's above it.
ATTENTION_SHARE = {n / 48: math.log(p / _LOWEST) for n, p in _PERPLEXITY.items()}
TRANSFORMER = math.log(8.68 / _LOWEST)

# Grouped queries instead of full heads: 0.04% of perplexity (Waleffe et al. 2024, arXiv
# 2406.07887).
GROUPED_QUERIES = 0.0004

# One key/value head instead of four, of twelve query heads, at 4K (Ren et al. 2024, arXiv
# 2406.07522; about 430M parameters, one run each).
ONE_FOR_FOUR = {"Samba": math.log(10.07 / 10.02), "Llama-2-SWA": math.log(10.89 / 11.11)}
