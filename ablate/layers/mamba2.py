"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ablate.kernels import (
    causal_conv1d_step,
    gated_rms_norm,
    linear,
    mamba2_core,
    rms_norm,
    ssd,
    ssd_step,
)
from ablate.kernels.ssd import CHUNK
from ablate.layers.context import (
    Context,
    ResidualLayer,
    State,
    padded_linear,
    short_conv,
    stop_at_end,
)
from ablate.layers.options import DERIVED, STRICT, DerivedInt, PositiveFloat, PositiveInt, tile_work


@dataclass(frozen=True, kw_only=True)
class Mamba2Options:
    d_model: PositiveInt
    d_state: PositiveInt = 128
    """N: numbers of state a channel, shared maps B and C of this size"""
    d_conv: PositiveInt = 4
    """taps of the short convolution over x, B and C"""
    expand: PositiveFloat = 2.0
    """inner width over d_model, where d_inner is not given"""
    d_inner: DerivedInt = DERIVED
    """I: inner width, a multiple of head_dim; replaces expand"""
    head_dim: PositiveInt = 64
    """P: channels that share one decay"""
    n_groups: PositiveInt = 1
    """G: heads of a group share B and C"""
    conv_bias: bool = True
    norm_per_group: bool = True
    """the gated RMSNorm works within a group's channels, not over all of them"""
    a_init: tuple[PositiveFloat, PositiveFloat] = (1.0, 16.0)
    """initial decay rates are uniform in this range"""
    dt_min: PositiveFloat = 1e-3
    """initial step sizes are log-uniform from here"""
    dt_max: PositiveFloat = 0.1
    """to here"""
    dt_floor: PositiveFloat = 1e-4
    """and not smaller than this"""

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.d_inner is None:
            object.__setattr__(self, "d_inner", round(self.expand * self.d_model))
        object.__setattr__(self, "expand", self.d_inner / self.d_model)
        if self.d_inner % self.head_dim:
            raise ValueError(
                f"the inner width (d_inner, or expand x d_model) is {self.d_inner}, which is not "
                f"a multiple of head_dim {self.head_dim}"
            )
        if self.n_heads % self.n_groups:
            raise ValueError(
                f"n_groups {self.n_groups} does not divide the {self.n_heads} heads "
                f"(d_inner {self.d_inner} / head_dim {self.head_dim})"
            )
        if self.a_init[0] > self.a_init[1]:
            raise ValueError(f"a_init {list(self.a_init)} must be a range, the lower end first")
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} is above dt_max {self.dt_max}")

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def in_width(self) -> int:
        """Width of the in-projection: z, x, B, C and dt."""
        return self.d_inner + self.conv_width + self.n_heads

    def num_params(self) -> int:
        conv = self.conv_width * (self.d_conv + self.conv_bias)
        projections = self.d_model * (self.in_width + self.d_inner)
        return self.d_model + projections + conv + 3 * self.n_heads + self.d_inner

    def flops(self, T: int) -> int:
        squares, reads, writes = tile_work(T, CHUNK)
        pair = 2 * (self.n_groups * self.d_state + self.d_inner)
        projections = 2 * T * self.d_model * (self.in_width + self.d_inner)
        return projections + squares * pair + (reads + writes) * 2 * self.d_inner * self.d_state

    def elementwise_flops(self, T: int) -> int:
        """Convolution taps, and the decay of each pair in a tile: one exponential, one product."""
        squares, _, _ = tile_work(T, CHUNK)
        return 2 * T * self.d_conv * self.conv_width + 2 * squares * self.n_heads

    def state_bytes(self, T: int, dtype_bytes: int = 2) -> int:
        """The scan's state is float32 whatever the cache's type."""
        return 4 * self.d_inner * self.d_state + dtype_bytes * (self.d_conv - 1) * self.conv_width

    def decode_flops(self, T: int) -> int:
        projections = 2 * self.d_model * (self.in_width + self.d_inner)
        return projections + 4 * self.d_inner * self.d_state


class Mamba2(ResidualLayer):
    """x + out_proj(core(in_proj(norm(x)))); the projection holds z, x, B, C, dt in this order."""

    ragged = True
    fusible = False
    roles: ClassVar[dict[str, str]] = {
        "norm": "ones",
        "in_proj": "matrix",
        "conv_weight": "conv",
        "conv_bias": "conv",
        "dt_bias": "dt_bias",
        "A_log": "a_uniform",
        "D": "ones",
        "gate_norm": "ones",
        "out_proj": "residual",
    }

    def __init__(self, options: Mamba2Options, norm_eps: float) -> None:
        super().__init__(options.d_model, norm_eps)
        o = self.options = options
        self.in_proj = nn.Parameter(torch.empty(o.in_width, o.d_model))
        self.conv_weight = nn.Parameter(torch.empty(o.conv_width, o.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(o.conv_width)) if o.conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(o.n_heads))
        self.A_log = nn.Parameter(torch.empty(o.n_heads))
        self.D = nn.Parameter(torch.empty(o.n_heads))
        self.gate_norm = nn.Parameter(torch.empty(o.d_inner))
        self.out_proj = nn.Parameter(torch.empty(o.d_model, o.d_inner))
        self.norm_group = o.d_inner // o.n_groups if o.norm_per_group else None

    def branch(self, u_BLD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        zxbcdt = padded_linear(u_BLD, self.in_proj)
        if state is None:
            y = self._core(zxbcdt, ctx)
        else:
            y = self._prefill(zxbcdt[..., : self.options.in_width], ctx, state)
        return linear(y, self.out_proj)

    def _core(self, zxbcdt: Tensor, ctx: Context, projection: Tensor | None = None) -> Any:
        o = self.options
        return mamba2_core(
            zxbcdt,
            self.conv_weight,
            self.conv_bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.gate_norm,
            head_dim=o.head_dim,
            n_groups=o.n_groups,
            d_state=o.d_state,
            eps=self.eps,
            norm_group_size=self.norm_group,
            doc_start_BL=ctx.doc_start_BL,
            projection_DI=projection,
        )

    def chained(
        self, u_BLD: Tensor, x_BLD: Tensor, next_norm_D: Tensor, ctx: Context
    ) -> tuple[Tensor, Tensor]:
        """What the norm of all the inner width divides by commutes with the projection: it divides
        where the residual is added."""
        inner = self.options.d_inner
        several = self.norm_group not in (None, inner)  # norms, which commute with nothing
        if several or type(self).branch is not Mamba2.branch:  # or a user's own layer
            return super().chained(u_BLD, x_BLD, next_norm_D, ctx)
        zxbcdt = padded_linear(u_BLD, self.in_proj)
        out, squares = self._core(zxbcdt, ctx, self.out_proj)
        u, x = rms_norm(
            out,
            next_norm_D,
            eps=self.eps,
            residual=x_BLD,
            squares_xS=squares,
            squares_of=inner,
        )
        return u, x

    def _prefill(self, zxbcdt: Tensor, ctx: Context, state: State) -> Tensor:
        o = self.options
        z, xbc, dt = zxbcdt.split((o.d_inner, o.conv_width, o.n_heads), dim=-1)
        xbc, conv = short_conv(xbc, self.conv_weight, self.conv_bias, ctx)
        x, B, C = self._heads(xbc)
        y, ssm = ssd(
            x,
            stop_at_end(dt, ctx.lengths_B),
            -self.A_log.float().exp(),
            B,
            C,
            self.D,
            dt_bias_H=self.dt_bias,
            dt_softplus=True,
            return_final_state=True,
            doc_start_BL=ctx.doc_start_BL,
        )
        state["conv"].copy_(conv)
        state["ssm"].copy_(ssm)
        return self._normed(y, z)

    def _normed(self, y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(
            y.flatten(-2), z, self.gate_norm, eps=self.eps, group_size=self.norm_group
        )

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        o = self.options
        shared = o.n_groups * o.d_state
        x, B, C = xbc.split((o.d_inner, shared, shared), dim=-1)
        groups = (o.n_groups, o.d_state)
        return x.unflatten(-1, (-1, o.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def init_state(
        self, batch: int, max_len: int, device: torch.device | None, dtype: torch.dtype
    ) -> State:
        o = self.options
        scan = torch.promote_types(dtype, torch.float32)
        return {
            "conv": torch.zeros(batch, o.d_conv - 1, o.conv_width, device=device, dtype=dtype),
            "ssm": torch.zeros(batch, o.n_heads, o.head_dim, o.d_state, device=device, dtype=scan),
        }

    def branch_step(self, u_BD: Tensor, ctx: Context, state: State) -> Tensor:
        o = self.options
        zxbcdt = linear(u_BD, self.in_proj)
        z, xbc, dt = zxbcdt.split((o.d_inner, o.conv_width, o.n_heads), dim=-1)
        xbc = causal_conv1d_step(xbc, self.conv_weight, self.conv_bias, state_BKD=state["conv"])
        x, B, C = self._heads(xbc)
        y = ssd_step(
            x,
            dt,
            -self.A_log.float().exp(),
            B,
            C,
            self.D,
            dt_bias_H=self.dt_bias,
            dt_softplus=True,
            state_BHPN=state["ssm"],
        )
        return linear(self._normed(y, z), self.out_proj)
