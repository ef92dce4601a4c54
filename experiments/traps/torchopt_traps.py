"""torchopt, put to the traps: ``diff.implicit.custom_root`` around the caller's own fixed-point loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchopt
from protocol import Answer, NotOfferedError, Wish, main
from torch_library import TorchLibrary, tensors_only
from torchopt import linear_solve


class TorchOpt(TorchLibrary):
    """Only the derivative is the library's: cases about the forward solve do not apply."""

    name = "torchopt"
    packages = ("torchopt", "torch")

    def solve(self, phi: Callable[..., Any], w0: Any, params: tuple[Any, ...], wish: Wish) -> Answer:
        """A plain loop of the caller; the adjoint by its default, conjugate gradients on the normal equations."""
        if wish.method in ("picard", "anderson"):
            raise NotOfferedError("the forward solve is the caller's own")
        if wish.batch:
            raise NotOfferedError("the forward solve is the caller's own, and one system a call: no notion of rows")
        if not isinstance(w0, tuple):
            tensors_only(w0, "a tensor or a tuple of tensors")
        backward = {}
        if not wish.defaults and wish.adjoint_tol is not None:
            backward = {"solve": linear_solve.solve_normal_cg(rtol=wish.adjoint_tol, atol=0.0, maxiter=wish.adjoint_steps)}
        tol = 1e-6 if wish.defaults else wish.tol
        steps = 1000 if wish.defaults else wish.max_steps

        def optimality(w: Any, *args: Any) -> Any:
            out = phi(w, *args)
            return tuple(a - b for a, b in zip(out, w, strict=True)) if isinstance(w, tuple) else out - w

        @torchopt.diff.implicit.custom_root(optimality, argnums=tuple(range(1, len(params) + 1)), **backward)
        def solver(w: Any, *args: Any) -> Any:
            with torch.no_grad():
                for _ in range(steps):
                    new = phi(w, *args)
                    pairs = zip(new, w, strict=True) if isinstance(w, tuple) else [(new, w)]
                    distance = max(float(torch.linalg.vector_norm(a - b)) for a, b in pairs)
                    w = new
                    if not distance > tol:
                        break
            return w

        return Answer(solver(w0, *params))

    def linear_solvers(self) -> dict[str, Callable[[list[list[float]], list[float]], Answer]]:
        """``torchopt.linear_solve``; the Neumann series is ``solve_inv(ns=True)``."""
        limits = {"rtol": 1e-12, "maxiter": 500}
        found = {
            "solve_cg": linear_solve.solve_cg(**limits),
            "solve_normal_cg": linear_solve.solve_normal_cg(**limits),
            "solve_inv": linear_solve.solve_inv(),
            "solve_inv, Neumann": linear_solve.solve_inv(ns=True, maxiter=500),
        }

        def solver(name: str) -> Callable[[list[list[float]], list[float]], Answer]:
            def run(a: list[list[float]], b: list[float]) -> Answer:
                matrix = torch.tensor(a, dtype=torch.float64)
                return Answer(found[name](lambda v: matrix @ v, torch.tensor(b, dtype=torch.float64)))

            return run

        return {name: solver(name) for name in found}

    def batch_norm(self, width: int) -> tuple[Callable[..., Any], Callable[[], int]]:
        """The loop that would update them is the caller's."""
        raise NotOfferedError("the forward solve is the caller's own")

    def entry(self, **options: Any) -> None:
        """Of the linear solver, where the tolerance is given."""
        linear_solve.solve_cg(**options)(lambda v: 2 * v, torch.ones(3, dtype=torch.float64))


if __name__ == "__main__":
    main(TorchOpt())
