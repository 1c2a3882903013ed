"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.kernels import causal_conv1d_step, gated_delta_rule, gated_delta_rule_step, linear
from ablate.kernels.gated_delta_rule import CHUNK
from ablate.layers.context import (
    Context,
    ResidualLayer,
    State,
    aligned_linear,
    gated_output,
    short_conv,
    stop_at_end,
)
from ablate.layers.options import DERIVED, STRICT, DerivedInt, PositiveFloat, PositiveInt, tile_work


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetOptions:
    d_model: PositiveInt
    head_dim: PositiveInt = 128
    """K: channels of a query and a key"""
    n_heads: DerivedInt = DERIVED
    """H; 3/4 d_model / head_dim, rounded, where not given, which with expand_v 2 makes a layer of
    about 6 d_model^2 parameters"""
    expand_v: PositiveFloat = 2.0
    """channels of a value over head_dim"""
    d_conv: PositiveInt = 4
    """taps of the short convolution over queries, keys and values"""
    conv_bias: bool = False
    allow_neg_eigval: bool = False
    """beta up to 2, not 1, so that the state's transition may have negative eigenvalues
    (arXiv:2411.12537)"""
    a_init: tuple[PositiveFloat, PositiveFloat] = (0.01, 16.0)
    """initial decay rates are uniform in this range"""
    dt_min: PositiveFloat = 1e-3
    """initial step sizes are log-uniform from here"""
    dt_max: PositiveFloat = 0.1
    """to here"""
    dt_floor: PositiveFloat = 1e-4
    """and not smaller than this"""

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.n_heads is None:
            n_heads = max(1, round(0.75 * self.d_model / self.head_dim))
            object.__setattr__(self, "n_heads", n_heads)
        if self.head_v_dim != self.expand_v * self.head_dim:
            raise ValueError(
                f"expand_v {self.expand_v} of head_dim {self.head_dim} is "
                f"{self.expand_v * self.head_dim:g} channels, which must be a whole number"
            )
        if self.a_init[0] > self.a_init[1]:
            raise ValueError(f"a_init {list(self.a_init)} must be a range, the lower end first")
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} is above dt_max {self.dt_max}")

    @property
    def head_v_dim(self) -> int:
        """V: channels of a value."""
        return round(self.expand_v * self.head_dim)

    @property
    def key_width(self) -> int:
        """Width of all queries, and of all keys."""
        return self.n_heads * self.head_dim

    @property
    def value_width(self) -> int:
        return self.n_heads * self.head_v_dim

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_width + self.value_width

    @property
    def in_width(self) -> int:
        """Width of the in-projection: the gate z, queries, keys, values, b and a."""
        return self.value_width + self.conv_width + 2 * self.n_heads

    @property
    def state_numbers(self) -> int:
        return self.key_width * self.head_v_dim

    def num_params(self) -> int:
        conv = self.conv_width * (self.d_conv + self.conv_bias)
        projections = self.d_model * (self.in_width + self.value_width)
        return self.d_model + projections + conv + 2 * self.n_heads + self.head_v_dim

    def flops(self, T: int) -> int:
        # A pair of a tile: a query with a key, two keys, and both times its value, once as the
        # triangular system is solved by substitution. A state is read with queries and with keys.
        squares, reads, writes = tile_work(T, CHUNK)
        pair = 4 * (self.key_width + self.value_width)
        projections = 2 * T * self.d_model * (self.in_width + self.value_width)
        return projections + squares * pair + (2 * reads + writes) * 2 * self.state_numbers

    def elementwise_flops(self, T: int) -> int:
        """Convolution taps, and the decay of each pair in a tile: one exponential, two products."""
        squares, _, _ = tile_work(T, CHUNK)
        return 2 * T * self.d_conv * self.conv_width + 3 * squares * self.n_heads

    def state_bytes(self, T: int, dtype_bytes: int = 2) -> int:
        """The scan's state is float32 whatever the cache's type."""
        return 4 * self.state_numbers + dtype_bytes * (self.d_conv - 1) * self.conv_width

    def decode_flops(self, T: int) -> int:
        """Projections; and what the key reads, what it writes and what the query reads."""
        projections = 2 * self.d_model * (self.in_width + self.value_width)
        return projections + 6 * self.state_numbers


class GatedDeltaNet(ResidualLayer):
    """x + out_proj(gate(rule(conv(in_proj(norm(x)))))); the projection holds z, q, k, v, b, a in
    this order. The gate normalises each head with one weight for all: norm(o) * silu(z)."""

    ragged = True
    roles: ClassVar[dict[str, str]] = {
        "norm": "ones",
        "in_proj": "matrix",
        "conv_weight": "conv",
        "conv_bias": "conv",
        "dt_bias": "dt_bias",
        "A_log": "a_uniform",
        "gate_norm": "ones",
        "out_proj": "residual",
    }

    def __init__(self, options: GatedDeltaNetOptions, norm_eps: float) -> None:
        super().__init__(options.d_model, norm_eps)
        o = self.options = options
        self.in_proj = nn.Parameter(torch.empty(o.in_width, o.d_model))
        self.conv_weight = nn.Parameter(torch.empty(o.conv_width, o.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(o.conv_width)) if o.conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(o.n_heads))
        self.A_log = nn.Parameter(torch.empty(o.n_heads))
        self.gate_norm = nn.Parameter(torch.empty(o.head_v_dim))
        self.out_proj = nn.Parameter(torch.empty(o.d_model, o.value_width))

    def _split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """z, the convolution's inputs, b and a."""
        o = self.options
        return projected.split((o.value_width, o.conv_width, o.n_heads, o.n_heads), dim=-1)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        o = self.options
        q, k, v = qkv.split((o.key_width, o.key_width, o.value_width), dim=-1)
        keys, values = (o.n_heads, o.head_dim), (o.n_heads, o.head_v_dim)
        return q.unflatten(-1, keys), k.unflatten(-1, keys), v.unflatten(-1, values)

    def _rates(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The log of the decay and beta, float32."""
        log_decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)
        beta = torch.sigmoid(b.float())
        return log_decay, 2 * beta if self.options.allow_neg_eigval else beta

    def branch(self, u_BLD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        z, qkv, b, a = self._split(aligned_linear(u_BLD, self.in_proj))
        qkv, conv = short_conv(qkv, self.conv_weight, self.conv_bias, ctx)
        # past a row's end: no decay, and nothing is written
        a, b = stop_at_end(a, ctx.lengths_B), stop_at_end(b, ctx.lengths_B)
        y = gated_delta_rule(
            *self._heads(qkv),
            *self._rates(b, a),
            normalize_qk=True,
            return_final_state=state is not None,
            doc_start_BL=ctx.doc_start_BL,
        )
        if state is not None:
            y, scan = y
            state["conv"].copy_(conv)
            state["scan"].copy_(scan)
        assert isinstance(y, Tensor)
        return gated_output(y, z, self.gate_norm, self.eps, self.out_proj)

    def init_state(
        self, batch: int, max_len: int, device: torch.device | None, dtype: torch.dtype
    ) -> State:
        o = self.options
        wide = torch.promote_types(dtype, torch.float32)
        return {
            "conv": torch.zeros(batch, o.d_conv - 1, o.conv_width, device=device, dtype=dtype),
            "scan": torch.zeros(
                batch, o.n_heads, o.head_dim, o.head_v_dim, device=device, dtype=wide
            ),
        }

    def branch_step(self, u_BD: Tensor, ctx: Context, state: State) -> Tensor:
        z, qkv, b, a = self._split(linear(u_BD, self.in_proj))
        qkv = causal_conv1d_step(qkv, self.conv_weight, self.conv_bias, state_BKD=state["conv"])
        y = gated_delta_rule_step(
            *self._heads(qkv), *self._rates(b, a), normalize_qk=True, state_BHKV=state["scan"]
        )
        return gated_output(y, z, self.gate_norm, self.eps, self.out_proj)
