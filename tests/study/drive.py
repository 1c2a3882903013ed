"""A study in a process of its own, forked from one that has imported torch already."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

FAKE = [sys.executable, str(Path(__file__).with_name("fake_child.py"))]


def drive(tree: dict[str, Any], fake: bool, environment: dict[str, str], output: str) -> None:
    """Run a study at the head of a session; the exit code is the study's."""
    from ablate.study.supervisor import run_study

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where pytest runs behind an &
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(run_study(tree, child_command=FAKE if fake else None).exit_code)
