"""This library, put to the traps."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ours_ranks import hypergradients
from protocol import Answer, Wish, main
from torch_library import TorchLibrary

import hyperopt
from hyperopt.core.operator import FunctionOperator


class Ours(TorchLibrary):
    """``hyperopt.fixed_point``."""

    name = "ours"

    def solve(self, phi: Callable[..., Any], w0: Any, params: tuple[Any, ...], wish: Wish) -> Answer:
        """Picard unless another method is asked for; the adjoint is implicit with a Neumann series."""
        if wish.defaults:
            sol = hyperopt.fixed_point(phi, w0, params)
            return Answer(sol.value, lambda: said(sol))
        limits = {"rtol": wish.tol, "max_steps": wish.max_steps}
        solver = {
            "best": lambda: hyperopt.Picard(**limits),
            "picard": lambda: hyperopt.Picard(**limits, damping=wish.damping),
            "anderson": lambda: hyperopt.Anderson(**limits),
            "newton": lambda: hyperopt.Newton(**limits),
        }[wish.method]()
        adjoint = hyperopt.Implicit()
        if wish.adjoint_tol is not None:
            adjoint = hyperopt.Implicit(hyperopt.Neumann(rtol=wish.adjoint_tol, max_steps=wish.adjoint_steps))
        sol = hyperopt.fixed_point(
            phi, w0, params, rows="batch" if wish.batch else "auto", row_args=wish.row_params, solver=solver, adjoint=adjoint
        )
        return Answer(sol.value, lambda: said(sol))

    def linear_solvers(self) -> dict[str, Callable[[list[list[float]], list[float]], Answer]]:
        """Of ``(I - M) v = b`` with ``M = I - A``."""
        names = ("Neumann", "LinearAnderson", "GMRES", "BiCGStab", "CG", "NormalCG", "Dense")

        def solver(name: str) -> Callable[[list[list[float]], list[float]], Answer]:
            def solve(a: list[list[float]], b: list[float]) -> Answer:
                matrix = torch.tensor(a, dtype=torch.float64)
                m = torch.eye(len(a), dtype=torch.float64) - matrix
                method = getattr(hyperopt, name)(rtol=1e-12, max_steps=500)
                found = method.solve(rows_times(m), torch.tensor([b], dtype=torch.float64))
                return Answer(found.value, lambda: found.stats.status.message if found.stats.status.failed else "")

            return solve

        return {name: solver(name) for name in names}

    def contraction(self, phi: Callable[..., Any], w0: Any) -> float:
        """From the Arnoldi diagnosis."""
        return float(hyperopt.diagnose(phi, w0, rows="batch").radius)

    def entry(self, **options: Any) -> None:
        """Settings of the solver."""
        hyperopt.fixed_point(lambda w: 0.5 * w + 1.0, torch.zeros(3), solver=hyperopt.Picard(**options))

    def distributed(self) -> float:
        """Two processes with 5 and 7 of 12 rows, against one with all; an equilibrium, and a trained model in two ways."""
        with tempfile.TemporaryDirectory() as folder:
            outs = [Path(folder) / f"{rank}.pt" for rank in range(2)]
            script = str(Path(__file__).with_name("ours_ranks.py"))
            commands = [[sys.executable, script, str(rank), "2", f"{folder}/store", str(out)] for rank, out in enumerate(outs)]
            processes = [subprocess.Popen(command) for command in commands]
            if any([process.wait(120) for process in processes]):
                raise RuntimeError("a rank failed; see above")
            found = [torch.load(out, weights_only=True) for out in outs]
        expected = hypergradients()
        return max(float((g - e).norm() / e.norm()) for rank in found for g, e in zip(rank, expected, strict=True))


def rows_times(m: torch.Tensor) -> FunctionOperator:
    """``v -> M v`` on rows, with its transpose."""
    return FunctionOperator(lambda v: v @ m.T, lambda v: v @ m)


def said(sol: Any) -> str:
    """What the statuses say, forward and backward."""
    parts = [("inner", sol.forward), ("adjoint", sol.adjoint)]
    return "; ".join(f"status {stats.status.name} ({what})" for what, stats in parts if stats is not None and stats.status.failed)


if __name__ == "__main__":
    main(Ours())
