"""The feed-forward layer: SwiGLU (arXiv 2002.05202), GELU, or squared ReLU (arXiv 2109.08668)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.kernels import gelu, linear, mlp, swiglu
from ablate.layers.context import Context, ResidualLayer, State
from ablate.layers.options import DERIVED, STRICT, DerivedInt, PositiveInt


@dataclass(frozen=True, kw_only=True)
class MLPOptions:
    d_model: PositiveInt
    kind: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    """swiglu is gated and has three matrices, the others two"""
    d_hidden: DerivedInt = DERIVED
    """hidden width; where not given 8/3 d_model to the nearest multiple of 64 for swiglu, 4 d_model
    for the others"""
    bias: bool = False
    """biases in the projections"""

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.d_hidden is None:
            gated = max(64, round(8 * self.d_model / 3 / 64) * 64)
            hidden = gated if self.kind == "swiglu" else 4 * self.d_model
            object.__setattr__(self, "d_hidden", hidden)

    @property
    def in_width(self) -> int:
        return self.d_hidden * (2 if self.kind == "swiglu" else 1)

    def num_params(self) -> int:
        biases = self.in_width + self.d_model if self.bias else 0
        return self.d_model * (1 + self.in_width + self.d_hidden) + biases

    def flops(self, T: int) -> int:
        return 2 * T * self.d_model * (self.in_width + self.d_hidden)

    def elementwise_flops(self, T: int) -> int:
        return 0

    def state_bytes(self, T: int, dtype_bytes: int = 2) -> int:
        return 0

    def decode_flops(self, T: int) -> int:
        return self.flops(1)


class MLP(ResidualLayer):
    """x + out_proj(act(in_proj(norm(x)))); in_proj of SwiGLU holds the gate, then the value."""

    ragged = True
    roles: ClassVar[dict[str, str]] = {
        "norm": "ones",
        "in_proj": "matrix",
        "in_bias": "zeros",
        "out_proj": "residual",
        "out_bias": "zeros",
    }

    def __init__(self, options: MLPOptions, norm_eps: float) -> None:
        super().__init__(options.d_model, norm_eps)
        o = self.options = options
        self.fusible = o.kind == "relu2"
        self.in_proj = nn.Parameter(torch.empty(o.in_width, o.d_model))
        self.in_bias = nn.Parameter(torch.empty(o.in_width)) if o.bias else None
        self.out_proj = nn.Parameter(torch.empty(o.d_model, o.d_hidden))
        self.out_bias = nn.Parameter(torch.empty(o.d_model)) if o.bias else None

    def branch(self, u_BLD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        if self.options.kind != "relu2" and not self.options.bias:
            return mlp(u_BLD, self.in_proj, self.out_proj, gated=self.options.kind == "swiglu")
        h = linear(u_BLD, self.in_proj, self.in_bias)
        if self.options.kind == "swiglu":
            h = swiglu(h)
        elif self.options.kind == "gelu":
            h = gelu(h)
        else:
            h = F.relu(h).square()
        return linear(h, self.out_proj, self.out_bias)

    def init_state(
        self, batch: int, max_len: int, device: torch.device | None, dtype: torch.dtype
    ) -> State:
        return {}

    def branch_step(self, u_BD: Tensor, ctx: Context, state: State) -> Tensor:
        return self.branch(u_BD, ctx)
