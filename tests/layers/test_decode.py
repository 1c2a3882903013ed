"""One-token steps, prefilled caches and document resets equal the plain forward pass."""

from __future__ import annotations

import pytest
import torch

from ablate.layers import Context

from .test_contract import CASES, make

all_cases = pytest.mark.parametrize(("letter", "values"), CASES)
LENGTH = 23


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def steps(module, x, state, first):
    return torch.stack(
        [
            module.step(x[:, t], Context(torch.tensor([[t]])), state)
            for t in range(first, x.shape[1])
        ],
        dim=1,
    )


@all_cases
@torch.no_grad()
def test_steps_equal_forward(letter, values):
    _, module = make(letter, values)
    x = torch.randn(2, LENGTH, 32)
    expected = module(x, Context(torch.arange(LENGTH)[None]))
    assert (expected - x).abs().mean() > 0.02  # the branch does something
    close(steps(module, x, module.init_state(2, LENGTH, None, x.dtype), 0), expected)


@all_cases
@pytest.mark.parametrize("prompt", [1, 2, 7, 8, 20])
@torch.no_grad()
def test_prefill_then_steps_equal_forward(letter, values, prompt):
    _, module = make(letter, values)
    x = torch.randn(2, LENGTH, 32)
    expected = module(x, Context(torch.arange(LENGTH)[None]))
    state = module.init_state(2, LENGTH + 3, None, x.dtype)
    first = module(x[:, :prompt], Context(torch.arange(prompt)[None]), state)
    close(torch.cat([first, steps(module, x, state, prompt)], dim=1), expected)


@all_cases
def test_rows_of_a_step_may_stand_at_different_positions(letter, values):
    _, module = make(letter, values)
    x = torch.randn(2, 12, 32)
    with torch.no_grad():
        expected = module(x, Context(torch.arange(12)[None]))
        states = [module.init_state(1, 12, None, x.dtype) for _ in range(2)]
        for row, done in ((0, 11), (1, 5)):
            steps(module, x[row : row + 1, :done], states[row], 0)
        both = {k: torch.cat([s[k] for s in states]) for k in states[0]}
        ctx = Context(torch.tensor([[11], [5]]))
        close(module.step(torch.stack([x[0, 11], x[1, 5]]), ctx, both)[0], expected[0, 11])
        ctx = Context(torch.tensor([[11], [5]]))
        both = {k: torch.cat([s[k] for s in states]) for k in states[0]}
        close(module.step(torch.stack([x[0, 11], x[1, 5]]), ctx, both)[1], expected[1, 5])


@all_cases
def test_reset_documents_equal_separate_ones(letter, values):
    """Values and gradients; documents of one token, shorter and longer than taps and windows."""
    _, module = make(letter, values)
    starts = [[0, 1, 3, 12], [0, 9, 10]]
    doc_start = torch.zeros(2, LENGTH, dtype=torch.int32)
    for row, row_starts in enumerate(starts):
        for start in row_starts:
            doc_start[row, start:] = start
    x = torch.randn(2, LENGTH, 32, requires_grad=True)
    weight = torch.randn(2, LENGTH, 32)
    index = torch.arange(LENGTH)
    packed = module(x, Context(index - doc_start, doc_start))
    (packed * weight).sum().backward()
    packed_grads = [x.grad, *(p.grad for p in module.parameters())]
    x.grad = None
    module.zero_grad()
    separate = torch.zeros_like(packed)
    for row, row_starts in enumerate(starts):
        for start, end in zip(row_starts, [*row_starts[1:], LENGTH], strict=True):
            ctx = Context(torch.arange(end - start)[None])
            separate[row, start:end] = module(x[row : row + 1, start:end], ctx)[0]
    close(packed, separate)
    (separate * weight).sum().backward()
    for got, expected in zip(
        packed_grads, [x.grad, *(p.grad for p in module.parameters())], strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@all_cases
@torch.no_grad()
def test_causal(letter, values):
    _, module = make(letter, values)
    x = torch.randn(1, LENGTH, 32)
    ctx = Context(torch.arange(LENGTH)[None])
    before = module(x, ctx)
    x[:, 11] += 1
    after = module(x, ctx)
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 11], after[:, 11])


@torch.no_grad()
def test_positions_are_relative_or_absent():
    x = torch.randn(1, LENGTH, 32)
    here, shifted = (Context(torch.arange(LENGTH)[None] + n) for n in (0, 100))
    stretched = Context(2 * torch.arange(LENGTH)[None])
    for values in ({"head_dim": 8}, {"head_dim": 8, "rope_share": 0.5}):
        _, module = make("*", values)
        close(module(x, here), module(x, shifted))
        assert not torch.allclose(module(x, here), module(x, stretched), atol=1e-3)
    _, module = make("*", {"head_dim": 8, "rope_base": None})
    assert torch.equal(module(x, here), module(x, stretched))


@torch.no_grad()
def test_window_counts_the_query_itself():
    _, module = make("S", {"head_dim": 8, "window": 7})
    x = torch.randn(1, LENGTH, 32)
    ctx = Context(torch.arange(LENGTH)[None])
    before = module(x, ctx)
    x[:, 4] += 1
    changed = (module(x, ctx) - before).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero()[:, 0].tolist() == list(range(4, 11))
