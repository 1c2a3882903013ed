"""The operations models are made of, each with a plain PyTorch form and, on a GPU, Triton kernels.

Import from here (`from ablate.kernels import ssd`): several operations share the name of their
module, and the names below are always the functions. Nothing here imports Triton by itself.
"""

from __future__ import annotations

from ablate.kernels.attention import attention, attention_form, attention_step
from ablate.kernels.conv1d import causal_conv1d, causal_conv1d_step
from ablate.kernels.cross_entropy import linear_cross_entropy
from ablate.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from ablate.kernels.gelu import gelu
from ablate.kernels.gla import gla, gla_step
from ablate.kernels.linear import linear
from ablate.kernels.mamba1_core import mamba1_core
from ablate.kernels.mamba2_core import mamba2_core
from ablate.kernels.mlp import mlp
from ablate.kernels.norm import gated_rms_norm, rms_norm
from ablate.kernels.rotary import rotary, rotary_qkv, rotary_table
from ablate.kernels.selective_scan import selective_scan, selective_scan_step
from ablate.kernels.ssd import ssd, ssd_step
from ablate.kernels.swiglu import swiglu

__all__ = [
    "attention",
    "attention_form",
    "attention_step",
    "causal_conv1d",
    "causal_conv1d_step",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gated_rms_norm",
    "gelu",
    "gla",
    "gla_step",
    "linear",
    "linear_cross_entropy",
    "mamba1_core",
    "mamba2_core",
    "mlp",
    "rms_norm",
    "rotary",
    "rotary_qkv",
    "rotary_table",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "swiglu",
]
