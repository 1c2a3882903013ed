"""The scan's forms against its definition, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from _check import DEVICES

from ablate.kernels.ssd import ssd, ssd_chunked, ssd_recurrent


def doc_starts(b: int, length: int, every: int, first: int = 0) -> torch.Tensor:
    """Documents of `every` tokens; those of row 0 begin at `first` (< 0: continued)."""
    position = torch.arange(length)
    rows = [(position - first - r) // every * every + first + r for r in range(b)]
    return torch.stack(rows).to(torch.int32)


def make(b, length, heads, p, groups, n, *, decay=1.0, dtype=torch.float64, seed=0, d_rank=1):
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    args = {
        "x_BLHP": r(b, length, heads, p),
        "dt_BLH": r(b, length, heads),
        "A_H": -decay * torch.exp(r(heads)),
        "B_BLGN": r(b, length, groups, n) / math.sqrt(n),
        "C_BLGN": r(b, length, groups, n),
        "D_H": r(heads) if d_rank == 1 else r(heads, p),
        "dt_bias_H": r(heads),
        "initial_state_BHPN": r(b, heads, p, n),
    }
    return {k: v.to(dtype).requires_grad_() for k, v in args.items()}


def run(form, args, *, final=True, **options):
    """Outputs and the gradients of a random projection of them, by name."""
    out = form(**args, dt_softplus=True, return_final_state=final, **options)
    outs = dict(zip(("y", "state"), out if final else (out,), strict=False))
    g = torch.Generator().manual_seed(9)
    loss = sum(
        (v * torch.randn(v.shape, generator=g, dtype=torch.float64).to(v)).sum()
        for v in outs.values()
    )
    leaves = {k: v for k, v in args.items() if v is not None and v.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return outs | {f"grad {k}": v for k, v in zip(leaves, grads, strict=True) if v is not None}


def errors(got, want):
    """Norm-wise; the floor is for gradients that are zero, as of A with a reset everywhere."""
    found = {}
    for name, w in want.items():
        g = got[name].double().cpu()
        assert torch.isfinite(g).all(), name
        found[name] = float((g - w.double()).norm() / w.double().norm().clamp_min(1e-2))
    return found


def assert_close(got, want, tolerance, plain=None):
    """plain: results of PyTorch's form in the same type, which A's gradient, a small difference of
    large sums, may leave as far off; three times its errors are no fault."""
    assert got.keys() == want.keys()
    allowed = {} if plain is None else errors(plain, want)
    for name, error in errors(got, want).items():
        limit = max(tolerance, 3 * allowed.get(name, 0.0))
        assert error <= limit, f"{name}: {error:.2e} > {limit:.1e}"


@pytest.mark.parametrize(
    ("b", "length", "heads", "p", "groups", "n"),
    [(2, 150, 4, 8, 2, 4), (1, 5, 1, 4, 1, 3), (2, 64, 3, 4, 3, 8), (1, 129, 2, 4, 1, 4)],
)
@pytest.mark.parametrize("docs", [None, "some", "every token"])
@pytest.mark.parametrize("with_state", [True, False])
def test_chunked_is_the_recurrence(b, length, heads, p, groups, n, docs, with_state):
    args = make(b, length, heads, p, groups, n, d_rank=1 + length % 2)
    if not with_state:
        args["initial_state_BHPN"] = None
    starts = None
    if docs is not None:
        every = 37 if docs == "some" else 1
        starts = doc_starts(b, length, every, first=-5 if docs == "some" else 0)
    got = run(ssd_chunked, args, final=with_state, doc_start_BL=starts)
    want = run(ssd_recurrent, args, final=with_state, doc_start_BL=starts)
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("decay", [1e-4, 1.0, 300.0])
def test_weak_and_strong_decay_in_float32(decay):
    args = make(2, 200, 2, 8, 1, 8, decay=decay)
    want = run(ssd_recurrent, args)
    args32 = {k: v.detach().float().requires_grad_() for k, v in args.items()}
    got = run(ssd_chunked, args32)
    assert_close(got, want, 1e-5)


def test_zero_steps_keep_their_gradient():
    # dt = 0 makes spans whose exponent is exactly zero: their gradient must not be cut or halved.
    args = make(1, 70, 1, 4, 1, 4)
    dt = args["dt_BLH"].detach().abs()
    dt[:, ::3] = 0.0
    args |= {"dt_BLH": dt.requires_grad_(), "dt_bias_H": None}

    def form(f):
        def call(**kw):
            return f(**(kw | {"dt_softplus": False}))

        return call

    assert_close(run(form(ssd_chunked), args), run(form(ssd_recurrent), args), 1e-12)


def test_retention_is_a_special_case():
    # RetNet, arXiv:2307.08621, equation 5: (Q K^T * gamma^(t-s)) V.
    b, length, heads, p, n = 1, 80, 2, 6, 4
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(b, length, heads, n, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(b, length, heads, p, generator=g, dtype=torch.float64)
    gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))
    span = torch.arange(length)[:, None] - torch.arange(length)
    weight = torch.where(span >= 0, gamma[:, None, None] ** span.clamp_min(0), 0.0)
    want = torch.einsum("blhn,bshn,hls,bshp->blhp", q, k, weight, v)
    got = ssd(v, torch.ones(b, length, heads, dtype=torch.float64), gamma.log(), k, q)
    torch.testing.assert_close(got, want)


def test_two_segments_are_one_sequence():
    args = make(2, 100, 2, 4, 1, 4)
    starts = doc_starts(2, 100, 30)
    whole, state = ssd_chunked(
        **args, dt_softplus=True, return_final_state=True, doc_start_BL=starts
    )
    cut = 71
    timed = ("x_BLHP", "dt_BLH", "B_BLGN", "C_BLGN")
    left = args | {k: args[k][:, :cut] for k in timed}
    right = args | {k: args[k][:, cut:] for k in timed}
    y1, s1 = ssd_chunked(
        **left, dt_softplus=True, return_final_state=True, doc_start_BL=starts[:, :cut]
    )
    right["initial_state_BHPN"] = s1
    y2, s2 = ssd_chunked(
        **right, dt_softplus=True, return_final_state=True, doc_start_BL=starts[:, cut:] - cut
    )
    torch.testing.assert_close(torch.cat((y1, y2), 1), whole)
    torch.testing.assert_close(s2, state)


def test_gradcheck():
    args = make(1, 7, 2, 2, 1, 2)
    names = list(args)

    def f(*values):
        return ssd_chunked(
            **dict(zip(names, values, strict=True)), dt_softplus=True, return_final_state=True
        )

    assert torch.autograd.gradcheck(f, tuple(args.values()))


def test_low_precision_keeps_its_type():
    args = make(1, 70, 2, 4, 1, 4, dtype=torch.bfloat16)
    y, state = ssd_chunked(**args, return_final_state=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


def test_wrong_shapes_are_told():
    args = make(1, 7, 3, 2, 1, 2)
    with pytest.raises(ValueError, match="3 heads"):
        ssd(**(args | {k: args[k].expand(1, 7, 2, 2) for k in ("B_BLGN", "C_BLGN")}))
    with pytest.raises(ValueError, match="dt has shape"):
        ssd(**(args | {"dt_BLH": args["dt_BLH"][:, :3]}))
    with pytest.raises(ValueError, match="backend"):
        ssd(**args, backend="cuda")


TRITON_SHAPES = {
    "two groups, odd length": (2, 150, 4, 16, 2, 16),
    "a group a head, narrow": (1, 70, 2, 8, 2, 4),
    "one short chunk": (1, 5, 1, 16, 1, 32),
    "whole chunks": (1, 128, 3, 16, 1, 16),
}


# On a GPU every configuration that the table of the kernels can choose: widths and types.
GPU_SHAPES = TRITON_SHAPES | {
    "published": (2, 200, 6, 64, 1, 128),
    "many groups": (1, 130, 8, 32, 4, 64),
    "wide heads": (1, 96, 2, 128, 1, 64),
}


def triton_against_the_recurrence(shape, docs, device, dtype, tolerance, decay=1.0):
    length = shape[1]
    args = make(*shape, d_rank=1 + (docs == "some"), decay=decay)
    if docs is None and length == 128:
        args |= {"D_H": None, "dt_bias_H": None, "initial_state_BHPN": None}
    # the arguments as the kernel gets them, so that no rounding of inputs counts as its error
    args = {
        k: v if v is None else v.detach().to(dtype).double().requires_grad_()
        for k, v in args.items()
    }
    starts = None
    if docs is not None:
        starts = doc_starts(
            shape[0], length, 37 if docs == "some" else 1, -5 if docs == "some" else 0
        )
    want = run(ssd_recurrent, args, doc_start_BL=starts)
    args = {
        k: v if v is None else v.detach().to(device, dtype).requires_grad_()
        for k, v in args.items()
    }
    plain = None
    if dtype == torch.float32:
        same = {
            k: v if v is None else v.detach().to("cpu", copy=True).requires_grad_()
            for k, v in args.items()
        }
        plain = run(ssd_chunked, same, doc_start_BL=starts)
    if starts is not None:  # rows of a longer matrix, and numbers that are not next to each other
        starts = torch.nn.functional.pad(starts, (0, 3)).to(device)[:, :-3]
        for name in ("A_H", "D_H", "dt_bias_H"):
            v = args[name].detach()
            args[name] = torch.stack([v, 9 - v], -1)[..., 0].requires_grad_()
    got = run(ssd, args, doc_start_BL=starts, backend="triton")
    if docs is not None:  # resets leave A's gradient a small difference of large sums, or nothing
        a, b = got.pop("grad A_H").double().cpu(), want.pop("grad A_H").double()
        assert (a - b).norm() <= 5 * tolerance * b.norm().clamp_min(0.05)
    assert_close(got, want, tolerance, plain)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", TRITON_SHAPES.values(), ids=TRITON_SHAPES.keys())
@pytest.mark.parametrize("docs", [None, "some", "every token"])
def test_triton_in_the_interpreter(shape, docs):
    triton_against_the_recurrence(shape, docs, "cpu", torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES.keys())
@pytest.mark.parametrize("docs", [None, "some", "every token"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_triton_on_a_gpu(shape, docs, dtype, tolerance):
    triton_against_the_recurrence(shape, docs, "cuda", dtype, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 3e-3)])
def test_fast_decay(device, dtype, tolerance):
    # Hardly more than the pair of a position with itself is left, and the gradients of A and of the
    # bias are what the few others add: they must not drown in that pair's rounding.
    shape = (1, 70, 2, 16, 1, 16)
    triton_against_the_recurrence(shape, None, device, dtype, tolerance, decay=30.0)


@pytest.mark.interpret
def test_triton_in_segments(monkeypatch):
    # 18 chunks of 64 tokens, so that the state is carried over two segments
    args = make(1, 17 * 64 + 5, 1, 16, 1, 16, decay=0.02)
    starts = doc_starts(1, 17 * 64 + 5, 700, -5)
    want = run(ssd_chunked, args, doc_start_BL=starts)
    args32 = {k: v.detach().float().requires_grad_() for k, v in args.items()}
    got = run(ssd, args32, doc_start_BL=starts, backend="triton")
    assert_close(got, want, 1e-5)
