"""Generation: ragged prompts, every layer kind, token by token equal to the full forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ablate.arch.spec import Architecture
from ablate.layers import KINDS
from ablate.model import Decoder, LanguageModel, Sampling, cast_weights, generate
from ablate.model.generate import padded_length

OPTIONS = {
    "mamba1": {"d_state": 4},
    "gated_deltanet": {"head_dim": 8},
    "mamba2": {"head_dim": 16, "d_state": 16, "n_groups": 2},
    "attention": {"head_dim": 16, "n_kv_heads": 1, "d_conv": 4},
    "swa": {"head_dim": 16, "window": 5},
    "gla": {"n_heads": 2},
    "retnet": {"head_dim": 8},
}
PATTERNS = ["M-", "m-", "*-", "S-", "G-", "L-", "R-", "mM-*S-"]


def model(pattern="mM-*S-"):
    options = {k: v for k, v in OPTIONS.items() if k in {KINDS[c].name for c in pattern}}
    arch = Architecture(pattern, d_model=32, vocab_size=64, init_std=0.3, options=options)
    return LanguageModel(arch, seed=1).eval()


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (n,), generator=generator).tolist() for n in lengths]


def slow(lm, prompt, n):
    """Greedy tokens by the full forward, and the smallest lead of a chosen one."""
    tokens, lead = list(prompt), 1e9
    for _ in range(n):
        top = lm.logits(torch.tensor([tokens]))[0, -1].topk(2)
        lead = min(lead, float(top.values[0] - top.values[1]))
        tokens.append(int(top.indices[0]))
    return tokens[len(prompt) :], lead


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ragged_prompts_equal_the_full_forward(pattern):
    """Prompts shorter than the taps, than the window, of its length and longer."""
    lm = model(pattern)
    given = prompts(1, 2, 3, 5, 6, 23, 70)
    for prompt, new in zip(given, generate(lm, given, 12), strict=True):
        expected, lead = slow(lm, prompt, 12)
        assert lead > 1e-4  # the test would be decided by rounding
        assert new == expected


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_after_ragged_prompts(pattern):
    lm = model(pattern)
    given = prompts(1, 4, 17, 40)
    decoder = Decoder(lm, 5, 60)  # a row stays idle
    logits = decoder.prefill(given)
    more = prompts(8, 8, 8, 8, seed=1)
    for i in range(8):
        for row, prompt in enumerate(given):
            whole = torch.tensor([prompt + more[row][:i]])
            expected = lm.logits(whole)[0, -1]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=2e-4)
        logits = decoder.step(torch.tensor([m[i] for m in more]))


def test_ragged_prompts_of_our_layers_are_one_forward():
    """A kind that forgets `ragged` is still right, but prefilled once a length."""
    for letter in "mM*S-":
        assert getattr(KINDS[letter].module, "ragged", False), letter


@torch.no_grad()
def test_a_decoder_is_reused_and_its_bytes_are_the_contract():
    lm = model()
    decoder = Decoder(lm, 3, 50, cache_dtype=torch.bfloat16)
    assert decoder.state.nbytes == 3 * lm.arch.cost(50).state_bytes
    decoder = Decoder(lm, 3, 50)
    one, other = prompts(9, 30, 2), prompts(4, 20, 8, seed=5)
    first = generate(lm, one, 6, decoder=decoder)
    generate(lm, other, 6, decoder=decoder)
    assert generate(lm, one, 6, decoder=decoder) == first
    with pytest.raises(ValueError, match="do not fit the decoder's 50"):
        generate(lm, one, 21, decoder=decoder)
    with pytest.raises(ValueError, match="4 prompts do not fit a batch of 3"):
        decoder.prefill(prompts(1, 1, 1, 1))
    with pytest.raises(ValueError, match="at least one token"):
        decoder.prefill([[]])


class Running(nn.Module):
    """A layer from elsewhere that knows nothing of padding: the mean over the past."""

    roles = {"norm": "ones"}  # noqa: RUF012

    def __init__(self, options, norm_eps):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(32))

    def forward(self, x, ctx, state=None):
        total = x.cumsum(1)
        if state is not None:
            state["total"].copy_(total[:, -1])
            state["n"].fill_(x.shape[1])
        return x + total / torch.arange(1, x.shape[1] + 1)[:, None]

    def init_state(self, batch, max_len, device, dtype):
        return {"total": torch.zeros(batch, 32), "n": torch.zeros(batch, 1)}

    def step(self, x, ctx, state):
        state["total"] += x
        state["n"] += 1
        return x + state["total"] / state["n"]


@torch.no_grad()
def test_a_layer_that_knows_no_padding_is_prefilled_by_length():
    lm = model("M-*-")
    lm.layers[1] = Running(None, 1e-5)
    given = prompts(3, 9, 3, 14)
    for prompt, new in zip(given, generate(lm, given, 6), strict=True):
        assert new == slow(lm, prompt, 6)[0]


@torch.no_grad()
def test_stop_and_vocabulary():
    lm = model("M-")
    free = generate(lm, prompts(5, 7), 10)
    stopped = generate(lm, prompts(5, 7), 10, stop=lambda row, new: row == 0 and len(new) == 3)
    assert stopped == [free[0][:3], free[1]]
    assert generate(lm, prompts(5), 0) == [[]]
    generator = torch.Generator().manual_seed(0)
    hot = Sampling(temperature=5.0)
    drawn = generate(lm, prompts(4), 60, sampling=hot, vocab_size=9, generator=generator)
    assert sorted(set(drawn[0])) == list(range(9))


def test_sampling_against_its_definition():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]]).expand(4000, 5)
    none = torch.zeros_like(logits, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)

    def shares(sampling, seen=none):
        drawn = sampling.choose(logits, seen, generator)
        return torch.bincount(drawn, minlength=5) / len(drawn)

    expected = torch.softmax(logits[0] / 0.7, -1)
    torch.testing.assert_close(shares(Sampling(temperature=0.7)), expected, atol=0.03, rtol=0)
    p = torch.softmax(logits[0], -1)
    nucleus = torch.where(torch.arange(5) < 2, p, 0.0)  # 0.61 + 0.22: the first two reach 0.8
    found = shares(Sampling(temperature=1.0, top_p=0.8))
    torch.testing.assert_close(found, nucleus / nucleus.sum(), atol=0.03, rtol=0)
    seen = none.clone()
    seen[:, [0, 3]] = True
    penalised = torch.softmax(torch.tensor([1.0, 1.0, 0.5, -2.0, -3.0]), -1)
    found = shares(Sampling(temperature=1.0, repetition_penalty=2.0), seen)
    torch.testing.assert_close(found, penalised, atol=0.03, rtol=0)
    assert Sampling(repetition_penalty=3.0).choose(logits, seen)[0] == 1


@torch.no_grad()
def test_a_repetition_penalty_forbids_what_was_seen():
    lm = model("M-")
    given = prompts(6)
    new = generate(lm, given, 20, sampling=Sampling(repetition_penalty=1e9))[0]
    assert len(set(new)) == 20
    assert not set(new) & set(given[0])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
    ],
)
def test_sampling_mistakes(fields, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**fields)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cast_weights_decode_without_autocast(pattern):
    lm = model(pattern)
    exact = lm.logits(torch.tensor(prompts(20)))[0, -1]
    decoder = Decoder(cast_weights(lm, torch.bfloat16), 1, 30)
    logits = decoder.prefill(prompts(20))
    torch.testing.assert_close(logits[0], exact, rtol=0.2, atol=0.6)
    assert decoder.step(logits.argmax(-1)).isfinite().all()
    assert decoder.state.nbytes == lm.arch.cost(30).state_bytes


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_captured_step_equals_the_plain_one(pattern):
    lm = model(pattern).cuda()
    given = prompts(3, 9, 40)
    captured, plain = Decoder(lm, 3, 80), Decoder(lm, 3, 80, graph=False)
    assert captured.graph is not None
    for _ in range(2):  # the second time on used caches
        token = captured.prefill(given).argmax(-1)
        assert torch.equal(plain.prefill(given).argmax(-1), token)
        for _ in range(20):
            one, other = captured.step(token), plain.step(token)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            token = one.argmax(-1)


def test_padded_lengths_are_few_and_near():
    lengths = [padded_length(n) for n in range(1, 8193)]
    assert all(n <= p <= max(n + 7, 1.125 * n) for n, p in enumerate(lengths, 1))
    assert len(set(lengths)) < 80
    assert [padded_length(n) for n in (1, 64, 65, 255, 2048, 262_144)] == [
        *(8, 64, 72, 256, 2048, 262_144)
    ]


class Largest(TorchDispatchMode):
    """The most numbers that one tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return out


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ragged", [False, True])
def test_a_prefill_holds_no_logits_and_no_mask_of_all_positions(pattern, ragged):
    """What it holds grows with the prompt, no faster, so that 256K tokens fit: the largest tensor
    is a layer's projection or the states of a scan, never (L, L) and never (L, V)."""
    options = {k: v for k, v in OPTIONS.items() if k in {KINDS[c].name for c in pattern}}
    arch = Architecture(pattern, d_model=32, vocab_size=8192, options=options)
    lm = LanguageModel(arch, seed=1).eval()
    found = []
    for length in (1024, 2048):
        decoder = Decoder(lm, 2, length)
        with Largest() as largest:
            decoder.prefill(prompts(length, length - 9 * ragged))
        found.append(largest.numbers)
    assert found[1] < 2.1 * found[0]
    assert found[1] < 2 * 2048 * 1024  # of (B, L, 8192) and (B, L, 2048)
