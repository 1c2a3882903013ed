"""How a batch is cut: by a search, by the config, and again where memory ran out."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ablate.arch.spec import Architecture
from ablate.errors import UserError
from ablate.model import LanguageModel
from ablate.run import RunFolder, read_json
from ablate.train import TrialFailed, train
from ablate.train.engine import Engine
from ablate.train.micro_batch import Shape, candidates, search
from ablate.train.step import Stepper
from ablate.train.stop import is_out_of_memory
from tests.train.conftest import Make, curve


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "study" / "run")


def limit_rows(monkeypatch: pytest.MonkeyPatch, most: int, from_call: int = 0) -> list[int]:
    """Memory that ends above so many rows a training pass; the rows of all passes."""
    original = LanguageModel.loss
    seen: list[int] = []

    def loss(self: LanguageModel, tokens_BL: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("reduction") == "sum":
            seen.append(len(tokens_BL))
            if len(tokens_BL) > most and len(seen) > from_call:
                raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return original(self, tokens_BL, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "loss", loss)
    return seen


def test_out_of_memory_goes_on_in_smaller_micro_batches(
    tiny: Make, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = limit_rows(monkeypatch, 2)
    result = train(tiny(), folder)
    assert seen == [4] + 40 * [2]
    assert result["train"]["micro_batch"] == 2
    assert result["train"]["steps"] == 20
    flag = result["train"]["out_of_memory"]
    assert (flag["from"], flag["to"], flag["step"]) == (4, 2, 0)
    assert flag["cause"].startswith("out of memory")
    assert "20.00 GiB" in flag["cause"]
    assert folder.environment()["micro_batch"]["out_of_memory"] == flag
    monkeypatch.undo()
    again = train(tiny(train={"micro_batch": result["train"]["micro_batch"]}))
    assert again["val_b"] == result["val_b"]
    assert again["train"]["out_of_memory"] is None


def test_out_of_memory_in_mid_run_goes_on_from_the_checkpoint(
    tiny: Make, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unbroken = RunFolder(tmp_path / "unbroken")
    train(tiny(train={"lr": 1e-4}), unbroken)
    seen = limit_rows(monkeypatch, 2, from_call=10)
    cfg = tiny(train={"lr": 1e-4, "checkpoint_steps": [8], "keep": "all"})
    result = train(cfg, folder)
    assert seen == 11 * [4] + 24 * [2]
    assert result["train"]["out_of_memory"]["step"] == 10
    for one, other in zip(curve(folder.metrics()), curve(unbroken.metrics()), strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize(("micro_batch", "words"), [("auto", "again, with 2 rows"), (1, "GiB$")])
def test_out_of_memory_twice_is_the_cause(
    tiny: Make,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    micro_batch: int | str,
    words: str,
) -> None:
    limit_rows(monkeypatch, 0)
    with pytest.raises(TrialFailed, match=rf"out of memory.*micro_batch.*20\.00.*{words}"):
        train(tiny(train={"micro_batch": micro_batch}), folder)
    assert folder.status()["state"] == "failed"
    assert folder.status()["cause"].startswith("out of memory")


def test_memory_errors_are_seen_behind_others() -> None:
    error = UserError("the step cannot be captured")
    error.__cause__ = torch.OutOfMemoryError("Tried to allocate")
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("something else"))


# --- the search ----------------------------------------------------------------------------------


def test_candidates() -> None:
    assert candidates(16, 2048) == [4, 8, 16]
    assert candidates(12, 4096) == [2, 3, 6, 12]
    assert candidates(4, 64) == [4]
    assert candidates(7, 8192) == [1, 7]


@pytest.mark.parametrize(
    ("speeds", "choice", "measured"),
    [
        ({4: 80.0, 8: 98.0, 16: 100.0}, 8, [4, 8, 16]),
        ({4: 99.0, 8: 99.5, 16: 120.0}, 4, [4, 8]),  # flat: no larger one is tried
        ({4: 50.0, 8: 100.0, 16: None}, 8, [4, 8, 16]),
        ({4: None, 2: None, 1: 10.0}, 1, [4, 2, 1]),
        ({4: None, 2: None, 1: None}, 1, [4, 2, 1]),
    ],
)
def test_search(speeds: dict[int, float | None], choice: int, measured: list[int]) -> None:
    found, seen = search(lambda n: speeds[n], 16, 2048)
    assert found == choice
    assert list(seen) == measured


class Gpu:
    """An engine whose device is said to be a GPU, and whose speeds are made up."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.measured = 0
        self.device = torch.device("cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def speed(self, batch: Any, rows: int) -> float:
        self.measured += 1
        return float(rows)


def test_many_workers_search_once(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from ablate.data import TrainStream, prepare

    cfg = tiny(data={"seq_len": 4096, "mqar": {"share": 0}})
    arch = Architecture.from_config(cfg.arch, vocab_size=320)
    engine = Engine(cfg, arch, torch.device("cpu"))
    shape = Shape.of(engine)
    batch = TrainStream(prepare(tiny().data), tiny().data, batch_size=4, seed=0).batch(0)
    assert shape.choose(engine, batch) == {"rows": 4, "source": "whole batch"}
    gpu = Gpu(engine)
    found: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda: found.append(shape.choose(gpu, batch)))  # type: ignore
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gpu.measured == 2
    assert sorted(f["source"] for f in found) == ["cache", "cache", "search"]
    assert [f["rows"] for f in found] == [4, 4, 4]
    assert found[0]["tokens_per_second"] == {"2": 2.0, "4": 4.0}
    other = tiny(data={"seq_len": 2048, "mqar": {"share": 0}})
    assert Shape.of(Engine(other, arch, torch.device("cpu"))) != shape


def test_many_workers_compile_a_shape_once(tmp_path: Path) -> None:
    shape = Shape(tmp_path / "shapes" / "shape.json")
    cold, active = [], []

    class Slow:
        micro_batch = 4

        def warm_up(self, batch: Any) -> None:
            known = "compiled" in (read_json(shape.path) or {})
            active.append(1)
            if not known:
                cold.append(len(active))
                time.sleep(0.3)
                assert len(active) == 1  # the others wait
            time.sleep(0.1)

    threads = [
        threading.Thread(target=shape.warm_up, args=(Slow(), None, lambda: None)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(cold), len(active)) == (1, 3)


def test_waiting_for_another_compilation_can_be_interrupted(tmp_path: Path) -> None:
    shape = Shape(tmp_path / "shapes" / "shape.json")

    def check() -> None:
        raise KeyboardInterrupt

    with shape.alone(lambda: None), pytest.raises(KeyboardInterrupt), shape.alone(check):
        pass


def test_a_resumed_run_keeps_its_micro_batch(
    tiny: Make, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(rows: int) -> Any:
        return lambda *args, **kwargs: {"rows": rows, "source": "search"}

    cfg = tiny(train={"micro_batch": "auto"})
    monkeypatch.setattr(Shape, "choose", choose(2))
    with pytest.raises(RuntimeError):
        train(cfg, folder, should_prune=lambda step, loss: step >= 8)
    monkeypatch.setattr(Shape, "choose", choose(1))
    assert train(cfg, folder)["train"]["micro_batch"] == 2


@pytest.mark.gpu
def test_a_search_on_a_gpu(tiny: Make, folder: RunFolder, tmp_path: Path) -> None:
    cfg = tiny(
        data={"seq_len": 2048, "cache": str(tmp_path), "mqar": {"share": 0}},
        train={"tokens": 5 * 16 * 2048, "batch_size": 16, "micro_batch": "auto"},
    )
    result = train(cfg, folder)
    record = folder.environment()["micro_batch"]
    assert record["source"] == "search"
    assert record["rows"] == result["train"]["micro_batch"]
    assert str(record["rows"]) in record["tokens_per_second"]
    again = RunFolder(folder.path.parent / "again")
    assert train(cfg, again)["val_b"] == result["val_b"]
    assert again.environment()["micro_batch"]["source"] == "cache"


@pytest.mark.gpu
def test_out_of_memory_in_a_capture(
    tiny: Make, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Stepper.captured, []

    def captured(self: Stepper, work: Any) -> Any:
        calls.append(self.micro_batch)
        if len(calls) == 1:

            def fails() -> None:
                work()
                torch.empty(1 << 45, device="cuda")

            return original(self, fails)
        return original(self, work)

    monkeypatch.setattr(Stepper, "captured", captured)
    result = train(tiny(train={"micro_batch": 4}), folder)
    assert calls == [4, 2]
    assert result["train"]["out_of_memory"]["step"] == 2
    assert result["train"]["steps"] == 20
