"""The training benchmark on a CPU: real processes, a real profile, mistakes in one sentence."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ablate.bench import train as bench
from ablate.compose import compose
from ablate.config import load
from ablate.errors import UserError

SMALL = ["scale=cpu", "arch.pattern=M*-", "arch.d_model=32", "evaluate.tokens=2000"]
SMALL += ["data.seq_len=32", "train.batch_size=2", "evaluate.mqar_rows=0", "arch.vocab_size=320"]


def tree_of(words: list[str]) -> dict[str, Any]:
    return compose(words).tree


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = tmp_path_factory.mktemp("text")
    for i in range(30):
        (text / f"{i}.txt").write_text(f"document {i} says nothing new " * 20)
    cache: Path = tmp_path_factory.mktemp("cache")
    return [*SMALL, "data=files", f"data.path={text}", f"data.cache={cache}", "data.mqar.share=0"]


def test_a_model_and_its_table(settings: list[str]) -> None:
    console = Console(file=io.StringIO(), width=200)
    words = ["mamba2_130m", *settings, "--steps", "6", "--peers", "none"]
    assert bench.run(words, tree_of=tree_of, console=console) == 0
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "s cold and" in said
    for group in ("GEMMs", "loss", "optimiser", "a step"):
        assert group in said, said


def test_a_model_that_fails(settings: list[str]) -> None:
    console = Console(file=io.StringIO(), width=200)
    words = ["mamba2_130m", *settings, "train.device=cuda", "--no-cold", "--peers", "none"]
    assert bench.run(words, tree_of=tree_of, console=console) == 1
    assert "train.device" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["mamba2_130"], "no model 'mamba2_130'.*mamba2_130m"),
        (["--peers", "plain"], "no model 'plain'.*plain_transformer"),
        (["--steps", "2"], "--steps is 2"),
    ],
)
def test_mistakes(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bench.run(words, tree_of=tree_of)


def test_every_model_composes_to_its_size() -> None:
    from ablate.study.trial import resolve

    sizes = {}
    for name, (words, _) in bench.MODELS.items():
        trial = resolve(tree_of([*bench._COMMON, *words]))
        sizes[name] = trial.architecture.num_params() / 1e6
        assert trial.config.train.batch_size * trial.config.data.seq_len >= 16 * 2048
    assert sizes == pytest.approx(
        {
            "mamba2_130m": 129,
            "mamba1_130m": 129,
            "transformer_124m": 124,
            "hybrid_137m": 137,
            "samba_130m": 130,
            "hybrid_14m": 19,
        },
        rel=0.06,
    )


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["aten::mm"], "GEMMs"),
        (["aten::mm", "_LinearCrossEntropy"], "loss"),
        (["ablate::ssd_backward", "CompiledFunctionBackward"], "Mamba-2, RetNet: ssd"),
        (["ablate::rms_norm_forward"], "all: norm"),
        (["aten::_fused_adamw_", "Optimizer.step#AdamW.step"], "optimiser"),
        (["aten::_foreach_norm"], "optimiser"),
        (["aten::_flash_attention_backward"], "attention: core"),
        (["triton_poi_fused_mul_0"], "compiled elementwise"),
        (["aten::copy_"], "other"),
    ],
)
def test_groups(names: list[str], group: str) -> None:
    assert bench.group_of(names) == group


def test_the_peer_steps(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(bench._Transformer, width=128, layers=2)
    monkeypatch.setattr(bench, "_Transformer", small)
    cfg = load(tree_of([*bench._COMMON, *settings]))
    found = bench._peer("plain_transformer", cfg, 1)
    assert found["tokens_per_second"] > 0
