"""The gated delta rule's PyTorch forms against its definition and against transformers."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from _check import compare, error, leaves, run

from ablate.kernels.gated_delta_rule import (
    gated_delta_rule,
    gated_delta_rule_chunked,
    gated_delta_rule_recurrent,
)


def make(batch, length, heads, keys, values, *, decay=1.0, state=True, beta=None, seed=0):
    """Inputs by name; beta: None for anything between 0 and 1, or a number for all tokens."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    t = {
        "q_BLHK": rand(batch, length, heads, keys),
        "k_BLHK": rand(batch, length, heads, keys),
        "v_BLHV": rand(batch, length, heads, values),
        "log_decay_BLH": -decay * rand(batch, length, heads).exp(),
        "beta_BLH": torch.sigmoid(rand(batch, length, heads)),
        "initial_state_BHKV": rand(batch, heads, keys, values) if state else None,
    }
    if beta is not None:
        t["beta_BLH"] = torch.full_like(t["beta_BLH"], beta)
    return {k: v if v is None else v.requires_grad_() for k, v in t.items()}


def documents(batch, length, every, first=0):
    """Documents of `every` tokens, those of row b shifted by b; `first` < 0: continued ones."""
    index = torch.arange(length)
    rows = [(index - first - b) // every * every + first + b for b in range(batch)]
    return torch.stack(rows).to(torch.int32)


@pytest.mark.parametrize("length", [1, 5, 64, 65, 150])
@pytest.mark.parametrize("docs", [None, (37, -5), (1, 0)])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_chunks_agree_with_the_definition(length, docs, state, normalize):
    # keys of any length make the recurrence grow, so those are small
    t = make(2, length, 2, 4, 6, state=state)
    if not normalize:
        t["k_BLHK"] = (0.3 * t["k_BLHK"].detach()).requires_grad_()
    if length == 1 or (docs and docs[0] == 1):
        t["log_decay_BLH"].requires_grad_(state and docs is None)
        if state and docs and docs[0] == 1:  # of the rows, one begins with a continued document
            t["log_decay_BLH"].requires_grad_(False)
    starts = None if docs is None else documents(2, length, *docs)
    compare(
        gated_delta_rule_chunked, gated_delta_rule_recurrent, t, limit=1e-10,
        normalize_qk=normalize, return_final_state=state, doc_start_BL=starts,
        scale=None if normalize else 0.7,
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 1e-6, 1.0, 2.0])
@pytest.mark.parametrize("decay", [1e-4, 1.0])
def test_the_ends_of_beta(beta, decay):
    compare(
        gated_delta_rule_chunked, gated_delta_rule_recurrent,
        make(1, 130, 2, 4, 3, beta=beta, decay=decay), limit=1e-10, normalize_qk=True,
        return_final_state=True,
    )  # fmt: skip


@pytest.mark.parametrize(("decay", "limit"), [(1e-4, 1e-5), (1.0, 1e-5), (1e3, 1e-3)])
def test_weak_and_strong_decay_in_float32(decay, limit):
    # sums of log decays up to thousands leave a step of one ulp some 1e-4
    compare(
        gated_delta_rule_chunked, gated_delta_rule_recurrent, make(2, 200, 2, 8, 8, decay=decay),
        limit=limit, dtype=torch.float32, normalize_qk=True, return_final_state=True,
    )  # fmt: skip


def equal_keys(length=128):
    """The same key for all tokens and beta 2: each step reflects the state, and powers of the
    system's matrix, were they taken, would reach 1e20."""
    t = make(1, length, 1, 8, 4, beta=2.0, decay=1e-6)
    t["k_BLHK"] = t["k_BLHK"].detach()[:, :1].expand(1, length, 1, 8).clone().requires_grad_()
    return t


def test_equal_keys_and_beta_two():
    compare(
        gated_delta_rule_chunked, gated_delta_rule_recurrent, equal_keys(), limit=1e-4,
        dtype=torch.float32, normalize_qk=True, return_final_state=True,
    )  # fmt: skip


def test_gradcheck():
    t = make(1, 7, 2, 2, 3)

    def f(*values):
        return gated_delta_rule_chunked(
            **dict(zip(t, values, strict=True)), normalize_qk=True, return_final_state=True
        )

    assert torch.autograd.gradcheck(f, tuple(t.values()))


def test_a_key_of_length_one_and_beta_one_replaces_its_value():
    generator = torch.Generator().manual_seed(0)
    keys = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    order = torch.tensor([0, 1, 2, 1, 3, 0])
    k = keys[order].view(1, 6, 1, 4)
    v = torch.randn(1, 6, 1, 5, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(1, 6, 1, dtype=torch.float64)
    _, state = gated_delta_rule(k, k, v, zeros, zeros + 1, return_final_state=True)
    held = torch.einsum("nk,kv->nv", keys, state[0, 0])
    torch.testing.assert_close(held, v[0, [5, 3, 2, 4], 0])


def test_two_segments_are_one_sequence():
    t = make(2, 100, 2, 4, 6)
    starts = documents(2, 100, 30)
    options = {"normalize_qk": True, "return_final_state": True}
    whole, last = gated_delta_rule(**t, **options, doc_start_BL=starts)
    cut = 71
    timed = [k for k in t if "L" in k.split("_")[-1]]
    left, right = ({k: t[k][:, part] for k in timed} for part in (slice(cut), slice(cut, None)))
    y1, state = gated_delta_rule(
        **left, **options, initial_state_BHKV=t["initial_state_BHKV"], doc_start_BL=starts[:, :cut]
    )
    y2, state = gated_delta_rule(
        **right, **options, initial_state_BHKV=state, doc_start_BL=starts[:, cut:] - cut
    )
    torch.testing.assert_close(torch.cat((y1, y2), 1), whole)
    torch.testing.assert_close(state, last)


def test_low_precision_keeps_its_type():
    t = leaves(make(1, 70, 2, 4, 4), torch.bfloat16)
    y, state = gated_delta_rule(**t, return_final_state=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


def test_wrong_shapes_are_told():
    t = make(1, 7, 3, 2, 4)
    with pytest.raises(ValueError, match="k has shape"):
        gated_delta_rule(**(t | {"k_BLHK": t["k_BLHK"][:, :3]}))
    with pytest.raises(ValueError, match="v has shape"):
        gated_delta_rule(**(t | {"v_BLHV": t["v_BLHV"][:, :, :2]}))
    with pytest.raises(ValueError, match="beta has shape"):
        gated_delta_rule(**(t | {"beta_BLH": t["beta_BLH"][..., None]}))
    with pytest.raises(ValueError, match="backend"):
        gated_delta_rule(**t, backend="cuda")


@pytest.mark.parametrize(
    "form", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"]
)
@pytest.mark.parametrize("length", [9, 130])
def test_against_transformers(form, length):
    """Qwen3-Next's rule in plain PyTorch, float32: values and gradients."""
    name = "transformers.models.qwen3_next.modeling_qwen3_next"
    theirs = inspect.unwrap(getattr(pytest.importorskip(name), form))  # not a GPU's, if installed
    names = {
        "q_BLHK": "query", "k_BLHK": "key", "v_BLHV": "value", "log_decay_BLH": "g",
        "beta_BLH": "beta", "initial_state_BHKV": "initial_state",
    }  # fmt: skip

    def reference(**tensors):
        return theirs(
            **{names[k]: v for k, v in tensors.items()}, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    t = make(2, length, 3, 8, 10, decay=0.1)
    want, want_grads = run(reference, leaves(t, torch.float32))
    got, got_grads = run(
        gated_delta_rule, leaves(t, torch.float32), normalize_qk=True, return_final_state=True
    )
    for ours, ref in zip(got, want, strict=True):
        assert error(ours, ref) < 1e-5
    for key, ref in want_grads.items():
        assert error(got_grads[key], ref) < 1e-5, key


def test_normalising_is_dividing_by_the_length():
    t = make(1, 40, 2, 8, 4)
    unit = t | {k: F.normalize(t[k], dim=-1) for k in ("q_BLHK", "k_BLHK")}
    got = gated_delta_rule(**t, normalize_qk=True)
    torch.testing.assert_close(got, gated_delta_rule(**unit), rtol=1e-5, atol=1e-6)
