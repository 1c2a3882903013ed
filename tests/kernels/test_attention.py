from __future__ import annotations

from importlib import import_module

import pytest
import torch

import ablate.kernels as kernels
from ablate.kernels.attention import attention_reference

module = import_module("ablate.kernels.attention")


def qkv(batch=2, length=23, heads=4, kv_heads=2, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, h, dim, generator=g, dtype=torch.float64, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]


DOCS = torch.tensor([[0] * 9 + [9] * 14, [-3] * 5 + [5] * 11 + [16] * 7], dtype=torch.int32)


@pytest.mark.parametrize("window", [None, 1, 6, 50])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("block", [5, 256])
def test_blocks_agree_with_the_definition(window, documents, kv_heads, block, monkeypatch):
    monkeypatch.setattr(module, "QUERY_BLOCK", block)
    tensors = qkv(kv_heads=kv_heads)
    doc = DOCS if documents else None
    got = kernels.attention(*tensors, window=window, doc_start_BL=doc, scale=0.3)
    want = attention_reference(*tensors, window=window, doc_start_BL=doc, scale=0.3)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), tensors),
        torch.autograd.grad((want * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_window_keeps_memory_linear_in_length():
    """A block sees at most window + block keys, so 16k positions never make a 16k x 16k mask."""
    seen = []
    visible = module._visible

    def spy(query, key, window, doc):
        seen.append(len(query) * len(key))
        return visible(query, key, window, doc)

    module._visible = spy
    try:
        q, k, v = (t.float() for t in qkv(1, 4096, 1, 1, 4))
        kernels.attention(q, k, v, window=64)
    finally:
        module._visible = visible
    assert max(seen) <= 256 * (256 + 64)


def test_mistakes_are_told():
    q, k, v = qkv(heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="multiple"):
        kernels.attention(q, k, v)
    q, k, v = qkv()
    with pytest.raises(ValueError, match="window=0"):
        kernels.attention(q, k, v, window=0)


def test_rotary_keeps_norms_and_depends_on_distance_only():
    q, k, _ = qkv(1, 6, 1, 1, 8)
    for dim in (8, 4):
        pos = torch.arange(6)[None]
        a, b = kernels.rotary(q, pos, dim=dim), kernels.rotary(k, pos, dim=dim)
        c, d = kernels.rotary(q, pos + 100, dim=dim), kernels.rotary(k, pos + 100, dim=dim)
        torch.testing.assert_close(a.norm(dim=-1), q.norm(dim=-1))
        torch.testing.assert_close(
            torch.einsum("bihp,bjhp->bij", a, b), torch.einsum("bihp,bjhp->bij", c, d)
        )
        torch.testing.assert_close(a[..., dim:], q[..., dim:])


def test_rotary_is_the_half_split_rotation():
    x = torch.randn(1, 3, 1, 4, dtype=torch.float64)
    pos = torch.tensor([[0, 1, 7]])
    y = kernels.rotary(x, pos, base=100.0)
    for i, p in enumerate([0, 1, 7]):
        for pair, rate in ((0, 1.0), (1, 0.1)):
            angle = torch.tensor(p * rate, dtype=torch.float64)
            a, b = x[0, i, 0, pair], x[0, i, 0, pair + 2]
            torch.testing.assert_close(y[0, i, 0, pair], a * angle.cos() - b * angle.sin())
            torch.testing.assert_close(y[0, i, 0, pair + 2], b * angle.cos() + a * angle.sin())
    with pytest.raises(ValueError, match="dim=3"):
        kernels.rotary(x, pos, dim=3)
