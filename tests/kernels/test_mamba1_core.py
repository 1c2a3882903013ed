"""The core of a Mamba-1 layer against code not written here, and against its own parts."""

from __future__ import annotations

import pytest
import torch
from _check import DEVICES, assert_compiles_whole, assert_repeats, assert_replays, compare

from ablate.kernels.mamba1_core import mamba1_core, mamba1_core_reference

LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# b, length, inner, state, rank, and what is unlike the published layer
CASES = {
    "plain": (2, 70, 48, 16, 8, ""),
    "documents, odd widths": (1, 33, 20, 5, 3, "docs"),
    "short, no bias": (2, 5, 16, 4, 1, "no_bias"),
    "one token, three taps": (4, 1, 8, 8, 2, "taps3"),
    "a reset everywhere, two taps": (2, 40, 16, 8, 2, "every_token taps2"),
}


def make(b, length, inner, n, rank, what="", dtype=torch.float64, seed=0):
    """Tensors that require gradients, and the options of the call."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    taps = 2 if "taps2" in what else 3 if "taps3" in what else 4
    args = {
        "xz_BLE": r(b, length, 2 * inner),
        "conv_weight_IK": r(inner, taps) / 2,
        "conv_bias_I": None if "no_bias" in what else r(inner),
        "x_proj_MI": r(rank + 2 * n, inner) / inner**0.5,
        "dt_proj_IR": r(inner, rank) / rank**0.5,
        "dt_bias_I": r(inner) - 2,
        "A_log_IN": torch.arange(1, n + 1).log().expand(inner, n).to(dtype) + r(inner, n) / 10,
        "D_I": r(inner),
    }
    options = {}
    if "docs" in what or "every_token" in what:
        every = 1 if "every_token" in what else 23
        position = torch.arange(length)
        starts = [(position - row) // every * every + row for row in range(b)]
        options["doc_start_BL"] = torch.stack(starts).to(torch.int32)
    return {k: None if v is None else v.requires_grad_() for k, v in args.items()}, options


def test_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = transformers.MambaConfig(
        hidden_size=16, state_size=4, expand=2, conv_kernel=4, time_step_rank=3, use_bias=False
    )
    torch.manual_seed(0)
    mixer = modeling.MambaMixer(config, layer_idx=0).double()
    args, _ = make(2, 50, 32, 4, 3)
    with torch.no_grad():
        mixer.conv1d.weight.copy_(args["conv_weight_IK"][:, None])
        mixer.conv1d.bias.copy_(args["conv_bias_I"])
        mixer.x_proj.weight.copy_(args["x_proj_MI"])
        mixer.dt_proj.weight.copy_(args["dt_proj_IR"])
        mixer.dt_proj.bias.copy_(args["dt_bias_I"])
        mixer.A_log.copy_(args["A_log_IN"])
        mixer.D.copy_(args["D_I"])
        hidden = torch.randn(2, 50, 16, dtype=torch.float64)
        want = mixer(hidden)
        args["xz_BLE"] = mixer.in_proj(hidden)
        got = mixer.out_proj(mamba1_core(**args))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_documents_are_independent():
    args, _ = make(1, 60, 8, 4, 2)
    cut = 23
    starts = torch.where(torch.arange(60) < cut, 0, cut)[None].to(torch.int32)
    got = mamba1_core(**args, doc_start_BL=starts)
    xz = args.pop("xz_BLE")
    parts = [mamba1_core(v, **args) for v in (xz[:, :cut], xz[:, cut:])]
    torch.testing.assert_close(got, torch.cat(parts, 1))


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("xz_BLE", (1, 5, 33), "last axis of xz is 33, but dt_proj has 16 channels, which take 32"),
        ("conv_weight_IK", (8, 4), "conv_weight has 8 channels and A_log 16, but dt_proj has 16"),
        ("x_proj_MI", (9, 16), r"x_proj is \(9, 16\), but .* take \(10, 16\)"),
    ],
)
def test_widths_that_do_not_fit_are_told(name, shape, says):
    args, _ = make(1, 5, 16, 4, 2)
    args[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=says):
        mamba1_core(**args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(device, dtype, name):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 is not the GPU's")
    args, options = make(*CASES[name])

    def on(fn):
        def call(**tensors):
            starts = options.get("doc_start_BL")
            if starts is not None:
                starts = starts.to(tensors["xz_BLE"].device)
            return fn(**tensors, doc_start_BL=starts)

        return call

    _, length, *_, what = CASES[name]
    if length == 1 or "every_token" in what:  # no state is carried, so nothing decays
        args["A_log_IN"].requires_grad_(False)
    compare(
        on(lambda **t: mamba1_core(**t, backend="triton")),
        on(mamba1_core_reference),
        args,
        limit=LIMITS[dtype],
        dtype=dtype,
        device=device,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_without_gradients_the_value_is_the_same(device):
    args, _ = make(2, 20, 16, 4, 2, dtype=torch.float32)
    args = {k: v.detach().to(device).requires_grad_() for k, v in args.items()}
    with torch.no_grad():
        bare = mamba1_core(**args, backend="triton")
    assert torch.equal(bare, mamba1_core(**args, backend="triton"))


def on_gpu(dtype=torch.bfloat16):
    """Weights in float32, as in training."""
    args, _ = make(2, 300, 256, 16, 16, dtype=torch.float32)
    args["xz_BLE"] = args["xz_BLE"].detach().to(dtype)
    args = {k: v.detach().cuda().requires_grad_() for k, v in args.items()}
    starts = torch.zeros(2, 300, dtype=torch.int32, device="cuda")
    starts[:, 100:] = 100

    def loss(t):
        return mamba1_core(**t, doc_start_BL=starts).float().square().sum()

    return loss, args


@pytest.mark.gpu
def test_repeats():
    assert_repeats(*on_gpu())


@pytest.mark.gpu
def test_compiles_whole():
    assert_compiles_whole(*on_gpu())


@pytest.mark.gpu
def test_replays():
    assert_replays(*on_gpu())
