"""Softmax attention, full (`*`) or sliding (`S`), with grouped queries and rotary positions.

    MHA  n_kv_heads = n_heads      every query head has its own key and value head
    GQA  1 < n_kv_heads < n_heads  consecutive query heads share one
    MQA  n_kv_heads = 1            all share one

The inner width n_heads x head_dim is free of d_model: 1.5 d_model makes the layer as large as a
Mamba-2 layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ablate.kernels import attention, attention_step, causal_conv1d_step, linear, rotary_qkv
from ablate.layers.context import Context, ResidualLayer, State, short_conv
from ablate.layers.options import DERIVED, STRICT, DerivedInt, PositiveFloat, PositiveInt, heads_of


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    d_model: PositiveInt
    head_dim: PositiveInt = 64
    """P: channels of a head"""
    n_heads: DerivedInt = DERIVED
    """H: query heads; d_model / head_dim where not given"""
    n_kv_heads: DerivedInt = DERIVED
    """key and value heads, a divisor of n_heads; n_heads where not given"""
    window: PositiveInt | None = None
    """keys that a query sees, its own among them; None: all"""
    rope_base: PositiveFloat | None = 10000.0
    """base of the rotary angles; None: no positions"""
    rope_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the head that is rotated"""
    d_conv: Annotated[int, Field(ge=0)] = 0
    """taps of a short convolution over the fused queries, keys and values; 0: none"""
    bias: bool = False
    """biases in the projections"""

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.n_heads is None:
            object.__setattr__(self, "n_heads", heads_of(self.d_model, self.head_dim))
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        if self.rope_base is None:
            object.__setattr__(self, "rope_share", 1.0)  # says nothing then; one key for all
        elif self.rope_dim != self.rope_share * self.head_dim or self.rope_dim % 2:
            raise ValueError(
                f"rope_share {self.rope_share} of head_dim {self.head_dim} is "
                f"{self.rope_share * self.head_dim:g} channels, which must be an even number"
            )
        self._check_window()

    def _check_window(self) -> None:
        if self.window is not None:
            raise ValueError(
                f"window is {self.window}, but '*' is full attention; a window belongs to 'S' (swa)"
            )

    @property
    def rope_dim(self) -> int:
        return round(self.rope_share * self.head_dim)

    @property
    def inner(self) -> int:
        """Width of all query heads."""
        return self.n_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    def num_params(self) -> int:
        biases = (self.qkv_width + self.d_model) if self.bias else 0
        conv = self.qkv_width * (self.d_conv + 1) if self.d_conv else 0
        return self.d_model * (1 + self.qkv_width + self.inner) + biases + conv

    def visible(self, T: int) -> int:
        """Keys that the T-th query sees."""
        return T if self.window is None else min(self.window, T)

    def pairs(self, T: int) -> int:
        """Query-key pairs of a sequence."""
        w = self.visible(T)
        return w * (w + 1) // 2 + (T - w) * w

    def flops(self, T: int) -> int:
        projections = 2 * T * self.d_model * (self.qkv_width + self.inner)
        return projections + 4 * self.inner * self.pairs(T)

    def elementwise_flops(self, T: int) -> int:
        """Convolution taps."""
        return 2 * T * self.d_conv * self.qkv_width

    def state_bytes(self, T: int, dtype_bytes: int = 2) -> int:
        kv = 2 * self.visible(T) * self.n_kv_heads * self.head_dim
        return dtype_bytes * (kv + max(0, self.d_conv - 1) * self.qkv_width)

    def decode_flops(self, T: int) -> int:
        return 2 * self.d_model * (self.qkv_width + self.inner) + 4 * self.inner * self.visible(T)


@dataclass(frozen=True, kw_only=True)
class SlidingAttentionOptions(AttentionOptions):
    window: PositiveInt = 2048
    """keys that a query sees, its own among them"""

    def _check_window(self) -> None:
        pass


class Attention(ResidualLayer):
    """x + out_proj(attention(rotary(conv(qkv_proj(norm(x))))))."""

    ragged = True
    fusible = False
    roles: ClassVar[dict[str, str]] = {
        "norm": "ones",
        "qkv_proj": "matrix",
        "qkv_bias": "zeros",
        "conv_weight": "conv",
        "conv_bias": "conv",
        "out_proj": "residual",
        "out_bias": "zeros",
    }

    def __init__(self, options: AttentionOptions, norm_eps: float) -> None:
        super().__init__(options.d_model, norm_eps)
        o = self.options = options
        self.qkv_proj = nn.Parameter(torch.empty(o.qkv_width, o.d_model))
        self.qkv_bias = nn.Parameter(torch.empty(o.qkv_width)) if o.bias else None
        self.conv_weight = nn.Parameter(torch.empty(o.qkv_width, o.d_conv)) if o.d_conv else None
        self.conv_bias = nn.Parameter(torch.empty(o.qkv_width)) if o.d_conv else None
        self.out_proj = nn.Parameter(torch.empty(o.d_model, o.inner))
        self.out_bias = nn.Parameter(torch.empty(o.d_model)) if o.bias else None

    def _heads(self, qkv_BLE: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values, (B, L, H, P)."""
        o = self.options
        if o.rope_base is None:
            heads = qkv_BLE.unflatten(-1, (-1, o.head_dim))
            q, k, v = heads.split((o.n_heads, o.n_kv_heads, o.n_kv_heads), dim=2)
            return q, k, v
        return rotary_qkv(
            qkv_BLE,
            ctx.positions_BL,
            n_heads=o.n_heads,
            n_kv_heads=o.n_kv_heads,
            head_dim=o.head_dim,
            base=o.rope_base,
            dim=o.rope_dim,
            table=ctx.tables.get((o.rope_base, o.rope_dim)),
        )

    def branch(self, u_BLD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        o = self.options
        qkv = linear(u_BLD, self.qkv_proj, self.qkv_bias)
        if self.conv_weight is not None:
            qkv, conv = short_conv(qkv, self.conv_weight, self.conv_bias, ctx, activation=None)
            if state is not None:
                state["conv"].copy_(conv)
        q, k, v = self._heads(qkv, ctx)
        if state is not None:
            self._fill(state, k, v, ctx.lengths_B)
        y = attention(q, k, v, window=o.window, doc_start_BL=ctx.doc_start_BL)
        return linear(y.flatten(-2), self.out_proj, self.out_bias)

    @staticmethod
    def _fill(state: State, k: Tensor, v: Tensor, lengths_B: Tensor | None) -> None:
        """Keep a prompt. The cache is a ring: position i lies in slot i modulo its length."""
        length, slots = k.shape[1], state["k"].shape[1]
        if lengths_B is None:
            kept = torch.arange(max(0, length - slots), length, device=k.device)
            for name, value in (("k", k), ("v", v)):
                state[name][:, kept % slots] = value[:, kept].to(state[name].dtype)
            return
        # The newest position of each slot; a slot that has none yet is not visible to any query.
        last_B1 = lengths_B[:, None] - 1
        slot_T = torch.arange(slots, device=k.device)
        newest_BT = (last_B1 - (last_B1 - slot_T) % slots).clamp(min=0)
        index = newest_BT[..., None, None].expand(-1, -1, *k.shape[2:])
        for name, value in (("k", k), ("v", v)):
            state[name].copy_(value.gather(1, index))

    def init_state(
        self, batch: int, max_len: int, device: torch.device | None, dtype: torch.dtype
    ) -> State:
        o = self.options
        shape = (batch, o.visible(max_len), o.n_kv_heads, o.head_dim)
        state = {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}
        if o.d_conv:
            state["conv"] = torch.zeros(
                batch, o.d_conv - 1, o.qkv_width, device=device, dtype=dtype
            )
        return state

    def branch_step(self, u_BD: Tensor, ctx: Context, state: State) -> Tensor:
        o = self.options
        qkv = linear(u_BD, self.qkv_proj, self.qkv_bias)
        if self.conv_weight is not None:
            qkv = causal_conv1d_step(
                qkv, self.conv_weight, self.conv_bias, activation=None, state_BKD=state["conv"]
            )
        y = attention_step(
            qkv,
            ctx.positions_BL[:, 0].expand(u_BD.shape[0]),
            state["k"],
            state["v"],
            base=o.rope_base,
            dim=o.rope_dim,
            table=ctx.tables.get((o.rope_base, o.rope_dim)) if o.rope_base else None,
        )
        return linear(y.flatten(-2), self.out_proj, self.out_bias)
