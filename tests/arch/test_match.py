"""Matched architectures: as near as widths allow, by figures that the real modules have."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ablate.arch.certificate import QUANTITIES, Certificate
from ablate.arch.match import check, figures, solve
from ablate.arch.spec import Architecture
from ablate.config import ArchConfig, MatchConfig
from ablate.errors import UserError
from ablate.model import LanguageModel
from ablate.train import checkpoint

CONF = Path(__file__).parents[2] / "conf" / "match"
SMALL = {"mamba2": {"head_dim": 32, "d_state": 32}, "attention": {"head_dim": 16, "n_heads": 6}}
SEQ = 128


def arch(**fields: Any) -> ArchConfig:
    return ArchConfig(**{"d_model": 64, "mlp_share": 0.25, **SMALL, **fields})


def made(config: ArchConfig) -> Architecture:
    return Architecture.from_config(config, 128)


def matched(
    config: ArchConfig, target: float, **fields: Any
) -> tuple[Architecture, Certificate, ArchConfig]:
    match = MatchConfig(**{"by": "attention_inner", "tolerance": 0.02, **fields})
    changes, certificate = solve(config, made(config), match, seq_len=SEQ, target=target)
    new = ArchConfig(**{**config.model_dump(), **changes})
    return made(new), certificate, new


def real_params(architecture: Architecture) -> int:
    with torch.device("meta"):
        model = LanguageModel(architecture, seed=None)
    return sum(p.numel() for p in model.parameters()) - model.embedding.numel()


shares = st.floats(0.0, 0.6)
depths = st.integers(2, 32)


@given(
    share=shares,
    depth=depths,
    mlp=st.floats(0.0, 0.4),
    quantity=st.sampled_from(["non_embedding_params", "train_flops", "decode_bytes"]),
)
@settings(max_examples=40, deadline=None)
def test_the_nearest_choice_is_found_and_is_what_the_modules_have(
    share: float, depth: int, mlp: float, quantity: str
) -> None:
    config = arch(n_layers=depth, attention_share=share, mlp_share=mlp)
    target = figures(made(arch(n_layers=depth, attention_share=0.0, mlp_share=mlp)), SEQ)[quantity]
    after, certificate, new = matched(config, target, quantity=quantity, force=True)
    assert figures(after, SEQ) == certificate.after
    assert figures(made(config), SEQ) == certificate.before
    assert real_params(after) == certificate.after["non_embedding_params"]
    heads = [o.n_heads for o in after.layer_options if hasattr(o, "n_kv_heads")]
    assert not heads or max(heads) - min(heads) <= 1
    # no other spread of whole heads comes nearer
    off = abs(certificate.after[quantity] - target)
    for step in (-1, 1):
        for i, (letter, options) in enumerate(zip(after.letters, after.layer_options, strict=True)):
            if letter == "*" and options.n_heads + step >= 1:
                n = options.n_heads + step
                moved = {**new.overrides, str(i): {"n_heads": n, "n_kv_heads": n}}
                other = made(ArchConfig(**{**new.model_dump(), "overrides": moved}))
                assert abs(figures(other, SEQ)[quantity] - target) >= off * (1 - 1e-9)
                break
    if heads:  # a head is 4 x 16 x 64 parameters: half of one is the most that can be left
        step_size = abs(figures(other, SEQ)[quantity] - certificate.after[quantity])
        within_reach = certificate.after[quantity] <= target or min(heads) > 1
        assert not within_reach or off <= 0.51 * step_size


@given(depth=st.integers(4, 24), share=st.floats(0.1, 0.5))
@settings(max_examples=15, deadline=None)
def test_mlps_move_in_multiples_of_64_and_states_of_16(depth: int, share: float) -> None:
    config = arch(n_layers=depth, attention_share=0.0, mlp_share=share)
    mlps = made(config).pattern.count("-")
    for by, name, step in (("mlp_width", "d_hidden", 64), ("state", "d_state", 16)):
        quantity = "non_embedding_params" if by == "mlp_width" else "state_bytes"
        target = 1.4 * figures(made(config), SEQ)[quantity]
        after, certificate, _ = matched(config, target, by=by, quantity=quantity, force=True)
        values = [getattr(o, name) for o in after.layer_options if hasattr(o, name)]
        assert not values or max(values) - min(values) <= step
        assert all(v % step == 0 for v in values)
        assert {c["field"] for c in certificate.changes} == ({name} if values else set())
        assert not values or not mlps or certificate.needed


def test_one_step_is_spread_evenly_over_the_layers() -> None:
    config = arch(n_layers=12, attention_share=0.5, mlp_share=0.0)
    one = 4 * 16 * 64  # parameters of a head
    target = made(config).non_embedding_params() + 2 * one
    after, certificate, _ = matched(config, target)
    wide = [c["layer"] for c in certificate.changes if c["field"] == "n_heads"]
    attention = [i for i, letter in enumerate(after.letters) if letter == "*"]
    assert [attention.index(i) for i in wide] == [1, 4]
    assert certificate.error == 0
    assert certificate.widths() == (
        f"n_heads and n_kv_heads of attention 6 to 7 in layers {wide[0]}, {wide[1]}"
    )
    # exactly on target as configured: nothing moves
    _, unchanged, new = matched(config, made(config).non_embedding_params())
    assert not unchanged.changes
    assert new == config


def test_grouped_heads_move_in_whole_groups() -> None:
    attention = {"head_dim": 16, "n_heads": 6, "n_kv_heads": 3}
    config = arch(n_layers=8, attention_share=0.25, attention=attention)
    target = 1.1 * made(config).non_embedding_params()
    after, _, _ = matched(config, target, force=True)
    options = [o for o in after.layer_options if hasattr(o, "n_kv_heads")]
    assert all(o.n_kv_heads == 3 and o.n_heads % 3 == 0 for o in options)
    assert max(o.n_heads for o in options) > 6


def test_layers_move_in_whole_units() -> None:
    config = arch(n_layers=8, unit="M-", overrides={})
    target = 1.5 * made(config).non_embedding_params()
    after, certificate, new = matched(config, target, by="layers", tolerance=0.05)
    assert after.n_layers == new.n_layers == 12
    assert certificate.changes == [
        {"layer": None, "kind": "", "field": "n_layers", "before": 8, "after": 12}
    ]
    with pytest.raises(UserError, match=r"match\.by is 'layers', but arch\.pattern is given"):
        matched(arch(pattern="M-M-"), target, by="layers")


def test_beyond_the_tolerance_the_nearest_is_shown_and_refused() -> None:
    config = arch(n_layers=4, attention_share=0.25, mlp_share=0.0)
    target = 1.005 * made(config).non_embedding_params()
    with pytest.raises(UserError) as caught:
        matched(config, target, tolerance=0.001)
    for words in ("nearest choice", "beyond match.tolerance 0.001", "match.force=true", "-0.50%"):
        assert words in str(caught.value)
    _, certificate, _ = matched(config, target, tolerance=0.001, force=True)
    assert not certificate.reached
    assert certificate.forced
    with pytest.raises(UserError, match=r"no layer that match\.by 'mlp_width' moves"):
        matched(config, 2 * target, by="mlp_width")


def test_a_certificate_of_another_architecture_is_refused() -> None:
    config = arch(n_layers=8, attention_share=0.25)
    target = figures(made(arch(n_layers=8, attention_share=0.0)), SEQ)["non_embedding_params"]
    after, certificate, _ = matched(config, target)
    match = MatchConfig(by="attention_inner", certificate=certificate.plain())
    check(match, after, SEQ)
    with pytest.raises(UserError, match=r"match\.certificate speaks of another architecture"):
        check(match, made(config), SEQ)


# --- single layers of an architecture ------------------------------------------------------------


def test_layers_of_a_kind_can_differ() -> None:
    a = made(arch(pattern="M*-*", overrides={"3": {"n_heads": 2}, "2": {"d_hidden": 64}}))
    assert [getattr(o, "n_heads", None) for o in a.layer_options][1:] == [6, None, 2]
    assert a.overrides == {3: {"n_heads": 2, "n_kv_heads": 2}}  # the only MLP is its kind's first
    assert a.options["mlp"].d_hidden == 64
    assert real_params(a) == a.non_embedding_params()
    same = made(arch(pattern="M*-*", mlp={"d_hidden": 64}, overrides={3: {"n_heads": 2}}))
    assert a == same
    assert a.canonical() == same.canonical()
    alike = arch(pattern="M*-*", overrides={1: {"n_heads": 2}, 3: {"n_heads": 2}})
    written = arch(pattern="M*-*", attention={"head_dim": 16, "n_heads": 2})
    assert made(alike).canonical() == made(written).canonical()
    assert "overrides" not in made(written).canonical()


def test_a_model_of_differing_layers_trains_decodes_and_is_restored(tmp_path: Path) -> None:
    a = made(arch(pattern="M*-*", overrides={"3": {"n_heads": 2}}))
    model, other = LanguageModel(a, seed=0), LanguageModel(a, seed=1)
    tokens = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    model.loss(tokens, tokens).backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        state = model.init_state(2, 12)
        model.prefill(tokens[:, :11], state)
        torch.testing.assert_close(model.step(tokens[:, 11], state), model.logits(tokens)[:, -1])
    caches = [{k: v.shape for k, v in layer.items()} for layer in state.layers]
    assert caches[1]["k"] != caches[3]["k"]
    checkpoint.save(tmp_path, 1, model.state_dict(), {}, {})
    other.load_state_dict(checkpoint.load(tmp_path, 1).model)
    torch.testing.assert_close(other.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"9": {"n_heads": 2}}, "arch.overrides: 9 is no layer; with 4 layers they go from 0 to 3"),
        ({"1": {"n_head": 2}}, "unknown field 'arch.overrides.1.n_head' (did you mean 'n_heads'"),
        ({"1": {"d_model": 2}}, "arch.overrides.1.d_model is 2"),
        ({"2": {"d_hidden": 0}}, "field 'arch.overrides.2.d_hidden' is 0"),
    ],
)
def test_mistakes_in_a_single_layer(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        made(arch(pattern="M*-*", overrides=overrides))
    assert words in str(caught.value)


def test_the_group_names_every_field_with_its_default() -> None:
    text = (CONF / "none.yaml").read_text()
    assert yaml.safe_load(text) == MatchConfig().model_dump()
    assert all("#" in line for line in text.splitlines())
    for path in CONF.glob("*.yaml"):
        if path.stem != "none":
            assert yaml.safe_load(path.read_text())["by"] == path.stem
    assert set(QUANTITIES) == set(MatchConfig.model_fields["quantity"].annotation.__args__)  # type: ignore[union-attr]
    assert {f.name for f in dataclasses.fields(Certificate)} >= {"before", "after", "changes"}


def test_layers_of_a_kind_that_differ_are_compiled_each() -> None:
    """The limit on variants counts the widths; `eager` compiles nothing and keeps the guards."""
    widths = {str(2 * i + 1): {"d_state": i + 1} for i in range(10)}
    model = LanguageModel(made(arch(pattern="Mm" * 10, overrides=widths)))
    tokens = torch.randint(0, 128, (2, 8))
    plain = model.loss(tokens, tokens).item()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        model.compile_layers(backend="eager")
        loss = model.loss(tokens, tokens)
        loss.backward()
    assert loss.item() == pytest.approx(plain)
