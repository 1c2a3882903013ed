"""Trains in forked children and kills them with SIGKILL at random moments, until one finishes.

    python kill_server.py CONFIG_JSON FOLDER SEED MOST

The parent imports torch once, so that a life costs no start-up. Prints how many were killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from ablate.config import load
from ablate.run import RunFolder
from ablate.train import train


def main() -> None:
    cfg = load(json.loads(sys.argv[1]))
    folder = RunFolder(Path(sys.argv[2]))
    rng = random.Random(int(sys.argv[3]))
    most = int(sys.argv[4])
    killed = 0
    while True:
        child = os.fork()
        if child == 0:
            train(cfg, folder)
            os._exit(0)
        if killed < most:
            time.sleep(rng.uniform(0.02, 0.5))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif folder.status()["state"] == "done":
            break
        elif os.WEXITSTATUS(status):
            sys.exit(f"a child ended with {os.WEXITSTATUS(status)}")
    print(killed)


main()
