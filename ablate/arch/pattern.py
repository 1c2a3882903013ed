"""The pattern language, and patterns made from shares, positions and units.

One letter is one residual layer: `M` Mamba-2, `m` Mamba-1, `G` Gated DeltaNet, `L` gated linear
attention, `R` RetNet, `*` full attention, `S` sliding-window attention, `-` MLP. `xN` repeats the
unit before it, `.` separates units:

    pattern = part { "." part }        part = letter { letter } [ "x" count ]

Nothing in a pattern needs quotes in bash or on Hydra's command line; YAML needs them, where `*` and
`-` have a meaning of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from ablate.config import ArchConfig
from ablate.errors import UserError
from ablate.layers.registry import KINDS, RESERVED

Placement = Literal["published", "even", "front", "middle", "back"]

MAX_LAYERS = 1024

EXAMPLES = {
    "M-x12": "twelve Mamba-2 layers, each followed by an MLP",
    "*-x12": "a Transformer of twelve blocks",
    "M-x6.*-": "attention in the last block only",
    "m-S-x6": "Samba: Mamba-1, MLP, sliding-window attention, MLP",
    "m-S-x6.*-": "the same with a block of full attention at the end",
    "mS-x8": "Samba's variant with one MLP for two mixers",
    "M-M-M--*M-M-M-M-*M--M-M-": "a pattern given whole",
    "G-G-G-*-x6": "three layers of Gated DeltaNet to one of attention",
    "Mx6.*.Mx6.*.Mx6": "Mamba-2 with two attention layers, no MLP",
    "Sx4.*": "four windowed layers and a full one",
    "-M*": "a stack may open with any layer",
}

_HINTS = {
    "P": "an MLP is written '-'",
    "F": "full attention is written '*'",
    "A": "full attention is written '*'",
    "X": "repetition is written with a small x, as in M-x6",
    "×": "repetition is written with an x, as in M-x6",
    "|": "units are separated by '.'",
    "/": "units are separated by '.'",
    ",": "units are separated by '.'",
    " ": "units are separated by '.', without spaces",
    **dict.fromkeys("()[]{}", "brackets are not needed: xN repeats all letters back to the '.'"),
}


class PatternError(UserError):
    """A wrong character. The message is a sentence, then the pattern, then a caret under it."""

    def __init__(self, field: str, text: str, position: int, problem: str) -> None:
        super().__init__(f"{field}: {problem}\n  {text}\n  {' ' * position}^")
        self.position = position


def parse(text: str, *, field: str = "pattern") -> tuple[str, ...]:
    """The letters of a pattern, one a layer. `PatternError` points at the first wrong character."""
    letters: list[str] = []
    unit: list[str] = []  # letters since the last '.'
    repeated = False  # whether the unit has its xN already
    i = 0
    while i < len(text):
        char = text[i]

        def wrong(problem: str, at: int = i) -> PatternError:
            return PatternError(field, text, at, f"{problem} at position {at}")

        if char in KINDS:
            if repeated:
                raise wrong(f"a '.' is missing before '{char}', after a repetition,")
            unit.append(char)
        elif char == ".":
            if not unit:
                raise wrong("there is no layer before the '.'")
            letters += unit
            unit, repeated = [], False
        elif char == "x":
            if not unit:
                raise wrong("there is no layer for 'x' to repeat")
            if repeated:
                raise wrong("a unit is repeated twice by the 'x'")
            digits = "".join(itertools.takewhile("0123456789".__contains__, text[i + 1 :]))
            if not digits or int(digits[:5]) == 0:
                raise wrong("'x' needs a count of at least 1", i + 1 if digits else i)
            if len(digits) > 4 or len(letters) + len(unit) * int(digits) > MAX_LAYERS:
                raise wrong(f"'x{digits}' makes more than {MAX_LAYERS} layers", i + 1)
            unit *= int(digits)
            repeated = True
            i += len(digits)
        elif char in RESERVED:
            raise wrong(f"'{char}' is reserved for {RESERVED[char]}, which does not exist yet,")
        elif char in _HINTS:
            raise wrong(f"'{char}' is no layer ({_HINTS[char]})")
        else:
            known = " ".join(KINDS)
            raise wrong(f"'{char}' is no layer (layers are {known})")
        i += 1
    if not unit:
        if text:
            problem = f"there is no layer after the '.' at position {len(text) - 1}"
            raise PatternError(field, text, len(text) - 1, problem)
        raise PatternError(field, text, 0, "the pattern is empty; it needs at least one layer")
    letters += unit
    if len(letters) > MAX_LAYERS:
        raise UserError(f"{field}: {len(letters)} layers are more than {MAX_LAYERS}")
    return tuple(letters)


def compress(letters: Sequence[str]) -> str:
    """The shortest pattern of these letters, by dynamic programming over their suffixes."""
    n = len(letters)
    word = "".join(letters)
    # best[i]: (pattern of word[i:], whether it starts with letters that are not repeated). Those
    # join the letters before them without a '.'.
    plain: list[str] = [""] * (n + 1)  # best that starts with unrepeated letters ("" at the end)
    repeated: list[str | None] = [None] * (n + 1)  # best that starts with a repeated unit
    for i in range(n - 1, -1, -1):
        options = [word[i] + plain[i + 1]]
        after = repeated[i + 1]
        if after is not None:
            options.append(f"{word[i]}.{after}")
        plain[i] = min(options, key=len)
        best: str | None = None
        for size in range(1, min(32, (n - i) // 2) + 1):
            unit = word[i : i + size]
            count = 1
            while word.startswith(unit, i + count * size):
                count += 1
            if count == 1:
                continue
            for used in {count, max(2, count - 1)}:  # the last one may start the next unit
                end = i + used * size
                rest = _shorter(plain[end], repeated[end]) if end < n else None
                text = f"{unit}x{used}" if rest is None else f"{unit}x{used}.{rest}"
                best = text if best is None or len(text) < len(best) else best
        repeated[i] = best
    return _shorter(plain[0], repeated[0]) if n else ""


def _shorter(a: str, b: str | None) -> str:
    return a if b is None or len(a) <= len(b) else b


# --- making patterns --------------------------------------------------------------------------


def place(
    n_layers: int,
    n_attention: int,
    where: Placement,
    *,
    mlp_share: float = 0.0,
    mixer: str = "M",
    attention: str = "*",
    mlp: str = "-",
) -> tuple[str, ...]:
    """`n_attention` layers at one place of the stack, around the same sequence of other layers.

    published: the allocator of Waleffe et al. 2024 (arXiv 2406.07887; its official code): equal
    sections of other layers between, before and after them, then round(L m) MLP layers spread over
    the others by the same walk; counts that exceed the layers give as many as there is room for.
    even: one in the middle of each of `n_attention` equal parts of the stack.
    front, middle, back: all together.
    """
    if not 0 <= n_attention <= n_layers:
        raise UserError(f"{n_attention} attention layers do not fit into {n_layers} layers")
    free = n_layers - n_attention
    if where == "published":
        at = _walk(n_layers, free / (n_attention + 1)) if n_attention else []
    elif where == "even":
        at = [(2 * i + 1) * n_layers // (2 * n_attention) for i in range(n_attention)]
    else:
        first = {"front": 0, "middle": free // 2, "back": free}[where]
        at = list(range(first, first + n_attention))
    return _fill(n_layers, at, mlp_share, mixer, attention, mlp)


def at_positions(
    n_layers: int,
    positions: Sequence[int],
    *,
    mlp_share: float = 0.0,
    mixer: str = "M",
    attention: str = "*",
    mlp: str = "-",
) -> tuple[str, ...]:
    """Attention at the given 0-based indices; the MLP layers spread over the rest."""
    wrong = next((p for p in positions if not 0 <= p < n_layers), None)
    if wrong is not None:
        raise UserError(
            f"arch.positions: {wrong} is no layer; with arch.n_layers {n_layers} they go from 0 to "
            f"{n_layers - 1}"
        )
    if len(set(positions)) != len(positions):
        raise UserError(f"arch.positions {list(positions)} names a layer twice")
    return _fill(n_layers, positions, mlp_share, mixer, attention, mlp)


def repeat(unit: str, n_layers: int) -> tuple[str, ...]:
    """A unit repeated until there are `n_layers`, which it must divide."""
    letters = parse(unit, field="arch.unit")
    times, rest = divmod(n_layers, len(letters))
    if rest:
        near = [n for n in (times * len(letters), (times + 1) * len(letters)) if n]
        raise UserError(
            f"arch.n_layers {n_layers} is not a multiple of the {len(letters)} layers of arch.unit "
            f"'{unit}'; {' or '.join(map(str, near))} would be"
        )
    return letters * times


def make(arch: ArchConfig) -> str:
    """The whole pattern, expanded, that an `arch` section asks for.

    `pattern` is taken as it is; else `unit` is repeated; else attention goes to `positions`, or by
    `attention_share` and `placement`.
    """
    if arch.pattern is not None:
        for field in ("unit", "positions"):
            if getattr(arch, field) is not None:
                raise UserError(f"arch.pattern and arch.{field} are both given; one must be null")
        return "".join(parse(arch.pattern, field="arch.pattern"))
    if arch.unit is not None:
        if arch.positions is not None:
            raise UserError("arch.unit and arch.positions are both given; one must be null")
        return "".join(repeat(arch.unit, arch.n_layers))
    letters = {"mixer": "mixer_letter", "attention": "attention_letter", "mlp": "mlp_letter"}
    chosen = {role: getattr(arch, field) for role, field in letters.items()}
    for role, field in letters.items():
        if len(parse(chosen[role], field=f"arch.{field}")) != 1:
            raise UserError(f"arch.{field} is {chosen[role]!r}; it must be one letter")
    if len(set(chosen.values())) < 3:
        raise UserError(
            "arch.mixer_letter, arch.attention_letter and arch.mlp_letter must differ, they are "
            + ", ".join(f"'{letter}'" for letter in chosen.values())
        )
    n_layers, m = arch.n_layers, arch.mlp_share
    if arch.positions is not None:
        _check_shares(len(arch.positions) / n_layers, m, "the share of arch.positions")
        return "".join(at_positions(n_layers, arch.positions, mlp_share=m, **chosen))
    _check_shares(arch.attention_share, m)
    n_attention = round(n_layers * arch.attention_share)
    return "".join(place(n_layers, n_attention, arch.placement, mlp_share=m, **chosen))


def shares(letters: Sequence[str]) -> dict[str, float]:
    """Attention's share of all layers and of the layers that mix tokens, and the MLP's of all."""
    attends = sum(KINDS[letter].attends for letter in letters)
    mixes = sum(KINDS[letter].mixes for letter in letters)
    return {
        "attention_of_layers": attends / len(letters),
        "attention_of_mixers": attends / mixes if mixes else 0.0,
        "mlp_of_layers": sum(KINDS[letter].name == "mlp" for letter in letters) / len(letters),
    }


def _check_shares(
    attention_share: float, mlp_share: float, attention_name: str = "arch.attention_share"
) -> None:
    total = attention_share + mlp_share
    if total > 1 and not math.isclose(total, 1):
        raise UserError(
            f"{attention_name} {attention_share:g} and arch.mlp_share {mlp_share:g} add up to "
            f"{total:g}; together they must not exceed 1"
        )


def _walk(length: int, section: float) -> list[int]:
    """Indices where a running remainder falls under one half.

    It starts at the section length, grows by it at each such index and drops by one at each other.
    In floating point, in the official code's order of operations: ties are decided by it.
    """
    at = []
    remainder = section
    for i in range(length):
        if remainder < 0.5:
            at.append(i)
            remainder += section
        else:
            remainder -= 1
    return at


def _fill(
    n_layers: int, at: Sequence[int], mlp_share: float, mixer: str, attention: str, mlp: str
) -> tuple[str, ...]:
    """Attention at the given indices; MLP layers spread over the others by the published walk."""
    others = [mixer] * (n_layers - len(at))
    n_mlp = round(n_layers * mlp_share)
    if n_mlp:
        for i in _walk(len(others), (len(others) - n_mlp) / n_mlp):
            others[i] = mlp
    rest = iter(others)
    taken = set(at)
    return tuple(attention if i in taken else next(rest) for i in range(n_layers))
