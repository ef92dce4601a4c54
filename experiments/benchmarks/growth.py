"""Growth of one outer gradient's time and memory with rows, state size, iterations and contraction.

    python experiments/benchmarks/growth.py [--only rows state steps contraction]

From 5,000 rows of 784 features, state size 200, T = K = 20, ``||A|| = .9``, float32, one of the four is changed at a time;
against the contraction the solves go to 1e-3, on 500 rows, and the number of iterations is theirs. Memory is the most that
tensors made during the gradient had at once. Exponents are least-squares slopes of log time over log size, over all points and
over the upper half.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch
from facts import HERE, facts, load, store
from torch.nn import functional

import hyperopt
from hyperopt.core.memory import Peak
from hyperopt.nn.equilibrium import TanhAffine

AXES: dict[str, list[float]] = {
    "rows": [1000, 2000, 5000, 10_000, 20_000, 60_000],
    "state": [50, 100, 200, 500, 1000, 2000],
    "steps": [10, 20, 50, 100, 200, 500, 1000],
    "contraction": [0.5, 0.8, 0.9, 0.95, 0.99, 0.999],
}
FEATURES = 784


def measure(rows: int = 5000, state: int = 200, steps: int = 20, contraction: float = 0.9, rtol: float = 0.0) -> dict[str, Any]:
    """Median CPU seconds of three gradients after one, and the peak of another."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, FEATURES, generator=generator)
    y = torch.randint(10, (rows,), generator=generator)
    A = torch.randn(state, state, generator=generator)
    A = torch.linalg.qr(A)[0] * contraction  # every singular value is the contraction factor
    # Small inputs: tanh stays near its linear part, where it contracts by no more than A does.
    params = [A, 1e-4 * torch.randn(state, FEATURES, generator=generator), 0.05 * torch.randn(10, state, generator=generator)]
    A, B, W = (each.requires_grad_() for each in params)
    limit = steps if rtol == 0 else 20_000
    solver = hyperopt.Picard(rtol=rtol, max_steps=limit)
    adjoint = hyperopt.Implicit(hyperopt.Neumann(rtol=rtol, max_steps=limit))
    cell, w0 = TanhAffine(), torch.zeros(rows, state)

    def gradient() -> hyperopt.Solution:
        solution = hyperopt.fixed_point(cell, w0, (functional.linear(x, B), A), row_args=(0,), solver=solver, adjoint=adjoint)
        torch.autograd.grad(functional.cross_entropy(functional.linear(solution.value, W), y), [A, B, W])
        return solution

    seconds = []
    for _ in range(4):
        start = time.process_time()
        solution = gradient()
        seconds.append(time.process_time() - start)
    with Peak() as peak:
        gradient()
    assert solution.adjoint is not None
    products = solution.forward.evaluations + solution.adjoint.vjps
    return {"seconds": statistics.median(seconds[1:]), "bytes": peak.peak, "products": products}


def slope(sizes: list[float], values: list[float]) -> float:
    """Least-squares exponent."""
    a, b = [math.log(each) for each in sizes], [math.log(each) for each in values]
    mean = statistics.fmean(a)
    return sum((p - mean) * q for p, q in zip(a, b, strict=True)) / sum((p - mean) ** 2 for p in a)


def points(name: str) -> list[float]:
    """Where the sizes of an axis stand in the table and in the figure."""
    return [1 / (1 - size) for size in AXES[name]] if name == "contraction" else AXES[name]


def draw(found: dict[str, Any]) -> None:
    """Write growth.png."""
    from matplotlib.figure import Figure

    labels = {"rows": "rows", "state": "size of the state", "steps": "steps, T = K", "contraction": "1 / (1 - contraction)"}
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    for (name, label), axes in zip(labels.items(), figure.subplots(2, 2).flat, strict=True):
        axes.loglog(points(name), [row["seconds"] for row in found[name]], "o-", label="CPU seconds")
        axes.loglog(points(name), [row["bytes"] / 1e9 for row in found[name]], "s--", label="peak memory, GB")
        axes.set(xlabel=label, ylabel="seconds, GB")
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(HERE / "growth.png", dpi=110)


def main() -> None:
    """Measure, print and store; axes that are not asked for stay as they were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(AXES), choices=AXES)
    options = parser.parse_args()
    found: dict[str, Any] = load(HERE / "results.json").get("growth", {}).get("axes", {})
    if missing := [name for name in AXES if name not in found and name not in options.only]:
        parser.error(f"--only leaves out {', '.join(missing)}, which results.json does not have yet")
    torch.set_num_threads(1)
    lines = [
        "| against | from | to | time ~ size^ | upper half | memory ~ size^ | least and most MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, sizes in AXES.items():
        cast = float if name == "contraction" else int
        more = {"rtol": 1e-3, "rows": 500} if name == "contraction" else {}
        if name in options.only:
            found[name] = [{"size": size, **measure(**{name: cast(size)}, **more)} for size in sizes]  # pyright: ignore[reportArgumentType]
        at = points(name)
        seconds, memory = ([row[key] for row in found[name]] for key in ("seconds", "bytes"))
        half = len(at) // 2
        exponents = [slope(at, seconds), slope(at[half:], seconds[half:]), slope(at, memory)]
        title = "1 / (1 - contraction)" if name == "contraction" else name
        numbers = " | ".join(f"{each:.2f}" for each in exponents)
        lines.append(f"| {title} | {at[0]:g} | {at[-1]:g} | {numbers} | {min(memory) / 1e6:.1f}, {max(memory) / 1e6:.1f} |")
        print(lines[-1], flush=True)
    draw(found)
    store("growth", {**facts(), "axes": found}, lines)


if __name__ == "__main__":
    main()
