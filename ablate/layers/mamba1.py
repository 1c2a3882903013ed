"""Mamba-1 (Gu and Dao 2023, arXiv 2312.00752, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ablate.kernels import (
    causal_conv1d_step,
    linear,
    mamba1_core,
    selective_scan,
    selective_scan_step,
)
from ablate.layers.context import (
    Context,
    ResidualLayer,
    State,
    aligned_linear,
    short_conv,
    stop_at_end,
)
from ablate.layers.options import DERIVED, STRICT, DerivedInt, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class Mamba1Options:
    d_model: PositiveInt
    d_state: PositiveInt = 16
    """N: numbers of state a channel"""
    d_conv: PositiveInt = 4
    """taps of the short convolution"""
    expand: PositiveFloat = 2.0
    """inner width over d_model, where d_inner is not given"""
    d_inner: DerivedInt = DERIVED
    """I: inner width; replaces expand"""
    dt_rank: DerivedInt = DERIVED
    """rank of the step size's projection; d_model / 16, rounded up, where not given"""
    conv_bias: bool = True
    dt_min: PositiveFloat = 1e-3
    """initial step sizes are log-uniform from here"""
    dt_max: PositiveFloat = 0.1
    """to here"""
    dt_floor: PositiveFloat = 1e-4
    """and not smaller than this"""

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.d_inner is None:
            object.__setattr__(self, "d_inner", max(1, round(self.expand * self.d_model)))
        object.__setattr__(self, "expand", self.d_inner / self.d_model)
        if self.dt_rank is None:
            object.__setattr__(self, "dt_rank", -(-self.d_model // 16))
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} is above dt_max {self.dt_max}")

    @property
    def _projections(self) -> int:
        """Weights of in_proj, x_proj, dt_proj and out_proj."""
        inner = 3 * self.d_model + 2 * self.dt_rank + 2 * self.d_state
        return self.d_inner * inner

    def num_params(self) -> int:
        conv = self.d_inner * (self.d_conv + self.conv_bias)
        return self.d_model + self._projections + conv + self.d_inner * (self.d_state + 2)

    def flops(self, T: int) -> int:
        """The projections: the scan is elementwise work."""
        return 2 * T * self._projections

    def elementwise_flops(self, T: int) -> int:
        """Convolution taps; and of the scan, for each channel and state: dt A, its exponential,
        (dt u) B, and the multiply-adds of the state and of the output; for each channel: dt u and
        the multiply-add of the skip."""
        return T * self.d_inner * (2 * self.d_conv + 7 * self.d_state + 3)

    def state_bytes(self, T: int, dtype_bytes: int = 2) -> int:
        """The scan's state is float32 whatever the cache's type."""
        return self.d_inner * (4 * self.d_state + dtype_bytes * (self.d_conv - 1))

    def decode_flops(self, T: int) -> int:
        return 2 * self._projections


class Mamba1(ResidualLayer):
    """x + out_proj(core(in_proj(norm(x)))); in_proj holds x, z; x_proj dt, B, C."""

    ragged = True
    fusible = False
    roles: ClassVar[dict[str, str]] = {
        "norm": "ones",
        "in_proj": "matrix",
        "conv_weight": "conv",
        "conv_bias": "conv",
        "x_proj": "matrix",
        "dt_proj": "dt_proj",
        "dt_bias": "dt_bias",
        "A_log": "a_range",
        "D": "ones",
        "out_proj": "residual",
    }

    def __init__(self, options: Mamba1Options, norm_eps: float) -> None:
        super().__init__(options.d_model, norm_eps)
        o = self.options = options
        self.in_proj = nn.Parameter(torch.empty(2 * o.d_inner, o.d_model))
        self.conv_weight = nn.Parameter(torch.empty(o.d_inner, o.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(o.d_inner)) if o.conv_bias else None
        self.x_proj = nn.Parameter(torch.empty(o.dt_rank + 2 * o.d_state, o.d_inner))
        self.dt_proj = nn.Parameter(torch.empty(o.d_inner, o.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(o.d_inner))
        self.A_log = nn.Parameter(torch.empty(o.d_inner, o.d_state))
        self.D = nn.Parameter(torch.empty(o.d_inner))
        self.out_proj = nn.Parameter(torch.empty(o.d_model, o.d_inner))

    def _maps(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes before bias and softplus, B and C."""
        o = self.options
        dt, B, C = aligned_linear(u, self.x_proj).split((o.dt_rank, o.d_state, o.d_state), dim=-1)
        return linear(dt, self.dt_proj), B, C

    def branch(self, u_BLD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        xz = linear(u_BLD, self.in_proj)
        if state is None:
            y = mamba1_core(
                xz,
                self.conv_weight,
                self.conv_bias,
                self.x_proj,
                self.dt_proj,
                self.dt_bias,
                self.A_log,
                self.D,
                doc_start_BL=ctx.doc_start_BL,
            )
        else:
            y = self._prefill(xz, ctx, state)
        return linear(y, self.out_proj)

    def _prefill(self, xz_BLE: Tensor, ctx: Context, state: State) -> Tensor:
        x, z = xz_BLE.chunk(2, dim=-1)
        u, conv = short_conv(x, self.conv_weight, self.conv_bias, ctx)
        dt, B, C = self._maps(u)
        y, ssm = selective_scan(
            u,
            stop_at_end(dt, ctx.lengths_B),
            -self.A_log.float().exp(),
            B,
            C,
            self.D,
            z_BLD=z,
            delta_bias_D=self.dt_bias,
            delta_softplus=True,
            return_final_state=True,
            doc_start_BL=ctx.doc_start_BL,
        )
        state["conv"].copy_(conv)
        state["ssm"].copy_(ssm)
        assert isinstance(y, Tensor)
        return y

    def init_state(
        self, batch: int, max_len: int, device: torch.device | None, dtype: torch.dtype
    ) -> State:
        o = self.options
        scan = torch.promote_types(dtype, torch.float32)
        return {
            "conv": torch.zeros(batch, o.d_conv - 1, o.d_inner, device=device, dtype=dtype),
            "ssm": torch.zeros(batch, o.d_inner, o.d_state, device=device, dtype=scan),
        }

    def branch_step(self, u_BD: Tensor, ctx: Context, state: State) -> Tensor:
        u, z = linear(u_BD, self.in_proj).chunk(2, dim=-1)
        u = causal_conv1d_step(u, self.conv_weight, self.conv_bias, state_BKD=state["conv"])
        dt, B, C = self._maps(u)
        y = selective_scan_step(
            u,
            dt,
            -self.A_log.float().exp(),
            B,
            C,
            self.D,
            z_BD=z,
            delta_bias_D=self.dt_bias,
            delta_softplus=True,
            state_BDN=state["ssm"],
        )
        return linear(y, self.out_proj)
