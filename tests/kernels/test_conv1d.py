from __future__ import annotations

import pytest
import torch
from _check import compare

from ablate.kernels.conv1d import causal_conv1d, causal_conv1d_reference, causal_conv1d_step


def starts(batch: int, length: int, seed: int = 0, continues: bool = True) -> torch.Tensor:
    """Random document starts; the first document of every other row began before the row."""
    generator = torch.Generator().manual_seed(seed)
    begin = torch.rand(batch, length, generator=generator) < 0.2
    index = torch.arange(length).expand(batch, length)
    start = torch.where(begin, index, -1).cummax(1).values
    first = torch.tensor([-5 if continues and b % 2 else 0 for b in range(batch)])
    return torch.where(start < 0, first[:, None], start).to(torch.int32)


def inputs(batch, length, width, taps=4, state=False, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)

    return {
        "x_BLD": rand(batch, length, width),
        "weight_DK": rand(width, taps),
        "bias_D": rand(width) if bias else None,
        "initial_state_BDK": rand(batch, taps - 1, width) if state else None,
    }


@pytest.mark.parametrize("length", [1, 2, 3, 17])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
def test_cpu_form_agrees_with_the_definition(length, documents, state, activation):
    doc = starts(3, length) if documents else None
    tensors = inputs(3, length, 5, state=state, bias=activation is not None)
    compare(
        causal_conv1d, causal_conv1d_reference, tensors, limit=1e-12,
        activation=activation, doc_start_BL=doc, return_final_state=True,
    )  # fmt: skip


def test_definition_agrees_with_conv1d():
    t = {k: v for k, v in inputs(2, 11, 6, seed=3).items() if v is not None}
    out = torch.nn.functional.conv1d(
        t["x_BLD"].transpose(1, 2), t["weight_DK"].unsqueeze(1), t["bias_D"], padding=3, groups=6
    )
    want = torch.nn.functional.silu(out[..., :11]).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(**t), want)


@pytest.mark.parametrize("documents", [False, True])
def test_two_halves_and_single_steps_continue_the_whole(documents):
    t = inputs(2, 13, 4, seed=1)
    doc = starts(2, 13, continues=False) if documents else None
    whole = causal_conv1d(**t, doc_start_BL=doc)
    cut = 6
    x, w, b = t["x_BLD"], t["weight_DK"], t["bias_D"]
    one, state = causal_conv1d(
        x[:, :cut], w, b, return_final_state=True,
        doc_start_BL=None if doc is None else doc[:, :cut],
    )  # fmt: skip
    two = causal_conv1d(
        x[:, cut:], w, b, initial_state_BDK=state,
        doc_start_BL=None if doc is None else (doc[:, cut:] - cut).contiguous(),
    )  # fmt: skip
    torch.testing.assert_close(torch.cat([one, two], 1), whole)
    if doc is None:
        state = state.detach().clone()
        for i in range(cut, 13):
            with torch.no_grad():
                y = causal_conv1d_step(x[:, i], w, b, activation="silu", state_BKD=state)
            torch.testing.assert_close(y, whole[:, i])


def test_a_token_of_another_document_changes_nothing():
    t = inputs(1, 8, 3)
    doc = torch.tensor([[0, 0, 0, 3, 3, 3, 6, 6]], dtype=torch.int32)
    before = causal_conv1d(**t, doc_start_BL=doc)
    x = t["x_BLD"].detach().clone()
    x[:, 2] += 100
    after = causal_conv1d(x, t["weight_DK"], t["bias_D"], doc_start_BL=doc)
    torch.testing.assert_close(after[:, 3:], before[:, 3:])


def test_unknown_activation_and_backend_are_told():
    t = inputs(1, 4, 3)
    with pytest.raises(ValueError, match="relu"):
        causal_conv1d(**t, activation="relu")
    with pytest.raises(ValueError, match="cuda"):
        causal_conv1d(**t, backend="cuda")
