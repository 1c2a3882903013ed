"""Architectures made equal by construction: widths moved until a quantity meets its target.

d_model is shared by all arms of a study and never moves. What moves is the inner width of attention
(heads × head_dim, in whole heads), the hidden width of MLPs (in multiples of 64), the state of
recurrent layers (in multiples of 16, the smallest tile of the scan), or the number of layers. All
moved layers get one width; what one step too few would leave over is spread over them, one step
each, evenly along the stack. The choice is the nearest one there is, and the certificate says how
near: who wants to use an architecture beyond the tolerance has to say so (`match.force`).
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from ablate.arch import pattern as patterns
from ablate.arch.certificate import QUANTITIES, Certificate
from ablate.arch.spec import Architecture
from ablate.config import ArchConfig, MatchConfig
from ablate.errors import UserError
from ablate.layers.registry import KINDS, Kind

_OF_LAYER: dict[str, Callable[[Any, int], float]] = {
    "non_embedding_params": lambda o, T: o.num_params(),
    "train_flops": lambda o, T: 3 * o.flops(T) / T,
    "decode_bytes": lambda o, T: 2 * o.num_params() + o.state_bytes(T),
    "state_bytes": lambda o, T: o.state_bytes(T),
}
"""what one layer adds to a quantity"""
STEPS = {"mlp_width": 64, "state": 16}
MAX_STEPS = 1 << 14  # of one layer; a target beyond is a mistake


def figures(architecture: Architecture, seq_len: int) -> dict[str, float]:
    """The quantities that can be matched, at a sequence length."""
    cost = architecture.cost(seq_len)
    return {name: getattr(cost, name) for name in QUANTITIES}


def solve(
    arch: ArchConfig,
    architecture: Architecture,
    match: MatchConfig,
    *,
    seq_len: int,
    target: float,
    reference: str = "match.target",
) -> tuple[dict[str, Any], Certificate]:
    """The fields of `arch` to change, and the certificate. `architecture` is that of `arch`.

    Nothing changes where the architecture as configured is as near as any other. Raises UserError
    for a pattern that has nothing to move in, unless it is within the tolerance, and for a nearest
    choice beyond the tolerance, unless `match.force`.
    """
    before = figures(architecture, seq_len)
    found: Architecture | None
    if match.by == "layers":
        found = _layers(arch, architecture, match.quantity, seq_len, target)
    else:
        found = _widths(architecture, match, seq_len, target)
    changed = found or architecture
    changes: dict[str, Any] = {}
    rows = list(_rows(architecture, changed))
    if match.by == "layers" and rows:
        changes = {"n_layers": changed.n_layers}
    elif rows:
        overrides = {i: dict(values) for i, values in arch.overrides.items()}
        for row in rows:
            overrides.setdefault(str(row["layer"]), {})[row["field"]] = row["after"]
        changes = {"overrides": overrides}
    certificate = Certificate(
        quantity=match.quantity,
        target=float(target),
        reference=reference,
        by=str(match.by),
        tolerance=match.tolerance,
        forced=match.force,
        before=before,
        after=figures(changed, seq_len),
        changes=rows,
    )
    if not certificate.reached and not match.force:
        nothing = f", as the pattern has no layer that match.by '{match.by}' moves"
        raise UserError(
            f"match.quantity '{match.quantity}': the nearest choice has {certificate.sentence()}"
            f"{nothing if found is None else ''}; that is beyond match.tolerance "
            f"{match.tolerance:g}: give another match.by, a wider match.tolerance, or "
            "match.force=true to run it so"
        )
    return changes, certificate


def check(match: MatchConfig, architecture: Architecture, seq_len: int) -> None:
    """UserError unless a trial's certificate speaks of its architecture."""
    if match.certificate is None:
        return
    try:
        after = Certificate(**match.certificate).after
    except TypeError:  # made up
        after = None
    if figures(architecture, seq_len) != after:
        raise UserError(
            "match.certificate speaks of another architecture: it is filled in when a study is "
            "resolved and must be null in a config that is changed by hand"
        )


def _rows(before: Architecture, after: Architecture) -> Iterator[dict[str, Any]]:
    names = ("layer", "kind", "field", "before", "after")
    n, m = before.n_layers, after.n_layers
    if n != m:
        yield dict(zip(names, (None, "", "n_layers", n, m), strict=True))
        return
    pairs = zip(before.letters, before.layer_options, after.layer_options, strict=True)
    for i, (letter, options, changed) in enumerate(pairs):
        for field, new in vars(changed).items():
            old = getattr(options, field)
            if new != old:
                yield dict(zip(names, (i, KINDS[letter].name, field, old, new), strict=True))


# --- widths ---------------------------------------------------------------------------------------

Widen = Callable[[int], dict[str, int]]  # fields of a layer at so many steps


def _moves(kind: Kind, options: Any, by: str) -> Widen | None:
    """How a layer's width goes with steps, or None where it does not move."""
    names = {field.name for field in dataclasses.fields(options)}
    if by == "attention_inner" and kind.attends and {"n_heads", "n_kv_heads"} <= names:
        if options.n_kv_heads == options.n_heads:
            return lambda steps: {"n_heads": steps, "n_kv_heads": steps}
        group = options.n_kv_heads
        return lambda steps: {"n_heads": steps * group}
    if by == "mlp_width" and not kind.mixes and "d_hidden" in names:
        return lambda steps: {"d_hidden": steps * STEPS["mlp_width"]}
    if by == "state" and "d_state" in names:
        return lambda steps: {"d_state": steps * STEPS["state"]}
    return None


def _widths(
    architecture: Architecture, match: MatchConfig, seq_len: int, target: float
) -> Architecture | None:
    """The architecture with the nearest widths; itself when it is as near; None: nothing moves."""
    layers = zip(architecture.letters, architecture.layer_options, strict=True)
    widens = [_moves(KINDS[letter], options, str(match.by)) for letter, options in layers]
    moving = {i: widen for i, widen in enumerate(widens) if widen is not None}
    if not moving:
        return None
    total = figures(architecture, seq_len)[match.quantity]

    def layer(i: int, steps: int | None = None) -> float:
        options = architecture.layer_options[i]
        if steps is not None:
            options = dataclasses.replace(options, **moving[i](steps))
        return _OF_LAYER[match.quantity](options, seq_len)

    fixed = total - sum(layer(i) for i in moving)

    def even(steps: int) -> list[float]:
        return [layer(i, steps) for i in moving]

    # the quantity grows with the width: the last steps below the target, one at least
    more_steps = range(2, MAX_STEPS)
    low = 1 + bisect.bisect_left(more_steps, target, key=lambda steps: fixed + sum(even(steps)))
    few, more = even(low), even(low + 1)

    def at(extra: int) -> float:
        wide = _spread(extra, len(moving))
        return fixed + sum(more[j] if j in wide else few[j] for j in range(len(moving)))

    extra = min(range(len(moving) + 1), key=lambda n: abs(at(n) - target))
    if abs(total - target) <= abs(at(extra) - target):
        return architecture
    wide = _spread(extra, len(moving))
    overrides = dict(architecture.overrides)
    for j, (i, widen) in enumerate(moving.items()):
        overrides[i] = {**overrides.get(i, {}), **widen(low + (j in wide))}
    kinds = architecture.canonical()["options"]
    return dataclasses.replace(architecture, options=kinds, overrides=overrides)


def _spread(extra: int, places: int) -> set[int]:
    """`extra` of `places`, evenly."""
    return {(2 * n + 1) * places // (2 * extra) for n in range(extra)}


# --- layers ---------------------------------------------------------------------------------------


def _layers(
    arch: ArchConfig, architecture: Architecture, quantity: str, seq_len: int, target: float
) -> Architecture:
    """The architecture with the nearest number of layers, made by the same rule."""
    for name in ("pattern", "positions", "overrides"):
        if getattr(arch, name):
            raise UserError(
                f"match.by is 'layers', but arch.{name} is given: only a pattern made from shares "
                "or a unit can have another number of layers"
            )
    total = figures(architecture, seq_len)[quantity]
    guess = arch.n_layers * target / total
    top = min(patterns.MAX_LAYERS, int(1.5 * guess) + 2)
    best, nearest = architecture, abs(total - target)
    for n in range(max(1, int(0.6 * guess)), top + 1):
        try:
            changed = arch.model_copy(update={"n_layers": n})
            other = Architecture.from_config(changed, architecture.vocab_size)
        except UserError:  # no multiple of the unit
            continue
        off = abs(figures(other, seq_len)[quantity] - target)
        if off < nearest:
            best, nearest = other, off
    return best
