"""The pattern language, the allocator and the other ways to make a pattern."""

from __future__ import annotations

import itertools
import re
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from ablate.arch.pattern import (
    EXAMPLES,
    PatternError,
    at_positions,
    compress,
    make,
    parse,
    place,
    repeat,
    shares,
)
from ablate.config import ArchConfig
from ablate.errors import UserError

ROOT = Path(__file__).parents[2]

# Waleffe et al. 2024, official code: (layers, attention share, MLP share) -> pattern.
TABLE = {
    (56, 0.08, 0.5): "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-",
    (48, 0.08, 0.5): "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-",
    (24, 0.08, 0): "MMMMMMM*MMMMMMMM*MMMMMMM",
    (24, 0.08, 0.05): "MMMMMMM*MMMMMMMM*MMMMMM-",
    (24, 0.08, 0.3): "MM-MM-M*M-MMM-MM*-MM-MM-",
    (24, 0.08, 0.5): "M-M-M--*M-M-M-M-*M--M-M-",
    (24, 0.04, 0.5): "M-M-M-M-M--M*-M-M-M-M-M-",
    (24, 0.25, 0.5): "M--*M-*-M-*-M*--M*--*M--",
    (48, 0.5, 0.2): "M*-*M*M*-*M*-*M*M*-*M*-**M*-*M*M*-*M*-*M*M*-*M*-",
}

GRID = [
    (n, i / 20, j / 20) for n in range(1, 65) for i in range(21) for j in range(21) if i + j <= 20
]


def allocate(
    n: int, a: float, m: float, mixer: str = "M", attention: str = "*", mlp: str = "-"
) -> tuple[str, ...]:
    """The published allocator: round(n a) attention layers in its places."""
    letters = {"mixer": mixer, "attention": attention, "mlp": mlp}
    return place(n, round(n * a), "published", mlp_share=m, **letters)


@pytest.mark.parametrize(("case", "pattern"), TABLE.items())
def test_allocator_table(case, pattern):
    assert "".join(allocate(*case)) == pattern


def sections(total: int, count: int, section: float) -> list[int]:
    """The rule again, section by section: how many others precede each of `count` placed layers."""
    taken, lengths, remainder = 0, [], section
    for _ in range(count):
        run = 0
        while remainder >= 0.5:
            run += 1
            remainder -= 1
        lengths.append(run)
        taken += run
        remainder += section
    return [*lengths, total - count - taken]


def rule(n: int, a: float, m: float) -> str:
    attention = round(n * a)
    others = n - attention
    mlps = min(round(n * m), others)
    runs = sections(others, mlps, (others - mlps) / mlps) if mlps else [others]
    rest = "-".join("M" * run for run in runs)
    result, start = "", 0
    for run in sections(n, attention, others / (attention + 1)):
        result += rest[start : start + run] + "*"
        start += run
    return result[:-1]


def test_allocator_agrees_with_an_independent_statement():
    for case in GRID:
        assert "".join(allocate(*case)) == rule(*case), case


def test_allocator_agrees_with_exact_arithmetic_except_at_ties():
    """The k-th attention layer stands after ceil(k s - 1/2) others, s the exact section length."""
    ties = 0
    for n, a, m in GRID:
        letters = allocate(n, a, m)
        count = round(n * a)
        assert letters.count("*") == count
        assert letters.count("-") == min(round(n * m), n - count)
        section = Fraction(n - count, count + 1)
        before = [i - k for k, i in enumerate(i for i, c in enumerate(letters) if c == "*")]
        for k, others in enumerate(before, 1):
            bound = k * section - Fraction(1, 2)
            if bound.denominator == 1:
                ties += 1
                assert others in (bound, bound + 1)
            else:
                assert others == -(-bound.numerator // bound.denominator)
    assert ties


def test_allocator_takes_other_letters():
    assert "".join(allocate(24, 0.25, 0.5, "m", "S", "M")) == TABLE[24, 0.25, 0.5].translate(
        str.maketrans("M*-", "mSM")
    )


def test_share_errors_name_the_fields():
    with pytest.raises(UserError) as error:
        make(ArchConfig(n_layers=24, attention_share=0.6, mlp_share=0.5))
    for word in ("arch.attention_share 0.6", "arch.mlp_share 0.5", "1.1"):
        assert word in str(error.value)


def test_shares_that_only_round_above_one_are_taken():
    assert 0.35 + 0.55 + 0.1 > 1 - 1e-12  # and such sums may exceed it
    assert len(allocate(20, 0.7, 0.3)) == 20
    assert len(allocate(10, 0.1 + 0.2, 0.7)) == 10


# --- the language -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("M", "M"),
        ("m-S-x6.*-", "m-S-" * 6 + "*-"),
        ("mS-x8", "mS-" * 8),
        ("M-.*-.M-", "M-*-M-"),
        ("Mx3.*x2.-", "MMM**-"),
        ("M-x1", "M-"),
        ("M-x01", "M-"),
        ("*x1024", "*" * 1024),
    ],
)
def test_parse(text, letters):
    assert "".join(parse(text)) == letters


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("M-P-", 2, "an MLP is written '-'"),
        ("MF", 1, "full attention is written '*'"),
        ("M-E", 2, "mixture of experts"),
        ("Z", 0, "shared attention block"),
        ("M-q", 2, "layers are M m G L R * S -"),
        ("M-é", 2, "is no layer"),
        ("M-x", 2, "needs a count"),
        ("M-x0.*", 3, "needs a count"),
        ("M-x٣", 2, "needs a count"),
        ("x3", 0, "no layer for 'x' to repeat"),
        ("M.x3", 2, "no layer for 'x' to repeat"),
        ("M-x3x2", 4, "repeated twice"),
        ("M-x3*-", 4, "'.' is missing before '*'"),
        ("M-x99999999999", 3, "more than 1024 layers"),
        ("Mx1000.Mx25", 9, "more than 1024 layers"),
        (".M", 0, "no layer before the '.'"),
        ("M..M", 2, "no layer before the '.'"),
        ("M-.", 2, "no layer after the '.'"),
        ("(M-)x3", 0, "brackets are not needed"),
        ("M- M-", 2, "without spaces"),
        ("M|M", 1, "separated by '.'"),
        ("M7", 1, "is no layer"),
        ("", 0, "empty"),
    ],
)
def test_a_wrong_character_is_pointed_at(text, position, words):
    with pytest.raises(PatternError) as error:
        parse(text, field="arch.pattern")
    sentence, shown, caret = str(error.value).split("\n")
    assert error.value.position == position
    assert sentence.startswith("arch.pattern: ")
    assert words in sentence
    assert not text or f"position {position}" in sentence
    assert shown == f"  {text}"
    assert caret.index("^") - 2 == position


@given(st.text("Mm*S-", min_size=1, max_size=40), st.integers(1, 5))
@settings(deadline=None)
def test_compress_is_parsed_back_and_never_longer(word, times):
    letters = tuple(word * times)
    assert parse(compress(letters)) == letters
    assert len(compress(letters)) <= len(letters)


@pytest.mark.parametrize("text", ["m-S-x6.*-", "mx60", "M-x3.*-.M-x4", "M-*-"])
def test_compress_finds_the_short_form(text):
    assert compress(parse(text)) == text


def documented_patterns() -> set[str]:
    found = set(EXAMPLES)
    for path in (ROOT / "conf" / "arch").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        found |= {config[key] for key in ("pattern", "unit") if config.get(key)}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        if path.exists():
            found |= set(re.findall(r"arch\.(?:pattern|unit)=([^\s`'\"]+)", path.read_text()))
    return found


def test_documented_patterns_are_right_and_need_no_quotes_but_in_yaml(tmp_path):
    patterns = sorted(documented_patterns())
    assert len(patterns) > 10
    words = " ".join(f"arch.pattern={p}" for p in patterns)
    script = tmp_path / "pasted.sh"
    script.write_text(f"printf '%s\\n' {words}\n")
    (tmp_path / "M-file").touch()  # something for a glob to match
    shell = subprocess.run(["bash", script], cwd=tmp_path, capture_output=True, text=True)
    pasted = shell.stdout.splitlines()
    assert pasted == [f"arch.pattern={p}" for p in patterns]
    overrides = OverridesParser.create().parse_overrides(pasted)
    assert [o.value() for o in overrides] == patterns
    listed = OverridesParser.create().parse_override(f"+x=[{','.join(patterns)}]")
    assert list(listed.value()) == patterns
    for p in patterns:
        parse(p)
        assert yaml.safe_load(f"pattern: '{p}'") == {"pattern": p}
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load("pattern: *-x12")


# --- making patterns --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "pattern"),
    [
        ("published", "M-M*-M-M*-M-"),
        ("even", "M-M*-M-M-*M-"),
        ("front", "**M-M-M-M-M-"),
        ("middle", "M-M-M**-M-M-"),
        ("back", "M-M-M-M-M-**"),
    ],
)
def test_placements_move_attention_through_the_same_others(where, pattern):
    letters = place(12, 2, where, mlp_share=0.42)
    assert "".join(letters) == pattern
    assert "".join(c for c in letters if c != "*") == "M-M-M-M-M-"


@pytest.mark.parametrize("where", ["published", "even", "front", "middle", "back"])
def test_placements_for_all_counts(where):
    for n, count in itertools.product(range(1, 33), range(33)):
        if count > n:
            with pytest.raises(UserError, match="do not fit"):
                place(n, count, where)
            continue
        letters = place(n, count, where)
        assert (len(letters), letters.count("*")) == (n, count)


def test_positions():
    letters = at_positions(32, [6, 12, 18, 24])
    assert [i for i, c in enumerate(letters) if c == "*"] == [6, 12, 18, 24]
    with pytest.raises(UserError, match=r"arch\.positions: 32 is no layer.*0 to 31"):
        at_positions(32, [6, 32])
    with pytest.raises(UserError, match=r"arch\.positions .* twice"):
        at_positions(32, [6, 6])


def test_units():
    assert "".join(repeat("m-S-", 8)) == "m-S-m-S-"
    assert "".join(repeat("M-x3.*-", 16)) == "M-M-M-*-" * 2
    with pytest.raises(UserError, match=r"arch\.n_layers 24 .* 5 layers .* 20 or 25 would be"):
        repeat("M-M-*", 24)
    with pytest.raises(UserError, match="8 would be"):
        repeat("M-x4", 3)
    with pytest.raises(PatternError, match=r"arch\.unit: 'P'"):
        repeat("MP", 24)


def test_shares():
    assert shares("M-*-") == {
        "attention_of_layers": 0.25,
        "attention_of_mixers": 0.5,
        "mlp_of_layers": 0.5,
    }
    assert shares("---")["attention_of_mixers"] == 0
    assert shares("mS-")["attention_of_layers"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({}, TABLE[24, 0.08, 0.5]),
        ({"pattern": "mS-x2", "n_layers": 99}, "mS-mS-"),
        ({"unit": "m-S-", "n_layers": 8}, "m-S-m-S-"),
        ({"positions": [0, 5], "n_layers": 6, "mlp_share": 0.0}, "*MMMM*"),
        ({"placement": "back", "n_layers": 4, "attention_share": 0.25, "mlp_share": 0.0}, "MMM*"),
        (
            {"mixer_letter": "m", "attention_letter": "S", "n_layers": 4, "attention_share": 0.25},
            "m-S-",
        ),
    ],
)
def test_make(fields, pattern):
    assert make(ArchConfig(**fields)) == pattern


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pattern": "M-", "unit": "M-"}, "arch.pattern and arch.unit are both given"),
        ({"pattern": "M-", "positions": [1]}, "arch.pattern and arch.positions are both given"),
        ({"unit": "M-", "positions": [1]}, "arch.unit and arch.positions are both given"),
        ({"attention_share": 0.6}, "arch.attention_share 0.6 and arch.mlp_share 0.5"),
        ({"positions": list(range(13))}, "the share of arch.positions"),
        ({"mixer_letter": "*"}, "must differ"),
        ({"mixer_letter": "MM"}, "arch.mixer_letter is 'MM'; it must be one letter"),
        ({"mlp_letter": "P"}, "arch.mlp_letter: 'P' is no layer (an MLP is written '-')"),
    ],
)
def test_make_errors(fields, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make(ArchConfig(**fields))
