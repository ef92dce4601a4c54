"""Start-up: ``hyperopt --help`` and tab completion without torch, and the first outer step after ``import torch``.

    python experiments/benchmarks/startup.py

Wall seconds of whole processes, the median of seven after one that warms the disk's cache; those of ``import torch`` in the same
rounds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from facts import facts, store

FIRST = """
import time, torch
start = time.perf_counter()
from hyperopt.app.cli import main
import hyperopt.app.run as loop, sys
def stop(*args, **kwargs):
    raise SystemExit(f"first {time.perf_counter() - start}")
from hyperopt.tasks.equilibrium import EquilibriumTask
step = EquilibriumTask.step
def timed(self, *args):
    step(self, *args)
    print("first", time.perf_counter() - start, flush=True)
    import os
    os._exit(0)
EquilibriumTask.step = timed
sys.argv = ["hyperopt", "trainer.progress=false", "hydra.run.dir=" + sys.argv[1]]
main()
"""
COMPLETION = {"_COMPLETE": "1", "COMP_LINE": "hyperopt solver=", "COMP_POINT": "16"}


def wall(command: list[str], **more: str) -> tuple[float, str]:
    """Seconds of a process, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **more}, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}\n{done.stderr}")
    return seconds, done.stdout


def main() -> None:
    """Measure, print and store."""
    import tempfile

    found: dict[str, list[float]] = {}
    python = [sys.executable, "-m", "hyperopt.app.cli"]
    for k in range(8):
        with tempfile.TemporaryDirectory() as folder:
            times = {
                "python -c pass": wall([sys.executable, "-c", "pass"])[0],
                "import torch": wall([sys.executable, "-c", "import torch"])[0],
                "hyperopt --help": wall([*python, "--help"])[0],
                "tab completion (hyperopt -sc query=bash)": wall([*python, "-sc", "query=bash"], **COMPLETION)[0],
                "first outer step of hyperopt (digits) after import torch": float(
                    wall([sys.executable, "-c", FIRST, folder + "/run"])[1].split()[-1]
                ),
            }
        for name, seconds in times.items() if k else ():
            found.setdefault(name, []).append(seconds)
    medians = {name: statistics.median(each) for name, each in found.items()}
    lines = ["| process | seconds |", "|---|---|", *(f"| `{name}` | {each:.2f} |" for name, each in medians.items())]
    store("startup", {**facts(), "seconds": found}, lines)


if __name__ == "__main__":
    main()
