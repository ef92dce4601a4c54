"""optimistix, put to the traps: ``fixed_point`` with its implicit adjoint, the default; linear solvers by lineax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import lineax
import optimistix
from jax_library import LOCKSTEP, JaxLibrary, in_batches
from protocol import Answer, NotOfferedError, Wish, main


class Optimistix(JaxLibrary):
    """It raises where a solve fails, unless told otherwise; batches by ``jax.vmap``."""

    name = "optimistix"
    packages = ("optimistix", "lineax", "jax")

    def solve(self, phi: Callable[..., Any], w0: Any, params: tuple[Any, ...], wish: Wish) -> Answer:
        """``FixedPointIteration`` or ``Newton``; where tolerances are asked of the adjoint, GMRES, which has them."""
        if wish.method == "anderson":
            raise NotOfferedError("no Anderson acceleration")
        tol = 1e-5 if wish.defaults else wish.tol  # it has no defaults here
        options: dict[str, Any] = {}
        if not wish.defaults:
            options = {"max_steps": wish.max_steps}
            if wish.adjoint_tol is not None:
                steps = {"max_steps": wish.adjoint_steps, "restart": 20, "stagnation_iters": 20}
                linear = lineax.GMRES(rtol=wish.adjoint_tol, atol=1e-15, **steps)
                options["adjoint"] = optimistix.ImplicitAdjoint(linear_solver=linear)
        if wish.method == "newton":
            solver = optimistix.Newton(rtol=tol, atol=tol * wish.scale)
        else:
            solver = optimistix.FixedPointIteration(rtol=tol, atol=tol * wish.scale, damp=1.0 - wish.damping)

        def run(w: Any, *args: Any) -> Any:
            found = optimistix.fixed_point(lambda y, given: phi(y, *given), solver, w, args, throw=not wish.batch, **options)
            return found.value

        return Answer(in_batches(run, w0, params, wish.row_params) if wish.batch else run(w0, *params))

    def linear_solvers(self) -> dict[str, Callable[[list[list[float]], list[float]], Answer]]:
        """Those of lineax."""
        limits = {"rtol": 1e-12, "atol": 1e-14, "max_steps": 500}
        found = {
            "CG": lineax.CG(**limits),
            "BiCGStab": lineax.BiCGStab(**limits),
            "GMRES": lineax.GMRES(**limits),
            "LU": lineax.LU(),
            "Normal(CG)": lineax.Normal(lineax.CG(**limits)),
            "AutoLinearSolver": lineax.AutoLinearSolver(well_posed=True),
        }

        def solver(name: str) -> Callable[[list[list[float]], list[float]], Answer]:
            def run(a: list[list[float]], b: list[float]) -> Answer:
                operator = lineax.MatrixLinearOperator(self.array(a), lineax.positive_semidefinite_tag)
                return Answer(lineax.linear_solve(operator, self.array(b), found[name]).value)

            return run

        return {name: solver(name) for name in found}

    def remark(self, number: int) -> str:
        """On batches."""
        if number == 5:
            return "with throw=False; at the default, throw=True, one bad row is an error for the whole batch"
        return LOCKSTEP if number == 9 else ""

    def entry(self, **options: Any) -> None:
        """Of ``FixedPointIteration``."""
        solver = optimistix.FixedPointIteration(**({"rtol": 1e-3, "atol": 1e-3} | options))
        optimistix.fixed_point(lambda y, _: 0.5 * y + 1.0, solver, jnp.zeros(3))


if __name__ == "__main__":
    main(Optimistix())
