"""jaxopt, put to the traps: its solvers with implicit differentiation, their default; batches by ``jax.vmap``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import jaxopt
from jax_library import LOCKSTEP, JaxLibrary, in_batches, known
from jaxopt import linear_solve
from protocol import Answer, NotOfferedError, Wish, main


class JaxOpt(JaxLibrary):
    """Its tolerance is absolute; the default adjoint is conjugate gradients on the normal equations."""

    name = "jaxopt"
    packages = ("jaxopt", "jax")
    tolerance = "tol"

    def solve(self, phi: Callable[..., Any], w0: Any, params: tuple[Any, ...], wish: Wish) -> Answer:
        """``FixedPointIteration``, ``AndersonAcceleration`` or ``Broyden``."""
        if wish.damping != 1.0:
            raise NotOfferedError("FixedPointIteration has no damping")
        options: dict[str, Any] = {}
        if not wish.defaults:
            options = {"tol": wish.tol * wish.scale, "maxiter": wish.max_steps}
            if wish.adjoint_tol is not None:
                limits = {"tol": wish.adjoint_tol, "maxiter": wish.adjoint_steps}
                options["implicit_diff_solve"] = partial(linear_solve.solve_normal_cg, **limits)
        if wish.method == "anderson":
            solver = jaxopt.AndersonAcceleration(phi, **options)
        elif wish.method == "newton":
            solver = jaxopt.Broyden(lambda w, *args: phi(w, *args) - w, **options)
        else:
            solver = jaxopt.FixedPointIteration(phi, **options)
        if wish.batch:
            value, state = in_batches(solver.run, w0, params, wish.row_params)
        else:
            value, state = solver.run(w0, *params)

        def said() -> str:
            error = state.error
            tol = options.get("tol", solver.tol)
            if not known(error) or bool(jnp.all(error <= tol)):
                return ""
            return f"state.error is {float(jnp.max(error)):.1e}"

        return Answer(value, said)

    def linear_solvers(self) -> dict[str, Callable[[list[list[float]], list[float]], Answer]]:
        """``jaxopt.linear_solve``."""
        limits = {"tol": 1e-12, "maxiter": 500}
        found = {
            "solve_cg": partial(linear_solve.solve_cg, **limits),
            "solve_normal_cg": partial(linear_solve.solve_normal_cg, **limits),
            "solve_bicgstab": partial(linear_solve.solve_bicgstab, **limits),
            "solve_gmres": partial(linear_solve.solve_gmres, **limits),
            "solve_lu": linear_solve.solve_lu,
            "solve_cholesky": linear_solve.solve_cholesky,
        }

        def solver(name: str) -> Callable[[list[list[float]], list[float]], Answer]:
            def run(a: list[list[float]], b: list[float]) -> Answer:
                matrix = self.array(a)
                return Answer(found[name](lambda v: matrix @ v, self.array(b)))

            return run

        return {name: solver(name) for name in found}

    def remark(self, number: int) -> str:
        """On batches."""
        return LOCKSTEP if number == 9 else ""

    def entry(self, **options: Any) -> None:
        """Of ``FixedPointIteration``."""
        jaxopt.FixedPointIteration(lambda w: 0.5 * w + 1.0, **options).run(jnp.zeros(3))


if __name__ == "__main__":
    main(JaxOpt())
