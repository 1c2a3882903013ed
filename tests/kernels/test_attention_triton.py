"""The windowed kernel against the float64 definition and against torch's attention with a mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _check import compare, error

from ablate.kernels import attention
from ablate.kernels.attention import attention_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def documents(batch: int, length: int, kind: str | None) -> torch.Tensor | None:
    """Starts (B, L): none, every token its own, or about 37 tokens each, the first continued."""
    index = torch.arange(length, dtype=torch.int32)
    if kind is None:
        return None
    if kind == "every token":
        return index.expand(batch, length).contiguous()
    if kind == "long":
        return torch.where(index < 2 * length // 3, -7, 2 * length // 3).int().expand(
            batch, length
        ).contiguous()  # fmt: skip
    return torch.stack([(index + 5 * b) // 37 * 37 - 5 * b for b in range(batch)])


def qkv(batch, length, heads, kv_heads, head_dim, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"q_BLHP": heads, "k_BLHP": kv_heads, "v_BLHP": kv_heads}
    return {
        name: torch.randn(batch, length, h, head_dim, generator=g, dtype=torch.float64)
        .requires_grad_()
        for name, h in shapes.items()
    }  # fmt: skip


def masked_sdpa(q, k, v, window, doc, scale=None):
    """torch's attention with every mask written out, one batch row at a time."""
    length = q.shape[1]
    seen = torch.ones(q.shape[0], length, length, dtype=torch.bool).tril()
    if window is not None:
        seen &= torch.ones(length, length, dtype=torch.bool).triu(1 - window)
    if doc is not None:
        start = doc.clamp(min=0).long()
        seen &= start[:, :, None] == start[:, None, :]
    repeat = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeat, 2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale) \
        .transpose(1, 2)  # fmt: skip


def check(shape, window, kind, device, dtype, scale=None, tensors=None):
    doc = documents(shape[0], shape[1], kind)
    tensors = tensors or qkv(*shape)
    if window == 1 or shape[1] == 1 or kind == "every token":
        # one visible key: y is its v, and nothing depends on q and k (see below)
        for name in ("q_BLHP", "k_BLHP"):
            tensors[name].requires_grad_(False)

    def ours(**t):
        here = None if doc is None else doc.to(t["q_BLHP"].device)
        return attention(**t, window=window, doc_start_BL=here, scale=scale, backend="triton")

    def definition(**t):
        return attention_reference(**t, window=window, doc_start_BL=doc, scale=scale)

    compare(ours, definition, tensors, limit=TOLERANCE[dtype], dtype=dtype, device=device)


# (B, L, H, H_kv, P), window, documents; tiles are 32 to 128 long
CASES = [
    ((2, 70, 4, 2, 16), 9, "some"),
    ((2, 70, 4, 1, 16), 1, None),
    ((1, 150, 2, 2, 16), 70, None),
    ((1, 150, 3, 1, 16), 100, "some"),
    ((2, 128, 2, 1, 32), 128, "some"),
    ((1, 128, 2, 1, 32), 33, None),
    ((1, 131, 1, 1, 64), 500, "long"),
    ((1, 200, 2, 1, 16), None, "long"),
    ((1, 40, 2, 1, 16), None, "every token"),
    ((2, 70, 2, 2, 16), None, None),
    ((1, 1, 2, 1, 16), 4, None),
    ((2, 1, 1, 1, 16), None, "some"),
    ((1, 37, 2, 1, 24), 20, None),
    ((1, 65, 2, 1, 4), 16, "some"),
]
MORE = [  # every tile of the tables, also where they are not square to the edges
    ((2, 640, 4, 2, 64), 200, None),
    ((2, 640, 4, 4, 64), 256, "some"),
    ((1, 1000, 8, 1, 128), 300, None),
    ((2, 515, 4, 2, 128), 128, "some"),
    ((2, 384, 4, 4, 128), 129, "long"),
    ((2, 384, 2, 2, 128), None, "some"),
    ((1, 2048, 2, 1, 64), 1024, None),
    ((1, 2048, 2, 1, 128), 700, "long"),
    ((1, 640, 2, 1, 32), 64, "some"),
    ((1, 640, 2, 1, 16), 127, None),
    ((1, 512, 2, 1, 64), 1, None),
    ((1, 512, 2, 1, 64), None, None),
    ((1, 500, 2, 1, 96), 100, "some"),
    ((1, 512, 2, 1, 64), None, "every token"),
]


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "window", "kind"), CASES)
def test_in_the_interpreter(shape, window, kind, dtype):
    check(shape, window, kind, "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "window", "kind"), CASES + MORE)
def test_on_a_gpu(shape, window, kind, dtype):
    check(shape, window, kind, "cuda", dtype)


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu),
])  # fmt: skip
@pytest.mark.parametrize(("shape", "window", "kind"), [CASES[0], CASES[3], CASES[7]])
def test_against_torch_with_a_mask(device, shape, window, kind):
    doc = documents(shape[0], shape[1], kind)
    compare(
        lambda q_BLHP, k_BLHP, v_BLHP: attention(
            q_BLHP, k_BLHP, v_BLHP, window=window, scale=0.3, backend="triton",
            doc_start_BL=None if doc is None else doc.to(q_BLHP.device),
        ),
        lambda q_BLHP, k_BLHP, v_BLHP: masked_sdpa(q_BLHP, k_BLHP, v_BLHP, window, doc, 0.3),
        qkv(*shape, seed=1), limit=1e-5, dtype=torch.float32, device=device,
    )  # fmt: skip


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu),
])  # fmt: skip
def test_reads_a_fused_projection_in_place(device):
    """Rows 80 apart, every second row of the batch left out; y's gradient is a view too."""
    fused = torch.randn(4, 45, 80, dtype=torch.float64).float().to(device).requires_grad_()
    weight = torch.randn(2, 2, 45, 16).to(device).transpose(1, 2)

    def parts(x):
        return x[::2].unflatten(-1, (5, 16)).split((2, 1, 2), dim=2)

    def loss(fn):
        q, k, v = parts(fused)
        y = fn(q, k, v[:, :, 1:], window=11)
        return torch.autograd.grad((y * weight).sum(), fused)[0]

    got = loss(lambda *t, **o: attention(*t, **o, backend="triton"))
    assert error(got, loss(attention_reference)) < 1e-5


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu),
])  # fmt: skip
def test_one_visible_key_leaves_queries_and_keys_no_gradient(device):
    q, k, v = (
        t.detach().float().to(device).requires_grad_() for t in qkv(1, 40, 2, 1, 16).values()
    )
    y = attention(q, k, v, window=1, backend="triton")
    assert torch.equal(y, v.expand_as(y))
    dq, dk, dv = torch.autograd.grad(y.sum(), (q, k, v))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5
    assert error(dv, torch.full_like(dv, 2.0)) < 1e-6


def test_cases_without_a_kernel_are_told():
    q, k, v = (t.detach() for t in qkv(1, 4, 1, 1, 16).values())
    with pytest.raises(ValueError, match="does not support"):
        attention(q, k, v, window=2, backend="triton")  # float64
    q, k, v = (t.float() for t in (q, k, v))
    with pytest.raises(ValueError, match="does not support"):
        attention(q, k, v, window=2, scale=-1.0, backend="triton")


def random(batch=2, length=300, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16):
    return [
        t.detach().to("cuda", dtype).requires_grad_()
        for t in qkv(batch, length, heads, kv_heads, head_dim).values()
    ]


def outcome(fn, tensors, doc, window):
    y = fn(*tensors, window=window, doc_start_BL=doc)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), tensors)]


@pytest.mark.gpu
def test_two_runs_agree_bit_for_bit():
    tensors, doc = random(4, 1111, 8, 2), documents(4, 1111, "some").cuda()
    for window in (None, 200):
        first, second = (outcome(attention, tensors, doc, window) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_compiles_without_a_graph_break():
    tensors, doc = random(), documents(2, 300, "some").cuda()
    compiled = torch.compile(attention, fullgraph=True)
    for window, starts in ((100, None), (100, doc), (None, doc), (300, None)):
        got = outcome(compiled, tensors, starts, window)
        for a, b in zip(got, outcome(attention, tensors, starts, window), strict=True):
            assert error(a, b) < 1e-2


@pytest.mark.gpu
def test_a_captured_graph_sees_new_documents():
    tensors, doc = random(), documents(2, 300, "some").cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outcome(attention, tensors, doc, 100)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = outcome(attention, tensors, doc, 100)
    doc.copy_(documents(2, 300, "long"))
    graph.replay()
    want = outcome(attention, tensors, doc, 100)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_past_two_to_the_31_numbers():
    length, heads, head_dim = 280_000, 64, 128  # 2.3e9 numbers
    q = torch.randn(1, length, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn_like(q[:, :, :1]) for _ in range(2))
    y = attention(q, k, v, window=40)
    want = attention_reference(*(t[:, -100:].float() for t in (q, k, v)), window=40)
    assert error(y[:, -50:], want[:, -50:]) < 1e-2
