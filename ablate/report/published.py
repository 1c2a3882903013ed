"""Published effects in nats a token, to plan by and to compare with."""

from __future__ import annotations

# Above the best arm, by share of attention: the Mamba-2 paper's ablation (Dao and Gu 2024,
# arXiv 2405.21060; 350M parameters, 48 layers, 7B tokens, validation perplexities).
ATTENTION_SHARE = {0 / 48: 0.0403, 2 / 48: 0.0072, 4 / 48: 0.0036, 6 / 48: 0.0, 8 / 48: 0.002,
                   12 / 48: 0.006, 16 / 48: 0.012, 24 / 48: 0.029}  # fmt: skip
TRANSFORMER = 0.0496  # the same paper's Transformer++ above that best arm: perplexity 8.68, 8.26

# Grouped queries instead of full heads: 0.04% of perplexity (Waleffe et al. 2024, arXiv
# 2406.07887).
GROUPED_QUERIES = 0.0004
