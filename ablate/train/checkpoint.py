"""Checkpoints: versioned directories that are either whole or not there.

    checkpoint/step-00001200/
        model.safetensors       parameters and persistent buffers
        optimizer.safetensors   AdamW's moments, random states, running sums
        state.json              step, seconds, whose it is
        manifest.json           size and SHA-256 of each file above

A directory is filled under a temporary name, flushed to the disk, and renamed. The two newest are
kept, so that damage to one costs minutes. Nothing is pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

log = logging.getLogger(__name__)

FORMAT = 1
KEPT = 2  # newest checkpoints that stay while a run goes on


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def _name(step: int) -> str:
    return f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """Steps that have a checkpoint (whole or damaged), oldest first."""
    if not root.is_dir():
        return []
    names = [p.name.removeprefix("step-") for p in root.iterdir() if p.name.startswith("step-")]
    return sorted(int(name) for name in names if name.isdigit())


def save(
    root: Path,
    step: int,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of `step`; OSError when the disk refuses, with the others intact."""
    root.mkdir(exist_ok=True)
    temporary = root / f".{_name(step)}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, tensors in (("model", model), ("optimizer", optimizer)):
            plain = {k: v.detach().contiguous() for k, v in tensors.items()}
            try:
                save_file(plain, temporary / f"{name}.safetensors")
            except SafetensorError as error:  # says the errno in its text only
                number = re.search(r"os error (\d+)", str(error))
                code = int(number[1]) if number else errno.EIO
                raise OSError(code, f"cannot write {name}.safetensors: {error}") from error
        content = {"format": FORMAT, **state, "step": step}
        (temporary / "state.json").write_text(json.dumps(content))
        files = {p.name: _fingerprint(p) for p in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(files, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        final = root / _name(step)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(root: Path, step: int) -> Checkpoint:
    """The checkpoint of `step`; ValueError with the reason when it is missing or damaged."""
    path = root / _name(step)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, expected in manifest.items():
            if _fingerprint(path / name) != expected:
                raise ValueError(f"{name} is not what was written")
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']}, this version reads {FORMAT}")
        return Checkpoint(
            path,
            load_file(path / "model.safetensors"),
            load_file(path / "optimizer.safetensors"),
            state,
        )
    except (OSError, KeyError, AttributeError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} cannot be used: {error}") from error


def load_newest(root: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None; a damaged one is named in the log and removed."""
    for step in reversed(steps(root)):
        try:
            return load(root, step)
        except ValueError as error:
            log.warning("%s; going back to the one before", error)
            shutil.rmtree(root / _name(step), ignore_errors=True)
    return None


def tidy(root: Path, keep: Collection[int] = (), newest: int = KEPT) -> None:
    """Remove all but the newest checkpoints and those of the steps in `keep`."""
    for step in steps(root)[:-newest]:
        if step not in keep:
            shutil.rmtree(root / _name(step), ignore_errors=True)
    if root.is_dir():
        for path in root.glob(".step-*"):  # left by a process that was killed while writing
            shutil.rmtree(path, ignore_errors=True)


def finish(root: Path, keep: str, kept_steps: Collection[int] = ()) -> None:
    """What stays after the result: "none", the last "weights" alone, or "all" that was kept."""
    if keep == "none":
        shutil.rmtree(root, ignore_errors=True)
        return
    tidy(root, kept_steps, newest=1)
    present = steps(root)
    if keep == "weights" and present:
        # Not a checkpoint any more: nothing resumes from it.
        last = root / _name(present[-1])
        os.replace(last / "model.safetensors", root / "model.safetensors")
        shutil.rmtree(last, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _flush(path: Path) -> None:
    """fsync a file or a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
