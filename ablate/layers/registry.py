"""Letters, layer kinds, and how a user's own package adds one.

A kind is an options dataclass and a module. The options have `d_model` as their first field,
`__pydantic_config__ = STRICT`, and the cost contract, all for the layer with its own pre-norm:

    num_params()             parameters
    flops(T)                 forward FLOPs of a sequence of T tokens in training, 2 a multiply-add:
                             projections and token mixing; attention by its exact pairs, a scan
                             at its kernel's tile length
    elementwise_flops(T)     convolution taps and recurrences, which no matrix unit does; norms,
                             activations and softmax are counted nowhere
    state_bytes(T, bytes=2)  decoding cache of one sequence after T tokens, `bytes` an element
    decode_flops(T)          forward FLOPs of one decoded token, the T-th (it sees T with itself)

The module is built as `Module(options, norm_eps)` and has `forward(x_BLD, ctx, state=None)`, which
returns the new residual stream and, given a fresh state, fills it; `init_state(batch, max_len,
device, dtype)`; `step(x_BD, ctx, state)`, which decodes one token and updates the state in place;
`ragged = True` where its prefill heeds `ctx.lengths_B`; and `roles`, which tells for each of its
parameters how it is initialised and whether it decays (the roles are in `model/init.py`).

Before a run trains, each such kind is run on random numbers, and refused where what it makes of a
token depends on later ones (`model/causal.py`). A run records a digest of the source of each such
module, and reports tell where runs of a study were made by different ones: two trials whose configs
are equal have the same key, whatever was changed in the code between them.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ablate.config import ArchConfig
from ablate.errors import UserError
from ablate.layers.attention import Attention, AttentionOptions, SlidingAttentionOptions
from ablate.layers.gated_deltanet import GatedDeltaNet, GatedDeltaNetOptions
from ablate.layers.gla import GLA, GLAOptions
from ablate.layers.mamba1 import Mamba1, Mamba1Options
from ablate.layers.mamba2 import Mamba2, Mamba2Options
from ablate.layers.mlp import MLP, MLPOptions
from ablate.layers.retnet import RetNet, RetNetOptions


@dataclass(frozen=True)
class Kind:
    """A layer kind.

    letter: its character in patterns. name: its section under `arch.`. mixes: tokens see each
    other in it. attends: counted as attention in shares.
    """

    letter: str
    name: str
    options: type[Any]
    module: type[Any]
    mixes: bool = True
    attends: bool = False


KINDS: dict[str, Kind] = {
    kind.letter: kind
    for kind in (
        Kind("M", "mamba2", Mamba2Options, Mamba2),
        Kind("m", "mamba1", Mamba1Options, Mamba1),
        Kind("G", "gated_deltanet", GatedDeltaNetOptions, GatedDeltaNet),
        Kind("L", "gla", GLAOptions, GLA),
        Kind("R", "retnet", RetNetOptions, RetNet),
        Kind("*", "attention", AttentionOptions, Attention, attends=True),
        Kind("S", "swa", SlidingAttentionOptions, Attention, attends=True),
        Kind("-", "mlp", MLPOptions, MLP, mixes=False),
    )
}

RESERVED = {"E": "mixture of experts", "Z": "shared attention block"}

# What is called of the options, by how many arguments.
_CONTRACT: dict[str, tuple[tuple[int, ...], str]] = {
    "num_params": ((0,), "()"),
    "flops": ((1,), "(T)"),
    "elementwise_flops": ((1,), "(T)"),
    "state_bytes": ((1, 2), "(T, bytes=2)"),
    "decode_flops": ((1,), "(T)"),
}

_loaded: set[str] = set()


def register(kind: Kind) -> None:
    """Make a kind known. `UserError` when its letter or name cannot be used, or a method that is
    called of it is not there."""
    letter, name = kind.letter, kind.name
    if not (len(letter) == 1 and letter.isascii() and letter.isalpha() and letter != "x"):
        raise UserError(
            f"layer kind '{name}' has the letter {letter!r}; it must be one ASCII letter, not 'x'"
        )
    if letter in RESERVED:
        raise UserError(
            f"layer kind '{name}' has the letter '{letter}', reserved for {RESERVED[letter]}"
        )
    if letter in KINDS:
        raise UserError(
            f"layer kind '{name}' has the letter '{letter}', taken by '{KINDS[letter].name}'"
        )
    if not name.isidentifier() or name in ArchConfig.model_fields:
        raise UserError(f"a layer kind cannot be named {name!r}: its options stand at arch.<name>")
    if any(other.name == name for other in KINDS.values()):
        raise UserError(f"there is a layer kind '{name}' already")
    _check_contract(kind)
    KINDS[letter] = kind


def _check_contract(kind: Kind) -> None:
    for name, (counts, written) in _CONTRACT.items():
        method = inspect.getattr_static(kind.options, name, None)
        bound = isinstance(method, staticmethod | classmethod)
        called = getattr(kind.options, name) if bound else method
        try:
            for count in counts:
                inspect.signature(called).bind(*range(count + (not bound)))
        except (TypeError, ValueError):
            raise UserError(
                f"layer kind '{kind.name}': {kind.options.__name__} must have {name}{written}"
            ) from None
    for name in ("forward", "init_state", "step"):
        method = getattr(kind.module, name, None)
        if not callable(method) or method is nn.Module.forward:
            raise UserError(f"layer kind '{kind.name}': {kind.module.__name__} must have {name}")


def own_modules(letters: Iterable[str]) -> list[str]:
    """Names of the modules outside this package that the kinds of `letters` come from."""
    found = {KINDS[letter].module.__module__ for letter in letters}
    return sorted(name for name in found if name.split(".")[0] != __name__.split(".")[0])


def own_sources(letters: Iterable[str]) -> dict[str, str]:
    """`own_modules` with a digest of each one's source ("unknown" where there is none to read)."""
    found = {}
    for module in own_modules(letters):
        try:
            source = inspect.getsource(sys.modules[module])
        except (OSError, TypeError, KeyError):
            found[module] = "unknown"
            continue
        found[module] = hashlib.sha256(source.encode()).hexdigest()[:16]
    return found


def load_modules(names: Iterable[str]) -> None:
    """Import the modules of `arch.layers`, each of which calls `register`."""
    for name in names:
        if name in _loaded:
            continue
        before = set(KINDS)
        try:
            importlib.import_module(name)
        except UserError as error:
            _forget(name, before)
            raise UserError(f"arch.layers: module '{name}': {error}") from None
        except Exception as error:
            _forget(name, before)
            raise UserError(
                f"arch.layers: module '{name}' cannot be imported ({error}); it must be importable "
                "from where the command runs"
            ) from error
        # A module that was imported before has registered its kinds then.
        if not any(k not in before or KINDS[k].module.__module__ == name for k in KINDS):
            raise UserError(f"arch.layers: module '{name}' registers no layer kind")
        _loaded.add(name)


def _forget(name: str, before: set[str]) -> None:
    """Undo a failed import, so that a corrected module can be imported again."""
    sys.modules.pop(name, None)
    for letter in set(KINDS) - before:
        del KINDS[letter]


def by_name(name: str) -> Kind | None:
    return next((kind for kind in KINDS.values() if kind.name == name), None)
