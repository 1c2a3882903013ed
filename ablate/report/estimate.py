"""How long a trial will take and what memory, from the best source there is.

    calibration   20 steps of this very trial, here and now
    earlier runs  of this architecture, or of about its size, on this hardware
    contract      the cost contract's FLOPs at a tenth of the hardware's peak

Every estimate says which one it is from. FLOPs of validation are counted with those of training;
starting, the text and the first step come on top.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate import config
from ablate.errors import UserError
from ablate.run import RunFolder, find_runs
from ablate.study.trial import Trial
from ablate.train.environment import device_of, environment, uses_bf16
from ablate.train.loop import VALIDATIONS
from ablate.train.peak import data_sheet, known_gpus, peak_flops

CONTRACT_SHARE = 0.1  # of the peak: 8 to 11% were measured with 14M parameters on an H200
CONTRACT_START = 20.0  # seconds until the second step, without a run to go by
STATE_BYTES = 16  # of each parameter: weight, gradient and two moments in fp32
# Kept for the backward pass by a residual layer, per token and channel in bf16: 17 of a Transformer
# (34 a block of two; Korthikanti et al. 2022, arXiv 2205.05198, with the scores recomputed), more
# of a Mamba-2 layer, whose inner width is twice the stream's.
ACTIVATION_BYTES = 20
CALIBRATION_STEPS = 20
START = ("start_up", "data", "build", "first_step")  # phases before the pace of training
NEAR = 4.0  # a run of a size within this factor tells something of a trial's speed
MOST_RUNS = 500  # newest finished runs that are looked at


@dataclass(frozen=True)
class Machine:
    """What trials would run on: a GPU of this name, or CPU threads."""

    name: str
    gpu: bool
    bf16: bool
    threads: int
    peak: float
    peak_source: str

    def __str__(self) -> str:
        return self.name if self.gpu else f"{self.name}, {self.threads} thread(s) a trial"


@dataclass(frozen=True)
class Speed:
    """Training FLOPs a second after the start, seconds of the start, peak memory where measured."""

    flops: float
    start: float
    memory: float
    source: str


@dataclass(frozen=True)
class Estimate:
    seconds: float
    memory: float


@dataclass(frozen=True)
class Past:
    """A finished run on this hardware."""

    shape: tuple[Any, ...]
    params: float
    flops: float
    start: float
    memory: float
    study: str


def machine(cfg: config.Config, gpu: str | None = None) -> Machine:
    """This machine, as `cfg.train` would use it (the CPU's peak is measured in half a second), or
    one with the named GPU. UserError for a GPU whose peak is not known."""
    if gpu is not None:
        rates = data_sheet(gpu)
        if rates is None:
            raise UserError(f"gpu is '{gpu}', whose peak is not known; there are {known_gpus()}")
        bf16 = cfg.train.precision != "fp32"
        return Machine(gpu, True, bf16, cfg.train.threads, rates[0 if bf16 else 1], "data sheet")
    device = device_of(cfg.train)
    bf16 = uses_bf16(cfg.train, device)
    peak, source = peak_flops(device.type, bf16, cfg.train.threads)
    hardware = environment(cfg.train, device)["hardware"]
    name = _name(hardware)
    return Machine(name, device.type == "cuda", bf16, cfg.train.threads, peak, source)


def _name(hardware: dict[str, Any]) -> str:
    return str(hardware.get("gpu") or hardware.get("cpu") or "")


# --- sources --------------------------------------------------------------------------------------


def history(root: Path, here: Machine) -> list[Past]:
    """Finished runs in the study folders below `root` on this hardware, the newest first."""
    found: list[tuple[float, RunFolder]] = []
    for study in root.iterdir() if root.is_dir() else []:
        for run in find_runs(study):
            result = run.path / "result.json"
            if result.is_file():
                found.append((result.stat().st_mtime, run))
    found.sort(key=lambda pair: -pair[0])
    runs = []
    for _, run in found[:MOST_RUNS]:
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # one that is damaged
            runs.append(_past(run, here))
    return [run for run in runs if run is not None]


def _past(run: RunFolder, here: Machine) -> Past | None:
    result, tree, surroundings = run.result() or {}, run.config() or {}, run.environment()
    numerics = surroundings.get("numerics") or {}
    name = _name(surroundings.get("hardware") or {})
    if name != here.name and not (here.gpu and here.name.upper() in name.upper()):
        return None
    if (numerics.get("precision") == "bf16") != here.bf16:
        return None
    if not here.gpu and numerics.get("threads") != here.threads:
        return None
    phases = {k: v for k, v in (result.get("seconds") or {}).items() if isinstance(v, int | float)}
    train, arch = result.get("train") or {}, result.get("architecture") or {}
    speed, per_token = train.get("tokens_per_second", 0), arch.get("train_flops_per_token", 0)
    needed = (phases.get("train"), train.get("flops"), speed, per_token)
    if not all(config.is_number(figure) and figure > 0 for figure in needed):
        return None
    start = sum(phases.get(k, 0.0) for k in START)
    return Past(
        shape=(
            *(arch.get(n) for n in ("pattern", "d_model", "params", "state_bytes")),
            *(config.get(tree, n) for n in ("data.seq_len", "train.batch_size")),
            config.get(tree, "train.devices") or 1,
        ),
        params=float(arch.get("non_embedding_params") or math.nan),
        flops=float(speed * per_token),
        start=start,
        memory=float(train.get("peak_memory_bytes") or math.nan),
        study=run.path.parent.name,
    )


def _shape(trial: Trial) -> tuple[Any, ...]:
    """What `Past.shape` is for a run of this trial."""
    cfg, architecture = trial.config, trial.architecture
    return (
        *(architecture.pattern, architecture.d_model, trial.cost.params, trial.cost.state_bytes),
        *(cfg.data.seq_len, cfg.train.batch_size, cfg.train.devices),
    )


def calibrate(trial: Trial) -> tuple[Speed, dict[str, Any]]:
    """Train 20 steps of a trial in a temporary folder; its speed, and what result.json says of the
    text. What fails raises as `train` does."""
    from ablate.train import train

    cfg = trial.config
    step = cfg.train.batch_size * cfg.data.seq_len
    tree = config.override(
        trial.tree,
        {
            **{f"train.{name}": None for name in ("flops", "seconds", "branch_from", "branch_at")},
            "train.tokens": CALIBRATION_STEPS * step,
            "train.eval_every": CALIBRATION_STEPS,
            "train.checkpoint_steps": [],
            "train.keep": "none",
            "evaluate.tokens": 4 * cfg.data.seq_len,
            "evaluate.mqar_rows": 0,
            "tracker.kind": "none",
        },
    )
    result = train(config.load(tree))
    phases = result["seconds"]
    start = sum(phases.get(k, 0.0) for k in START)
    speed = Speed(
        result["train"]["tokens_per_second"] * trial.cost.train_flops,
        start,
        float(result["train"]["peak_memory_bytes"]),
        f"calibration of {CALIBRATION_STEPS} steps",
    )
    return speed, result["data"]


def speed(trial: Trial, past: Sequence[Past], here: Machine) -> Speed:
    """From earlier runs of this architecture, else of about its size, else from the contract."""
    shape = _shape(trial)
    same = [run for run in past if run.shape == shape]
    if same:
        return _median(same, f"{_count(same)} of this architecture{_where(same)}", memory=True)
    params = trial.architecture.non_embedding_params()
    like = [run for run in past if 1 / NEAR <= run.params / params <= NEAR]
    near = sorted(like, key=lambda run: abs(math.log(run.params / params)))[:5]
    if near:
        return _median(near, f"{_count(near)} of about this size{_where(near)}", memory=False)
    share = f"{CONTRACT_SHARE:.0%} of the {here.peak_source} peak of {here.peak:.2g} FLOP/s"
    return Speed(CONTRACT_SHARE * here.peak, CONTRACT_START, math.nan, f"contract at {share}")


def _median(runs: Sequence[Past], source: str, *, memory: bool) -> Speed:
    return Speed(
        statistics.median(run.flops for run in runs),
        statistics.median(run.start for run in runs),
        statistics.median(run.memory for run in runs) if memory else math.nan,
        source,
    )


def _count(runs: Sequence[Past]) -> str:
    return f"{len(runs)} earlier run{'s' * (len(runs) > 1)}"


def _where(runs: Iterable[Past]) -> str:
    return f" ({', '.join(sorted({run.study for run in runs}))})"


def estimate(trial: Trial, known: Speed, here: Machine) -> Estimate:
    """Seconds of a whole trial, and bytes of memory: measured ones, or states and activations."""
    cfg = trial.config
    scored = (VALIDATIONS + 1) * (cfg.evaluate.tokens or 0)  # A while training, and B once
    beside = known.start + scored * trial.cost.forward_flops / known.flops
    training = cfg.train.seconds or trial.flops / known.flops
    memory = known.memory
    if not math.isfinite(memory):
        rows = cfg.train.batch_size // cfg.train.devices
        if isinstance(cfg.train.micro_batch, int):
            rows = cfg.train.micro_batch
        channels = trial.architecture.n_layers * trial.architecture.d_model
        per = ACTIVATION_BYTES * (1 if here.bf16 else 2)
        params = trial.architecture.num_params()
        memory = STATE_BYTES * params + per * rows * cfg.data.seq_len * channels
    return Estimate(training + beside, memory)
