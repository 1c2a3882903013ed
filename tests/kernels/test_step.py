"""One token at a time, in place, against the whole sequence in float64: every operation that a
decoding step is made of, its plain form, its kernel in the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from _check import error

from ablate.kernels import (
    attention,
    attention_step,
    causal_conv1d,
    causal_conv1d_step,
    gated_delta_rule,
    gated_delta_rule_step,
    gla,
    gla_step,
    rotary,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_step,
)

BACKENDS = [
    pytest.param("cpu", "reference", id="plain"),
    pytest.param("cpu", "triton", marks=pytest.mark.interpret, id="interpreted"),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu, id="gpu"),
]
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
everywhere = pytest.mark.parametrize(("device", "backend"), BACKENDS)
dtypes = pytest.mark.parametrize("dtype", LIMITS)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def skip_bf16(device, dtype):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 is not the GPU's")


def strided(t):
    """The same numbers, not next to each other: as of a parameter that holds more."""
    return torch.stack([t, 9 - t], -1)[..., 0]


def check(step, whole, dtype):
    """`step(t)` for each token equals row t of `whole`, which is (B, L, ...)."""
    with torch.no_grad():
        rows = [step(t).cpu() for t in range(whole.shape[1])]
    assert rows[0].dtype == dtype
    assert error(torch.stack(rows, 1), whole) <= LIMITS[dtype]


@everywhere
@dtypes
@pytest.mark.parametrize(("taps", "width", "silu"), [(4, 70, "silu"), (2, 256, None)])
def test_convolution(device, backend, dtype, taps, width, silu):
    skip_bf16(device, dtype)
    data = random(2, 7, 2 * width).to(dtype)[..., :width]  # rows of a wider projection
    weight, bias = random(width, taps, seed=1).float(), random(width, seed=2).float()
    bias = bias if silu else None
    whole = causal_conv1d(
        data.double(), weight.double(), bias if bias is None else bias.double(), activation=silu
    )
    state = torch.zeros(2, taps - 1, width, dtype=dtype, device=device)
    here = [t if t is None else strided(t.to(device)) for t in (weight, bias)]
    x = data.to(device)
    check(
        lambda t: causal_conv1d_step(
            x[:, t], *here, activation=silu, state_BKD=state, backend=backend
        ),
        whole,
        dtype,
    )
    assert torch.equal(state.cpu(), data[:, -(taps - 1) :])


@everywhere
@dtypes
@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "d_state", "skip"),
    [(4, 2, 8, 16, "head"), (3, 1, 20, 12, "channel"), (2, 2, 64, 128, None)],
)
def test_ssd(device, backend, dtype, heads, groups, head_dim, d_state, skip):
    skip_bf16(device, dtype)
    length = 9
    t = {
        "x": random(2, length, heads, head_dim), "dt": random(2, length, heads, seed=1),
        "A": -random(heads, seed=2).exp(), "B": random(2, length, groups, d_state, seed=3),
        "C": random(2, length, groups, d_state, seed=4), "D": None,
    }  # fmt: skip
    if skip:
        t["D"] = random(*((heads,) if skip == "head" else (heads, head_dim)), seed=5)
    bias, start = random(heads, seed=6), random(2, heads, head_dim, d_state, seed=7).float()
    t = {k: v if v is None else v.to(dtype) for k, v in t.items()}
    whole, last = ssd(
        *(v if v is None else v.double() for v in t.values()), dt_bias_H=bias, dt_softplus=True,
        initial_state_BHPN=start.double(), return_final_state=True,
    )  # fmt: skip
    state = start.to(device)
    x, dt, A, B, C, D = (v if v is None else strided(v.to(device)) for v in t.values())
    bias = strided(bias.float().to(device))
    check(
        lambda i: ssd_step(
            x[:, i], dt[:, i], A, B[:, i], C[:, i], D, dt_bias_H=bias,
            dt_softplus=True, state_BHPN=state, backend=backend,
        ),
        whole,
        dtype,
    )  # fmt: skip
    assert error(state, last) <= 1e-5


@everywhere
@dtypes
@pytest.mark.parametrize(("width", "d_state", "full"), [(40, 16, True), (70, 5, False)])
def test_selective_scan(device, backend, dtype, width, d_state, full):
    skip_bf16(device, dtype)
    length = 9
    u, delta, z = (random(2, length, width, seed=s).to(dtype) for s in range(3))
    B, C = (random(2, length, d_state, seed=s).to(dtype) for s in (3, 4))
    A, D, bias = -random(width, d_state, seed=5).exp().float(), random(width).float(), None
    if full:
        bias = random(width, seed=6).float()
    else:
        z = D = None
        delta = delta.abs()
    wide = [v if v is None else v.double() for v in (u, delta, A, B, C, D, z, bias)]
    start = random(2, width, d_state, seed=7).float()
    whole, last = selective_scan(
        *wide[:6], z_BLD=wide[6], delta_bias_D=wide[7], delta_softplus=full,
        initial_state_BDN=start.double(), return_final_state=True,
    )  # fmt: skip
    state = start.to(device)
    u, delta, A, B, C, D, z, bias = (
        v if v is None else strided(v.to(device)) for v in (u, delta, A, B, C, D, z, bias)
    )
    check(
        lambda t: selective_scan_step(
            u[:, t], delta[:, t], A, B[:, t], C[:, t], D, z_BD=None if z is None else z[:, t],
            delta_bias_D=bias, delta_softplus=full, state_BDN=state, backend=backend,
        ),
        whole,
        dtype,
    )  # fmt: skip
    assert error(state, last) <= 1e-5


@everywhere
@dtypes
@pytest.mark.parametrize(
    ("heads", "width", "values", "unit"),
    [(2, 16, 24, True), (3, 12, 8, False), (1, 128, 256, True)],
)
def test_gated_delta_rule(device, backend, dtype, heads, width, values, unit):
    skip_bf16(device, dtype)
    length = 9
    wide = random(2, length, heads * (2 * width + values)).to(dtype)  # q, k and v of one projection
    split = (heads * width, heads * width, heads * values)
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in wide.split(split, -1))
    if not unit:
        q, k = q / width, k / width
    decay, beta = (
        -random(2, length, heads, seed=1).exp(),
        random(2, length, heads, seed=2).sigmoid(),
    )
    start = random(2, heads, width, values, seed=3).float()
    whole, last = gated_delta_rule(
        q.double(), k.double(), v.double(), decay, beta, normalize_qk=unit,
        initial_state_BHKV=start.double(), return_final_state=True,
    )  # fmt: skip
    state = start.to(device)
    rows = [t.to(device) for t in (q, k, v, decay.float(), beta.float())]
    check(
        lambda i: gated_delta_rule_step(
            *(t[:, i] for t in rows), normalize_qk=unit, state_BHKV=state, backend=backend
        ),
        whole,
        dtype,
    )
    assert error(state, last) <= 1e-5


@everywhere
@dtypes
@pytest.mark.parametrize(("heads", "width", "values"), [(2, 16, 24), (3, 12, 8), (1, 96, 200)])
def test_gla(device, backend, dtype, heads, width, values):
    skip_bf16(device, dtype)
    length = 9
    wide = random(2, length, heads * (2 * width + values)).to(dtype)  # q, k and v of one projection
    q, k, v = (
        t.unflatten(-1, (heads, -1))
        for t in wide.split((heads * width, heads * width, heads * values), -1)
    )
    decay = -random(2, length, heads, width, seed=1).exp().to(dtype)
    decay[:, 4, :, ::3] = -torch.inf
    start = random(2, heads, width, values, seed=2).float()
    whole, last = gla(
        *(t.double() for t in (q, k, v, decay)), initial_state_BHKV=start.double(),
        return_final_state=True,
    )  # fmt: skip
    state = start.to(device)
    rows = [t.to(device) for t in (q, k, v, decay)]
    check(
        lambda i: gla_step(*(t[:, i] for t in rows), state_BHKV=state, backend=backend),
        whole,
        dtype,
    )
    assert error(state, last) <= 1e-5


ATTENTION = {  # heads, key and value heads, channels, rotated channels, window, shared keys
    "full": (4, 2, 16, 16, None),
    "half rotated": (2, 2, 24, 12, None),
    "no positions": (3, 1, 64, None, None),
    "ring": (4, 1, 16, 16, 11),
    "ring of one": (2, 1, 16, 16, 1),
}


@everywhere
@dtypes
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION.keys())
def test_attention(device, backend, dtype, parts, case, monkeypatch):
    """Five tokens after a filled cache; the second row stands 68 tokens behind the first."""
    skip_bf16(device, dtype)
    if backend == "triton":
        from ablate.kernels import step_triton

        monkeypatch.setattr(step_triton, "splits", lambda *a: parts)
    elif parts > 1:
        pytest.skip("the plain form has no parts")
    heads, kv, head_dim, dim, window = case
    steps, first = 5, [70, 2]
    length = max(first) + steps
    qkv = random(2, length, (heads + 2 * kv) * head_dim).to(dtype)
    q, k, v = qkv.double().unflatten(-1, (-1, head_dim)).split((heads, kv, kv), 2)
    if dim:
        index = torch.arange(length)[None]
        q, k = (rotary(t, index, base=100.0, dim=dim).to(dtype).double() for t in (q, k))
    whole = attention(q, k, v, window=window)
    slots = length + 5 if window is None else window
    caches = [torch.zeros(2, slots, kv, head_dim, dtype=dtype) for _ in range(2)]
    for row, end in enumerate(first):
        for i in range(end):
            for cache, new in zip(caches, (k, v), strict=True):
                cache[row, i % slots] = new[row, i]
    caches = [c.to(device) for c in caches]
    position = torch.tensor(first)
    check(
        lambda t: attention_step(
            qkv[[0, 1], position + t].to(device), (position + t).to(device), *caches,
            base=100.0 if dim else None, dim=dim, backend=backend,
        ),
        torch.stack([whole[row, at : at + steps] for row, at in enumerate(first)]),
        dtype,
    )  # fmt: skip
    for row, at in enumerate(first):
        last = at + steps - 1
        kept = range(max(0, last + 1 - slots), last + 1)
        slot = [i % slots for i in kept]
        assert error(caches[0][row, slot], k[row, kept]) <= LIMITS[dtype]
        assert error(caches[1][row, slot], v[row, kept]) == 0


def test_a_cache_of_another_type():
    """Weights in float32, caches in bfloat16: values of the projection's type come out."""
    caches = [torch.zeros(1, 8, 1, 16, dtype=torch.bfloat16) for _ in range(2)]
    y = attention_step(torch.ones(1, 64), torch.tensor([0]), *caches)
    assert y.dtype == torch.float32
    assert torch.equal(y, torch.ones(1, 2, 16))


def test_a_projection_that_does_not_fit_is_told():
    cache = torch.zeros(1, 8, 2, 16)
    with pytest.raises(ValueError, match="does not fit a cache of 2 heads of 16"):
        attention_step(torch.ones(1, 7 * 16), torch.tensor([0]), cache, cache.clone())


def test_keys_are_shared_out_by_what_the_gpu_holds():
    from ablate.kernels.step_triton import splits

    assert splits(programs=8, blocks=2048, processors=132) == 64
    assert splits(programs=32, blocks=2048, processors=132) == 16
    assert splits(programs=1024, blocks=2048, processors=132) == 1
    assert splits(programs=8, blocks=5, processors=132) == 4
    assert splits(programs=8, blocks=1, processors=132) == 1
