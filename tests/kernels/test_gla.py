"""Gated linear attention in plain PyTorch: chunks against the definition, and steps."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from _check import compare

from ablate.kernels.gla import gla, gla_recurrent, gla_step

module = import_module("ablate.kernels.gla")


def inputs(batch=2, length=19, heads=2, width=3, values=5, *, decay=0.5, initial=True, seed=0):
    """Leaves in float64; log decays are -decay * exp(normal)."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    t = {
        "q_BLHK": rand(batch, length, heads, width),
        "k_BLHK": rand(batch, length, heads, width),
        "v_BLHV": rand(batch, length, heads, values),
        "log_decay_BLHK": -decay * rand(batch, length, heads, width).exp(),
        "initial_state_BHKV": rand(batch, heads, width, values) if initial else None,
    }
    return {k: v if v is None else v.requires_grad_() for k, v in t.items()}


def documents(batch, length, every, first=0):
    """Documents of `every` tokens, those of row b shifted by b; `first` < 0: continued ones."""
    index = torch.arange(length)
    rows = [(index - first - b) // every * every + first + b for b in range(batch)]
    return torch.stack(rows).to(torch.int32)


DOCS = {"none": None, "some": (7, -3), "every token": (1, 0)}


@pytest.mark.parametrize("docs", DOCS)
@pytest.mark.parametrize("length", [1, 2, 3, 16, 19])
@pytest.mark.parametrize("decay", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("state", [False, True])
def test_chunks_agree_with_the_definition(docs, length, decay, state, monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 8)
    starts = DOCS[docs]
    compare(
        gla, gla_recurrent, inputs(length=length, decay=decay, initial=state), limit=1e-11,
        doc_start_BL=None if starts is None else documents(2, length, *starts),
        return_final_state=state, scale=0.7,
    )  # fmt: skip


def test_decays_of_every_size_side_by_side():
    # what a plain quotient of running products cannot do, also in float32
    t = inputs(length=70, width=6)
    with torch.no_grad():
        t["log_decay_BLHK"][:, ::5] = -1e4
        t["log_decay_BLHK"][:, 1::5] = -80.0
        t["log_decay_BLHK"][:, 2::5] *= 1e-4
        t["log_decay_BLHK"][..., 3] = 0.0
    compare(gla, gla_recurrent, t, limit=1e-5, dtype=torch.float32, return_final_state=True)


def test_minus_infinity_forgets():
    t = inputs(length=40, initial=False)
    with torch.no_grad():
        t["log_decay_BLHK"][:, 11] = -torch.inf
    y, _ = gla(**t, return_final_state=True)
    late = {k: v if v is None else v[:, 11:] for k, v in t.items()}
    torch.testing.assert_close(y[:, 11:], gla(**late))
    grads = torch.autograd.grad(y.sum(), [v for v in t.values() if v is not None])
    assert all(torch.isfinite(g).all() for g in grads)


def test_gradcheck():
    t = inputs(1, 7, 1, 2, 2)
    names = list(t)

    def f(*values):
        return gla(**dict(zip(names, values, strict=True)), return_final_state=True)

    assert torch.autograd.gradcheck(f, tuple(t.values()))


def test_it_is_the_sum_over_pairs():
    """Paper, equation 4, with the running products that are safe at this length."""
    t = inputs(1, 12, 2, 3, 4, initial=False)
    q, k, v, g = list(t.values())[:4]
    total = g.cumsum(1)
    scores = torch.einsum("bthk,bshk->bhts", q * total.exp(), k * (-total).exp()) / 3**0.5
    want = torch.einsum("bhts,bshv->bthv", scores.tril(), v)
    torch.testing.assert_close(gla(q, k, v, g), want)


def test_two_segments_are_one_sequence():
    t = inputs(length=75)
    starts = documents(2, 75, 40, -5)
    whole, last = gla(**t, doc_start_BL=starts, return_final_state=True)
    cut = 41
    parts = ([], [])
    state = t["initial_state_BHKV"]
    for part in (slice(0, cut), slice(cut, 75)):
        cells = {k: v[:, part] for k, v in t.items() if k != "initial_state_BHKV"}
        y, state = gla(
            **cells, initial_state_BHKV=state, doc_start_BL=starts[:, part] - part.start,
            return_final_state=True,
        )  # fmt: skip
        parts[0].append(y)
    torch.testing.assert_close(torch.cat(parts[0], 1), whole)
    torch.testing.assert_close(state, last)


def test_steps_continue_a_sequence():
    t = inputs()
    with torch.no_grad():
        whole, last = gla(**t, return_final_state=True)
        state = t["initial_state_BHKV"].clone()
        for i in range(19):
            row = [t[k][:, i] for k in ("q_BLHK", "k_BLHK", "v_BLHV", "log_decay_BLHK")]
            torch.testing.assert_close(gla_step(*row, state_BHKV=state), whole[:, i])
    torch.testing.assert_close(state, last)


def test_low_precision_keeps_its_type():
    t = {k: v.detach().bfloat16() for k, v in inputs().items()}
    y, state = gla(**t, return_final_state=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


def test_wrong_shapes_are_told():
    t = inputs()
    with pytest.raises(ValueError, match="must have the shape of q"):
        gla(**(t | {"k_BLHK": t["k_BLHK"][:, :3]}))
    with pytest.raises(ValueError, match="first three"):
        gla(**(t | {"v_BLHV": t["v_BLHV"][:, :3]}))
    with pytest.raises(ValueError, match="initial_state"):
        gla(**(t | {"initial_state_BHKV": t["initial_state_BHKV"][..., :2]}))
    with pytest.raises(ValueError, match="does not support"):
        gla(**t, backend="triton")
