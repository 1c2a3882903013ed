"""What an architecture costs, before anything runs: the sum of its layers' contracts.

FLOPs are those of the forward pass, two a multiply-add, as `layers/registry.py` states; training
costs three times as much. Looking up an embedding costs none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ablate.layers.registry import KINDS

if TYPE_CHECKING:
    from ablate.arch.spec import Architecture


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer, with its pre-norm. FLOPs per sequence of `seq_len`, decode FLOPs per token."""

    index: int
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
            of_kind = [layer for layer in self.layers if layer.letter == letter]
            name = f"{letter} {KINDS[letter].name}"
            rows.append(
                _row(
                    name,
                    len(of_kind),
                    params=sum(layer.params for layer in of_kind),
                    forward=sum(layer.flops for layer in of_kind) / self.seq_len,
                    elementwise=sum(x.elementwise_flops for x in of_kind) / self.seq_len,
                    state=sum(layer.state_bytes for layer in of_kind),
                    decode=sum(layer.decode_flops for layer in of_kind),
                )
            )
        rows.append(_row("embedding", 0, params=self.embedding_params))
        output = self.final_norm_params + self.unembedding_params
        rows.append(
            _row(
                "norm and output",
                0,
                params=output,
                forward=self.unembedding_flops,
                decode=self.unembedding_flops,
            )
        )
        rows.append(
            _row(
                "total",
                len(self.layers),
                params=self.params,
                forward=self.forward_flops,
                elementwise=self.elementwise_flops,
                state=self.state_bytes,
                decode=self.decode_flops,
            )
        )
        return rows


def _row(
    part: str,
    layers: int,
    *,
    params: int,
    forward: float = 0,
    elementwise: float = 0,
    state: int = 0,
    decode: int = 0,
) -> dict[str, Any]:
    return {
        "part": part,
        "layers": layers,
        "params": params,
        "forward_flops": forward,
        "elementwise_flops": elementwise,
        "state_bytes": state,
        "decode_flops": decode,
    }


def cost(arch: Architecture, seq_len: int) -> Cost:
    """The cost of an architecture at a sequence length."""
    matrix = arch.vocab_size * arch.d_model
    return Cost(
        seq_len=seq_len,
        layers=tuple(_layers(arch, seq_len)),
        embedding_params=matrix,
        unembedding_params=0 if arch.tie_embeddings else matrix,
        final_norm_params=arch.d_model,
        unembedding_flops=2 * matrix,
    )


def _layers(arch: Architecture, seq_len: int) -> Iterable[LayerCost]:
    for index, (letter, o) in enumerate(zip(arch.letters, arch.layer_options, strict=True)):
        yield LayerCost(
            index=index,
            letter=letter,
            params=o.num_params(),
            flops=o.flops(seq_len),
            elementwise_flops=o.elementwise_flops(seq_len),
            state_bytes=o.state_bytes(seq_len),
            decode_flops=o.decode_flops(seq_len),
        )
