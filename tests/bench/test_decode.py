"""The decoding benchmark: real caches, several architectures, mistakes in one sentence."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from ablate.arch.spec import Architecture
from ablate.bench import decode
from ablate.errors import UserError

NONE = {"known": ["samba_421m"], "section_of": lambda name: None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(dtype):
    options = {
        "mamba2": {"head_dim": 16},
        "attention": {"head_dim": 16},
        "swa": {"head_dim": 16, "window": 8},
    }
    arch = Architecture("mM-*S-", d_model=32, vocab_size=64, options=options)
    rows = decode.measure(
        "a", arch, [4, 32], batch=2, steps=3, device=torch.device("cpu"), dtype=dtype
    )
    assert [row.context for row in rows] == [4, 32]
    assert all(row.tokens_per_second > 0 for row in rows)
    if dtype == torch.bfloat16:
        assert [row.state_bytes for row in rows] == [arch.cost(n).state_bytes for n in (4, 32)]


def test_table():
    console = Console(file=io.StringIO(), width=160)
    words = ["--pattern", "M-", "--pattern", "*-", "--d-model", "64", "--vocab-size", "64"]
    words += ["--device", "cpu"]
    assert decode.run([*words, "--contexts", "16,64", "--steps", "4"], **NONE, console=console) == 0
    said = console.file.getvalue()
    assert "tokens/s" in said
    assert "against" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [([], "--pattern"), (["samba_421"], "did you mean 'samba_421m'"), (["--pattern", "Q"], "Q")],
)
def test_mistakes(words, named):
    with pytest.raises(UserError, match=named):
        decode.run(words, **NONE)


@pytest.mark.parametrize("batch", ["0", "-3"])
def test_a_batch_has_a_sequence(batch, capsys):
    with pytest.raises(SystemExit) as ended:
        decode.run(["--pattern", "M-", "--device", "cpu", "--batch", batch], **NONE)
    assert ended.value.code == 2
    assert f"argument --batch: {batch} must be 1 or more" in capsys.readouterr().err


def test_the_cpu_must_be_asked_for(monkeypatch):
    def made(*args, **kwargs):
        raise AssertionError("weights were made")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(decode, "measure", made)
    with pytest.raises(UserError, match=r"needs a GPU.*--device cpu"):
        decode.run(["--pattern", "M-x24"], **NONE)


@pytest.mark.gpu
def test_a_gpu_table():
    console = Console(file=io.StringIO(), width=160)
    words = ["--pattern", "M-x4", "--pattern", "*-x4", "--contexts", "128,1024"]
    assert decode.run(words, **NONE, console=console) == 0
    assert "no memory" not in console.file.getvalue()
