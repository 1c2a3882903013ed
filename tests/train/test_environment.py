"""What a run ran on: commit, peak, numeric settings; and where the seconds go."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ablate.arch.spec import Architecture
from ablate.config import load
from ablate.errors import UserError
from ablate.run import process_age
from ablate.train import environment as env
from ablate.train.clock import Clock
from ablate.train.peak import data_sheet, peak_flops

CPU = torch.device("cpu")


def test_environment_says_what_matters() -> None:
    cfg = load({"train": {"tokens": 1, "threads": 3, "device": "cpu"}}).train
    said = env.environment(cfg, CPU)
    assert said["versions"]["torch"] == torch.__version__
    assert said["numerics"] == {
        "device": "cpu",
        "precision": "fp32",
        "tf32": False,
        "deterministic": True,
        "threads": 3,
    }
    assert said["hardware"]["cores"] == os.cpu_count()
    assert set(env.commit()) == {"commit", "dirty"}


@pytest.mark.gpu
def test_the_gpu_is_told_from_others_of_its_type() -> None:
    cfg = load({"train": {"tokens": 1}}).train
    ids = [
        env.environment(cfg, torch.device("cuda", i))["gpu_id"]
        for i in range(torch.cuda.device_count())
    ]
    assert all(ids)
    assert len(set(ids)) == len(ids)


def test_a_copy_without_its_repository_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLATE_COMMIT", "abc123")
    assert env.commit() == {"commit": "abc123", "dirty": False}


def test_precision() -> None:
    auto = load({"train": {"tokens": 1}}).train
    fp32 = load({"train": {"tokens": 1, "precision": "fp32"}}).train
    assert not env.uses_bf16(auto, CPU)
    assert env.uses_bf16(auto, torch.device("cuda"))
    assert not env.uses_bf16(fp32, torch.device("cuda"))


def test_a_missing_gpu_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.device"):
        env.device_of(load({"train": {"tokens": 1, "device": "cuda"}}).train)


def test_peak_is_measured_once_and_quickly() -> None:
    peak_flops.cache_clear()
    started = time.perf_counter()
    peak, source = peak_flops("cpu", False, 1)
    assert time.perf_counter() - started < 5
    assert source == "measured"
    assert 1e8 < peak < 1e14
    assert peak_flops("cpu", False, 1) == (peak, source)
    assert peak_flops.cache_info().misses == 1


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H200", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312)],
)
def test_peak_of_known_gpus(monkeypatch: pytest.MonkeyPatch, name: str, tflops: float) -> None:
    peak_flops.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops("cuda", True) == (tflops * 1e12, "data sheet")
    assert peak_flops("cuda", False)[0] < tflops * 1e12
    peak_flops.cache_clear()


def test_a_longer_number_is_another_gpu() -> None:
    assert data_sheet("NVIDIA H1000") is None
    assert data_sheet("rtx 4090D") == data_sheet("NVIDIA GeForce RTX 4090")


def test_phases_nest_without_counting_twice() -> None:
    clock = Clock(CPU)
    started = time.perf_counter()
    with clock.of("train"):
        time.sleep(0.02)
        with clock.of("checkpoint"):
            time.sleep(0.05)
            assert clock.now("checkpoint") >= 0.05
            assert clock.now("train") == clock.seconds["train"]
        time.sleep(0.02)
    total = time.perf_counter() - started
    assert clock.seconds["checkpoint"] >= 0.05
    assert clock.seconds["train"] >= 0.04
    assert sum(clock.seconds.values()) <= total
    assert process_age() >= 0


def test_what_computes_attention_is_said() -> None:
    arch = Architecture("MS*-", d_model=64, vocab_size=64, options={"swa": {"window": 16}})
    data = {"seq_len": 32}
    cfg = load({"train": {"tokens": 1, "precision": "fp32"}, "data": data})
    with sdpa_kernel(SDPBackend.MATH):
        forms = env.attention_forms(arch, cfg.data, cfg.train, CPU)
    assert forms == {"S": "blocks", "*": "math"}
    cfg = load(
        {"train": {"tokens": 1, "precision": "fp32"}, "data": data | {"reset_documents": True}}
    )
    assert env.attention_forms(arch, cfg.data, cfg.train, CPU)["*"] == "blocks"


def test_inductors_own_setting_comes_back_too() -> None:
    from torch._inductor import config

    def fails() -> None:
        with env.numerics(cfg, torch.device("cpu")):
            assert config.deterministic
            raise KeyError

    cfg = load({"train": {"tokens": 1, "deterministic": True}}).train
    with pytest.raises(KeyError):
        fails()
    assert not config.deterministic
