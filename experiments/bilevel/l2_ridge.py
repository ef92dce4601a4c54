"""Ridge regression in closed form: every estimator to 1e-10, and the error of each linear solver against steps and theory.

    python experiments/bilevel/l2_ridge.py

Two problems of ``task=l2``: ``experiment=l2_ridge`` (diabetes, 10 features), on which every exact estimator is held against the
closed form, and 200 rows of 100 features drawn from a linear model, whose condition number leaves room for a rate. Writes
results.json, ridge.png and the tables of README.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from common import HERE, Row, built, save, write_table
from torch import Tensor

import hyperopt
from hyperopt import GMRES, Dense, Implicit, LinearAnderson, Neumann, NormalCG, Nystrom
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.linear.base import LinearSolver
from hyperopt.core.linear.bicgstab import BiCGStab
from hyperopt.core.linear.cg import CG
from hyperopt.tasks.linear import L2Task
from hyperopt.tasks.scores import loss_of

STEPS = (*range(1, 20), *range(20, 100, 5), *range(100, 400, 20), *range(400, 2001, 100))


class Ridge:
    """A task with its closed form: solution, Hessian and hypergradient."""

    def __init__(self, *overrides: str) -> None:
        """Build it, and put the weights at the solution."""
        task = built("experiment=l2_ridge", *overrides).task
        assert isinstance(task, L2Task)
        self.task = task
        train, val = task.splits.train, task.splits.val
        self.lam = {"l2": task.hyper.read()["l2"]}
        strengths = self.lam["l2"].clone().requires_grad_()
        hessian = train.x.T @ train.x / len(train) + torch.diag(strengths[:, 0])
        solution = torch.linalg.solve(hessian, train.x.T @ train.y / len(train))[:, None]
        (self.exact,) = torch.autograd.grad(loss_of(val.x @ solution, val.y), strengths)
        self.w, self.eigenvalues = solution.detach(), torch.linalg.eigvalsh(hessian.detach())

    def error(self, adjoint: Adjoint, w: Tensor | None = None, **more: Any) -> tuple[float, hyperopt.Estimate]:
        """Relative error of an estimate, taken at ``w`` (None: the solution)."""
        found = hyperopt.hypergradient(self.task.built.problem, self.w if w is None else w, self.lam, adjoint=adjoint, **more)
        return float((found.grad["l2"] - self.exact).norm() / self.exact.norm()), found


def estimators(ridge: Ridge) -> list[Row]:
    """Every estimator: what is exact to 1e-10, what is not meant to be, and the bound of the certificate."""
    largest, least = float(ridge.eigenvalues[-1]), float(ridge.eigenvalues[0])
    zero = torch.zeros_like(ridge.w)
    descent = hyperopt.GradientDescent(step_size=2 / (largest + least), max_steps=1000)
    solved = {"rtol": 1e-14, "max_steps": 1000}
    ways: dict[str, tuple[Adjoint, Any]] = {
        "implicit, Neumann": (Implicit(Neumann(**solved), policy="ignore"), None),
        "implicit, CG": (Implicit(CG(**solved), policy="ignore"), None),
        "implicit, GMRES": (Implicit(GMRES(**solved), policy="ignore"), None),
        "implicit, BiCGStab": (Implicit(BiCGStab(**solved), policy="ignore"), None),
        "implicit, Anderson": (Implicit(LinearAnderson(**solved), policy="ignore"), None),
        "implicit, normal equations": (Implicit(NormalCG(**solved), policy="ignore"), None),
        "implicit, dense": (Implicit(Dense(), policy="ignore"), None),
        "implicit, Nystrom of full rank": (Implicit(Nystrom(rank=10, rho=1e-8, rtol=1e-14, max_steps=20), policy="ignore"), None),
        "unrolled, 1,000 steps": (hyperopt.Unrolled(), descent),
        "unrolled, 1,000 steps of Adam": (hyperopt.Unrolled(), hyperopt.InnerAdam(lr=0.01, max_steps=1000)),
        "unrolled, recomputed": (hyperopt.Checkpointed(), descent),
        "truncated, last 20 of 1,000": (hyperopt.Unrolled(last=20), descent),
        "one-step": (hyperopt.OneStep(), None),
        "T1-T2": (hyperopt.T1T2(), None),
        "finite differences (DARTS)": (hyperopt.FiniteDifference(), None),
        "Nystrom of rank 5, rho = 1": (Implicit(Nystrom(rank=5, rho=1.0), policy="ignore"), None),
    }
    rows = []
    for name, (adjoint, inner) in ways.items():
        error, found = ridge.error(adjoint, zero if inner else None, inner=inner)
        size = float(ridge.exact.norm())
        bound = found.certificate.error / size if found.certificate.is_bound else None
        rows.append({"estimator": name, "error": error, "bound": bound, "cost": vars(found.cost)})
    return rows


def rates(ridge: Ridge) -> list[Row]:
    """Error against steps, and the factor a step that theory has for it."""
    least, largest = float(ridge.eigenvalues[0]), float(ridge.eigenvalues[-1])
    kappa = largest / least
    step, root = 2 / (least + largest), math.sqrt(kappa)
    krylov, fixed = (root - 1) / (root + 1), (kappa - 1) / (kappa + 1)
    exactly = {"rtol": 0.0, "atol": 0.0}
    solvers: dict[str, tuple[Any, float]] = {
        "Neumann, step 2 / (mu + L)": (lambda k: Neumann(**exactly, max_steps=k), fixed),
        "Neumann, step 1 / L": (lambda k: Neumann(**exactly, max_steps=k), 1 - 1 / kappa),
        "CG": (lambda k: CG(**exactly, max_steps=k), krylov),
        "GMRES": (lambda k: GMRES(**exactly, max_steps=k, window=100), krylov),
        "BiCGStab": (lambda k: BiCGStab(**exactly, max_steps=k), krylov**2),
        "Anderson, window 5": (lambda k: LinearAnderson(**exactly, max_steps=k), fixed),
        "normal equations": (lambda k: NormalCG(**exactly, max_steps=k), fixed),
    }
    rows = []
    for name, (make, theory) in solvers.items():
        own = 1 / largest if "1 / L" in name else step
        curve = []
        for k in STEPS:
            solver: LinearSolver = make(k)
            curve.append((k, ridge.error(Implicit(solver, policy="ignore"), step=own if solver.iterates else None)[0]))
            if not curve[-1][1] > 1e-13:
                break
        middle = [(k, e) for k, e in curve if 1e-10 < e < 1e-2]
        (k0, e0), (k1, e1) = middle[0], middle[-1]
        measured = (e1 / e0) ** (1 / (k1 - k0)) if k1 > k0 else math.nan
        steps = next((k for k, e in curve if e <= 1e-8), None)
        rows.append({"solver": name, "theory": theory, "measured": measured, "steps to 1e-8": steps, "curve": curve})
    return rows


PANELS = (
    ("CG", "GMRES", "BiCGStab"),
    ("Neumann, step 2 / (mu + L)", "Neumann, step 1 / L", "Anderson, window 5", "normal equations"),
)


def figure(rows: list[Row], kappa: float) -> None:
    """Error against steps, where a rate is a straight line; dotted those of the theory, from an error of 2."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9.5, 4.2), layout="constrained")
    drawn.suptitle(f"Ridge regression, 100 features, condition number {kappa:.1f}; dotted: the theory's factor a step")
    for axes, names in zip(drawn.subplots(1, 2, sharey=True), PANELS, strict=True):
        ends: dict[float, int] = {}  # of the theory's lines: solvers with one rate share one
        for row in [row for row in rows if row["solver"] in names]:
            ks, errors = zip(*row["curve"], strict=True)
            axes.semilogy(ks, errors, ".-", label=row["solver"], markersize=3, linewidth=1)
            if not row["solver"].startswith("Anderson"):
                ends[row["theory"]] = max(ends.get(row["theory"], 0), ks[-1])
        for theory, end in ends.items():
            axes.semilogy([0, end], [2, 2 * theory**end], ":", color="black", linewidth=1)
            middle = 0.4 * end
            axes.annotate(f" {theory:.4f}", (middle, 2 * theory**middle), fontsize=8, ha="left", va="bottom")
        axes.set(xlabel="steps of the linear solver", ylim=(1e-14, 5))
        axes.legend(fontsize=8, loc="upper right")
        axes.grid(alpha=0.3)
    drawn.axes[0].set_ylabel("relative error of the hypergradient")
    drawn.savefig(HERE / "ridge.png", dpi=110)


def main() -> None:
    """Measure, and write the results."""
    table = estimators(Ridge())
    lines = [
        "| estimator | relative error | its bound | gradients, Hessian products, mixed products |",
        "|---|---|---|---|",
    ]
    for row in table:
        cost, bound = row["cost"], "" if row["bound"] is None else f"{row['bound']:.0e}"
        spent = f"{cost['inner_gradients']}, {cost['hessian_products']}, {cost['mixed_products']}"
        lines.append(f"| {row['estimator']} | {row['error']:.0e} | {bound} | {spent} |")
    print("\n".join(lines))
    write_table("l2_ridge", lines)
    larger = ["dataset=synthetic", "dataset.targets=numbers", "dataset.train=200", "dataset.val=200", "dataset.features=100"]
    ridge = Ridge(*larger, "task.l2.init=0.01")
    kappa = float(ridge.eigenvalues[-1] / ridge.eigenvalues[0])
    rows = rates(ridge)
    lines = ["| linear solver | factor a step, theory | measured | steps to 1e-8 |", "|---|---|---|---|"]
    lines += [f"| {r['solver']} | {r['theory']:.4f} | {r['measured']:.4f} | {r['steps to 1e-8']} |" for r in rows]
    print(f"condition number {kappa:.1f}", *lines, sep="\n")
    write_table("rates", lines)
    figure(rows, kappa)
    save("l2_ridge", {"estimators": table, "condition number": kappa, "rates": rows})


if __name__ == "__main__":
    main()
