"""The certificate's error against the true one, for every solver and linear solver, at every accuracy, on problems of every kind.

    python experiments/certificate/measure.py

Float64. The exact hypergradient is that of Newton's method and a dense adjoint at the rounding floor. An estimate is good when it
lies within a factor of 100 of the true error, both ways; errors below 1e-12 of the hypergradient are rounding and left out.

Writes results.json, scatter.png and the table of README.md beside this file.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

import hyperopt
from hyperopt import (
    GMRES,
    Anderson,
    BiCGStab,
    Broyden,
    Chord,
    Dense,
    Implicit,
    LinearAnderson,
    Neumann,
    Newton,
    NewtonKrylov,
    NormalCG,
    Picard,
    fixed_point,
)
from hyperopt.core.certificate import certify
from hyperopt.core.linear.base import LinearSolver
from hyperopt.core.solvers.base import FixedPointSolver

HERE = Path(__file__).resolve().parent
FACTOR = 100.0  # what an estimate is held to
ROUNDING = 1e-12  # relative errors below are rounding
MANY = 20_000

Outer = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Case:
    """A map, its start, its hyperparameters, how its rows lie, and an outer loss."""

    phi: Callable[..., Any]
    w0: Any
    params: list[Tensor]
    rows: str = "auto"


def outer(tree: Any) -> Tensor:
    """An outer loss of any tree: ``sum w^2 + sin w``."""
    leaves = [tree] if isinstance(tree, Tensor) else list(tree)
    return torch.stack([(x**2).sum() + x.sin().sum() for x in leaves]).sum()


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    """A normal hyperparameter."""
    return (scale * torch.randn(*shape)).requires_grad_()


def contraction(n: int, norm: float) -> Tensor:
    """A normal matrix of a given spectral norm."""
    m = torch.randn(n, n)
    return (m * (norm / torch.linalg.matrix_norm(m, 2))).requires_grad_()


def linear(matrix: Tensor) -> Case:
    """``w = M w + b``."""
    m, b = matrix.requires_grad_(), leaf(matrix.shape[0])
    return Case(lambda w: m @ w + b, torch.zeros(matrix.shape[0]), [m, b])


def spectrum(*values: float) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values)))
    return q @ torch.diag(torch.tensor(values)) @ q.T


def rotation() -> Case:
    """A plane rotation of radius .9."""
    c, s = 0.9 * math.cos(1.0), 0.9 * math.sin(1.0)
    return linear(torch.tensor([[c, -s], [s, c]]))


def ridge() -> Case:
    """The gradient step on a ridge loss; the hyperparameter is its strength."""
    x, y, lam = torch.randn(30, 6), torch.randn(30), torch.tensor(0.5, requires_grad=True)
    step = 1 / float(torch.linalg.eigvalsh(x.T @ x)[-1] + 0.5)
    return Case(lambda w: w - step * (x.T @ (x @ w - y) + lam * w), torch.zeros(6), [lam], "joint")


def tanh(norm: float) -> Case:
    """Eight rows of the equilibrium model, of 10 entries."""
    a, u = contraction(10, norm), leaf(8, 10)
    return Case(lambda w: torch.tanh(w @ a + u), torch.zeros(8, 10), [a, u])


def two_variables() -> Case:
    """A pair of different sizes, each in the other's map."""
    a, b, c = contraction(3, 0.4), leaf(2, 3, scale=0.15), leaf(3, 2, scale=0.15)

    def phi(w: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.tanh(w[0] @ a + w[1] @ b + 0.3), torch.cos(w[0] @ c)

    return Case(phi, (torch.zeros(4, 3), torch.zeros(4, 2)), [a, b, c])


def convolution() -> Case:
    """A small DEQ cell: ``norm(relu(w + norm(x + conv(relu(conv(w))))))`` by group normalization."""
    k, m, x = leaf(4, 2, 3, 3, scale=0.05), leaf(2, 4, 3, 3, scale=0.05), leaf(3, 2, 4, 4)

    def phi(w: Tensor) -> Tensor:
        inner = functional.conv2d(functional.softplus(functional.conv2d(w, k, padding=1)), m, padding=1)
        return functional.group_norm(functional.softplus(w + functional.group_norm(x + inner, 2)), 2)

    return Case(phi, torch.zeros(3, 2, 4, 4), [k, m, x])


def scalar() -> Case:
    """``w = cos(a w)``."""
    a = torch.tensor(0.9, requires_grad=True)
    return Case(lambda w: torch.cos(a * w), torch.zeros(()), [a])


PROBLEMS: dict[str, Callable[[], Case]] = {
    "linear, radius .1": lambda: linear(spectrum(0.1, -0.05, 0.02, 0.01)),
    "linear, radius .9": lambda: linear(spectrum(0.9, -0.5, 0.2, 0.1)),
    "linear, radius .99": lambda: linear(spectrum(0.99, -0.5, 0.2, 0.1)),
    "linear, radius .999": lambda: linear(spectrum(0.999, -0.5, 0.2, 0.1)),
    "linear, non-normal": lambda: linear(torch.tensor([[0.5, 20.0, 0.0], [0.0, 0.4, 20.0], [0.0, 0.0, 0.3]])),
    "rotation, radius .9": rotation,
    "ridge": ridge,
    "tanh, |A| = .5": lambda: tanh(0.5),
    "tanh, |A| = .9": lambda: tanh(0.9),
    "two variables": two_variables,
    "convolution": convolution,
    "scalar": scalar,
}
SOLVERS: dict[str, Callable[[float], FixedPointSolver]] = {
    "Picard": lambda tol: Picard(tol, max_steps=MANY),
    "Anderson": lambda tol: Anderson(tol, max_steps=MANY),
    "Broyden": lambda tol: Broyden(tol, max_steps=MANY),
    "Newton": lambda tol: Newton(tol),
    "Chord": lambda tol: Chord(tol),
    "NewtonKrylov": lambda tol: NewtonKrylov(tol),
}
LINEAR: dict[str, Callable[[float], LinearSolver]] = {
    "Neumann": lambda tol: Neumann(tol, max_steps=MANY),
    "Anderson": lambda tol: LinearAnderson(tol, max_steps=MANY),
    "GMRES": lambda tol: GMRES(tol, max_steps=MANY),
    "BiCGStab": lambda tol: BiCGStab(tol, max_steps=MANY),
    "NormalCG": lambda tol: NormalCG(tol, max_steps=MANY),
    "Dense": lambda tol: Dense(tol),
}
PAIRS = [(s, m, t, u) for s in SOLVERS for m in LINEAR for t, u in ((1e-3, 1e-3), (1e-6, 1e-2), (1e-2, 1e-6), (1e-6, 1e-6))]
FIXED = [(5, 5), (20, 5), (5, 20), (50, 50)]


def gradient(case: Case, solver: FixedPointSolver, linear: LinearSolver) -> tuple[Tensor, hyperopt.Solution]:
    """The hypergradient, flat, and the solution."""
    solution = fixed_point(
        case.phi, case.w0, rows=case.rows, solver=solver, adjoint=Implicit(linear, policy="ignore"), policy="ignore"
    )
    found = torch.autograd.grad(outer(solution.value), case.params)
    return torch.cat([g.flatten() for g in found]), solution


def points(seeds: int) -> list[dict[str, Any]]:
    """Every (problem, pair of methods) as a row."""
    rows = []
    for name, make in PROBLEMS.items():
        for seed in range(seeds):
            torch.manual_seed(seed)
            case = make()
            exact, _ = gradient(case, Newton(4e-15), Dense(1e-15))
            runs = [(f"{s} + {m}", SOLVERS[s](t), LINEAR[m](u), f"{t:g}, {u:g}") for s, m, t, u in PAIRS]
            runs += [("Picard + Neumann", Picard(0.0, max_steps=t), Neumann(0.0, max_steps=k), f"T={t}, K={k}") for t, k in FIXED]
            for methods, solver, lin, what in runs:
                got, solution = gradient(case, solver, lin)
                assert solution.adjoint is not None
                error, norm = float((got - exact).norm()), float(exact.norm())
                found = certify(solution, float(got.norm()))
                rows.append(
                    {
                        "problem": name,
                        "seed": seed,
                        "methods": methods,
                        "accuracy": what,
                        "inner": solution.forward.status.name,
                        "adjoint": solution.adjoint.status.name,
                        "error": error / norm,
                        "estimate": found.error / norm,
                        "rough": found.error > float(got.norm()),
                        "factor": found.contraction,
                    }
                )
    return rows


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the table, one a problem."""
    lines = ["| problem | points | no estimate | rough | within 100 | least estimate / error | largest |", "|" + "---|" * 7]
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["problem"]].append(row)
    for name, group in [*groups.items(), ("all", rows)]:
        seen = [row for row in group if row["error"] > ROUNDING]
        known = [row for row in seen if math.isfinite(row["estimate"])]
        rough = [row for row in known if row["rough"]]
        assert all(row["error"] > 1 / FACTOR for row in rough), [row for row in rough if row["error"] <= 1 / FACTOR]
        ratios = [row["estimate"] / row["error"] for row in known if not row["rough"]]
        good = sum(1 / FACTOR <= r <= FACTOR for r in ratios)
        ends = f"{min(ratios):.2g} | {max(ratios):.2g}" if ratios else "- | -"
        shown = name.replace("|", "\\|")  # a bar in a cell would end it
        lines.append(f"| {shown} | {len(seen)} | {len(seen) - len(known)} | {len(rough)} | {good} of {len(ratios)} | {ends} |")
    return lines


def scatter(rows: list[dict[str, Any]]) -> Figure:
    """The estimate against the true error, both relative to the exact hypergradient."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    ends = [ROUNDING, 10.0]
    axes.fill_between(ends, [e / FACTOR for e in ends], [e * FACTOR for e in ends], color="0.93", label="within a factor of 100")
    axes.plot(ends, ends, color="0.6", linewidth=1)
    colors = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    for name, color in zip(PROBLEMS, colors, strict=False):
        some = [r for r in rows if r["problem"] == name and r["error"] > ROUNDING and math.isfinite(r["estimate"])]
        for rough, marker in ((False, "o"), (True, "x")):
            xy = [(r["error"], r["estimate"]) for r in some if r["rough"] == rough]
            if xy:
                axes.plot(*zip(*xy, strict=True), marker, color=color, markersize=4, label=None if rough else name, alpha=0.8)
    axes.plot([], [], "kx", markersize=4, label="estimate above the hypergradient's own norm")
    axes.set(xscale="log", yscale="log", xlabel="true error of the hypergradient, relative", ylabel="error estimate, relative")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    rows = points(seeds)
    facts = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    columns = list(rows[0])
    values = [[float(f"{row[c]:.3g}") if isinstance(row[c], float) else row[c] for c in columns] for row in rows]
    (HERE / "results.json").write_text(json.dumps({**facts, "columns": columns, "points": values}, separators=(",", ":")) + "\n")
    lines = summary(rows)
    print("\n".join(lines))
    readme = (HERE / "README.md").read_text()
    before, after = readme.split("<!-- table -->")[0], readme.split("<!-- /table -->")[1]
    (HERE / "README.md").write_text(before + "<!-- table -->\n" + "\n".join(lines) + "\n<!-- /table -->" + after)
    scatter(rows).savefig(HERE / "scatter.png", dpi=130)


if __name__ == "__main__":
    main()
