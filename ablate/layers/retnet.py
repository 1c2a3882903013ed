"""Multi-scale retention (RetNet, Sun et al. 2023, arXiv 2307.08621, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ablate.kernels import linear, rotary, ssd, ssd_step
from ablate.kernels.ssd import CHUNK
from ablate.layers.context import Context, ResidualLayer, State, beyond, gated_output
from ablate.layers.options import (
    DERIVED,
    STRICT,
    DerivedInt,
    PositiveFloat,
    PositiveInt,
    heads_of,
    tile_work,
)

# The scan's kernels take heads and states of up to this width. A wider value is several heads of
# one group, and what wider keys give is the sum over their pieces.
VALUES, KEYS = 64, 128


@dataclass(frozen=True, kw_only=True)
class RetNetOptions:
    d_model: PositiveInt
    head_dim: PositiveInt = 256
    """channels of a query and of a key"""
    n_heads: DerivedInt = DERIVED
    """H; d_model / head_dim where not given"""
    expand_v: PositiveFloat = 2.0
    """channels of a value over those of a key"""
    rope_base: PositiveFloat | None = 10000.0
    """base of the rotary angles; None: no positions but the decay"""

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.n_heads is None:
            object.__setattr__(self, "n_heads", heads_of(self.d_model, self.head_dim))
        if self.rope_base is not None and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but rotary positions need an even one")
        if self.value_dim < 1:
            raise ValueError(f"expand_v {self.expand_v:g} of head_dim {self.head_dim} is no width")

    @property
    def rope_dim(self) -> int:
        return self.head_dim

    @property
    def value_dim(self) -> int:
        """Channels of a value."""
        return round(self.expand_v * self.head_dim)

    @property
    def d_key(self) -> int:
        """Width of all queries, and of all keys."""
        return self.n_heads * self.head_dim

    @property
    def d_value(self) -> int:
        return self.n_heads * self.value_dim

    @property
    def in_width(self) -> int:
        """Width of the in-projection: queries, keys, values and output gate."""
        return 2 * (self.d_key + self.d_value)

    @property
    def _projections(self) -> int:
        return self.d_model * (self.in_width + self.d_value)

    def num_params(self) -> int:
        return self.d_model + self._projections + self.value_dim

    def flops(self, T: int) -> int:
        squares, reads, writes = tile_work(T, CHUNK)
        pairs = squares * 2 * (self.d_key + self.d_value)
        state = (reads + writes) * 2 * self.d_key * self.value_dim
        return 2 * T * self._projections + pairs + state

    def elementwise_flops(self, T: int) -> int:
        """The decay of each pair in a tile: one exponential, one product."""
        return 2 * tile_work(T, CHUNK)[0] * self.n_heads

    def state_bytes(self, T: int, dtype_bytes: int = 2) -> int:
        """The state is float32 whatever the cache's type."""
        return 4 * self.d_key * self.value_dim

    def decode_flops(self, T: int) -> int:
        return 2 * self._projections + 4 * self.d_key * self.value_dim


class RetNet(ResidualLayer):
    """x + out_proj(norm(retention(rotary(q), rotary(k), v)) * silu(z)); the norm is that of each
    head, with one weight for all. in_proj holds q, k, v and z.

    Head h decays by 1 - 2^(-5 - h) a token (equation 8). The paper's normalisations by sums of
    decays scale a head's output alone, which the norm undoes. The rotation pairs channels as all
    layers here do; which are paired is a matter of their order.
    """

    ragged = True
    roles: ClassVar[dict[str, str]] = {
        "norm": "ones",
        "in_proj": "matrix",
        "head_norm": "ones",
        "out_proj": "residual",
    }

    def __init__(self, options: RetNetOptions, norm_eps: float) -> None:
        super().__init__(options.d_model, norm_eps)
        o = self.options = options
        self.in_proj = nn.Parameter(torch.empty(o.in_width, o.d_model))
        self.head_norm = nn.Parameter(torch.empty(o.value_dim))
        self.out_proj = nn.Parameter(torch.empty(o.d_model, o.d_value))

    def _inputs(self, u: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys (B, L, H, K), both rotated and the keys scaled, values (B, L, H, V),
        and the output gate."""
        o = self.options
        widths = (o.d_key, o.d_key, o.d_value, o.d_value)
        q, k, v, z = linear(u, self.in_proj).split(widths, dim=-1)
        q, k, v = (t.unflatten(-1, (o.n_heads, -1)) for t in (q, k, v))
        if o.rope_base is not None:
            table = ctx.tables.get((o.rope_base, o.rope_dim))
            q, k = (rotary(t, ctx.positions_BL, base=o.rope_base, table=table) for t in (q, k))
        return q, k * o.head_dim**-0.5, v, z

    def _log_decays(self, repeat: int, like: Tensor) -> Tensor:
        """Of each head, `repeat` times."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        h = torch.arange(self.options.n_heads, device=like.device, dtype=dtype)
        return torch.log1p(-torch.exp2(-5 - h)).repeat_interleave(repeat)

    def branch(self, u_BLD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        o = self.options
        q, k, v, z = self._inputs(u_BLD, ctx)
        split = o.value_dim // VALUES if o.value_dim % VALUES == 0 else 1
        x = v.unflatten(-1, (split, -1)).flatten(2, 3)  # (B, L, H split, V / split)
        step = torch.ones(x.shape[:3], device=x.device, dtype=torch.float32)
        if ctx.lengths_B is not None:  # from a row's end on, the state neither decays nor grows
            step = step * ~beyond(x, ctx.lengths_B)[..., None]
        total: Tensor | None = None
        lasts = []
        for begin in range(0, o.head_dim, KEYS):
            keys = slice(begin, min(begin + KEYS, o.head_dim))
            y = ssd(
                x,
                step,
                self._log_decays(split, x),
                k[..., keys],
                q[..., keys],
                return_final_state=state is not None,
                doc_start_BL=ctx.doc_start_BL,
            )
            if isinstance(y, tuple):
                y, last = y
                lasts.append(last.reshape(len(x), o.n_heads, o.value_dim, -1))
            total = y if total is None else total + y
        assert total is not None
        if state is not None:
            state["retention"].copy_(torch.cat(lasts, dim=-1))
        return gated_output(total, z, self.head_norm, self.eps, self.out_proj)

    def init_state(
        self, batch: int, max_len: int, device: torch.device | None, dtype: torch.dtype
    ) -> State:
        o = self.options
        shape = (batch, o.n_heads, o.value_dim, o.head_dim)
        dtype = torch.promote_types(dtype, torch.float32)
        return {"retention": torch.zeros(shape, device=device, dtype=dtype)}

    def branch_step(self, u_BD: Tensor, ctx: Context, state: State) -> Tensor:
        q, k, v, z = (t.squeeze(1) for t in self._inputs(u_BD.unsqueeze(1), ctx))
        step = torch.ones(v.shape[:2], device=v.device, dtype=torch.float32)
        y = ssd_step(v, step, self._log_decays(1, v), k, q, state_BHPN=state["retention"])
        return gated_output(y, z, self.head_norm, self.eps, self.out_proj)
