"""The training benchmark on a CPU: real processes, a real profile, mistakes in one sentence."""

from __future__ import annotations

import functools
import io
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from ablate.bench import train as bench
from ablate.compose import compose
from ablate.config import load
from ablate.errors import UserError
from tests.processes import left_behind

SMALL = ["scale=cpu", "arch.pattern=M*-", "arch.d_model=32", "evaluate.tokens=2000"]
SMALL += [
    "train.device=cpu",
    "data.seq_len=32",
    "train.batch_size=2",
    "evaluate.mqar_rows=0",
    "arch.vocab_size=320",
]


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


def test_the_cpu_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was trained")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "_measure", measured)
    with pytest.raises(UserError, match=r"needs a GPU.*train\.device=cpu"):
        bench.run(["mamba2_130m", "--peers", "none"], tree_of=tree_of)


PARENT = """
import sys
from ablate.bench import train as bench
from ablate.compose import compose

bench.run(sys.argv[1:], tree_of=lambda words: compose(words).tree)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_that_trains_ends_with_its_parent(
    settings: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    words = ["mamba2_130m", *settings, "--steps", "100000", "--peers", "none", "--no-cold"]
    left = left_behind(PARENT, words, number, tmp_path, under_way="**/ablate-*/run")
    if number == signal.SIGTERM:
        assert not left


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
        (["aten::mm", "ablate::mlp_forward"], "MLP: products with their activation"),
        (["ablate::mlp_backward"], "MLP: products with their activation"),
        (["aten::_fused_adamw_", "Optimizer.step#AdamW.step"], "optimiser"),
        (["aten::_foreach_norm"], "optimiser"),
        (["ablate::adamw_update"], "optimiser"),
        (["aten::_flash_attention_backward"], "attention: core"),
        (["triton_poi_fused_mul_0"], "compiled elementwise"),
        (["aten::copy_"], "other"),
    ],
)
def test_groups(names: list[str], group: str) -> None:
    assert bench.group_of(names) == group


CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def on_device(name: str, start: float, end: float, annotation: bool = False) -> Any:
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name=name, device_type=CUDA, time_range=span, is_user_annotation=annotation
    )


def operator(name: str, *kernels: tuple[str, float], parent: Any = None) -> Any:
    launched = [SimpleNamespace(name=name, duration=us) for name, us in kernels]
    span = SimpleNamespace(start=0.0, end=99.0)
    return SimpleNamespace(
        name=name, device_type=CPU, time_range=span, kernels=launched, cpu_parent=parent
    )


def test_busy_times_are_the_union_of_kernels() -> None:
    events = [
        on_device("b", 4, 12),  # beside a on another stream
        on_device("a", 0, 10),
        on_device("c", 5, 8),  # within both
        on_device("a", 20, 25),
        on_device("step", 0, 30, annotation=True),
        operator("aten::mm", ("a", 10)),
    ]
    assert bench.busy_times(events) == {"a": 15, "b": 2, "c": 0}


def test_captured_time_has_the_proportions_of_launched_kernels() -> None:
    loss = operator("_LinearCrossEntropy")
    launched = [
        loss,
        operator("aten::mm", ("gemm", 30.0)),
        operator("aten::mm", ("gemm", 10.0), parent=loss),
        operator("ablate::rms_norm_forward", ("norm", 5.0)),
        operator("aten::copy_", ("copy", 7.0), ("nothing", 0.0)),
        on_device("gemm", 0, 30),
    ]
    groups = bench.kernel_groups(launched, torch.device("cuda"))
    assert groups == {
        "gemm": {"GEMMs": 30.0, "loss": 10.0},
        "norm": {"all: norm": 5.0},
        "copy": {"other": 7.0},
    }
    # captured: the product is slower, the copy is gone, and another kernel is there
    times = bench.by_group({"gemm": 60.0, "norm": 5.0, "splitk": 2.0}, groups)
    assert times == {"GEMMs": 45.0, "loss": 15.0, "all: norm": 5.0, "of no operator": 2.0}


def test_the_peer_steps(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(bench._Transformer, width=128, layers=2)
    monkeypatch.setattr(bench, "_Transformer", small)
    cfg = load(tree_of([*bench._COMMON, *settings]))
    found = bench._peer("plain_transformer", cfg, 1)
    assert found["tokens_per_second"] > 0
