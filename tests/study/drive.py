"""A study run from the command line: `drive.py TREE_JSON [fake]`; its exit code is the study's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ablate.study.supervisor import run_study

if __name__ == "__main__":
    fake = [sys.executable, str(Path(__file__).with_name("fake_child.py"))]
    command = fake if "fake" in sys.argv else None
    sys.exit(run_study(json.loads(sys.argv[1]), child_command=command).exit_code)
