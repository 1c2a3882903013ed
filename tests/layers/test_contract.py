"""The cost contract of every layer kind, against the real modules and by brute force."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ablate.layers import KINDS, Context
from ablate.layers.options import build

SCAN_TILE = 64

# kind, options, at width 32
CASES = [
    ("M", {"head_dim": 16}),
    ("M", {"head_dim": 8, "d_state": 5, "n_groups": 2, "d_conv": 3, "conv_bias": False}),
    ("M", {"head_dim": 16, "d_inner": 48, "d_state": 16, "n_groups": 3, "norm_per_group": False}),
    ("m", {}),
    ("m", {"d_state": 5, "dt_rank": 3, "expand": 1.5, "d_conv": 2, "conv_bias": False}),
    ("G", {"head_dim": 8, "n_heads": 3}),
    ("G", {"head_dim": 5, "n_heads": 2, "expand_v": 1.4, "d_conv": 2, "conv_bias": True}),
    ("G", {"head_dim": 24, "expand_v": 0.5, "allow_neg_eigval": True}),
    ("*", {"head_dim": 8}),
    ("*", {"head_dim": 16, "n_heads": 3, "n_kv_heads": 1, "rope_base": None, "bias": True}),
    ("*", {"head_dim": 8, "n_heads": 6, "n_kv_heads": 2, "rope_share": 0.5, "d_conv": 4}),
    ("S", {"head_dim": 8, "window": 7}),
    ("S", {"head_dim": 8, "window": 7, "n_kv_heads": 2, "d_conv": 3}),
    ("L", {}),
    ("L", {"n_heads": 2, "expand_k": 0.75, "expand_v": 1.5, "gate_rank": 3}),
    ("R", {"head_dim": 16}),
    ("R", {"head_dim": 6, "n_heads": 3, "expand_v": 0.5, "rope_base": None}),
    ("-", {}),
    ("-", {"kind": "gelu", "bias": True}),
    ("-", {"kind": "relu2", "d_hidden": 40}),
    ("-", {"kind": "swiglu", "d_hidden": 40, "bias": True}),
]
all_cases = pytest.mark.parametrize(("letter", "values"), CASES)


def make(letter, values):
    kind = KINDS[letter]
    options = build(kind.options, 32, values, f"arch.{kind.name}")
    torch.manual_seed(0)
    module = kind.module(options, 1e-5)
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, 0.5 if "norm" in name else 0.0, 0.3)
    return options, module


def scan_shape(letter, o):
    """Heads with keys of their own, and the channels of a key and of a value."""
    if letter == "M":
        return o.n_groups, o.d_state, o.head_dim
    return o.n_heads, o.d_key // o.n_heads, o.d_value // o.n_heads


def mixing(letter, o, T):
    """FLOPs of token mixing by walking over tokens and pairs, and how many pairs there are."""
    flops = pairs = 0
    for t in range(T):
        for s in range(T):
            if letter in "*S":
                if s <= t and (o.window is None or s > t - o.window):
                    pairs += 1
                    flops += o.n_heads * (2 * o.head_dim + 2 * o.head_dim)  # scores, values
            elif letter in "MLR" and s // SCAN_TILE == t // SCAN_TILE:
                pairs += 1
                heads, keys, values = scan_shape(letter, o)
                flops += 2 * heads * keys  # C_t . B_s, or q_t . k_s
                flops += 2 * o.n_heads * values  # its product with x_s, or v_s
            elif letter == "G" and s // SCAN_TILE == t // SCAN_TILE:
                pairs += 1
                flops += 2 * o.n_heads * 2 * o.head_dim  # k_t . k_s and q_t . k_s
                flops += 2 * o.n_heads * 2 * o.head_v_dim  # in the system's solution, and in o_t
        if letter == "G":
            outer = 2 * o.n_heads * o.head_dim * o.head_v_dim
            flops += 2 * outer * (t // SCAN_TILE > 0)  # key and query read the state before
            flops += outer * (t // SCAN_TILE < (T - 1) // SCAN_TILE)
        if letter in "MLR":
            _, keys, values = scan_shape(letter, o)
            outer = 2 * o.n_heads * keys * values
            flops += outer * (t // SCAN_TILE > 0)  # reads the state of the tiles before
            flops += outer * (t // SCAN_TILE < (T - 1) // SCAN_TILE)  # adds to the state after
    return flops, pairs


def counted(call) -> dict[str, int]:
    """FLOPs of the call by torch operator."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


def projections(counts) -> int:
    return counts.get("aten.mm", 0) + counts.get("aten.addmm", 0)


@all_cases
def test_params(letter, values):
    options, module = make(letter, values)
    assert options.num_params() == sum(p.numel() for p in module.parameters())


@all_cases
@pytest.mark.parametrize("T", [1, 6, 64, 150])
def test_flops(letter, values, T):
    options, module = make(letter, values)
    x = torch.randn(1, T, 32)
    counts = counted(lambda: module(x, Context(torch.arange(T)[None])))
    flops, pairs = mixing(letter, options, T)
    assert options.flops(T) == projections(counts) + flops
    if letter in "*S":
        assert options.pairs(T) == pairs
    if letter == "M" and T <= SCAN_TILE:  # one tile needs no state: the kernel does just this
        assert options.flops(T) == sum(counts.values())
    if letter == "G" and T <= SCAN_TILE:  # torch counts no solution of a triangular system
        assert options.flops(T) == sum(counts.values()) + 2 * T * T * options.value_width


@all_cases
def test_decode_flops(letter, values):
    options, module = make(letter, values)
    for T in (1, 5, 7, 8, 30):
        state = module.init_state(1, 40, None, torch.float32)
        ctx = Context(torch.tensor([[T - 1]]))
        counts = counted(lambda s=state, c=ctx: module.step(torch.randn(1, 32), c, s))
        mixed = 0
        if letter in "*S":
            visible = sum(options.window is None or s >= T - options.window for s in range(T))
            mixed = 4 * options.inner * visible
        elif letter in "MLR":
            _, keys, values = scan_shape(letter, options)
            mixed = 4 * options.n_heads * keys * values
        elif letter == "G":
            mixed = 6 * options.n_heads * options.head_dim * options.head_v_dim
        assert options.decode_flops(T) == projections(counts) + mixed


@pytest.mark.parametrize(("letter", "values"), [c for c in CASES if c[0] in "*S-"])
def test_decoding_a_sequence_costs_its_forward_pass(letter, values):
    options, _ = make(letter, values)
    assert sum(options.decode_flops(t) for t in range(1, 31)) == options.flops(30)


@all_cases
def test_state_bytes(letter, values):
    options, module = make(letter, values)
    for T in (1, 6, 7, 8, 100):
        for dtype in (torch.float32, torch.bfloat16):
            state = module.init_state(1, T, None, dtype)
            total = sum(tensor.nbytes for tensor in state.values())
            assert options.state_bytes(T, dtype.itemsize) == total


def test_elementwise_flops():
    """Tap by tap, state by state."""
    m1, _ = make("m", {"d_state": 5, "d_conv": 3})
    ops = 0
    for _token in range(7):
        for _channel in range(m1.d_inner):
            ops += 2 * 3  # taps
            ops += 1 + 2  # dt u, D u + y
            ops += 5 * (1 + 1 + 1 + 2 + 2)  # dt A, exp, times B, a h + b, C h + y
    assert m1.elementwise_flops(7) == ops
    m2, _ = make("M", {"head_dim": 16, "d_state": 5})
    _, pairs = mixing("M", m2, 70)
    taps = 70 * 2 * 4 * (m2.d_inner + 2 * 5)
    assert m2.elementwise_flops(70) == taps + 2 * m2.n_heads * pairs
    delta, _ = make("G", {"head_dim": 8, "n_heads": 3})
    _, pairs = mixing("G", delta, 70)
    taps = 70 * 2 * 4 * 3 * (8 + 8 + 16)
    assert delta.elementwise_flops(70) == taps + 3 * 3 * pairs
    retnet, _ = make("R", {"head_dim": 16})
    _, pairs = mixing("R", retnet, 70)
    assert retnet.elementwise_flops(70) == 2 * retnet.n_heads * pairs
    gla, _ = make("L", {"n_heads": 2})
    ops = 0
    for _token in range(7):
        for _channel in range(gla.d_key):
            ops += 2 * 6  # from the middle of blocks of 2, 4, ... 64 tokens: exp, product
            ops += 2 * 2  # from the start of the tile and to its end
    assert gla.elementwise_flops(7) == ops
    assert make("*", {"head_dim": 8, "d_conv": 4})[0].elementwise_flops(9) == 9 * 2 * 4 * 96
    assert make("-", {})[0].elementwise_flops(9) == 0


def test_derived_options():
    def options(letter, values, width=1024):
        return build(KINDS[letter].options, width, values, "x")

    assert options("M", {}).n_heads == 32
    assert options("M", {"d_inner": 512}).expand == 0.5
    assert options("M", {"d_inner": 2048}) == options("M", {"d_inner": None, "expand": 2.0})
    assert options("m", {}, 1000).dt_rank == 63
    assert options("G", {}).n_heads == 6
    assert options("G", {}, 64).n_heads == 1
    assert abs(options("G", {}).num_params() / 1024**2 - 6) < 0.1
    assert options("*", {}).n_heads == 16 == options("*", {}).n_kv_heads
    assert options("*", {"n_heads": 3}, 1000).inner == 192
    assert options("S", {}).window == 2048
    assert options("L", {}, 1536).n_heads == 4
    assert (options("L", {}, 100).n_heads, options("L", {}, 100).d_key) == (1, 50)
    assert (options("R", {}, 1536).n_heads, options("R", {}, 1536).value_dim) == (6, 512)
    assert options("-", {}, 1536).d_hidden == 4096
    assert options("-", {}, 64).d_hidden == 192
    assert options("-", {"kind": "gelu"}, 100).d_hidden == 400
