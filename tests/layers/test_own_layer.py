"""A layer kind from a user's own package, without touching this repository."""

from __future__ import annotations

import linecache
import sys

import pytest
import torch

from ablate.arch.spec import Architecture
from ablate.config import ArchConfig, load
from ablate.errors import UserError
from ablate.layers import KINDS, registry
from ablate.model import LanguageModel, param_groups
from ablate.run import RunFolder
from ablate.study.trial import resolve
from ablate.train import train

LAYER = '''
from dataclasses import dataclass

import torch
from torch import nn

from ablate.layers import STRICT, Kind, PositiveInt, register


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    d_model: PositiveInt
    rank: PositiveInt = 4

    __pydantic_config__ = STRICT

    def num_params(self):
        return 2 * self.d_model * self.rank

    def flops(self, T):
        return 4 * T * self.d_model * self.rank

    def elementwise_flops(self, T):
        return 2 * T * self.rank

    def state_bytes(self, T, dtype_bytes=2):
        return dtype_bytes * self.rank

    def decode_flops(self, T):
        return self.flops(1)


class Average(nn.Module):
    """The sum over the past of a projection."""

    roles = {"down": "matrix", "up": "residual"}

    def __init__(self, options, norm_eps):
        super().__init__()
        self.options = options
        self.down = nn.Parameter(torch.empty(options.rank, options.d_model))
        self.up = nn.Parameter(torch.empty(options.d_model, options.rank))

    def forward(self, x, ctx, state=None):
        total = (x @ self.down.T).cumsum(1)
        if state is not None:
            state["total"].copy_(total[:, -1])
        return x + total @ self.up.T

    def init_state(self, batch, max_len, device, dtype):
        return {"total": torch.zeros(batch, self.options.rank, device=device, dtype=dtype)}

    def step(self, x, ctx, state):
        state["total"] += x @ self.down.T
        return x + state["total"] @ self.up.T


register(Kind("W", "average", AverageOptions, Average))
'''


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """`my_pkg` on the path; kinds and modules as they were afterwards."""
    folder = tmp_path / "my_pkg"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "my_layer.py").write_text(LAYER)
    monkeypatch.syspath_prepend(tmp_path)
    kinds, loaded = dict(KINDS), set(registry._loaded)
    yield folder
    KINDS.clear()
    KINDS.update(kinds)
    registry._loaded.clear()
    registry._loaded.update(loaded)
    for name in [n for n in sys.modules if n.split(".")[0] == "my_pkg"]:
        del sys.modules[name]


def config(**fields):
    return ArchConfig(
        pattern="M-W-", d_model=64, layers=["my_pkg.my_layer"], **{"average": {"rank": 3}, **fields}
    )


def test_it_is_a_kind_like_the_others():
    arch = Architecture.from_config(config(), 128)
    assert arch.options["average"].rank == 3
    assert arch.canonical()["options"]["average"] == {"rank": 3}
    assert arch.shares()["attention_of_mixers"] == 0
    lm = LanguageModel(arch)
    assert sum(p.numel() for p in lm.parameters()) == arch.num_params()
    assert "layers.2.down" in param_groups(lm, 0.1)[0]["names"]
    tokens = torch.randint(0, 128, (2, 12))
    lm.loss(tokens, tokens).backward()
    assert lm.layers[2].up.grad.abs().max() > 0
    with torch.no_grad():
        state = lm.init_state(2, 12)
        lm.prefill(tokens[:, :11], state)
        torch.testing.assert_close(lm.step(tokens[:, 11], state), lm.logits(tokens)[:, -1])
    Architecture.from_config(config(), 128)  # a second time finds it


def test_its_options_are_checked_as_ours_are():
    with pytest.raises(
        UserError, match=r"unknown field 'arch\.average\.rnk' \(did you mean 'rank'"
    ):
        Architecture.from_config(config(average={"rnk": 3}), 128)
    with pytest.raises(UserError, match=r"field 'arch\.average\.rank' is 0"):
        Architecture.from_config(config(average={"rank": 0}), 128)


def test_a_module_imported_before_is_taken():
    import my_pkg.my_layer  # noqa: F401

    assert Architecture.from_config(config(), 128).options["average"].rank == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "registers no layer kind"),
        ("import nothing_like_this", "cannot be imported (No module named 'nothing_like_this')"),
        ("1 / 0", "cannot be imported (division by zero)"),
        (LAYER.replace('"W"', '"M"'), "the letter 'M', taken by 'mamba2'"),
        (LAYER.replace('"W"', '"E"'), "the letter 'E', reserved for mixture of experts"),
        (LAYER.replace('"W"', '"x"'), "must be one ASCII letter, not 'x'"),
        (LAYER.replace('"W"', '"WW"'), "must be one ASCII letter"),
        (LAYER.replace('"average"', '"pattern"'), "cannot be named 'pattern'"),
        (LAYER.replace('"average"', '"mlp"'), "there is a layer kind 'mlp' already"),
        (LAYER + "\nimport nothing_like_this", "cannot be imported"),
        (LAYER.replace("dtype_bytes=2", "b"), "AverageOptions must have state_bytes(T, bytes=2)"),
        (LAYER.replace("def flops(", "def flop("), "AverageOptions must have flops(T)"),
        (LAYER.replace("def step(", "def stop("), "Average must have step"),
        (LAYER.replace("def forward(", "def forwards("), "Average must have forward"),
        (
            LAYER.replace("    def num_params(self):", "    num_params = 3\n    def n(self):"),
            "num_params()",
        ),
    ],
)
def test_mistakes_name_the_field_and_the_module(package, text, words):
    before = dict(KINDS)
    (package / "my_layer.py").write_text(text)
    with pytest.raises(UserError) as error:
        Architecture.from_config(config(), 128)
    assert str(error.value).startswith("arch.layers: module 'my_pkg.my_layer'")
    assert words in str(error.value)
    assert before == KINDS  # nothing half done stays


def test_a_module_that_does_not_exist():
    with pytest.raises(UserError, match=r"arch\.layers: module 'my_pkg\.none' cannot be imported"):
        Architecture.from_config(ArchConfig(pattern="M-", layers=["my_pkg.none"]), 128)


def test_without_it_the_letter_is_unknown():
    with pytest.raises(UserError, match="'W' is no layer"):
        Architecture("M-W-", d_model=64, vocab_size=128)


def test_parameters_are_counted_as_they_are(package):
    (package / "my_layer.py").write_text(
        LAYER.replace("return 2 * self.d_model", "return 3 * self.d_model")
    )
    arch = Architecture.from_config(config(), 128)
    with pytest.raises(
        UserError, match=r"AverageOptions\.num_params\(\) is 576, but Average has 384"
    ):
        LanguageModel(arch)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("return 2 * self.d_model", "return 3 * self.d_model", r"num_params\(\) is 768, but"),
        ("options.rank, options.d_model", "options.rnk, options.d_model",
         r"a layer of my_pkg\.my_layer cannot be made \(AttributeError: .*'rnk'"),
    ],
)  # fmt: skip
def test_a_plan_is_told_of_a_layer_that_cannot_be_what_it_says(package, old, new, says):
    (package / "my_layer.py").write_text(LAYER.replace(old, new))
    arch = {"pattern": "M-W-", "d_model": 64, "layers": ["my_pkg.my_layer"]}
    with pytest.raises(UserError, match=says):
        resolve({"arch": arch, "train": {"tokens": 4096}})


@pytest.mark.parametrize(
    ("given", "says"),
    [("[:, 1:]", r"\(2, 11, 64\)"), ("[:, :1]", r"\(2, 1, 64\)"), (", 1", "tuple")],
)
def test_what_a_layer_gives_has_the_shape_of_what_it_got(package, given, says):
    text = LAYER.replace("x + total @ self.up.T", f"(x + total @ self.up.T){given}")
    (package / "my_layer.py").write_text(text)
    lm = LanguageModel(Architecture.from_config(config(), 128))
    tokens = torch.randint(0, 128, (2, 12))
    with pytest.raises(UserError, match=rf"Average\.forward gave {says}, not \(2, 12, 64\)"):
        lm.loss(tokens, tokens)


LEAKS = {
    "all": "(x @ self.down.T).sum(1, keepdim=True).expand(-1, x.shape[1], -1)",
    "one ahead": "(x @ self.down.T).roll(-1, 1)",
    "within chunks of 16": "(x @ self.down.T).unflatten(1, (-1, 16)).flip(2).flatten(1, 2)",
    "a norm over the row": "F.layer_norm((x @ self.down.T).mT, x.shape[1:2]).mT.cumsum(1)",
}


def own(package, text, **data):
    """A short run of a layer of this source."""
    (package / "my_layer.py").write_text("import torch.nn.functional as F\n" + text)
    tree = {
        "arch": {"pattern": "W-", "d_model": 16, "layers": ["my_pkg.my_layer"]},
        "train": {"tokens": 256, "batch_size": 2, "device": "cpu"},
        "data": {"seq_len": 64, **data},
        "tracker": {"kind": "none"},
    }
    folder = RunFolder(package.parent / f"run {data}")
    folder.create(tree)
    train(load(tree), folder)


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_a_layer_that_sees_later_tokens_is_not_trained(package, leak):
    with pytest.raises(UserError, match="layer kind 'average' is not causal"):
        own(package, LAYER.replace("(x @ self.down.T).cumsum(1)", leak))


def test_a_layer_that_sees_other_documents_is_not_trained_where_they_are_apart(package):
    own(package, LAYER)
    with pytest.raises(UserError, match=r"'average' looks across documents, and data\.reset_docum"):
        own(package, LAYER, reset_documents=True)


@pytest.mark.parametrize(
    "total",
    [
        # by a spectrum, whose rounding every token sees
        "torch.fft.irfft(torch.fft.rfft(x @ self.down.T, 128, 1)"
        " * torch.fft.rfft(torch.ones(64, 1), 128, 0), 128, 1)[:, :64]",
        "(x @ self.down.T) * torch.rand(())",  # what is random cannot be compared
    ],
)
def test_rounding_and_chance_are_no_leak(package, total):
    own(package, LAYER.replace("(x @ self.down.T).cumsum(1)", total))


def test_methods_may_be_static(package):
    text = LAYER.replace(
        "    def elementwise_flops(self, T):\n        return 2 * T * self.rank",
        "    @staticmethod\n    def elementwise_flops(T):\n        return 2 * T",
    )
    assert "@staticmethod" in text
    (package / "my_layer.py").write_text(text)
    assert Architecture.from_config(config(), 128).cost(8).elementwise_flops > 0


def test_a_run_that_goes_on_with_another_source_has_both(package, tmp_path, monkeypatch):
    tree = {
        "arch": {"pattern": "W-", "d_model": 16, "layers": ["my_pkg.my_layer"]},
        "train": {"tokens": 256, "batch_size": 2, "device": "cpu"},
        "data": {"seq_len": 32},
        "tracker": {"kind": "none"},
    }
    folder = RunFolder(tmp_path / "run")
    folder.create(tree)
    folder.write_environment({"layers": {"my_pkg.my_layer": "older"}})
    train(load(tree), folder)
    told = folder.environment()["layers"]["my_pkg.my_layer"]
    assert told == f"older, {registry.own_sources('W')['my_pkg.my_layer']}"


def test_what_its_source_was_is_known(package):
    assert registry.own_sources("M*-") == {}
    arch = Architecture.from_config(config(), 128)
    (before,) = registry.own_sources(arch.letters).items()
    assert before[0] == "my_pkg.my_layer"
    registry._forget("my_pkg.my_layer", set(KINDS) - {"W"})
    registry._loaded.discard("my_pkg.my_layer")
    (package / "my_layer.py").write_text(LAYER + "# otherwise\n")
    linecache.checkcache()
    arch = Architecture.from_config(config(), 128)
    (after,) = registry.own_sources(arch.letters).items()
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_another_module_of_the_same_options_is_another_run(package):
    keys = []
    for name in ("my_layer", "other"):
        (package / f"{name}.py").write_text(LAYER)
        tree = {"arch": {"pattern": "M-W-", "d_model": 64, "layers": [f"my_pkg.{name}"]}}
        keys.append(resolve(tree | {"train": {"tokens": 65536}}).key)
        del KINDS["W"]
    assert keys[0] != keys[1]
