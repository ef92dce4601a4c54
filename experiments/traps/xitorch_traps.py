"""xitorch, put to the traps: ``xitorch.optimize.equilibrium`` with its default method, Broyden's first, unless a case asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from protocol import Answer, NotOfferedError, Wish, main
from torch_library import TorchLibrary, tensors_only
from xitorch import LinearOperator
from xitorch.linalg import solve
from xitorch.optimize import equilibrium


class Xitorch(TorchLibrary):
    """Its tolerances are absolute, and it has no fixed-point iteration but ``linearmixing``, which is the damped one."""

    name = "xitorch"
    packages = ("xitorch", "torch")
    tolerance = "f_tol"

    def solve(self, phi: Callable[..., Any], w0: Any, params: tuple[Any, ...], wish: Wish) -> Answer:
        """One system a call; ``anderson_acc`` alone has batch dimensions."""
        tensors_only(w0, "a single tensor")
        options: dict[str, Any] = {}
        backward: dict[str, Any] = {}
        if not wish.defaults:
            tol = wish.tol * wish.scale
            # Rooted at y - phi(y): the step of linearmixing is alpha times that, so alpha = -damping is the damped iteration.
            method = {
                "best": {"method": "broyden1"},
                "newton": {"method": "broyden1"},
                "picard": {"method": "linearmixing", "alpha": -wish.damping, "line_search": False},
                "anderson": {"method": "anderson_acc", "feat_ndims": max(1, w0.dim() - 1)},
            }["anderson" if wish.batch and wish.method == "best" else wish.method]
            if wish.batch and method["method"] != "anderson_acc":
                raise NotOfferedError("one system a call; anderson_acc alone has batch dimensions")
            options = method | {"f_tol": tol, "x_tol": tol, "maxiter": wish.max_steps}
            if wish.adjoint_tol is not None:
                backward = {"rtol": wish.adjoint_tol, "atol": wish.adjoint_tol, "max_niter": wish.adjoint_steps}
        return Answer(equilibrium(phi, w0, params=params, bck_options=backward, **options))

    def linear_solvers(self) -> dict[str, Callable[[list[list[float]], list[float]], Answer]]:
        """``xitorch.linalg.solve`` by method."""

        def solver(method: str) -> Callable[[list[list[float]], list[float]], Answer]:
            def call(a: list[list[float]], b: list[float]) -> Answer:
                operator = LinearOperator.m(torch.tensor(a, dtype=torch.float64), is_hermitian=True)
                right = torch.tensor(b, dtype=torch.float64)[:, None]
                options = {} if method == "exactsolve" else {"rtol": 1e-12, "atol": 1e-12, "max_niter": 500}
                return Answer(solve(operator, right, method=method, **options)[:, 0])

            return call

        return {name: solver(name) for name in ("exactsolve", "cg", "bicgstab", "gmres")}

    def entry(self, **options: Any) -> None:
        """Of ``equilibrium``, with its default method."""
        equilibrium(lambda y: torch.cos(y), torch.zeros(3, dtype=torch.float64), **options)

    def config_changed(self) -> bool:
        """The dictionary of backward options."""
        config = {"rtol": 1e-6}
        b = torch.ones(6, requires_grad=True)
        equilibrium(lambda y, b: 0.5 * y + b, torch.zeros(6), params=(b,), bck_options=config).sum().backward()
        return config != {"rtol": 1e-6}


if __name__ == "__main__":
    main(Xitorch())
