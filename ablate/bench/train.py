"""`python -m ablate bench train [NAME…] [name=value …]`: the training engine, model by model.

    python -m ablate bench train                                 every model, with installed peers
    python -m ablate bench train mamba2_130m train.deterministic=false --peers none
    python -m ablate bench train mamba2_130m train.devices=4 train.batch_size=64 --peers none

Every model trains twice in processes of their own, with data, logging and validation: cold, a few
steps with compile caches that are empty, and warm, where the speed is measured. Kernel time is that
of captured steps under load, and gaps are what the measured step takes beyond it; what a kernel is
for comes from a profile of steps that are not captured. Peers: a plain compiled Transformer, and
mamba_ssm where installed. Without a GPU nothing is measured unless train.device=cpu asks for it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ablate.config import Config, load
from ablate.data import Batch, prepare
from ablate.errors import UserError, did_you_mean
from ablate.run import PHASES, die_with_parent, lifeline, process_age
from ablate.study.child import child_environment
from ablate.study.show import wide_console
from ablate.train import train
from ablate.train.engine import Engine
from ablate.train.environment import device_of, numerics
from ablate.train.loop import architecture_of
from ablate.train.stop import Interrupts, TrialFailed

TreeOf = Callable[[list[str]], dict[str, Any]]
PROFILED = 5  # steps
SETTLING = 3.0  # seconds under load before them
TIMEOUT = 300  # seconds of one process

_COMMON = ["data.seq_len=2048", "data.tokenizer.kind=byte", "data.allow_repeats=true"]
_COMMON += ["train.batch_size=16", "train.micro_batch=null", "train.eval_every=1000000"]
_COMMON += ["arch.vocab_size=50304", "evaluate.tokens=200000", "tracker=none"]
_130M = ["scale=130m", "arch.attention.n_heads=12", "arch.swa.n_heads=12", "arch.swa.window=1024"]
_GELU = ["arch.mlp.kind=gelu", "arch.mlp.d_hidden=3072"]

# Words of the config, and the tokens a second on one H200 that are the goal.
MODELS: dict[str, tuple[list[str], float]] = {
    "mamba2_130m": (["arch=mamba2_130m"], 450e3),
    "mamba1_130m": ([*_130M, "arch.pattern=mx24"], 280e3),
    "transformer_124m": (["arch=transformer_124m"], 580e3),
    "hybrid_137m": ([*_130M, *_GELU, "arch.attention_share=0.08", "arch.mlp_share=0.5"], 500e3),
    "samba_130m": ([*_130M, "arch.pattern=m-S-x6"], 350e3),
    "hybrid_14m": (["scale=14m", "train.batch_size=32", "arch.vocab_size=16384"], 1.4e6),
}
PEERS = ("plain_transformer", "mamba_ssm")


@dataclass(frozen=True)
class Row:
    """One model. Seconds are from the start of a process to the end of its first step; `phases`
    are those of the whole warm trial by what they went to."""

    name: str
    tokens_per_second: float
    mfu: float | None
    step_ms: float
    peak_bytes: float
    micro_batch: int
    cold: float | None
    warm: float | None
    kernels: Mapping[str, float]  # ms of a step
    phases: Mapping[str, float]

    @property
    def outside(self) -> float | None:
        """Seconds of the warm trial that are neither training steps nor before the first."""
        if not self.phases or self.warm is None:
            return None
        return sum(self.phases.values()) - self.phases["train"] - self.warm


def run(args: Sequence[str], *, tree_of: TreeOf, console: Console | None = None) -> int:
    """Print a row for each model and the table of kernel time; 1 where one failed, else 0.

    tree_of: the composed config of command-line words.
    """
    parser = argparse.ArgumentParser(prog="python -m ablate bench train", description=__doc__)
    parser.add_argument("words", nargs="*", help=f"{', '.join(MODELS)}; settings as name=value")
    parser.add_argument("--steps", type=int, default=100, help="of the warm process")
    parser.add_argument("--peers", default=",".join(PEERS), help="none, or names")
    parser.add_argument("--no-cold", action="store_true", help="with the compile caches there are")
    options = parser.parse_intermixed_args(list(args))
    names = [word for word in options.words if "=" not in word] or list(MODELS)
    settings = [word for word in options.words if "=" in word]
    peers = [] if options.peers == "none" else options.peers.split(",")
    for name, known in [*((n, MODELS) for n in names), *((p, PEERS) for p in peers)]:
        if name not in known:
            raise UserError(
                f"bench train: there is no model '{name}'{did_you_mean(name, known)}; "
                f"there are {', '.join(known)}"
            )
    if options.steps < 5:
        raise UserError(f"bench train: --steps is {options.steps}; give 5 or more")
    trees = [
        (name, tree_of([*_COMMON, *(MODELS[name][0] if name in MODELS else []), *settings]))
        for name in [*names, *peers]
    ]
    unasked = any(tree["train"]["device"] == "auto" for _, tree in trees)
    if unasked and not torch.cuda.is_available():
        raise UserError(
            "bench train needs a GPU, and torch sees none here; give train.device=cpu to measure "
            "on the CPU, whose memory must hold the models"
        )
    console = console or wide_console()
    rows: list[Row] = []
    failed = 0
    try:
        with Interrupts():  # SIGTERM is an exception too, so that no process and no folder is left
            for name, tree in trees:
                if name == "mamba_ssm" and importlib.util.find_spec("mamba_ssm") is None:
                    console.print("mamba_ssm is not installed")
                    continue
                try:
                    row = _measure(name, tree, options.steps, cold=not options.no_cold)
                except TrialFailed as error:
                    console.print(f"{name}: {error}", markup=False)
                    failed += 1
                    continue
                rows.append(row)
                console.print(_line(row), markup=False, highlight=False)
    finally:  # Ctrl-C too: what was measured is shown
        if rows:
            place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            console.print(_speeds(rows, place), _kernels(rows), _phases(rows))
    return int(failed > 0)


# --- processes ------------------------------------------------------------------------------------


def _measure(name: str, tree: dict[str, Any], steps: int, *, cold: bool) -> Row:
    cfg = load(tree)
    prepare(cfg.data)  # so that no process has the text to make
    environment = child_environment(cfg)
    # Processes that are killed may still write there for a moment, which must not hide the reason.
    place = tempfile.TemporaryDirectory(prefix="ablate-bench-", ignore_cleanup_errors=True)
    with place as empty:
        environment["TMPDIR"] = empty  # what a killed process leaves goes with it
        if cold:
            caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PYTHONPYCACHEPREFIX")
            for variable in environment.keys() & caches:
                environment[variable] = os.path.join(empty, variable)
        first = _process(name, tree, 5, environment, kernels=False) if cold else None
        found = _process(name, tree, steps, environment, kernels=True)
    tokens = cfg.train.batch_size * cfg.data.seq_len
    speed = found["tokens_per_second"]
    kernels = found["kernels"]
    step_ms = 1e3 * tokens / speed
    if kernels and torch.cuda.is_available():  # else the profile slows what it measures
        kernels["gaps"] = step_ms - sum(kernels.values())
    return Row(
        name,
        speed,
        found["mfu"],
        step_ms,
        found["peak_memory_bytes"],
        found["micro_batch"],
        None if first is None else first["seconds_to_first_step"],
        found["seconds_to_first_step"],
        kernels,
        found["phases"],
    )


def _process(
    name: str, tree: dict[str, Any], steps: int, environment: dict[str, str], *, kernels: bool
) -> dict[str, Any]:
    """What `_main` found in a process of its own; TrialFailed with its last line."""
    asked = {"name": name, "config": tree, "steps": steps, "kernels": kernels}
    try:
        with lifeline() as stdin:
            done = subprocess.run(
                [sys.executable, "-m", "ablate.bench.train", json.dumps(asked)],
                stdin=stdin,
                capture_output=True,
                text=True,
                env=environment,
                timeout=TIMEOUT,
            )
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"{steps} steps did not end within {TIMEOUT} s") from None
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    if done.returncode:
        raise TrialFailed(lines[-1] if lines else f"exit code {done.returncode}")
    return dict(json.loads(lines[-1]))


def _main() -> None:
    die_with_parent()
    asked = json.loads(sys.argv[1])
    cfg = load(asked["config"])
    tokens = asked["steps"] * cfg.train.batch_size * cfg.data.seq_len
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"tokens": tokens})})
    if asked["name"] in PEERS:
        print(json.dumps(_peer(asked["name"], cfg, asked["steps"])))
        return
    result = train(cfg)
    found = {name: value for name, value in result["train"].items() if name != "seconds"}
    found["phases"] = result["seconds"]
    found["kernels"] = kernel_times(cfg, found["micro_batch"]) if asked["kernels"] else {}
    print(json.dumps(found))


# --- where the time goes --------------------------------------------------------------------------

_OF_KIND = {
    "ssd": "Mamba-2, RetNet: ssd",
    "mamba2_core": "Mamba-2: core",
    "scale_columns": "Mamba-2: core",
    "weight_gradient": "GEMMs",
    "gated_rms_norm": "Mamba-2, linear attention: gated norm",
    "gated_delta_rule": "Gated DeltaNet: rule",
    "gla": "GLA: core",
    "selective_scan": "Mamba-1: scan",
    "conv1d": "Mamba: convolution",
    "rms_norm": "all: norm",
    "attention": "attention: core",
    "mlp": "MLP: products with their activation",
}
_OPTIMISER = ("Optimizer.step", "_foreach_norm", "vector_norm", "_fused_adam", "ablate::adamw")
_ATTENTION = ("attention", "flash", "flex", "sdpa")
_GEMM = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear")

_COMPILED = ("triton_", "Torch-Compiled", "CompiledFunction", "## Call CompiledFx")


def group_of(names: Sequence[str]) -> str:
    """What an operator is for, by its own name and those of the operators around it."""
    for name in names:
        if "CrossEntropy" in name or "cross_entropy" in name:
            return "loss"
        if any(part in name for part in _OPTIMISER):
            return "optimiser"
        if name.startswith("ablate::"):
            op = name.removeprefix("ablate::")
            for ending in ("_forward", "_backward", "_grad"):
                op = op.removesuffix(ending)
            return _OF_KIND.get(op, op)
        if any(part in name.lower() for part in _ATTENTION):
            return "attention: core"
    if names[0].startswith(_GEMM):
        return "GEMMs"
    return "compiled elementwise" if names[0].startswith(_COMPILED) else "other"


def kernel_times(cfg: Config, micro_batch: int) -> dict[str, float]:
    """Milliseconds of a training step by `group_of`: on the GPU, or where there is none the CPU's.

    The steps are those that `train` takes, captured where it captures them. A replayed graph tells
    its kernels but not what launched them, which comes from a second profile of steps launched one
    kernel after the other.
    """
    device = device_of(cfg.train)
    os.environ["TEARDOWN_CUPTI"] = "0"  # a profile after that can crash where there are graphs
    with numerics(cfg.train, device):
        engine = Engine(cfg, architecture_of(cfg, prepare(cfg.data)), device)
        shape = (cfg.train.batch_size // cfg.train.devices, cfg.data.seq_len)
        tokens = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
        starts = torch.zeros(shape, dtype=torch.int32) if cfg.data.reset_documents else None
        batch = Batch(tokens, tokens.roll(-1, 1), starts)
        captured = _profile(engine, micro_batch, batch) if engine.captured else None
        engine.captured = False
        launched = _profile(engine, micro_batch, batch)
    groups = kernel_groups(launched, device)
    if device.type == "cuda":
        busy = busy_times(launched if captured is None else captured)
    else:
        busy = {name: sum(times.values()) for name, times in groups.items()}
    return {name: us / 1e3 / PROFILED for name, us in by_group(busy, groups).items()}


def _profile(engine: Engine, micro_batch: int, batch: Batch) -> Sequence[Any]:
    """Events of PROFILED steps, on a GPU under the load of training, which lowers its clocks."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    settling = 0.0
    if engine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        settling = SETTLING
        gc.collect()
        torch.cuda.empty_cache()  # the memory of the graph before
    stepper = engine.stepper(micro_batch)

    def some_steps(n: int) -> None:
        for _ in range(n):
            stepper(batch, 1e-4)
        stepper.read()

    some_steps(1 + stepper.cold_steps)
    profiled = torch.profiler.profile(activities=activities)
    profiled.prepare_trace()  # which takes long enough for the clocks to rise
    until = time.perf_counter() + settling
    while time.perf_counter() < until:
        some_steps(PROFILED)
    profiled.start_trace()
    some_steps(PROFILED)
    profiled.stop_trace()
    return profiled.events()


def kernel_groups(events: Sequence[Any], device: torch.device) -> dict[str, dict[str, float]]:
    """Microseconds of each kernel, by its name, for each group of the operators that launched it.

    events: of steps that are not captured. On a CPU an operator is its own kernel.
    """
    groups: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        spent = [(kernel.name, kernel.duration) for kernel in event.kernels]
        if device.type == "cpu":
            spent = [(event.name, event.self_cpu_time_total)]
        names, parent = [event.name], event.cpu_parent
        while parent is not None:
            names.append(parent.name)
            parent = parent.cpu_parent
        for name, us in spent:
            if us > 0:
                groups[name][group_of(names)] += us
    return groups


def busy_times(events: Sequence[Any]) -> dict[str, float]:
    """Microseconds by kernel name, together those in which the GPU was busy.

    A kernel that begins while others run counts from when the last of them ends.
    """
    times: dict[str, float] = defaultdict(float)
    until = -math.inf
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.device_type == torch.autograd.DeviceType.CPU or event.is_user_annotation:
            continue
        start, end = event.time_range.start, event.time_range.end
        times[event.name] += max(0.0, end - max(start, until))
        until = max(until, end)
    return times


def by_group(
    busy: Mapping[str, float], groups: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """`busy_times` by group, each kernel's divided in the proportions of `kernel_groups`."""
    times: dict[str, float] = defaultdict(float)
    for name, us in busy.items():
        # A kernel that was launched in no other profile, as a library may choose another when it
        # is captured, has no known purpose; one that is not in `busy` took no time of the step.
        shares = groups.get(name, {"of no operator": 1.0})
        for group, share in shares.items():
            times[group] += us * share / sum(shares.values())
    return times


# --- peers ----------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Transformer(nn.Module):
    """The 124M Transformer as one writes it down, with learned positions and tied embeddings."""

    def __init__(self, vocabulary: int, length: int, width: int = 768, layers: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(_Block(width, width // 64) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embedding(tokens_BL) + self.positions))
        return F.linear(x, self.embedding.weight)


def _peer(name: str, cfg: Config, steps: int) -> dict[str, Any]:
    """A peer's step on tokens that are there already: no data, no logging, no validation."""
    device = device_of(cfg.train)
    rows, length, vocabulary = cfg.train.batch_size, cfg.data.seq_len, cfg.arch.vocab_size or 256
    torch.set_float32_matmul_precision("high")
    if name == "mamba_ssm":
        from mamba_ssm.models.config_mamba import MambaConfig  # type: ignore[import-not-found]
        from mamba_ssm.models.mixer_seq_simple import (  # type: ignore[import-not-found]
            MambaLMHeadModel,
        )

        shape = {"d_model": 768, "n_layer": 24, "vocab_size": vocabulary}
        peer = MambaLMHeadModel(MambaConfig(**shape, ssm_cfg={"layer": "Mamba2"}), device=device)
        logits: Any = lambda tokens: peer(tokens).logits  # noqa: E731
    else:
        peer = _Transformer(vocabulary, length).to(device)
        logits = peer
    on_gpu = device.type == "cuda"

    def loss_of(tokens: Tensor) -> Tensor:
        return F.cross_entropy(logits(tokens).flatten(0, 1).float(), tokens.flatten())

    if name != "mamba_ssm" and on_gpu:
        loss_of = torch.compile(loss_of)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, vocabulary, (rows, length), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    step()
    wait()
    first = process_age()
    for _ in range(3):
        step()
    wait()
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return {
        "tokens_per_second": steps * tokens.numel() / (time.perf_counter() - begun),
        "mfu": None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "micro_batch": rows,
        "seconds_to_first_step": first,
        "kernels": {},
        "phases": {},
    }


# --- tables ---------------------------------------------------------------------------------------


def _number(value: float | None, form: str = ",.1f") -> str:
    return "–" if value is None else format(value, form)


def _line(row: Row) -> str:
    return (
        f"{row.name}: {row.tokens_per_second:,.0f} tokens/s, first step after "
        f"{_number(row.cold)} s cold and {_number(row.warm)} s warm"
    )


def _speeds(rows: Sequence[Row], place: str) -> Table:
    table = Table(title=f"Training on {place}", title_justify="left")
    table.add_column("model")
    for name in ("tokens/s", "of the goal", "MFU", "ms a step", "rows a pass", "GiB"):
        table.add_column(name, justify="right")
    for name in ("first step, s\ncold", "\nwarm", "outside\nsteps, s"):
        table.add_column(name, justify="right")
    for row in rows:
        goal = MODELS[row.name][1] if row.name in MODELS else None
        table.add_row(
            row.name,
            f"{row.tokens_per_second:,.0f}",
            _number(goal and row.tokens_per_second / goal, ".2f"),
            _number(row.mfu, ".1%"),
            f"{row.step_ms:,.1f}",
            str(row.micro_batch),
            f"{row.peak_bytes / 2**30:,.1f}",
            *map(_number, (row.cold, row.warm, row.outside)),
        )
    return table


def _kernels(rows: Sequence[Row]) -> Table:
    """Groups in the order of their time, over all models."""
    table = Table(title="Kernel time of a step, ms", title_justify="left")
    table.add_column("")
    told = [row for row in rows if row.kernels]
    total: Counter[str] = Counter()
    for row in told:
        table.add_column(row.name, justify="right")
        total.update(row.kernels)
    for group in sorted(total, key=lambda g: (g == "gaps", -total[g])):
        table.add_row(group, *(_number(row.kernels.get(group), ".2f") for row in told))
    table.add_row("a step", *(f"{row.step_ms:.2f}" for row in told))
    return table


def _phases(rows: Sequence[Row]) -> Table:
    table = Table(title="Seconds of the warm trial", title_justify="left")
    told = [row for row in rows if row.phases]
    table.add_column("")
    for row in told:
        table.add_column(row.name, justify="right")
    for phase in PHASES:
        table.add_row(phase.replace("_", " "), *(f"{row.phases[phase]:.1f}" for row in told))
    return table


if __name__ == "__main__":
    _main()
