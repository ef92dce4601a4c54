"""Cost of one outer gradient of the equilibrium model against a hand-written loop of the same arithmetic, ours and others'.

    python experiments/benchmarks/arithmetic.py [--pairs 9] [--hypertorch PATH] [--envs DIR] [--libraries ours torchdeq jax]

5,000 MNIST images (random pixels where MNIST is not to be had: the arithmetic is the same), 784 -> 200 -> 10, ``||A|| = 0.9``,
T = K = 20, float32, one thread. Every library runs in an environment of its own, made where there is none; in its process each
way runs in turn with the hand-written loop ("floor"), and a ratio is the median over the pairs of process CPU seconds to the
floor's of the same pair. Errors are those to a float64 fixed point, over all five gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ways import LIBRARIES, NAMES, floor

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
ROWS, FEATURES, STATE, CLASSES, STEPS = 5000, 784, 200, 10, 20
HYPERTORCH = "give --hypertorch PATH, a clone of the repository prolearner/hypertorch: it is in no package index"


def problem() -> tuple[dict[str, Tensor], str]:
    """Data and parameters, and what the data are."""
    from hyperopt.data import DataError
    from hyperopt.data.mnist import MNIST

    generator = torch.Generator().manual_seed(0)
    try:
        rows = (
            MNIST(train=ROWS, val=0, root=os.environ.get("HYPEROPT_DATA", "data")).load(torch.float32, torch.device("cpu")).train
        )
        x, y, data = rows.x, rows.y, "MNIST"
    except DataError:
        x = torch.rand(ROWS, FEATURES, generator=generator)
        y, data = torch.randint(CLASSES, (ROWS,), generator=generator), "random pixels"
    A = torch.randn(STATE, STATE, generator=generator)
    p = {"A": A * 0.9 / torch.linalg.matrix_norm(A, 2), "B": 0.05 * torch.randn(STATE, FEATURES, generator=generator)}
    p |= {"c": torch.zeros(STATE), "W": 0.05 * torch.randn(CLASSES, STATE, generator=generator), "b": torch.zeros(CLASSES)}
    return {"x": x, "y": y, **p}, data


def reference(p: dict[str, Tensor]) -> list[Tensor]:
    """The gradient at the fixed point, float64."""
    return floor({name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}, 400)()


def measure(library: str, file: Path, pairs: int) -> None:
    """In a library's environment: print a line for each of its ways."""
    torch.set_num_threads(1)
    p = torch.load(file, weights_only=True)
    exact = p.pop("exact")
    loop = floor(p, STEPS)
    ways = {"the hand-written floor": loop} if library == "ours" else {}
    for name, way in {**ways, **LIBRARIES[library](p, STEPS)}.items():
        found = [torch.as_tensor(each).double() for each in way()]
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
        loop()
        seconds: list[tuple[float, float]] = []
        for _ in range(pairs):
            marks = [time.process_time()]
            for each in (way, loop):
                each()
                marks.append(time.process_time())
            seconds.append((marks[1] - marks[0], marks[2] - marks[1]))
        ratio = statistics.median(a / b for a, b in seconds)
        row = {"way": name, "ratio": ratio, "seconds": statistics.median(a for a, _ in seconds), "error": error}
        print(json.dumps(row), flush=True)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the table."""
    lines = ["| one outer gradient | x floor | CPU seconds | relative error |", "|---|---|---|---|"]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['way']} | not measured: {row['skipped']} | | |")
        else:
            lines.append(f"| {row['way']} | {row['ratio']:.2f} | {row['seconds']:.3f} | {row['error']:.1e} |")
    return lines


def main() -> None:
    """Measure, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--libraries", nargs="*", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--hypertorch", type=Path, help="a clone of prolearner/hypertorch")
    parser.add_argument("--envs", type=Path, default=HERE.parents[1] / "outputs" / "benchmarks" / "envs")
    parser.add_argument("--measure", nargs=2, metavar=("LIBRARY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]), options.pairs)
        return
    from environments import Environment, interpreter
    from facts import facts, store

    environments = {"torchdeq": Environment("torchdeq", ("torchdeq",), True), "jax": Environment("jax", ("jax",), True)}
    p, data = problem()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.pt"
        torch.save({**p, "exact": reference(p)}, file)
        for library in options.libraries:
            if library == "hypertorch" and options.hypertorch is None:
                rows.append({"way": "hypertorch", "skipped": HYPERTORCH})
                continue
            python = Path(sys.executable)
            if library in environments:
                python = interpreter(environments[library], options.envs)
            paths = [str(HERE.parents[1])] if library == "ours" else [str(options.hypertorch)] if library == "hypertorch" else []
            flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
            settings = os.environ | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
            settings["PYTHONPATH"] = os.pathsep.join(paths)
            command = [str(python), __file__, "--pairs", str(options.pairs), "--measure", library, str(file)]
            done = subprocess.run(command, env=settings, text=True, capture_output=True)
            if done.returncode:
                raise SystemExit(f"{library}: {command} ended with {done.returncode}\n{done.stderr}")
            rows += [json.loads(line) for line in done.stdout.splitlines()]
            print(*done.stdout.splitlines(), sep="\n", flush=True)
    found = {**facts(), "data": data, "pairs": options.pairs, "parameters": list(NAMES), "rows": rows}
    store("arithmetic", found, table(rows))


if __name__ == "__main__":
    main()
