"""The run folder: names, schema, atomic writes, reading back.

    runs/<study>/<key>/
        config.yaml        the resolved config, enough to run it again
        environment.json   versions, commit, hardware, data fingerprint
        tokenizer.json     text to ids, where weights are kept and ids are not bytes
        status.json        state, cause of failure, generation
        metrics.jsonl      one line per logged step
        result.json        final figures; written last and atomically
        checkpoint/        safetensors + training state
        evaluation/        one JSON per task, with per-item scores
        log.txt            what the process that trains printed, tracebacks included
        lock               held by the process that works here, freed by its death

A run is finished when `result.json` is there; everything else can be lost and made again. Nothing
else in the library knows a file name of this folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from ablate.errors import UserError

State = Literal["created", "running", "done", "failed", "pruned", "interrupted"]
PHASES = (  # of a run, whose seconds stand in its result
    *("start_up", "data", "build", "first_step"),
    *("train", "validation", "evaluation", "checkpoint"),
)
NO_RESULT = "its result.json is missing or damaged; the same command trains it again"

_UMASK = os.umask(0)  # it can only be read by setting it, which threads would notice later on
os.umask(_UMASK)


class StaleWriter(RuntimeError):
    """Another process has taken this run over, or its folder is gone: what this one computes has no
    place any more."""


def atomic_write(path: Path, text: str | bytes) -> None:
    """Write a file; a reader, or a crash at any moment, finds the old or the new content whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_UMASK)  # others of a shared disk may read it
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """`atomic_write` of JSON; NaN and infinities become null, which strict readers accept."""
    atomic_write(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file is missing, damaged or something else."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def python_path() -> str:
    """PYTHONPATH of a process that is to import this very package."""
    root = str(Path(__file__).resolve().parents[1])
    return os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)


@contextlib.contextmanager
def lifeline() -> Iterator[int]:
    """A descriptor that is stdin of a process which calls `die_with_parent`: it ends with this
    process, however that dies, as no other has its writing end."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def die_with_parent() -> None:
    """End this process at once when its stdin ends, which the parent holds open while it lives."""
    threading.Thread(target=_outlive_nobody, name="parent", daemon=True).start()


def _outlive_nobody() -> None:
    os.read(0, 1)
    os._exit(1)


def process_age() -> float:
    """Seconds since this process started, 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        booted = float(Path("/proc/uptime").read_text().split()[0])
        return booted - float(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def load_yaml(text: str) -> Any:
    """`yaml.safe_load`, by libyaml where PyYAML has it: ten times faster on a resolved config."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def dump_yaml(value: Any, width: int = 80) -> str:
    """`yaml.safe_dump` in the order given, by libyaml too."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=width))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. Cheap to make; touches the disk only through its methods."""

    path: Path

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    # --- reading -------------------------------------------------------------------------------

    def config(self) -> dict[str, Any] | None:
        try:
            content = load_yaml((self.path / "config.yaml").read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return None
        return content if isinstance(content, dict) else None

    def environment(self) -> dict[str, Any]:
        """What the run was made with; what is damaged there is left out."""
        content = read_json(self.path / "environment.json") or {}
        kinds = {"commit": str, "commits": list, "numerics": dict, "versions": dict, "layers": dict}
        return {k: v for k, v in content.items() if isinstance(v, kinds.get(k, object))}

    def tokenizer(self) -> str | None:
        """The JSON of the tokenizer that the weights were trained with, where one was kept."""
        try:
            return (self.path / "tokenizer.json").read_text()
        except (OSError, UnicodeDecodeError):
            return None

    def status(self) -> dict[str, Any]:
        """State, generation and cause. Done is only what has a result that can be read."""
        content = read_json(self.path / "status.json") or {}
        status = {"state": "created", "generation": 0, **content}
        if not isinstance(status["generation"], int):  # damaged: the next one begins anew
            status["generation"] = 0
        if status["state"] == "done" and self.result() is None:
            status |= {"state": "interrupted", "cause": NO_RESULT}
        return status

    def result(self) -> dict[str, Any] | None:
        """Final figures, or None while the run is not finished or where they cannot be read."""
        content = read_json(self.path / "result.json") or {}
        for name in ("val_a", "val_b", "train", "seconds", "architecture", "data"):
            section = content.get(name, {})
            if not isinstance(section, dict):
                return None
            if name.startswith("val_") and not isinstance(section.get("loss"), int | float | None):
                return None  # null is NaN
        return content or None

    def metrics(self) -> list[dict[str, Any]]:
        """Logged steps in order; a line torn by a crash or damaged is skipped."""
        rows = []
        try:
            lines = (self.path / "metrics.jsonl").read_text(errors="replace").splitlines()
        except OSError:
            return []
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and all(
                isinstance(v, int | float | None) for v in row.values()
            ):
                rows.append(row)
        return rows

    def stamp(self) -> str:
        """Changes when any file that a report reads of this run is written again."""
        parts = []
        for name in ("config.yaml", "environment.json", "status.json", "result.json"):
            try:
                stat = (self.path / name).stat()
                parts.append(f"{stat.st_mtime_ns}:{stat.st_size}")
            except OSError:
                parts.append("-")
        return " ".join(parts)

    def evaluation(self, task: str) -> dict[str, Any] | None:
        return read_json(self.path / "evaluation" / f"{task}.json")

    def evaluations(self) -> list[str]:
        """Names of the tasks that have been evaluated."""
        return sorted(path.stem for path in (self.path / "evaluation").glob("*.json"))

    # --- writing -------------------------------------------------------------------------------

    def lock(self) -> FileLock:
        """Take the folder for this process; `filelock.Timeout` when another live process has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / "lock", timeout=0)
        lock.acquire()
        return lock

    def is_held(self) -> bool:
        """Whether a live process works in this folder."""
        if not (self.path / "lock").exists():
            return False
        try:
            self.lock().release()
        except Timeout:
            return True
        return False

    def create(self, config: Mapping[str, Any], *, replace: bool = False) -> None:
        """Write the resolved config; a folder that has one keeps it unless told to `replace` it."""
        if replace or self.config() is None:
            atomic_write(self.path / "config.yaml", dump_yaml(dict(config)))

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        write_json(self._there() / "environment.json", environment)

    def write_tokenizer(self, definition: str) -> None:
        atomic_write(self._there() / "tokenizer.json", definition)

    def begin(self, **fields: Any) -> int:
        """Mark the run as running under a new generation, which is returned."""
        generation = self.status()["generation"] + 1
        self._status("running", generation, None, fields)
        return generation

    def end(self, state: State, generation: int, cause: str | None = None, **fields: Any) -> None:
        """Mark how the run ended; `StaleWriter` when a newer generation has begun."""
        self.check(generation)
        self._status(state, generation, cause, fields)

    def check(self, generation: int) -> None:
        """`StaleWriter` unless `generation` is the newest."""
        newest = self.status()["generation"]
        if newest == generation:
            return
        if not self.path.is_dir():
            why = f"its folder '{self.path}' is gone (moved or deleted while it ran)"
        elif not newest:
            why = "its status.json is missing or damaged"
        else:
            why = f"generation {generation} was replaced by {newest}"
        raise StaleWriter(f"run {self.key}: {why}")

    def _there(self) -> Path:
        """The folder, FileNotFoundError where it is gone. `lock`, `create` and `begin` make it, and
        nothing makes it again: the one that was moved could not be moved back."""
        if not self.path.is_dir():
            why = "this run's folder is gone (moved or deleted meanwhile)"
            raise FileNotFoundError(errno.ENOENT, why, str(self.path))
        return self.path

    def _status(
        self, state: State, generation: int, cause: str | None, fields: Mapping[str, Any]
    ) -> None:
        status = {
            "state": state,
            "generation": generation,
            "cause": cause,
            "pid": os.getpid(),
            "time": time.time(),
        }
        write_json(self.path / "status.json", {**status, **fields})

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One line, one write: a crash tears at most the last line."""
        line = json.dumps(_finite(row), allow_nan=False) + "\n"
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(line)

    def rewind_metrics(self, step: int) -> None:
        """Drop lines after `step`, as a resumed run will log them again."""
        rows = [row for row in self.metrics() if row.get("step", 0) <= step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write(self._there() / "metrics.jsonl", text)

    def check_writable(self) -> None:
        """UserError where no evaluation can be written: to be told before one is made."""
        try:
            (self.path / "evaluation").mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path / "evaluation", prefix="."):
                pass
        except OSError as error:
            raise UserError(f"cannot write to '{self.path}' ({error.strerror})") from None

    def write_evaluation(self, task: str, value: Mapping[str, Any]) -> None:
        write_json(self._there() / "evaluation" / f"{task}.json", value)

    def set_aside(self, task: str) -> Path:
        """Move the scores of a task to where those of others do not take their place."""
        scores = self.path / "evaluation" / f"{task}.json"
        earlier = scores.parent / "earlier"
        earlier.mkdir(exist_ok=True)
        n = 1 + len(list(earlier.glob(f"{task}-*.json")))
        return scores.rename(earlier / f"{task}-{n}.json")

    def write_result(self, result: Mapping[str, Any], generation: int) -> None:
        """The last write of a run: from here on it is finished."""
        self.check(generation)
        write_json(self.path / "result.json", result)


def find_runs(path: Path) -> Iterator[RunFolder]:
    """Run folders at, or directly below, `path`, in name order."""
    if (path / "config.yaml").is_file():
        yield RunFolder(path)
        return
    if path.is_dir():
        for child in sorted(path.iterdir()):
            if (child / "config.yaml").is_file():
                yield RunFolder(child)
