"""The language model: loss, parameters, decoding, documents, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ablate.arch.spec import Architecture
from ablate.model import LanguageModel, init_weights, param_groups

OPTIONS = {
    "mamba2": {"head_dim": 16, "d_state": 16},
    "attention": {"head_dim": 16, "n_kv_heads": 1},
    "swa": {"head_dim": 16, "window": 5},
}


def model(pattern="mM-*S-", tied=True, **fields):
    fields = {"d_model": 32, "vocab_size": 64, "init_std": 0.2, **fields}
    arch = Architecture(pattern, tie_embeddings=tied, options=OPTIONS, **fields)
    return LanguageModel(arch, seed=1)


def tokens(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [True, False])
def test_params_are_those_of_the_contract(tied):
    lm = model(tied=tied)
    assert sum(p.numel() for p in lm.parameters()) == lm.arch.num_params()


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_cross_entropy_of_the_logits(tied):
    lm = model(tied=tied)
    t, y = tokens(2, 20), tokens(2, 20, seed=1)
    y[0, :7] = -100
    logits = lm.logits(t)
    assert logits.shape == (2, 20, 64)
    each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(2, 20)
    torch.testing.assert_close(lm.loss(t, y, reduction="none"), each.detach())
    torch.testing.assert_close(lm.loss(t, y, reduction="sum"), each.sum())
    torch.testing.assert_close(lm.loss(t, y), each.sum() / 33)
    z = (logits.logsumexp(-1) ** 2)[y != -100].mean()
    torch.testing.assert_close(lm.loss(t, y, z_loss=0.1), each.sum() / 33 + 0.1 * z)
    assert torch.equal(lm(t, y), lm.loss(t, y))


def test_auxiliary_losses_are_added():
    lm = model("M-")
    t = tokens(2, 20)
    plain = lm.loss(t, t)
    layer = lm.layers[0].register_forward_hook(
        lambda module, args, out: args[1].losses.append(torch.tensor(0.25))
    )
    torch.testing.assert_close(lm.loss(t, t), plain + 0.25)
    torch.testing.assert_close(lm.loss(t, t, reduction="sum"), 40 * (plain + 0.25))
    layer.remove()


def test_every_parameter_gets_a_gradient():
    lm = model(tied=False)
    lm.loss(tokens(2, 20), tokens(2, 20, seed=1)).backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_documents_of_a_row_equal_rows_of_their_own():
    lm = model()
    t = tokens(1, 30)
    doc_start = torch.zeros(1, 30, dtype=torch.int32)
    doc_start[:, 11:] = 11
    doc_start[:, 12:] = 12
    packed = lm.logits(t, doc_start)
    separate = torch.cat([lm.logits(part) for part in t.split([11, 1, 18], dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(packed[:, 12:], lm.logits(t)[:, 12:], atol=1e-2)


@pytest.mark.parametrize("prompt", [1, 4, 19])
@torch.no_grad()
def test_decoding_equals_logits(prompt):
    lm = model()
    t = tokens(3, 20)
    expected = lm.logits(t)
    state = lm.init_state(3, 20)
    torch.testing.assert_close(lm.prefill(t[:, :prompt], state), expected[:, prompt - 1])
    for i in range(prompt, 20):
        torch.testing.assert_close(lm.step(t[:, i], state), expected[:, i], rtol=1e-4, atol=1e-4)
    assert state.position_B.tolist() == [20] * 3


@torch.no_grad()
def test_cache_is_what_the_contract_says():
    lm = model()
    for length in (3, 50):
        state = lm.init_state(1, length, torch.bfloat16)
        assert state.nbytes == lm.arch.cost(length).state_bytes
    with pytest.raises(ValueError, match="60 tokens does not fit max_len 50"):
        lm.prefill(tokens(1, 60), state)


def test_bf16_autocast_keeps_the_stream_in_float32():
    lm = model()
    streams = []
    hooks = [
        layer.register_forward_hook(lambda m, a, out: streams.append(out)) for layer in lm.layers
    ]
    t, y = tokens(2, 20), tokens(2, 20, seed=1)
    exact = lm.loss(t, y)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lm.loss(t, y)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(stream.dtype == torch.float32 for stream in streams)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in lm.parameters())
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    for hook in hooks:
        hook.remove()


# --- initialisation and weight decay ------------------------------------------------------------


def test_shared_parts_start_equal_across_variants():
    base = dict(model("M-M-M-").named_parameters())
    for pattern in ("M-*-M-", "M-S-M-", "M-m-M-"):
        other = dict(model(pattern).named_parameters())
        for name, value in base.items():
            same = not name.startswith("layers.2.")
            assert not same or torch.equal(value, other[name]), name
    full, sliding = (
        LanguageModel(Architecture(f"M-{a}-", d_model=64, vocab_size=64)).state_dict() for a in "*S"
    )
    assert all(torch.equal(full[name], sliding[name]) for name in full)
    deeper = model("M-x6").state_dict()
    assert torch.equal(deeper["embedding"], base["embedding"])


def test_seeds_differ_and_the_global_stream_is_not_touched():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    lm = model()
    assert torch.equal(torch.rand(1), expected)
    first = lm.state_dict()["layers.0.in_proj"].clone()
    init_weights(lm, 2)
    assert not torch.equal(first, lm.layers[0].in_proj)
    init_weights(lm, 1)
    assert torch.equal(first, lm.layers[0].in_proj)


def test_layers_of_one_kind_start_different():
    lm = model("MM")
    assert not torch.equal(lm.layers[0].in_proj, lm.layers[1].in_proj)
    assert not torch.equal(lm.layers[0].in_proj[0], lm.layers[0].in_proj[1])


def test_initial_values():
    arch = Architecture("mM*-x4", d_model=256, vocab_size=512, tie_embeddings=False, init_std=0.03)
    lm = LanguageModel(arch)
    n_layers = 16
    for name, p in lm.named_parameters():
        leaf = name.split(".")[-1]
        if leaf == "out_proj":
            assert p.std().item() == pytest.approx(0.03 / n_layers**0.5, rel=0.03), name
        elif leaf in ("in_proj", "x_proj", "qkv_proj", "embedding", "unembedding"):
            assert p.std().item() == pytest.approx(0.03, rel=0.03), name
            assert abs(p.mean().item()) < 1e-3
        elif leaf in ("norm", "gate_norm", "final_norm", "D"):
            assert torch.equal(p, torch.ones_like(p)), name
        elif leaf in ("conv_weight", "conv_bias"):
            assert p.abs().max() <= 0.5
            assert p.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1)
        elif leaf == "dt_proj":
            assert p.abs().max() <= 16**-0.5
            assert p.std().item() == pytest.approx(16**-0.5 / 3**0.5, rel=0.05)
        elif leaf == "dt_bias":
            dt = F.softplus(p)
            assert dt.min() > 1e-3 * 0.99
            assert dt.max() < 0.1 * 1.01
        elif leaf == "A_log" and p.ndim == 2:
            torch.testing.assert_close(p.exp(), torch.arange(1.0, 17).expand(512, 16))
        elif leaf == "A_log":
            assert p.exp().min() >= 1
            assert p.exp().max() <= 16
            assert p.exp().std() > 2
        else:
            raise AssertionError(f"{name} is not expected")


def test_initial_dt_floor_and_a_range_are_options():
    options = {"dt_min": 1e-6, "dt_max": 1e-5, "dt_floor": 1e-3, "a_init": [2.0, 2.0]}
    arch = Architecture("M", d_model=64, vocab_size=64, options={"mamba2": options})
    layer = LanguageModel(arch).layers[0]
    torch.testing.assert_close(F.softplus(layer.dt_bias), torch.full((2,), 1e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(layer.A_log.exp(), torch.full((2,), 2.0))


def test_weight_decay_groups():
    options = {**OPTIONS, "attention": {"head_dim": 16, "bias": True, "d_conv": 4}}
    options["mlp"] = {"bias": True}
    arch = Architecture("mM-*S", d_model=32, vocab_size=64, tie_embeddings=False, options=options)
    lm = LanguageModel(arch)
    decay, rest = param_groups(lm, 0.1)
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.1)
    assert (rest["name"], rest["weight_decay"]) == ("no_decay", 0.0)
    names = dict(lm.named_parameters())
    assert sorted(decay["names"] + rest["names"]) == sorted(names)
    for group in (decay, rest):
        assert all(names[n] is p for n, p in zip(group["names"], group["params"], strict=True))
    assert {name.split(".")[-1] for name in decay["names"]} == {
        "in_proj", "x_proj", "dt_proj", "qkv_proj", "out_proj",
    }  # fmt: skip
    assert {name.split(".")[-1] for name in rest["names"]} == {
        "embedding", "unembedding", "final_norm", "norm", "gate_norm", "A_log", "D", "dt_bias",
        "conv_weight", "conv_bias", "qkv_bias", "in_bias", "out_bias",
    }  # fmt: skip
    torch.optim.AdamW([decay, rest]).step()


def test_a_role_that_is_missing_is_named():
    lm = model("M-")
    lm.layers[0].extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"Mamba2\.roles does not name the parameter 'extra'"):
        param_groups(lm, 0.1)
