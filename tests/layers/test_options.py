"""Wrong options give one sentence with the field; YAML files and dataclasses say the same."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from ablate.errors import UserError
from ablate.layers import KINDS
from ablate.layers.options import build
from ablate.layers.registry import by_name

CONF = Path(__file__).parents[2] / "conf" / "layer"


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("mamba2", {"d_stat": 3}, "unknown field 'arch.mamba2.d_stat' (did you mean 'd_state'?)"),
        ("mamba2", {"d_state": 0}, "field 'arch.mamba2.d_state' is 0: input should be greater"),
        ("mamba2", {"d_state": "8"}, "field 'arch.mamba2.d_state' is '8': input should be a valid"),
        ("mamba2", {"d_state": None}, "field 'arch.mamba2.d_state' is None"),
        ("mamba2", {"d_inner": 0}, "field 'arch.mamba2.d_inner' is 0"),
        ("mamba2", {"conv_bias": 1}, "field 'arch.mamba2.conv_bias' is 1"),
        ("mamba2", {"a_init": [1.0]}, "field 'arch.mamba2.a_init' is [1.0]"),
        ("mamba2", {"expand": float("inf")}, "field 'arch.mamba2.expand' is inf"),
        ("mamba2", {"d_model": 64}, "arch.mamba2.d_model is 64; the width is set by arch.d_model"),
        ("mamba2", {"head_dim": 48}, "inner width (d_inner, or expand x d_model) is 128"),
        ("mamba2", {"n_groups": 3}, "n_groups 3 does not divide the 2 heads"),
        ("mamba2", {"a_init": [16, 1]}, "a_init [16.0, 1.0] must be a range"),
        ("mamba2", {"dt_min": 0.5}, "dt_min 0.5 is above dt_max 0.1"),
        ("mamba1", {"dt_rank": -1}, "field 'arch.mamba1.dt_rank' is -1"),
        ("mamba1", {"dt_min": 0.5}, "dt_min 0.5 is above dt_max 0.1"),
        ("gated_deltanet", {"expand_v": 1.3}, "expand_v 1.3 of head_dim 128 is 166.4 channels"),
        ("gated_deltanet", {"a_init": [0, 1]}, "field 'arch.gated_deltanet.a_init' is 0"),
        ("gated_deltanet", {"a_init": [2, 1]}, "a_init [2.0, 1.0] must be a range"),
        ("gated_deltanet", {"dt_min": 0.5}, "dt_min 0.5 is above dt_max 0.1"),
        ("attention", {"head_dim": 48}, "head_dim 48 does not divide d_model 64"),
        ("attention", {"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads 3 does not divide n_heads 4"),
        ("attention", {"rope_share": 0.3}, "rope_share 0.3 of head_dim 64 is 19.2 channels"),
        ("attention", {"head_dim": 1, "n_heads": 1}, "which must be an even number"),
        ("attention", {"rope_share": 0.0}, "field 'arch.attention.rope_share' is 0.0"),
        ("attention", {"window": 8}, "a window belongs to 'S' (swa)"),
        ("swa", {"window": None}, "field 'arch.swa.window' is None"),
        ("swa", {"window": 0}, "field 'arch.swa.window' is 0"),
        (
            "gla",
            {"n_heads": 3},
            "expand_k 0.5 of d_model 64 is a width of 32, which 3 heads cannot",
        ),
        ("gla", {"expand_v": 0.001}, "expand_v 0.001 of d_model 64 is a width of 0, which"),
        ("gla", {"gate_rank": 0}, "field 'arch.gla.gate_rank' is 0"),
        ("retnet", {}, "head_dim 256 does not divide d_model 64"),
        ("retnet", {"head_dim": 7, "n_heads": 2}, "head_dim is 7, but rotary positions"),
        ("retnet", {"head_dim": 16, "expand_v": 0.01}, "expand_v 0.01 of head_dim 16 is no width"),
        ("mlp", {"kind": "relu"}, "field 'arch.mlp.kind' is 'relu': input should be 'swiglu'"),
        ("mlp", {"d_hidden": 1.5}, "field 'arch.mlp.d_hidden' is 1.5"),
    ],
)
def test_errors(name, values, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        build(by_name(name).options, 64, values, f"arch.{name}")
    assert f"arch.{name}" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unused_kind_need_not_fit_the_width_but_its_fields_are_checked():
    options = KINDS["*"].options
    assert build(options, 100, {"head_dim": 64}, "arch.attention", used=False) is None
    with pytest.raises(UserError, match="head_dims"):
        build(options, 100, {"head_dims": 64}, "arch.attention", used=False)
    with pytest.raises(UserError, match="head_dim"):
        build(options, 100, {"head_dim": 0}, "arch.attention", used=False)


@pytest.mark.parametrize("name", [kind.name for kind in KINDS.values()])
def test_yaml_has_every_option_with_its_default_and_a_comment(name):
    text = (CONF / f"{name}.yaml").read_text()
    config = yaml.safe_load(text)
    kind = by_name(name)
    fields = [f.name for f in dataclasses.fields(kind.options) if f.name != "d_model"]
    assert sorted(config) == sorted(fields)
    # equal where the defaults do not depend on the width
    assert build(kind.options, 256, config, name) == build(kind.options, 256, {}, name)
    for line in text.splitlines()[1:]:
        assert re.fullmatch(r"\w+: \S.* # \S.*", line), line
