"""Retention and gated linear attention against their papers' formulas, written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ablate.layers import Context, retnet

from .test_contract import make


def head_norm(y, weight, eps=1e-5):
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight


@torch.no_grad()
def test_retention_is_its_quadratic_formula():
    # arXiv 2307.08621, equations 5 and 8; keys and values wider than a piece of the scan
    heads, keys, values, length = 2, 160, 192, 11
    o, m = make("R", {"head_dim": keys, "n_heads": heads, "expand_v": 1.2})
    assert (keys > retnet.KEYS, o.value_dim) == (True, values)
    m = m.double()
    x = torch.randn(2, length, 32, dtype=torch.float64)
    got = m(x, Context(torch.arange(length)[None]))

    u = head_norm(x, m.norm) @ m.in_proj.T
    q, k, v, z = u.split((heads * keys, heads * keys, heads * values, heads * values), -1)
    position = torch.arange(length, dtype=torch.float64)
    angle = position[:, None] * 10000.0 ** (
        -torch.arange(keys // 2, dtype=torch.float64) * 2 / keys
    )
    turn = torch.polar(torch.ones_like(angle), angle)
    branches = []
    for h in range(heads):
        rotated = []
        for t in (q, k):
            t = t[..., h * keys : (h + 1) * keys]
            rotated.append(torch.complex(t[..., : keys // 2], t[..., keys // 2 :]) * turn)
        scores = (rotated[0] @ rotated[1].mH).real / keys**0.5
        gamma = 1 - 2.0 ** (-5 - h)
        decay = (gamma ** (position[:, None] - position)).tril()
        y = (scores * decay) @ v[..., h * values : (h + 1) * values]
        branches.append(head_norm(y, m.head_norm))
    want = x + (torch.cat(branches, -1) * F.silu(z)) @ m.out_proj.T
    torch.testing.assert_close(got, want)


@torch.no_grad()
def test_gated_linear_attention_is_its_recurrence():
    # arXiv 2312.06635, equations 3 and 4 and section 4.4
    length, heads, keys, values = 9, 2, 12, 24
    o, m = make("L", {"n_heads": heads, "expand_k": 0.75, "expand_v": 1.5, "gate_rank": 3})
    assert (o.d_key, o.d_value) == (heads * keys, heads * values)
    m = m.double()
    x = torch.randn(2, length, 32, dtype=torch.float64)
    got = m(x, Context(torch.arange(length)[None]))

    u = head_norm(x, m.norm) @ m.in_proj.T
    q, k, v, z, low = u.split((o.d_key, o.d_key, o.d_value, o.d_value, 3), -1)
    alpha = torch.sigmoid(low @ m.decay_proj.T + m.decay_bias) ** (1 / 16)
    q, k, v, alpha = (t.unflatten(-1, (heads, -1)) for t in (q, k, v, alpha))
    state = torch.zeros(2, heads, keys, values, dtype=torch.float64)
    rows = []
    for t in range(length):
        state = alpha[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / keys**0.5)
    y = head_norm(torch.stack(rows, 1), m.head_norm).flatten(-2)
    torch.testing.assert_close(got, x + (y * F.silu(z)) @ m.out_proj.T)


@torch.no_grad()
def test_pieces_of_wide_keys_are_prefilled_and_stepped():
    _, m = make("R", {"head_dim": 160, "n_heads": 1, "expand_v": 0.8})
    x = torch.randn(1, 8, 32)
    state = m.init_state(1, 8, None, x.dtype)
    m(x[:, :5], Context(torch.arange(5)[None]), state)
    rest = [m.step(x[:, t], Context(torch.tensor([[t]])), state) for t in range(5, 8)]
    want = m(x, Context(torch.arange(8)[None]))[:, 5:]
    torch.testing.assert_close(torch.stack(rest, 1), want, rtol=1e-4, atol=1e-4)
