"""What the matching of an architecture came to. Imports no torch: reports read it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

QUANTITIES = {
    "non_embedding_params": "parameters beside the embedding",
    "train_flops": "training FLOPs a token",
    "decode_bytes": "bytes read to decode a token",
    "state_bytes": "bytes of state",
}


@dataclass(frozen=True)
class Certificate:
    """What an architecture was, what was changed, and how near that came to the target.

    before, after: the figures of `QUANTITIES`, of the architecture as configured (the unmatched
    swap) and as matched, at the training length. reference: the arm that gave the target, or
    'match.target'. changes: one row a moved width: layer (0-based; None: all), kind, field, before,
    after.
    """

    quantity: str
    target: float
    reference: str
    by: str
    tolerance: float
    forced: bool
    before: dict[str, float]
    after: dict[str, float]
    changes: list[dict[str, Any]]

    @property
    def error(self) -> float:
        """Relative distance from the target."""
        return self.after[self.quantity] / self.target - 1

    @property
    def error_before(self) -> float:
        return self.before[self.quantity] / self.target - 1

    @property
    def reached(self) -> bool:
        return abs(self.error) <= self.tolerance

    @property
    def needed(self) -> bool:
        """Whether the architecture as configured misses the tolerance."""
        return abs(self.error_before) > self.tolerance

    def widths(self) -> str:
        """'n_heads and n_kv_heads of attention 8 to 7 in layers 4, 12'."""
        layers: dict[tuple[Any, ...], list[Any]] = {}
        for c in self.changes:
            what = (c["kind"], c["field"], c["before"], c["after"])
            layers.setdefault(what, []).append(c["layer"])
        fields: dict[tuple[Any, ...], list[str]] = {}
        for (kind, name, before, after), where in layers.items():
            fields.setdefault((kind, before, after, tuple(where)), []).append(name)
        parts = []
        for (kind, before, after, where), names in fields.items():
            text = f"{' and '.join(names)}{f' of {kind}' if kind else ''} {before} to {after}"
            if where != (None,):
                listed = ", ".join(map(str, where))
                text += f" in layer{'s' * (len(where) > 1)} {listed}"
            parts.append(text)
        return "; ".join(parts) or "no width changed"

    def sentence(self) -> str:
        return (
            f"{self.after[self.quantity]:,.0f} {QUANTITIES[self.quantity]}, {self.error:+.2%} from "
            f"the {self.target:,.0f} of {self.reference} (as configured {self.error_before:+.2%}): "
            f"{self.widths()}"
        )

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
