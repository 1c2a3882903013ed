"""The core of a Mamba-2 layer against code not written here, and against its own parts."""

from __future__ import annotations

import pytest
import torch

from ablate.kernels.mamba2_core import inner_width, mamba2_core


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


def test_width_that_does_not_fit_is_told():
    assert inner_width(2 * 64 + 2 * 16 + 4, 16, 1, 16) == 64
    with pytest.raises(ValueError, match="no whole number of heads"):
        inner_width(2 * 64 + 2 * 16 + 5, 16, 1, 16)
