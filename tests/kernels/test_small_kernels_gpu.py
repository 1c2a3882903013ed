"""Convolution, norms and loss on a GPU: sizes past 2^31, repeatability, compile, graph capture."""

from __future__ import annotations

import pytest
import torch
from _check import assert_compiles_whole, assert_repeats, assert_replays, error

pytest.importorskip("triton")

from ablate.kernels import causal_conv1d, gated_rms_norm, gelu, linear_cross_entropy, rms_norm
from ablate.kernels.cross_entropy_triton import _launch

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def randn(*shape, dtype=BF16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def test_logits_past_two_to_the_31():
    rows, vocabulary = 43_000, 50_304
    logits = torch.empty(rows, vocabulary, device="cuda", dtype=BF16).normal_()
    target = torch.randint(0, vocabulary, (rows,), device="cuda")
    tail = logits[-50:].double()
    loss = torch.empty(rows, device="cuda")
    _launch(logits, target, loss, 0.0, -100, True)
    want = torch.nn.functional.cross_entropy(tail, target[-50:], reduction="none")
    assert error(loss[-50:], want) < 1e-5
    tail = tail.softmax(-1)
    tail[torch.arange(50), target[-50:]] -= 1
    assert error(logits[-50:], tail) < 3e-3


def test_convolution_and_norm_past_two_to_the_31():
    x = randn(2, 600_000, 1792)
    w, b = randn(1792, 4, dtype=torch.float32), randn(1792, dtype=torch.float32)
    y = causal_conv1d(x, w, b)
    want = causal_conv1d(x[1:, -40:], w, b, initial_state_BDK=x[1:, -43:-40], backend="reference")
    assert error(y[1:, -40:], want) < 1e-2
    del y
    y = rms_norm(x, b)
    assert error(y[1, -40:], rms_norm(x[1, -40:], b, backend="reference")) < 1e-2


def model(t):
    x = causal_conv1d(t["x"], t["conv"], t["bias"], doc_start_BL=t["doc"])
    x = gated_rms_norm(x, t["z"], t["norm"], group_size=24)
    y, total = rms_norm(x, t["norm"], residual=t["x"])
    y = gelu(rms_norm(y + total, t["norm"]))
    return linear_cross_entropy(y.flatten(0, 1), t["head"], t["target"], z_loss=1e-3)


def tensors():
    torch.manual_seed(0)
    doc = (torch.arange(70, device="cuda", dtype=torch.int32) // 20 * 20).expand(2, 70)
    t = {
        "x": randn(2, 70, 48),
        "z": randn(2, 70, 48),
        "conv": randn(48, 4, dtype=torch.float32),
        "bias": randn(48, dtype=torch.float32),
        "norm": randn(48, dtype=torch.float32),
        "head": randn(331, 48),
    }
    t = {k: v.requires_grad_() for k, v in t.items()}
    return t | {
        "doc": doc.contiguous(),
        "target": torch.randint(0, 331, (140,), device="cuda"),
    }


def test_two_runs_agree_bit_for_bit():
    assert_repeats(model, tensors())


def test_compile_takes_the_whole_graph():
    assert_compiles_whole(model, tensors())


def test_graph_capture_and_replay():
    assert_replays(model, tensors())
