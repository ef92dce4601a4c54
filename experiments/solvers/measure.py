"""Cost of each fixed-point solver on tanh equilibria whose Jacobian has a stated spectral radius at the solution.

    python experiments/solvers/measure.py [--state 100] [--rows 16] [--seeds 5] [--repeats 3]

The map is ``w -> tanh(w A + u)`` in float64, plain torch code without closed forms. The bound ``||A||`` says little about it,
since ``tanh'`` is 1 at 0 only: A is scaled until the largest spectral radius of ``d_w phi`` over the rows, at their solutions, is
the stated one to 1e-9 (interpolation on the scale, each solution by Newton from the one before, radius by a dense eigenvalue
solve). All solvers start from 0 and stop row by row at relative residual 1e-8; each is checked against that solution.

Writes results.json, residual.png and the table of README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperopt import Anderson, Broyden, Chord, Newton, NewtonKrylov, Picard
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.iterate import Iterate, iterate
from hyperopt.core.solvers.point import Point

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-8
RADII = (0.9, 0.99, 0.999)
KINDS = ("general", "symmetric")
SOLVERS: dict[str, FixedPointSolver] = {
    "Picard": Picard(TOLERANCE, max_steps=50_000),
    "Anderson, window 5": Anderson(TOLERANCE, max_steps=2_000),
    "Anderson, window 20": Anderson(TOLERANCE, max_steps=2_000, window=20),
    "Broyden, memory 20": Broyden(TOLERANCE, max_steps=2_000),
    "Broyden, memory 100": Broyden(TOLERANCE, max_steps=2_000, memory=100),
    "Newton": Newton(TOLERANCE),
    "Chord": Chord(TOLERANCE),
    "Newton-Krylov": NewtonKrylov(TOLERANCE),
}


@dataclass(frozen=True)
class Recorded(FixedPointSolver):
    """Notes the cost and the worst residual before every step of another solver."""

    inner: FixedPointSolver = field(default_factory=Picard)
    curve: list[tuple[int, int, float]] = field(default_factory=list)

    @property
    def linearizes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the other solver."""
        return self.inner.linearizes

    @property
    def rise(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the other solver."""
        return self.inner.rise

    def init(self, w: Tensor) -> Any:
        """As the other solver."""
        return self.inner.init(w)

    def step(self, state: Any, at: Point) -> tuple[Tensor, Any]:
        """Note, then step."""
        residual = torch.linalg.vector_norm(at.fw - at.w, dim=1) / torch.linalg.vector_norm(at.fw, dim=1)
        self.curve.append((at.cost.evaluations, at.cost.vjps + at.cost.jvps, float(residual.max())))
        return self.inner.step(state, at)


@dataclass(frozen=True)
class Equilibrium:
    """``w -> tanh(w A + u)`` and its solution, with the spectral radius of its Jacobian there."""

    A: Tensor
    u: Tensor
    solution: Tensor
    radius: float

    def phi(self, w: Tensor) -> Tensor:
        """The map."""
        return torch.tanh(torch.addmm(self.u, w, self.A))


def radius_at(A: Tensor, u: Tensor, start: Tensor) -> tuple[float, Tensor]:
    """Largest spectral radius of ``d_w phi`` over the rows, and the solution, found from ``start``; infinite where none is."""
    run = iterate(Newton(1e-14, line_search=True), lambda w: torch.tanh(w @ A + u), start)
    if run.stats.status.failed:  # beyond a fold, at which a radius passes 1
        return math.inf, run.value
    slope = 1 - run.value**2
    return float(torch.linalg.eigvals(slope[:, :, None] * A.T).abs().max()), run.value


def build(kind: str, radius: float, state: int, rows: int, seed: int) -> Equilibrium | None:
    """Draw A and u, and scale A until the radius at the solution is the one asked for; None where it jumps past it."""
    gen = torch.Generator().manual_seed(seed)
    raw = torch.randn(state, state, generator=gen, dtype=torch.float64) / state**0.5
    raw = (raw + raw.T) / 2**0.5 if kind == "symmetric" else raw
    u = 0.3 * torch.randn(rows, state, generator=gen, dtype=torch.float64)
    w = torch.zeros(rows, state, dtype=torch.float64)
    low, high = (0.0, 0.0), (0.0, 0.0)  # a scale of A and the radius there, on either side of the one asked for
    while high[1] < radius:  # walk up from A = 0, so that the solution is the one that continues its contraction
        low, scale = high, high[0] + 0.1
        found, after = radius_at(scale * raw, u, w)
        high, w = (scale, found), after if found < radius else w
    for k in range(80):
        share = (radius - low[1]) / (high[1] - low[1]) if k % 3 < 2 and math.isfinite(high[1]) else 0.5
        scale = low[0] + share * (high[0] - low[0])
        found, after = radius_at(scale * raw, u, w)
        if abs(found - radius) < 1e-9:
            return Equilibrium(scale * raw, u, after, found)
        low, high, w = ((scale, found), high, after) if found < radius else (low, (scale, found), w)
    print(f"{kind}, seed {seed}: left out, since the radius jumps from {low[1]:.6f} past {radius}")
    return None


def measure(problem: Equilibrium, solver: FixedPointSolver, repeats: int) -> dict[str, Any]:
    """One solver on one problem: costs, CPU seconds (least of the repeats), status, and whether it is the same solution."""
    start = torch.zeros_like(problem.u)
    seconds, run = [], None
    for _ in range(repeats):
        before = time.process_time()
        run = iterate(solver, problem.phi, start)
        seconds.append(time.process_time() - before)
        if seconds[-1] > 1:
            break  # long enough to be measured once
    assert isinstance(run, Iterate)
    stats = run.stats
    distance = torch.linalg.vector_norm(run.value - problem.solution, dim=1) / torch.linalg.vector_norm(problem.solution, dim=1)
    return {
        "status": stats.status.name,
        "failed_rows": int((stats.row_status > 1).sum()),
        "iterations": int(stats.iterations.max()),
        "evaluations": stats.evaluations,
        "vjps": stats.vjps,
        "jvps": stats.jvps,
        "cpu_seconds": min(seconds),
        "error": float(distance.max()),
    }


def curve(problem: Equilibrium, solver: FixedPointSolver) -> list[tuple[int, int, float]]:
    """(evaluations, products with J, worst residual) at every iterate."""
    recorded = Recorded(solver.rtol, solver.atol, solver.max_steps, inner=solver)
    stats = iterate(recorded, problem.phi, torch.zeros_like(problem.u)).stats
    return [*recorded.curve, (stats.evaluations, stats.vjps + stats.jvps, stats.worst_residual())]


def figure(curves: dict[float, dict[str, list[tuple[int, int, float]]]], path: Path) -> None:
    """Residual against evaluations (above) and against evaluations + vjps + jvps (below), one column a radius."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13, 7.5), layout="constrained")
    axes = drawn.subplots(2, len(curves), sharey=True)
    works: tuple[tuple[str, Callable[[int, int], int]], ...] = (
        ("evaluations", lambda e, p: e),
        ("evaluations + vjps + jvps", lambda e, p: e + p),
    )
    for column, (radius, by_name) in enumerate(curves.items()):
        for row, (label, work) in enumerate(works):
            ax = axes[row, column]
            for name, points in by_name.items():
                ax.loglog([work(e, p) for e, p, _ in points], [r for _, _, r in points], marker=".", markersize=4, label=name)
            ax.axhline(TOLERANCE, color="gray", linewidth=0.8, linestyle="--")
            ax.set(xlabel=label, ylim=(1e-9, 1e2))
            ax.grid(alpha=0.3)
        axes[0, column].set_title(f"radius {radius}")
    for row in range(2):
        axes[row, 0].set_ylabel("largest relative residual over the rows")
    drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    drawn.savefig(path, dpi=110)


def table(rows: list[dict[str, Any]]) -> str:
    """The README's table: medians over the seeds."""
    lines = [
        "| A | radius | solver | solved | iterations | evaluations | vjps | jvps | CPU ms | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        costs = " | ".join(f"{row[key]:g}" for key in ("iterations", "evaluations", "vjps", "jvps"))
        shown = f"{row['kind']} | {row['radius']} | {row['solver']} | {row['solved']}/{row['seeds']} | {costs}"
        lines.append(f"| {shown} | {1e3 * row['cpu_seconds']:.1f} | {row['error']:.0e} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("state", 100), ("rows", 16), ("seeds", 5), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows, curves = [], {}
    for kind in KINDS:
        for radius in RADII:
            built = (build(kind, radius, options.state, options.rows, seed) for seed in count())
            problems = list(islice((problem for problem in built if problem is not None), options.seeds))
            print(kind, radius, "measured radii:", *(f"{p.radius:.10f}" for p in problems), flush=True)
            for name, solver in SOLVERS.items():
                found = [measure(problem, solver, options.repeats) for problem in problems]
                solved = [f for f in found if f["failed_rows"] == 0]
                keys = ("iterations", "evaluations", "vjps", "jvps", "cpu_seconds", "error")
                medians = {key: statistics.median(f[key] for f in solved or found) for key in keys}
                head = {"kind": kind, "radius": radius, "solver": name, "solved": len(solved), "seeds": len(found)}
                rows.append({**head, **medians, "runs": found})
                print(table([rows[-1]]).splitlines()[-1], flush=True)
            if kind == KINDS[0]:
                curves[radius] = {name: curve(problems[0], solver) for name, solver in SOLVERS.items()}
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": 1,
        "tolerance": TOLERANCE,
        **vars(options),
    }
    (HERE / "results.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    figure(curves, HERE / "residual.png")
    readme = HERE / "README.md"
    if readme.exists():
        start, end = "<!-- table -->", "<!-- end of table -->"
        before, _, rest = readme.read_text().partition(start)
        readme.write_text(f"{before}{start}\n{table(rows)}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main()
