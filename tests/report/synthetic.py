"""Run folders that look like real ones, with planted figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ablate.config import Config
from ablate.config import override as override_tree
from ablate.run import RunFolder, write_json

ENVIRONMENT = {
    "versions": {"python": "3.11.7", "ablate": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6"},
    "commit": "55f9b32aaaaaaaaaaaaa",
    "dirty": False,
    "platform": "Linux-6.1",
    "host": "one",
    "hardware": {"cpu": "Some CPU", "cores": 2},
    "numerics": {"device": "cpu", "precision": "fp32", "deterministic": True, "threads": 1},
}

BASE = {
    "arch": {"n_layers": 6, "d_model": 64, "mlp_share": 0.0, "mamba2": {"d_state": 16}},
    "data": {"seq_len": 64, "mqar": {"share": 0.75, "pairs": 8}},
    "train": {"tokens": 2_457_600, "batch_size": 64, "lr": 4e-3},
    "evaluate": {"tokens": 65_536, "mqar_rows": 512},
}


def tree(changes: Mapping[str, Any] | None = None, seed: int = 0) -> dict[str, Any]:
    """The full config dict of a run, with dotted changes."""
    full = Config.model_validate({**BASE, "seed": seed}).model_dump(mode="json")
    return override_tree(full, {**(changes or {}), "seed": seed})


def result(
    *,
    loss: float,
    accuracy: float | None = None,
    attention: int = 0,
    mlp: int = 0,
    layers: int = 6,
    params: int = 92_000,
    tokens: int = 2_457_600,
    seconds: float = 58.0,
    fingerprint: str = "stdlib-3.11-abc",
    lr: float = 4e-3,
) -> dict[str, Any]:
    pattern = "M" * (layers - attention - mlp) + "*" * attention + "-" * mlp
    mixers = max(1, layers - mlp)
    scores = {
        "loss": loss,
        "bits_per_byte": loss / np.log(2),
        "perplexity": float(np.exp(loss)),
        "tokens": 65_536,
        "bytes": 65_536,
    }
    content = {
        "architecture": {
            "pattern": pattern,
            "n_layers": layers,
            "d_model": 64,
            "vocab_size": 320,
            "params": params + 20_480,
            "non_embedding_params": params,
            "forward_flops_per_token": 2.1 * params,
            "train_flops_per_token": 6.3 * params,
            "state_bytes": 36_000 + 16_384 * attention,
            "attention_of_layers": attention / layers,
            "attention_of_mixers": attention / mixers,
            "mlp_of_layers": mlp / layers,
        },
        "train": {
            "steps": tokens // 4096,
            "tokens": tokens,
            "text_tokens": tokens // 4,
            "flops": 6.3 * params * tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": 0.21,
            "loss": loss - 0.1,
            "skipped_steps": 0,
            "peak_memory_bytes": 4e8,
            "micro_batch": 64,
            "lr": lr,
        },
        "val_a": {**scores, "loss": loss + 0.01},
        "val_b": scores,
        "data": {
            "fingerprint": fingerprint,
            "unique_tokens": 8_000_000,
            "epochs": 0.08,
            "tokenizer": "byte",
        },
        "seconds": {"data": 1.0, "train": seconds},
    }
    if accuracy is not None:
        content["mqar"] = {"accuracy": accuracy, "loss": 1 - accuracy, "queries": 4096}
    return content


def curve(folder: RunFolder, loss: float, accuracy: float | None, tokens: int, seed: int) -> None:
    """A learning curve that ends at `loss`."""
    rng = np.random.default_rng(seed)
    steps = tokens // 4096
    for step in range(10, steps + 1, 10):
        done = step / steps
        now = loss + 3.2 * (np.exp(-5 * done) - np.exp(-5))
        folder.append_metrics(
            {
                "step": step,
                "tokens": step * 4096,
                "loss": now + rng.normal(0, 0.03),
                "lr": 4e-3 * (1 - done),
                "grad_norm": 0.5,
                "tokens_per_second": 42_000.0,
                "mfu": 0.2,
                "seconds": step * 0.097,
            }
        )
        if step % (steps // 5) < 10:
            row = {"step": step, "tokens": step * 4096, "val_a_loss": now + 0.01}
            if accuracy is not None:
                row["mqar_accuracy"] = 0.06 + (accuracy - 0.06) / (1 + np.exp(-12 * (done - 0.5)))
            folder.append_metrics(row)


def _items(folder: RunFolder, content: Mapping[str, Any], seed: int) -> None:
    """Scores of 40 documents and 64 recall rows that add up to the result's figures."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(50, 3000, 40)
    level = rng.normal(0, 0.3, 40)  # documents are hard or easy for every run
    for split in ("val_a", "val_b"):
        nats = tokens * (content[split]["loss"] + level - np.average(level, weights=tokens))
        folder.write_evaluation(split, {"nats": nats.tolist(), "tokens": tokens.tolist()})
    if "mqar" in content:
        rows = np.random.default_rng(seed).binomial(8, content["mqar"]["accuracy"], 64)
        part = {"queries_per_row": 8, "correct": rows.tolist(), "nats": [1.0] * 64}
        folder.write_evaluation("mqar", {"by_pairs": {"8": part}})


def write_run(
    study: Path,
    key: str,
    *,
    changes: Mapping[str, Any] | None = None,
    seed: int = 0,
    content: Mapping[str, Any] | None = None,
    state: str = "done",
    cause: str | None = None,
    environment: Mapping[str, Any] | None = None,
) -> RunFolder:
    """One run folder in the state asked for; a done one has `content` as its result."""
    folder = RunFolder(study / key)
    folder.create(tree(changes, seed))
    folder.write_environment({**ENVIRONMENT, **(environment or {})})
    if state == "created":
        return folder
    generation = folder.begin()
    if content is not None:
        val = content["val_b"]["loss"]
        accuracy = content.get("mqar", {}).get("accuracy")
        if val is not None and np.isfinite(val):
            curve(folder, val, accuracy, content["train"]["tokens"], seed)
        _items(folder, content, seed)
        folder.write_result(content, generation)
    if state != "running":
        folder.end(state, generation, cause)  # type: ignore[arg-type]
    return folder


def write_study(
    path: Path,
    *,
    shares: Sequence[float] = (0.0, 1 / 6, 1 / 3, 1 / 2),
    seeds: Sequence[int] = (0, 1),
    layers: int = 6,
    losses: Sequence[float] | None = None,
    accuracies: Sequence[float] | None = (0.09, 0.88, 0.91, 0.92),
    noise: float = 0.01,
    correlation: float = 0.3,
    params: Sequence[int] | None = None,
    random: int = 0,
    **common: Any,
) -> Path:
    """A finished study of the share of attention; losses and accuracies: the arms' true means."""
    rng = np.random.default_rng(random)
    losses = losses or [2.3] * len(shares)
    lucky = rng.normal(0, noise * correlation**0.5, len(seeds))
    cells = {}
    for i, share in enumerate(shares):
        for j, seed in enumerate(seeds):
            key = f"{i:02d}{seed:02d}".ljust(12, "a")
            changes = {"arch.attention_share": share, "arch.n_layers": layers}
            loss = losses[i] + lucky[j] + rng.normal(0, noise * (1 - correlation) ** 0.5)
            accuracy = None
            if accuracies is not None:
                accuracy = float(np.clip(accuracies[i] + rng.normal(0, 0.02), 0, 1))
            content = result(
                loss=loss,
                accuracy=accuracy,
                attention=round(share * layers),
                layers=layers,
                params=params[i] if params else 92_000,
            )
            write_run(path, key, changes=changes, seed=seed, content=content, **common)
            cells[key] = {
                "arm": f"attention_share={share:.3g}",
                "factors": {"arch.attention_share": share},
                "seed": seed,
            }
    write_json(
        path / "study.json",
        {
            "name": path.name,
            "question": "What share of the layers should be attention?",
            "finding": "attention_share",
            "x": None,
            "factors": ["arch.attention_share"],
            "cells": cells,
            "orphans": [],
        },
    )
    return path


def write_two_stages(
    path: Path,
    *,
    shares: Sequence[float] = (0.0, 0.125, 0.25, 0.5),
    points: int = 5,
    noise: float = 0.004,
    confirm: bool = True,
    best: float = 2.6e-3,
    margin: float | None = None,
    random: int = 0,
    **match: Any,
) -> Path:
    """A study of matched arms that tuned its learning rates: real configs, planted losses.

    best: the arms' optimal rate; confirm: whether the second stage has run.
    """
    from ablate import config
    from ablate.study import space
    from ablate.study.tune import Run, tune

    rng = np.random.default_rng(random)
    full = tree({"arch.n_layers": 24, "arch.d_model": 128, "train.lr": 3e-3})
    full["arch"]["attention"] = {"head_dim": 32, "n_heads": 4}
    full["data"]["mqar"]["share"] = 0.0
    full["evaluate"]["mqar_rows"] = 0
    full["match"] |= {"by": "attention_inner", **match}
    full["study"] |= {
        "name": path.name,
        "question": "What share of the layers should be attention?",
        "finding": "attention_share",
        "grid": {"arch.attention_share": list(shares)},
        "seeds": [0, 1, 2],
        "tune": {**full["study"]["tune"], "points": points},
    }
    cfg = config.load(full)
    arms = space.cells(full)
    cells, runs = {}, []

    def write(cell: Any, loss: float) -> None:
        arch = cell.trial.architecture
        cost = arch.cost(cfg.data.seq_len)
        content = result(loss=loss, params=cost.non_embedding_params, layers=24, lr=cell.rate)
        content["architecture"] |= {
            **arch.shares(),
            "pattern": arch.pattern,
            "train_flops_per_token": cost.train_flops,
            "state_bytes": cost.state_bytes,
            "match": cell.trial.config.match.certificate,
        }
        run = RunFolder(path / cell.key)
        run.create(cell.trial.tree)
        run.write_environment(ENVIRONMENT)
        curve(run, loss, None, content["train"]["tokens"], cell.seed)
        generation = run.begin()
        run.write_result(content, generation)
        run.end("done", generation)

    def entry(cell: Any) -> dict[str, Any]:
        tuning = {"stage": "tune"} if cell.stage == "tune" else {}
        return {"arm": cell.arm, "factors": cell.factors, "seed": cell.seed, **tuning}

    def excess(rate: float) -> float:
        return 0.02 * float(np.log2(rate / best)) ** 2

    for cell in space.tuning(cfg, arms):
        loss = 2.3 + excess(cell.rate) + float(rng.normal(0, noise))
        write(cell, loss)
        runs.append(Run(cell.arm, cell.rate, cell.seed, loss + 0.01))
        cells[cell.key] = entry(cell)
    found = tune(runs)
    tuned = {"keys": sorted(cells), "fit": found.plain(), "problems": found.problems}
    if confirm and not found.problems:
        lucky = rng.normal(0, noise * 0.5, 3)
        for cell in space.confirming(arms, found.rates()):
            gain = 0.0 if cell.factors["arch.attention_share"] == 0 else -0.03
            loss = 2.3 + gain + excess(cell.rate) + lucky[cell.seed] + float(rng.normal(0, noise))
            write(cell, loss)
            cells[cell.key] = entry(cell)
    content = {
        **{name: getattr(cfg.study, name) for name in ("name", "question", "finding")},
        "factors": space.factor_names(cfg),
        "x": "arch.attention_share",
        "margin": margin,
        "cells": cells,
        "orphans": [],
        "tuned": tuned,
    }
    write_json(path / "study.json", content)
    return path


def write_cells(
    path: Path, cells: Sequence[tuple[str, dict[str, Any], int, dict[str, Any], dict[str, Any]]]
) -> Path:
    """A study of (arm, factors, seed, result, evaluations)."""
    index = {}
    for i, (arm, factors, seed, content, evaluations) in enumerate(cells):
        key = f"{i:04d}".ljust(16, "b")
        run = write_run(path, key, seed=seed, content=content)
        for task, evaluation in evaluations.items():
            run.write_evaluation(task, evaluation)
        index[key] = {"arm": arm, "factors": factors, "seed": seed}
    factors = list(dict.fromkeys(name for cell in cells for name in cell[1]))
    study = {"name": path.name, "question": f"What of {path.name}?", "factors": factors}
    write_json(path / "study.json", {**study, "x": factors[0], "cells": index, "orphans": []})
    return path
