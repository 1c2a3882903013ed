"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635, section 4.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.kernels import gla, gla_step, linear
from ablate.kernels.gla import CHUNK
from ablate.layers.context import (
    Context,
    ResidualLayer,
    State,
    aligned_linear,
    beyond,
    gated_output,
)
from ablate.layers.options import DERIVED, STRICT, DerivedInt, PositiveFloat, PositiveInt, tile_work


@dataclass(frozen=True, kw_only=True)
class GLAOptions:
    d_model: PositiveInt
    n_heads: DerivedInt = DERIVED
    """H; d_model / 384, at least 1, where not given"""
    expand_k: PositiveFloat = 0.5
    """width of all keys over d_model"""
    expand_v: PositiveFloat = 1.0
    """width of all values over d_model"""
    gate_rank: PositiveInt = 16
    """rank of the decays' projection"""
    gate_normalizer: PositiveFloat = 16.0
    """log decays are log sigmoids over this: the larger, the longer the memory"""

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.n_heads is None:
            object.__setattr__(self, "n_heads", max(1, self.d_model // 384))
        for name, width in (("expand_k", self.d_key), ("expand_v", self.d_value)):
            if width < 1 or width % self.n_heads:
                raise ValueError(
                    f"{name} {getattr(self, name):g} of d_model {self.d_model} is a width of "
                    f"{width}, which {self.n_heads} heads cannot share"
                )

    @property
    def d_key(self) -> int:
        """Width of all queries, and of all keys."""
        return round(self.expand_k * self.d_model)

    @property
    def d_value(self) -> int:
        return round(self.expand_v * self.d_model)

    @property
    def in_width(self) -> int:
        """Width of the in-projection: queries, keys, values, output gate and the decays' rank."""
        return 2 * (self.d_key + self.d_value) + self.gate_rank

    @property
    def _projections(self) -> int:
        return self.d_model * (self.in_width + self.d_value) + self.gate_rank * self.d_key

    @property
    def _state(self) -> int:
        return self.d_key * self.d_value // self.n_heads

    def num_params(self) -> int:
        return self.d_model + self._projections + self.d_key + self.d_value // self.n_heads

    def flops(self, T: int) -> int:
        squares, reads, writes = tile_work(T, CHUNK)
        pairs = squares * 2 * (self.d_key + self.d_value)
        return 2 * T * self._projections + pairs + (reads + writes) * 2 * self._state

    def elementwise_flops(self, T: int) -> int:
        """Decays of queries and keys: an exponential and a product for every halving of a tile and
        for either end of it."""
        halvings = CHUNK.bit_length() - 1
        return T * 2 * self.d_key * (halvings + 2)

    def state_bytes(self, T: int, dtype_bytes: int = 2) -> int:
        """The state is float32 whatever the cache's type."""
        return 4 * self._state

    def decode_flops(self, T: int) -> int:
        return 2 * self._projections + 4 * self._state


class GLA(ResidualLayer):
    """x + out_proj(norm(gla(q, k, v)) * silu(z)); the norm is that of each head, with one weight
    for all. in_proj holds q, k, v, z and the low-rank input of the decays."""

    ragged = True
    roles: ClassVar[dict[str, str]] = {
        "norm": "ones",
        "in_proj": "matrix",
        "decay_proj": "matrix",
        "decay_bias": "zeros",
        "head_norm": "ones",
        "out_proj": "residual",
    }

    def __init__(self, options: GLAOptions, norm_eps: float) -> None:
        super().__init__(options.d_model, norm_eps)
        o = self.options = options
        self.in_proj = nn.Parameter(torch.empty(o.in_width, o.d_model))
        self.decay_proj = nn.Parameter(torch.empty(o.d_key, o.gate_rank))
        self.decay_bias = nn.Parameter(torch.empty(o.d_key))
        self.head_norm = nn.Parameter(torch.empty(o.d_value // o.n_heads))
        self.out_proj = nn.Parameter(torch.empty(o.d_model, o.d_value))

    def _inputs(self, u: Tensor) -> tuple[list[Tensor], Tensor]:
        """Queries, keys, values and log decays, by heads; the output gate."""
        o = self.options
        widths = (o.d_key, o.d_key, o.d_value, o.d_value, o.gate_rank)
        q, k, v, z, low = aligned_linear(u, self.in_proj).split(widths, dim=-1)
        decay = linear(low, self.decay_proj) + self.decay_bias  # the bias is float32 always
        g = (F.logsigmoid(decay) / o.gate_normalizer).to(q.dtype)
        return [t.unflatten(-1, (o.n_heads, -1)) for t in (q, k, v, g)], z

    def branch(self, u_BLD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        (q, k, v, g), z = self._inputs(u_BLD)
        if state is None:
            y = gla(q, k, v, g, doc_start_BL=ctx.doc_start_BL)
            assert isinstance(y, Tensor)
            return gated_output(y, z, self.head_norm, self.eps, self.out_proj)
        if ctx.lengths_B is not None:  # from a row's end on, the state neither decays nor grows
            padding = beyond(u_BLD, ctx.lengths_B)[..., None, None]
            k, g = k.masked_fill(padding, 0.0), g.masked_fill(padding, 0.0)
        y, last = gla(q, k, v, g, return_final_state=True, doc_start_BL=ctx.doc_start_BL)
        state["gla"].copy_(last)
        return gated_output(y, z, self.head_norm, self.eps, self.out_proj)

    def init_state(
        self, batch: int, max_len: int, device: torch.device | None, dtype: torch.dtype
    ) -> State:
        o = self.options
        shape = (batch, o.n_heads, o.d_key // o.n_heads, o.d_value // o.n_heads)
        dtype = torch.promote_types(dtype, torch.float32)
        return {"gla": torch.zeros(shape, device=device, dtype=dtype)}

    def branch_step(self, u_BD: Tensor, ctx: Context, state: State) -> Tensor:
        (q, k, v, g), z = self._inputs(u_BD)
        y = gla_step(q, k, v, g, state_BHKV=state["gla"])
        return gated_output(y, z, self.head_norm, self.eps, self.out_proj)
