"""A sweep of 1,000 jobs in one process: what it holds in memory, and what a job costs, from the first to the last.

    python experiments/faults/jobs.py [--jobs 1000]

The jobs are one outer step of L2 on 40 synthetic rows; the numbers go to ``jobs.json`` beside this file, as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SMALL = [
    "task=l2",
    "dataset=synthetic",
    "dataset.train=20",
    "dataset.val=10",
    "dataset.test=10",
    "dataset.features=3",
    "device=cpu",
]
SMALL += ["inner.max_steps=5", "adjoint=unrolled", "trainer.max_steps=1", "trainer.progress=false", "threads=1"]


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024, 1)


def measure(jobs: int, out: Path) -> dict[str, Any]:
    """Run the sweep and look at it whenever a tenth of it is done."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "jobs": jobs, "marks": {}}
    with tempfile.TemporaryDirectory() as work:
        sweep = Path(work) / "sweep"
        command = [sys.executable, "-m", "hyperopt.app.cli", "-m", f"hydra.sweep.dir={sweep}", f"seed=range({jobs})", *SMALL]
        begun = time.monotonic()
        with open(os.devnull, "w") as nowhere:
            process = subprocess.Popen(command, cwd=work, env=env, stdout=nowhere, stderr=nowhere)
        first, done = None, 0
        while process.poll() is None:
            done = sum(1 for _ in sweep.glob("*/job.json"))
            if done and first is None:
                first = time.monotonic()
                found["seconds until the first job"] = round(first - begun, 1)
            tenth = done - done % max(jobs // 10, 1)
            if first is not None and tenth and str(tenth) not in found["marks"]:
                found["marks"][str(tenth)] = {
                    "resident MiB": resident(process.pid),
                    "seconds": round(time.monotonic() - first, 1),
                }
                out.write_text(json.dumps(found, indent=2) + "\n")
            time.sleep(0.2)
        index = json.loads((sweep / "sweep.json").read_text())
        found |= {
            "status": process.returncode,
            "counts": index["counts"],
            "index KiB": (sweep / "sweep.json").stat().st_size // 1024,
        }
    out.write_text(json.dumps(found, indent=2) + "\n")
    return found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=HERE / "jobs.json")
    options = parser.parse_args()
    print(json.dumps(measure(options.jobs, options.out), indent=2))


if __name__ == "__main__":
    main()
