"""All benchmarks, one after another: prints and stores their tables.

    python experiments/benchmarks/run.py [arithmetic accuracy job products growth startup methods deq] [--hypertorch PATH]

Each is a process of its own; ``methods`` and ``deq`` are those of their own pages.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = {
    "arithmetic": HERE / "arithmetic.py",
    "accuracy": HERE / "accuracy.py",
    "job": HERE / "job.py",
    "products": HERE / "products.py",
    "growth": HERE / "growth.py",
    "startup": HERE / "startup.py",
    "methods": HERE / "methods.py",
    "deq": HERE.parent / "deq" / "step.py",
}


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--hypertorch", type=Path, help="a clone of the repository prolearner/hypertorch")
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no part is called {unknown[0]}; they are {', '.join(PARTS)}")
    for part in options.parts:
        more = ["--hypertorch", str(options.hypertorch.resolve())] if part == "arithmetic" and options.hypertorch else []
        more += ["--out", str(HERE / "methods.json")] if part == "methods" else []
        print(f"--- {part}", flush=True)
        subprocess.run([sys.executable, str(PARTS[part]), *more], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
