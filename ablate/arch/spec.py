"""An architecture: a pattern, a width, and the options of the layer kinds that it uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ablate.arch import pattern as patterns
from ablate.arch.cost import Cost, cost
from ablate.config import ArchConfig
from ablate.errors import UserError, did_you_mean
from ablate.layers.options import build
from ablate.layers.registry import KINDS, by_name, load_modules


@dataclass(frozen=True)
class Architecture:
    """A language model's shape, resolved and checked.

        Architecture("mS-x8", d_model=768, vocab_size=16384, options={"swa": {"window": 1024}})

    pattern: in the pattern language; the attribute holds it expanded, one letter a layer.
    vocab_size: rows of the embedding, padding included.
    init_std: of matrices and embeddings; None: sqrt(2 / (5 d_model)) (Nguyen and Salazar 2019,
        arXiv 1910.05895), 0.02 at width 1000, and large enough for narrow models to learn recall.
    options: by layer kind name, plain dicts; kinds that are not named have their defaults. The
        attribute holds the resolved dataclasses of the kinds that the pattern uses: those of the
        first layer of each kind.
    overrides: options of single layers by 0-based index, plain dicts, over those of their kind. The
        attribute holds what differs from `options`, and nothing where layers of a kind are alike.
    layer_options: the resolved dataclass of every layer.
    Raises UserError for anything that does not fit; fields are named as in the config (`arch.…`).
    """

    pattern: str
    _: dataclasses.KW_ONLY
    d_model: int
    vocab_size: int
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    init_std: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    layer_options: tuple[Any, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        letters = patterns.parse(self.pattern, field="arch.pattern")
        for name in ("d_model", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"arch.{name} is {value!r}; it must be a positive whole number")
        used = {KINDS[letter].name for letter in letters}
        resolved = {}
        for name, values in {**{name: {} for name in used}, **self.options}.items():
            kind = by_name(name)
            if kind is None:
                known = [k.name for k in KINDS.values()]
                raise UserError(f"unknown field 'arch.{name}'{did_you_mean(name, known)}")
            where = f"arch.{name}"
            built = build(kind.options, self.d_model, values, where, used=name in used)
            if name in used:
                resolved[name] = built
        layers = self._layers(letters, resolved)
        first = {KINDS[letter].name: layers[letters.index(letter)] for letter in letters}
        object.__setattr__(self, "pattern", "".join(letters))
        if self.init_std is None:
            object.__setattr__(self, "init_std", (0.4 / self.d_model) ** 0.5)
        differing = {}
        for i, (letter, own) in enumerate(zip(letters, layers, strict=True)):
            values, others = (_plain(o) for o in (own, first[KINDS[letter].name]))
            changed = {k: v for k, v in values.items() if v != others[k]}
            if changed:
                differing[i] = changed
        object.__setattr__(self, "options", first)
        object.__setattr__(self, "overrides", differing)
        object.__setattr__(self, "layer_options", layers)

    def _layers(self, letters: Sequence[str], resolved: Mapping[str, Any]) -> tuple[Any, ...]:
        """The options of every layer: its kind's, with its own over them."""
        layers = [resolved[KINDS[letter].name] for letter in letters]
        for index, changes in self.overrides.items():
            if not 0 <= index < len(letters):
                raise UserError(
                    f"arch.overrides: {index} is no layer; with {len(letters)} layers they go from "
                    f"0 to {len(letters) - 1}"
                )
            kind = KINDS[letters[index]]
            values = {**self.options.get(kind.name, {}), **changes}
            layers[index] = build(kind.options, self.d_model, values, f"arch.overrides.{index}")
        return tuple(layers)

    @classmethod
    def from_config(cls, arch: ArchConfig, vocab_size: int) -> Architecture:
        """The architecture of an `arch` section. `vocab_size` comes from the tokenizer, rounded."""
        load_modules(arch.layers)
        return cls(
            patterns.make(arch),
            d_model=arch.d_model,
            vocab_size=vocab_size,
            tie_embeddings=arch.tie_embeddings,
            norm_eps=arch.norm_eps,
            init_std=arch.init_std,
            options=arch.options,
            overrides={int(i): values for i, values in arch.overrides.items()},
        )

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(self.pattern)

    @property
    def n_layers(self) -> int:
        return len(self.pattern)

    def canonical(self) -> dict[str, Any]:
        """Plain data that is equal exactly for equal architectures, however they were written."""
        names = ("pattern", "d_model", "vocab_size", "tie_embeddings", "norm_eps", "init_std")
        shape = {name: getattr(self, name) for name in names}
        options = {name: _plain(self.options[name]) for name in sorted(self.options)}
        overrides = {str(i): dict(values) for i, values in self.overrides.items()}
        return {**shape, "options": options, **({"overrides": overrides} if overrides else {})}

    def shares(self) -> dict[str, float]:
        """`pattern.shares` of this pattern."""
        return patterns.shares(self.letters)

    def cost(self, seq_len: int) -> Cost:
        """What it costs at a sequence length."""
        return cost(self, seq_len)

    def num_params(self) -> int:
        return self.cost(1).params

    def non_embedding_params(self) -> int:
        """Without embedding and unembedding."""
        return self.cost(1).non_embedding_params


def _plain(options: Any) -> dict[str, Any]:
    """The options of a layer as plain data, without the width that all layers share."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(options).items()}
    del values["d_model"]
    return values
