"""What an architecture costs, before anything runs: the sum of its layers' contracts.

FLOPs are those of the forward pass, two a multiply-add, as `layers/registry.py` states; training
costs three times as much. Looking up an embedding costs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ablate.layers.registry import KINDS

if TYPE_CHECKING:
    from ablate.arch.spec import Architecture


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer, with its pre-norm. FLOPs per sequence of `seq_len`, decode FLOPs per token."""

    letter: str
    params: int
    flops: int
    elementwise_flops: int
    state_bytes: int
    decode_flops: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An architecture's cost at a sequence length of `seq_len` tokens."""

    seq_len: int
    layers: tuple[LayerCost, ...]
    embedding_params: int
    unembedding_params: int
    """0 when tied to the embedding"""
    final_norm_params: int
    unembedding_flops: int
    """forward, per token"""

    @property
    def params(self) -> int:
        return self.non_embedding_params + self.embedding_params + self.unembedding_params

    @property
    def non_embedding_params(self) -> int:
        return sum(layer.params for layer in self.layers) + self.final_norm_params

    @property
    def forward_flops(self) -> float:
        """Per token, averaged over a sequence of `seq_len`."""
        return sum(layer.flops for layer in self.layers) / self.seq_len + self.unembedding_flops

    @property
    def train_flops(self) -> float:
        """Per token: forward and backward, three times the forward."""
        return 3 * self.forward_flops

    @property
    def elementwise_flops(self) -> float:
        """Forward, per token; in no other figure."""
        return sum(layer.elementwise_flops for layer in self.layers) / self.seq_len

    @property
    def state_bytes(self) -> int:
        """Decoding cache of one sequence after `seq_len` tokens, in 16-bit types."""
        return sum(layer.state_bytes for layer in self.layers)

    @property
    def decode_bytes(self) -> int:
        """Bytes that decoding one token of one sequence reads at a context of `seq_len`, in 16-bit
        types: every weight once (of the embedding, the output projection only), and the state."""
        weights = self.non_embedding_params + self.unembedding_flops // 2
        return 2 * weights + self.state_bytes

    @property
    def decode_flops(self) -> int:
        """One token at a context of `seq_len`."""
        return sum(layer.decode_flops for layer in self.layers) + self.unembedding_flops

    def table(self) -> list[dict[str, Any]]:
        """Rows for printing: one a layer kind, then embedding, output and total.

        Columns: part, layers, params, forward_flops and elementwise_flops (per token), state_bytes,
        decode_flops.
        """
        rows = []
        for letter in dict.fromkeys(layer.letter for layer in self.layers):
            own = [layer for layer in self.layers if layer.letter == letter]
            rows.append(
                _row(
                    f"{letter} {KINDS[letter].name}",
                    len(own),
                    params=sum(layer.params for layer in own),
                    forward_flops=sum(layer.flops for layer in own) / self.seq_len,
                    elementwise_flops=sum(x.elementwise_flops for x in own) / self.seq_len,
                    state_bytes=sum(layer.state_bytes for layer in own),
                    decode_flops=sum(layer.decode_flops for layer in own),
                )
            )
        flops = self.unembedding_flops
        params = self.final_norm_params + self.unembedding_params
        total = {name: getattr(self, name) for name in _COLUMNS}
        return [
            *rows,
            _row("embedding", 0, params=self.embedding_params),
            _row("norm and output", 0, params=params, forward_flops=flops, decode_flops=flops),
            _row("total", len(self.layers), **total),
        ]


_COLUMNS = ("params", "forward_flops", "elementwise_flops", "state_bytes", "decode_flops")


def _row(part: str, layers: int, **figures: float) -> dict[str, Any]:
    return {"part": part, "layers": layers, **dict.fromkeys(_COLUMNS, 0), **figures}


def cost(arch: Architecture, seq_len: int) -> Cost:
    """The cost of an architecture at a sequence length, in tokens.

    Raises ValueError for one that is no positive whole number.
    """
    if not isinstance(seq_len, int) or seq_len < 1:
        raise ValueError(f"seq_len is {seq_len!r}; it must be a positive whole number")
    matrix = arch.vocab_size * arch.d_model
    layers = tuple(
        LayerCost(
            letter=letter,
            params=o.num_params(),
            flops=o.flops(seq_len),
            elementwise_flops=o.elementwise_flops(seq_len),
            state_bytes=o.state_bytes(seq_len),
            decode_flops=o.decode_flops(seq_len),
        )
        for letter, o in zip(arch.letters, arch.layer_options, strict=True)
    )
    return Cost(
        seq_len=seq_len,
        layers=layers,
        embedding_params=matrix,
        unembedding_params=0 if arch.tie_embeddings else matrix,
        final_norm_params=arch.d_model,
        unembedding_flops=2 * matrix,
    )
