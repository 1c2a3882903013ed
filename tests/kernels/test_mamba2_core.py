"""The core of a Mamba-2 layer against code not written here, and against its own parts."""

from __future__ import annotations

import pytest
import torch
from _check import (
    DEVICES,
    assert_compiles_whole,
    assert_repeats,
    assert_replays,
    compare,
    error,
)

from ablate.kernels import rms_norm
from ablate.kernels.mamba2_core import mamba2_core, mamba2_core_reference


def make(b, length, heads, p, groups, n, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    inner = heads * p
    channels = inner + 2 * groups * n
    return {
        "zxbcdt_BLE": r(b, length, inner + channels + heads),
        "conv_weight_CK": r(channels, 4) / 2,
        "conv_bias_C": r(channels),
        "dt_bias_H": r(heads),
        "A_log_H": r(heads),
        "D_H": r(heads),
        "norm_weight_I": 1 + r(inner) / 10,
    }


def test_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    heads, p, n, length = 4, 8, 16, 100
    config = transformers.Mamba2Config(
        hidden_size=16,
        expand=2,
        num_heads=heads,
        head_dim=p,
        state_size=n,
        n_groups=1,
        conv_kernel=4,
        chunk_size=32,
        use_bias=False,
        time_step_limit=(0.0, float("inf")),
    )
    torch.manual_seed(0)
    mixer = modeling.Mamba2Mixer(config, layer_idx=0).float()
    args = make(2, length, heads, p, 1, n)
    with torch.no_grad():
        mixer.conv1d.weight.copy_(args["conv_weight_CK"][:, None])
        mixer.conv1d.bias.copy_(args["conv_bias_C"])
        mixer.dt_bias.copy_(args["dt_bias_H"])
        mixer.A_log.copy_(args["A_log_H"])
        mixer.D.copy_(args["D_H"])
        mixer.norm.weight.copy_(args["norm_weight_I"])
        hidden = torch.randn(2, length, 16)
        want = mixer(hidden)
        args["zxbcdt_BLE"] = mixer.in_proj(hidden)
        got = mixer.out_proj(
            mamba2_core(**args, head_dim=p, n_groups=1, d_state=n, eps=config.layer_norm_epsilon)
        )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_documents_are_independent():
    args = make(1, 60, 2, 4, 2, 4, dtype=torch.float64)
    cut = 23
    starts = torch.where(torch.arange(60) < cut, 0, cut)[None].to(torch.int32)
    shape = {"head_dim": 4, "n_groups": 2, "d_state": 4, "norm_group_size": 4}
    got = mamba2_core(**args, **shape, doc_start_BL=starts)
    z = args.pop("zxbcdt_BLE")
    parts = [mamba2_core(v, **args, **shape) for v in (z[:, :cut], z[:, cut:])]
    torch.testing.assert_close(got, torch.cat(parts, 1))


@pytest.mark.parametrize("extra", [-1, 8])
def test_width_that_does_not_fit_is_told(extra):
    args = make(1, 5, 4, 16, 1, 16)
    args["zxbcdt_BLE"] = torch.zeros(1, 5, 2 * 64 + 2 * 16 + 4 + extra)
    with pytest.raises(ValueError, match=f"is {164 + extra}, but 4 heads of 16 .* take 164, and"):
        mamba2_core(**args, head_dim=16, n_groups=1, d_state=16)


# b, length, heads, p, groups, n, and what is unlike the published layer
CASES = {
    "plain, two groups": (2, 70, 4, 16, 2, 16, ""),
    "norm groups, a group a head": (1, 33, 2, 8, 2, 16, "norm_groups docs"),
    "one head, short, no norm": (2, 5, 1, 16, 1, 8, "no_norm no_bias"),
    "one token, three taps": (1, 1, 8, 16, 1, 16, "taps3"),
    "whole chunks, D a channel, documents": (1, 128, 2, 16, 1, 16, "d_rank2 docs"),
    "a reset everywhere": (2, 40, 2, 16, 1, 16, "every_token"),
}


def case(b, length, heads, p, groups, n, what, seed=0):
    """Tensors in float64 that require gradients, and the options of the call."""
    args = make(b, length, heads, p, groups, n, dtype=torch.float64, seed=seed)
    if "taps3" in what:
        args["conv_weight_CK"] = args["conv_weight_CK"][:, :3]
    if "no_bias" in what:
        args["conv_bias_C"] = None
    if "no_norm" in what:
        args["norm_weight_I"] = None
    if "d_rank2" in what:
        g = torch.Generator().manual_seed(1)
        args["D_H"] = torch.randn(heads, p, generator=g, dtype=torch.float64)
    args = {k: None if v is None else v.clone().requires_grad_() for k, v in args.items()}
    options = {"head_dim": p, "n_groups": groups, "d_state": n}
    if "norm_groups" in what:
        options["norm_group_size"] = p
    if "docs" in what or "every_token" in what:
        every = 1 if "every_token" in what else 23
        position = torch.arange(length)
        starts = [(position - r) // every * every + r for r in range(b)]
        options["doc_start_BL"] = torch.stack(starts).to(torch.int32)
    return args, options


def on(device, options):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_columns_of_padding_are_not_read_and_their_gradient_is_zero(device, backend):
    args, options = case(2, 70, 3, 16, 1, 16, "docs")
    padded = torch.nn.functional.pad(args["zxbcdt_BLE"].detach(), (0, 5), value=torch.nan)
    options = on(device, options)
    found = []
    for z, dtype, form in (
        (args["zxbcdt_BLE"], torch.float64, "reference"),
        (args["zxbcdt_BLE"], torch.float32, backend),
        (padded, torch.float32, backend),
    ):
        tensors = {k: v.detach().float() for k, v in {**args, "zxbcdt_BLE": z}.items()}
        leaves = [v.to(device, dtype).requires_grad_() for v in tensors.values()]
        y = mamba2_core(**dict(zip(tensors, leaves, strict=True)), **options, backend=form)
        found.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    want, plain, got = found
    assert not got[1][..., -5:].any()
    got[1] = got[1][..., :-5]
    # rows that are not aligned are read in another order on a GPU, so each has its own rounding
    for exact, *ours in zip(want, plain, got, strict=True):
        assert all(error(v, exact) < 1e-5 for v in ours)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
def test_triton_against_float64(device, dtype, sizes):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("no more than float16 shows in the interpreter")
    args, options = case(*sizes)
    compare(
        lambda **t: mamba2_core(**t, **on(device, options), backend="triton"),
        lambda **t: mamba2_core_reference(**t, **options),
        args,
        limit={torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype],
        dtype=dtype,
        device=device,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_scales_no_gradient(device):
    """Rounding may scatter gradients but must not shrink them: what is lost in every layer adds up.
    Digits that are cut off instead of rounded lose 0.3% to 1%."""
    heads, p, n, length = 3, 64, 32, 192
    args = make(1, length, heads, p, 1, n, dtype=torch.float64)
    args |= {"dt_bias_H": args["dt_bias_H"] - 4.0}  # step sizes of a new layer, about 0.02
    shape = {"head_dim": p, "n_groups": 1, "d_state": n}
    weight = torch.randn(
        1, length, heads * p, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    z = args["zxbcdt_BLE"].bfloat16()
    rest = {k: v.float() for k, v in args.items() if k != "zxbcdt_BLE"}
    found = []
    for fn, dtype, place in (
        (mamba2_core, None, device), (mamba2_core_reference, torch.float64, "cpu"),
    ):  # fmt: skip
        leaf = z.detach().to(place, dtype).requires_grad_()
        more = {} if dtype else {"backend": "triton"}
        y = fn(leaf, **{k: v.to(place, dtype) for k, v in rest.items()}, **shape, **more)
        (y.double() * weight.to(place)).sum().backward()
        found.append(leaf.grad.double().cpu().split((heads * p, heads * p, 2 * n, heads), -1))
    for name, ours, want in zip(("z", "x", "B and C", "dt"), *found, strict=True):
        scale = float((ours * want).sum() / want.square().sum())
        assert abs(scale - 1) < 2e-3, f"{name}: {scale:.5f}"  # draws differ by 1e-3


def layer_end(t, options, backend, apart):
    """From the in-projection to the stream and its norm; apart: what the gated norm divides by is
    left to the addition."""
    t = dict(t)
    projection, residual, norm = (t.pop(k) for k in ("projection", "residual", "next_norm"))
    if not apart:
        y = mamba2_core(**t, **options, backend=backend)
        out = y @ projection.to(y.dtype).t()
        return rms_norm(out, norm, residual=residual, backend=backend)
    inner = projection.shape[1]
    out, squares = mamba2_core(**t, **options, projection_DI=projection, backend=backend)
    return rms_norm(
        out, norm, residual=residual, squares_xS=squares, squares_of=inner, backend=backend
    )


APART = {k: CASES[k] for k in CASES if k in (
    "plain, two groups", "whole chunks, D a channel, documents", "a reset everywhere",
)}  # fmt: skip


def layer(args, width, dtype, seed=5):
    """Arguments of `layer_end`, the projection's output in dtype, and scores of its outputs."""
    g = torch.Generator().manual_seed(seed)
    inner, rows = args["norm_weight_I"].shape[0], args["zxbcdt_BLE"].shape[:2]
    shapes = {"projection": (width, inner), "residual": (*rows, width), "next_norm": (width,)}
    args = args | {
        k: torch.randn(shape, generator=g, dtype=torch.float64) / inner**0.5
        for k, shape in shapes.items()
    }
    args = {
        k: v if v is None else v.detach().to(dtype if k == "zxbcdt_BLE" else torch.float32)
        for k, v in args.items()
    }
    return args, [torch.randn(*rows, width, generator=g, dtype=torch.float64) for _ in range(2)]


def results(args, scores, options, device, dtype, backend, apart):
    """Outputs and gradients of `layer_end`; dtype: of all arguments, None for their own."""
    t = {
        k: v if v is None else v.clone().to(device, dtype).requires_grad_() for k, v in args.items()
    }
    u, x = layer_end(t, on(device, options), backend, apart)
    sum((o.double().cpu() * s).sum() for o, s in zip((u, x), scores, strict=True)).backward()
    return {"u": u.detach(), "x": x.detach()} | {k: v.grad for k, v in t.items() if v is not None}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("sizes", APART.values(), ids=APART.keys())
def test_norm_apart_is_the_norm_within(device, dtype, limit, sizes):
    """Values and the gradient of every input, with gates of zero, of nearly zero and far out."""
    args, options = case(*sizes)
    with torch.no_grad():
        gate = args["zxbcdt_BLE"][..., : args["norm_weight_I"].shape[0]]
        for i, value in enumerate((0.0, 1e-38, -90.0, 60.0)):
            gate[..., i::11] = value
    args, scores = layer(args, 24, dtype)
    want = results(args, scores, options, "cpu", torch.float64, "reference", False)
    exact = results(args, scores, options, "cpu", torch.float64, "reference", True)
    ours = results(args, scores, options, device, None, "triton", True)
    for name, w in want.items():
        assert error(exact[name], w) < 1e-9, name
        if float(w.norm()) > 1e-6:  # resets everywhere leave A nothing
            assert error(ours[name], w) < limit, name


@pytest.mark.parametrize("device", DEVICES)
def test_norm_apart_is_as_exact_in_bfloat16(device):
    """Over three draws no gradient is 1.5 times as far from float64 as with the norm within, though
    what the norm takes out of a gradient meets it after rounding."""
    errors = {}
    for seed in range(3):
        args, options = case(1, 128, 3, 64, 1, 16, "", seed=seed)
        args["dt_bias_H"] = args["dt_bias_H"].detach() - 4.0
        args, scores = layer(args, 96, torch.bfloat16, seed)
        want = results(args, scores, options, "cpu", torch.float64, "reference", False)
        for apart in (False, True):
            got = results(args, scores, options, device, None, "triton", apart)
            for name, w in want.items():
                errors.setdefault((name, apart), []).append(error(got[name], w))
    for name in want:
        within, ours = (sum(errors[name, apart]) for apart in (False, True))
        assert ours <= 1.5 * within + 3e-3, f"{name}: {ours / 3:.1e} for {within / 3:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("apart", [False, True])
def test_repeats_compiles_and_replays(apart):
    args, options = case(2, 130, 4, 16, 1, 16, "docs")
    args, _ = layer(args, 24, torch.bfloat16)
    tensors = {k: v.to("cuda").requires_grad_() for k, v in args.items()}
    options = on("cuda", options)

    def scalar(t):
        u, x = layer_end(t, options, None, apart)
        return u.float().cos().sum() + x.sin().sum()

    assert_repeats(scalar, tensors)
    assert_compiles_whole(scalar, tensors)
    assert_replays(scalar, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("normed", [False, True])
def test_squares_of_parts_may_count_differently(device, normed):
    """A norm over all parts gives each position one gradient; any other use must be right too."""
    args, options = case(2, 70, 4, 16, 2, 16, "")
    if not normed:
        args["norm_weight_I"] = None
    args["projection_DI"] = torch.eye(64, dtype=torch.float64)  # so that all is visible
    found = []
    for place, dtype, backend in (
        (device, torch.float32, "triton"), ("cpu", torch.float64, "reference"),
    ):  # fmt: skip
        t = {k: v if v is None else v.detach().clone().to(place, dtype) for k, v in args.items()}
        for v in t.values():
            if v is not None:
                v.requires_grad_()
        out, squares = mamba2_core(**t, **on(place, options), backend=backend)
        if found:  # the reference has one part
            gated = out / t["norm_weight_I"] if normed else out
            squares = gated.unflatten(-1, (found[0][0].shape[-1], -1)).square().sum(-1)
        weights = torch.arange(1, squares.shape[-1] + 1, device=place)
        ((squares * weights).sum() + out.sin().sum()).backward()
        grads = [t[k].grad for k in ("zxbcdt_BLE", "norm_weight_I") if t[k] is not None]
        found.append((squares.detach(), out.detach(), *grads))
    assert found[0][0].shape[-1] > 1
    for ours, want in zip(*found, strict=True):
        assert error(ours, want) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("use", ["sum", "a piece of more", "transposed"])
def test_gradients_may_lie_in_any_way(device, squares, use):
    args, options = case(1, 70, 2, 16, 1, 16, "no_norm")
    found = []
    for place, dtype, backend in (
        (device, torch.float32, "triton"), ("cpu", torch.float64, "reference"),
    ):  # fmt: skip
        t = {k: v if v is None else v.detach().clone().to(place, dtype) for k, v in args.items()}
        z = t["zxbcdt_BLE"].requires_grad_()
        one = {"projection_DI": torch.eye(32).to(place, dtype)} if squares else {}
        out = mamba2_core(**t, **on(place, options), **one, backend=backend)
        y, sums = out if squares else (out, z[..., :1] * 0)
        total = sums.sum(-1).log1p().sum()
        if use == "sum":
            total = total + y.sum()
        elif use == "transposed":
            total = total + (y.transpose(1, 2) * torch.arange(70, device=place)).sum()
        else:
            wide = torch.cat([y, y.detach()], -1)
            total = total + (wide * torch.arange(64, device=place)).sum()
        total.backward()
        found.append(z.grad)
    assert error(*found) < 1e-5


def test_several_norms_stay_before_the_projection():
    args = make(1, 5, 4, 16, 2, 16)
    options = {"head_dim": 16, "n_groups": 2, "d_state": 16, "norm_group_size": 32}
    with pytest.raises(ValueError, match="norm_group_size=32"):
        mamba2_core(**args, **options, projection_DI=torch.ones(8, 64))
