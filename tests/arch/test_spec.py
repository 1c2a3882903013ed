"""Architectures: resolution, canonical form, errors, and published figures."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from ablate.arch.spec import Architecture
from ablate.compose import compose
from ablate.config import ArchConfig
from ablate.errors import UserError
from ablate.layers import KINDS

CONF = Path(__file__).parents[2] / "conf"
NAMED = sorted(path.stem for path in (CONF / "arch").glob("*.yaml") if path.stem != "hybrid")
SCALES = ("cpu", "14m", "840m")


@functools.cache
def section(scale: str, name: str = "hybrid") -> dict:
    """The `arch` section that Hydra composes."""
    return compose([f"arch={name}", f"scale={scale}"]).tree["arch"]


def named(name: str, scale: str = "cpu") -> tuple[ArchConfig, Architecture]:
    """The same for a named architecture, merged here because composing takes long."""
    own = yaml.safe_load((CONF / "arch" / f"{name}.yaml").read_text())
    assert own.pop("defaults") == ["hybrid", "_self_"]
    merged = OmegaConf.to_container(OmegaConf.merge(section(scale), own))
    arch = ArchConfig(**merged)
    assert arch.vocab_size is not None
    return arch, Architecture.from_config(arch, arch.vocab_size)


def test_composing_is_merging():
    config, _ = named("lite_oute_2_250m", "14m")
    assert ArchConfig(**section("14m", "lite_oute_2_250m")) == config


# name -> (parameters in millions as published or computed from published configs, decimals given)
PUBLISHED = {
    "samba_421m": (421.79, 2),
    "llama2_438m": (438.08, 2),
    "llama2_swa_438m": (438.08, 2),
    "sliding_gla_438m": (438.31, 2),
    "sliding_retnet_446m": (445.56, 2),
    "mamba_432m": (432.80, 2),
    "mamba_swa_mlp_395m": (395.00, 2),
    "samba_1.3b": (1330, 0),
    "mamba2_hybrid_8b": (8655, 0),
    "mamba2_8b": (8240, -1),
    "transformer_8b": (8540, -1),
    "lite_oute_2_250m": (252, 0),
    "mamba_7b": (6950, -1),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_architectures_have_their_published_size_at_any_scale(name):
    config, arch = named(name)
    assert config.name == name
    if name in PUBLISHED:
        millions, digits = PUBLISHED[name]
        assert round(arch.num_params() / 1e6, digits) == millions
        assert config.published == {"params": pytest.approx(millions * 1e6)}
    else:
        assert config.published == {}
    for scale in SCALES:  # a scale sets sizes of layers too; a named architecture keeps its own
        assert named(name, scale)[1].canonical() == arch.canonical()


def test_no_published_size_is_missing():
    assert set(PUBLISHED) < set(NAMED)


@pytest.mark.parametrize(
    ("name", "changes", "millions"),
    [
        ("mamba_swa_mlp_395m", {"pattern": "m-x11.*-", "attention": {"head_dim": 128}}, 449.18),
        ("samba_1.3b", {"pattern": "*-x20", "attention": {"head_dim": 128}}, 1348),
        ("samba_1.3b", {"pattern": "mS-x12"}, 1239),
        ("mamba_432m", {"pattern": "mx48", "d_model": 2048}, 1335),
    ],
)
def test_other_published_sizes(name, changes, millions):
    config, _ = named(name)
    arch = Architecture.from_config(config.model_copy(update=changes), 32000)
    assert arch.num_params() / 1e6 == pytest.approx(millions, abs=0.5 if millions > 1000 else 0.005)


def test_published_costs_of_the_8b_models():
    """KV bytes per token; forward GFLOP per token, computed there with another tile of the scan."""
    _, transformer = named("transformer_8b")
    _, hybrid = named("mamba2_hybrid_8b")
    assert hybrid.pattern.count("M") == 24
    assert hybrid.pattern.count("*") == 4
    assert transformer.cost(1000).state_bytes == 1000 * 524_288
    assert hybrid.cost(1001).state_bytes - hybrid.cost(1000).state_bytes == 16_384
    for length, full, mixed in ((4, 16.1, 15.5), (32, 23.6, 16.5), (128, 49.3, 19.7)):
        assert transformer.cost(length * 1024).forward_flops / 1e9 == pytest.approx(full, abs=0.05)
        assert hybrid.cost(length * 1024).forward_flops / 1e9 == pytest.approx(mixed, abs=0.1)


def test_lite_oute_attention_layers():
    _, arch = named("lite_oute_2_250m")
    assert [i for i, letter in enumerate(arch.letters) if letter == "*"] == [6, 12, 18, 24]
    assert arch.options["attention"].rope_dim == 64
    assert arch.shares()["attention_of_layers"] == 0.125


def test_hybrid_yaml_has_every_field_with_a_comment_but_those_of_the_scale():
    text = (CONF / "arch" / "hybrid.yaml").read_text()
    config = yaml.safe_load(text)
    assert sorted(config) == sorted(set(ArchConfig.model_fields) - {"n_layers", "d_model"})
    assert ArchConfig(**config) == ArchConfig()
    assert all(" # " in line for line in text.splitlines() if not line.startswith("#"))


# --- resolution -------------------------------------------------------------------------------

OPTIONS = {"swa": {"window": 16, "head_dim": 16}, "mlp": {"d_hidden": 96}}


def test_options_of_used_kinds_only():
    arch = Architecture("mS-x2", d_model=64, vocab_size=128, options=OPTIONS)
    assert arch.pattern == "mS-mS-"
    assert list(arch.options) == ["mamba1", "swa", "mlp"]
    assert arch.options["swa"].window == 16
    assert arch.options["mamba1"].d_inner == 128
    assert arch.init_std == pytest.approx((2 / 5 / 64) ** 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        arch.d_model = 3


def test_canonical_is_what_was_made_not_how():
    def canonical(pattern, **options):
        return Architecture(pattern, d_model=64, vocab_size=128, options=options).canonical()

    base = canonical("M-x2", mamba2={"head_dim": 32})
    json.dumps(base)
    assert base == canonical("M-M-", mamba2={"head_dim": 32, "d_state": 128, "expand": 2.0})
    assert base == canonical("M-.M-", mamba2={"head_dim": 32, "d_inner": 128})
    assert base == canonical("M-x2", mamba2={"head_dim": 32}, attention={"head_dim": 16})
    assert base != canonical("M-x2", mamba2={"head_dim": 32, "d_state": 64})
    assert base != canonical("M-x3", mamba2={"head_dim": 32})
    nope = {"head_dim": 32, "rope_base": None}
    assert canonical("*", attention=nope) == canonical("*", attention={**nope, "rope_share": 0.5})
    assert canonical("*", attention=nope) != canonical("*", attention={"head_dim": 32})


def test_from_config():
    config = ArchConfig(n_layers=4, attention_share=0.25, d_model=64, mlp={"kind": "relu2"})
    arch = Architecture.from_config(config, 128)
    assert arch == Architecture("M-*-", d_model=64, vocab_size=128, options=config.options)


@pytest.mark.parametrize(
    ("pattern", "fields", "words"),
    [
        ("MP", {}, "arch.pattern: 'P' is no layer"),
        ("M-", {"d_model": 0}, "arch.d_model is 0"),
        ("M-", {"vocab_size": 1.5}, "arch.vocab_size is 1.5"),
        ("M-", {"options": {"mamba3": {}}}, "unknown field 'arch.mamba3' (did you mean 'mamba"),
        ("M-", {"options": {"mamba2": {"d_stat": 1}}}, "arch.mamba2.d_stat"),
        ("M-", {"options": {"swa": {"windows": 1}}}, "arch.swa.windows"),
        ("M-", {"d_model": 80}, "arch.mamba2: the inner width"),
    ],
)
def test_errors(pattern, fields, words):
    with pytest.raises(UserError) as error:
        Architecture(pattern, **{"d_model": 64, "vocab_size": 128, **fields})
    assert words in str(error.value)


def test_unused_kinds_need_not_fit():
    Architecture("m-", d_model=100, vocab_size=128, options={"attention": {"head_dim": 64}})


# --- cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, -5, 1.5])
def test_a_length_is_a_positive_whole_number(length):
    with pytest.raises(ValueError, match="seq_len is"):
        Architecture("M*", d_model=64, vocab_size=128).cost(length)


@pytest.mark.parametrize("tied", [True, False])
def test_cost_sums_the_contracts(tied):
    arch = Architecture(
        "mM-*S-", d_model=64, vocab_size=128, tie_embeddings=tied, options={"swa": {"window": 16}}
    )
    options = arch.layer_options
    cost = arch.cost(100)
    embeddings = 128 * 64 * (1 if tied else 2)
    assert cost.params == arch.num_params()
    assert cost.params - cost.non_embedding_params == embeddings
    assert arch.non_embedding_params() == sum(o.num_params() for o in options) + 64
    per_token = sum(o.flops(100) for o in options) / 100 + 2 * 64 * 128
    assert cost.forward_flops == per_token
    assert cost.train_flops == 3 * per_token
    assert cost.elementwise_flops == sum(o.elementwise_flops(100) for o in options) / 100
    assert cost.state_bytes == sum(o.state_bytes(100, 2) for o in options)
    assert cost.decode_flops == sum(o.decode_flops(100) for o in options) + 2 * 64 * 128
    assert [layer.letter for layer in cost.layers] == list("mM-*S-")


def test_cost_table_adds_up():
    arch = Architecture("M-x6.*-", d_model=64, vocab_size=128)
    *parts, total = arch.cost(100).table()
    assert [row["part"] for row in parts][:3] == ["M mamba2", "- mlp", "* attention"]
    for column in total:
        if column != "part":
            assert total[column] == pytest.approx(sum(row[column] for row in parts))
    assert total["params"] == arch.num_params()
    assert {KINDS[row["part"][0]].name for row in parts[:3]} == {"mamba2", "mlp", "attention"}
