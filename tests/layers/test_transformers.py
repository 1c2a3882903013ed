"""Whole models against the implementations of the transformers library, with the same weights."""

from __future__ import annotations

import inspect

import pytest
import torch

from ablate.arch.spec import Architecture
from ablate.layers import Context
from ablate.layers.gated_deltanet import GatedDeltaNet, GatedDeltaNetOptions
from ablate.model import LanguageModel

transformers = pytest.importorskip("transformers")

VOCAB, WIDTH = 96, 32


def randomise(model):
    """Weights away from their initial values, where norms, biases and D would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2)
            else:
                mean = 1.0 if "norm" in name or name.endswith("D") else 0.0
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(mean + 0.2 * noise)


def mamba_names(i, gated):
    pairs = {
        f"backbone.layers.{i}.norm.weight": f"layers.{i}.norm",
        **{
            f"backbone.layers.{i}.mixer.{theirs}": f"layers.{i}.{ours}"
            for theirs, ours in {
                "in_proj.weight": "in_proj",
                "conv1d.weight": "conv_weight",
                "conv1d.bias": "conv_bias",
                "A_log": "A_log",
                "D": "D",
                "out_proj.weight": "out_proj",
            }.items()
        },
    }
    m = f"backbone.layers.{i}.mixer"
    if gated:
        pairs |= {
            f"{m}.dt_bias": f"layers.{i}.dt_bias",
            f"{m}.norm.weight": f"layers.{i}.gate_norm",
        }
    else:
        pairs |= {
            f"{m}.x_proj.weight": f"layers.{i}.x_proj",
            f"{m}.dt_proj.weight": f"layers.{i}.dt_proj",
            f"{m}.dt_proj.bias": f"layers.{i}.dt_bias",
        }
    return pairs


def compare(theirs, ours, names, *, transform=None):
    """Copy `theirs` into `ours`; losses, logits and every gradient must agree.

    names: their parameter -> ours, or (ours, index into a fused parameter).
    """
    randomise(theirs)
    theirs_by_name = dict(theirs.named_parameters())
    ours_by_name = dict(ours.named_parameters())
    slices = {}
    covered = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in ours_by_name.items()}
    with torch.no_grad():
        for name, parameter in theirs_by_name.items():
            if name not in names:
                raise AssertionError(f"{name} is not mapped")
            target, rows = names[name] if isinstance(names[name], tuple) else (names[name], ...)
            slices[name] = (target, rows)
            ours_by_name[target][rows] = parameter.view_as(ours_by_name[target][rows])
            covered[target][rows] = True
    assert all(mask.all() for mask in covered.values())
    tokens = torch.randint(0, VOCAB, (2, 70), generator=torch.Generator().manual_seed(1))
    logits = theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(ours.logits(tokens), logits, rtol=1e-4, atol=1e-4)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    loss = ours.loss(tokens, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    loss.backward()
    for name, (target, rows) in slices.items():
        want = theirs_by_name[name].grad
        got = ours_by_name[target].grad[rows].reshape(want.shape)
        scale = want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=name)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups):
    config = transformers.Mamba2Config(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=12,
        n_groups=groups,
        expand=2,
        conv_kernel=4,
        vocab_size=VOCAB,
        chunk_size=16,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        rms_norm=True,
    )
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    ours = LanguageModel(
        Architecture(
            "MM",
            d_model=WIDTH,
            vocab_size=VOCAB,
            options={"mamba2": {"d_state": 12, "head_dim": 8, "n_groups": groups}},
        )
    )
    names = {"backbone.embeddings.weight": "embedding", "backbone.norm_f.weight": "final_norm"}
    for i in range(2):
        names |= mamba_names(i, gated=True)
    compare(theirs, ours, names)


def test_mamba1():
    config = transformers.MambaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        state_size=7,
        expand=2,
        conv_kernel=4,
        time_step_rank=3,
        vocab_size=VOCAB,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    ours = LanguageModel(
        Architecture(
            "mm",
            d_model=WIDTH,
            vocab_size=VOCAB,
            options={"mamba1": {"d_state": 7, "dt_rank": 3}},
        )
    )
    names = {"backbone.embeddings.weight": "embedding", "backbone.norm_f.weight": "final_norm"}
    for i in range(2):
        names |= mamba_names(i, gated=False)
    compare(theirs, ours, names)


def llama_names(n_blocks, kv, hidden):
    names = {
        "model.embed_tokens.weight": "embedding",
        "model.norm.weight": "final_norm",
        "lm_head.weight": "unembedding",
    }
    for i in range(n_blocks):
        theirs, attn, mlp = f"model.layers.{i}", f"layers.{2 * i}", f"layers.{2 * i + 1}"
        qkv = f"{attn}.qkv_proj"
        names |= {
            f"{theirs}.input_layernorm.weight": f"{attn}.norm",
            f"{theirs}.self_attn.q_proj.weight": (qkv, slice(0, WIDTH)),
            f"{theirs}.self_attn.k_proj.weight": (qkv, slice(WIDTH, WIDTH + kv)),
            f"{theirs}.self_attn.v_proj.weight": (qkv, slice(WIDTH + kv, WIDTH + 2 * kv)),
            f"{theirs}.self_attn.o_proj.weight": f"{attn}.out_proj",
            f"{theirs}.post_attention_layernorm.weight": f"{mlp}.norm",
            f"{theirs}.mlp.gate_proj.weight": (f"{mlp}.in_proj", slice(0, hidden)),
            f"{theirs}.mlp.up_proj.weight": (f"{mlp}.in_proj", slice(hidden, 2 * hidden)),
            f"{theirs}.mlp.down_proj.weight": f"{mlp}.out_proj",
        }
    return names


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_llama_and_mistral(kv_heads, window):
    fields = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    if window is None:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    else:
        config = transformers.MistralConfig(**fields, sliding_window=window)
        theirs = transformers.MistralForCausalLM(config).eval()
    section = {"head_dim": 8, "n_kv_heads": kv_heads}
    ours = LanguageModel(
        Architecture(
            "*-x2" if window is None else "S-x2",
            d_model=WIDTH,
            vocab_size=VOCAB,
            tie_embeddings=False,
            options={
                "mlp": {"d_hidden": 48},
                **({"attention": section} if window is None else {"swa": {**section, "window": 9}}),
            },
        )
    )
    compare(theirs, ours, llama_names(2, 8 * kv_heads, 48))


@pytest.mark.parametrize(("head_dim", "head_v_dim"), [(8, 16), (6, 5)])
def test_gated_deltanet(head_dim, head_v_dim, monkeypatch):
    """The layer of Qwen3-Next, with as many key heads as value heads."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    for name, value in vars(qwen).copy().items():  # a GPU's kernels, where they are installed
        if name.startswith(("torch_", "causal_conv1d")):
            monkeypatch.setattr(qwen, name, inspect.unwrap(value))
    heads, keys, values = 3, 3 * head_dim, 3 * head_v_dim
    config = transformers.Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=head_dim,
        linear_value_head_dim=head_v_dim,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
    )
    theirs = qwen.Qwen3NextGatedDeltaNet(config, 0)
    randomise(theirs)
    options = GatedDeltaNetOptions(
        d_model=WIDTH, head_dim=head_dim, n_heads=heads, expand_v=head_v_dim / head_dim
    )
    ours = GatedDeltaNet(options, 1e-5)
    with torch.no_grad():
        # theirs lie head by head: q, k, v, z in one projection and b, a in the other
        parts = theirs.in_proj_qkvz.weight.unflatten(0, (heads, -1)).split(
            (head_dim, head_dim, head_v_dim, head_v_dim), dim=1
        )
        q, k, v, z = (part.flatten(0, 1) for part in parts)
        b, a = theirs.in_proj_ba.weight.unflatten(0, (heads, 2)).unbind(1)
        ours.in_proj.copy_(torch.cat((z, q, k, v, b, a)))
        ours.conv_weight.copy_(theirs.conv1d.weight.squeeze(1))
        for name, source in (
            ("A_log", theirs.A_log),
            ("dt_bias", theirs.dt_bias),
            ("gate_norm", theirs.norm.weight),
            ("out_proj", theirs.out_proj.weight),
        ):
            getattr(ours, name).copy_(source)
    assert ours.in_proj.shape == (2 * keys + 2 * values + 2 * heads, WIDTH)
    x = torch.randn(2, 70, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    want = theirs(x)
    got = ours.branch(x, Context(torch.arange(70)[None]))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    mine = [ours.A_log, ours.dt_bias, ours.gate_norm, ours.conv_weight, ours.out_proj]
    other = [
        theirs.A_log, theirs.dt_bias, theirs.norm.weight, theirs.conv1d.weight,
        theirs.out_proj.weight,
    ]  # fmt: skip
    for ours_grad, ref in zip(
        torch.autograd.grad((got * weight).sum(), [x, *mine]),
        torch.autograd.grad((want * weight).sum(), [x, *other]),
        strict=True,
    ):
        scale = ref.abs().max().item()
        torch.testing.assert_close(ours_grad, ref.view_as(ours_grad), rtol=1e-3, atol=1e-4 * scale)
