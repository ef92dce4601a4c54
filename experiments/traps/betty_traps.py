"""betty, put to the traps: bilevel problems by its ``Engine``; it has no fixed-point solver, so most cases do not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import problems as p
import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from protocol import Answer, Measured, NotOfferedError, Wish, main
from torch_library import TorchLibrary


class Vector(torch.nn.Module):
    """A parameter vector."""

    def __init__(self, values: list[float]) -> None:
        """With these values."""
        super().__init__()
        self.values = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


class Level(ImplicitProblem):
    """A level whose loss is given; steps of size ``lr``."""

    def __init__(self, name: str, start: list[float], lr: float, loss: Callable[[Any], torch.Tensor], config: Config) -> None:
        """Keep the loss."""
        self.loss = loss
        module = Vector(start)
        optimizer = torch.optim.SGD(module.parameters(), lr=lr)
        loader = [(torch.zeros(1), torch.zeros(1))]
        super().__init__(name, config, module=module, optimizer=optimizer, train_data_loader=loader)

    def training_step(self, batch: Any) -> torch.Tensor:
        """The loss; the batch plays no part."""
        return self.loss(self)


def hypergradient(a: list[list[float]], b: list[float], start: list[float], config: Config) -> tuple[list[float], list[float]]:
    """``dE/dlam`` for the inner loss ``p A p / 2 + lam p`` and ``E = b p``, and p as it is left; exactly ``-A^{-1} b``.

    The inner step has size 0, so that p stays at ``start``, and the outer one 1 from 0, so that lam is left at ``-dE/dlam``.
    """
    matrix, weights = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)

    def inner_loss(level: Any) -> torch.Tensor:
        w = level.module.values
        return 0.5 * w @ matrix @ w + level.outer.module.values @ w

    outer = Level("outer", [0.0] * len(b), 1.0, lambda level: weights @ level.inner.module.values, Config())
    inner = Level("inner", start, 0.0, inner_loss, config)
    dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    Engine([outer, inner], EngineConfig(train_iters=1, valid_step=10**9), dependencies).run()
    return [-x for x in outer.module.values.tolist()], inner.module.values.tolist()


class Betty(TorchLibrary):
    """Linear solvers are reached through the hypergradient of a quadratic inner problem."""

    name = "betty-ml"
    packages = ("betty-ml", "torch")
    tolerance = "cg_alpha"

    def solve(self, phi: Callable[..., Any], w0: Any, params: tuple[Any, ...], wish: Wish) -> Answer:
        """It trains, it does not solve."""
        raise NotOfferedError("no fixed-point solver: inner problems are trained by the caller's optimizer")

    def linear_solvers(self) -> dict[str, Callable[[list[list[float]], list[float]], Answer]]:
        """As many steps of CG as unknowns, where it is exact; 500 terms of the Neumann series."""

        def solver(**options: Any) -> Callable[[list[list[float]], list[float]], Answer]:
            def run(a: list[list[float]], b: list[float]) -> Answer:
                steps = {"cg_iterations": len(b)} if options["type"] == "cg" else {"neumann_iterations": 500}
                found, _ = hypergradient(a, b, [0.0] * len(b), Config(**options, **steps))
                return Answer([-x for x in found])

            return run

        return {"cg": solver(type="cg"), "cg, cg_alpha=0.5": solver(type="cg", cg_alpha=0.5), "neumann": solver(type="neumann")}

    def special(self, number: int) -> Callable[[], Measured] | None:
        """Trap 10 by its own kind of problem; what it does not claim."""
        if number == 1:
            raise NotOfferedError("hypergradients of the first order only, none that can be differentiated again")
        if number == 2:
            raise NotOfferedError("the backward is a fixed number of steps by design, there is no tolerance to miss")
        return self.defaults if number == 10 else None

    def defaults(self) -> Measured:
        """The inner problem at its optimum, every setting at its default."""
        a, b = [[0.5, 0.1, 0.0], [0.1, 0.6, 0.1], [0.0, 0.1, 0.8]], [1.0, -0.5, 0.7]
        start = [0.0, 0.0, 0.0]  # the optimum for lam = 0
        gradient, state = hypergradient(a, b, start, Config())
        want = [-x for x in p.solve_rows([b], a)[0]]
        numbers = {
            "relative error of the state": p.error(state, start),
            "relative error of the gradient": p.error(gradient, want),
        }
        did = "quadratic inner problem at its optimum, every setting at its default; the state's error is absolute"
        return Measured(numbers, did)

    def remark(self, number: int) -> str:
        """On the default."""
        if number == 10:
            return (
                "the default is documented (type='darts': one step, by finite differences); the state's error is its shift of "
                "the weights, which is not undone"
            )
        return ""

    def entry(self, **options: Any) -> None:
        """Of ``Config``."""
        Config(**options)

    def distributed(self) -> float:
        """Its distributed mode cannot be had here."""
        raise NotOfferedError("its distributed=True is torch.nn.DataParallel over several CUDA devices in one process, not ranks")


if __name__ == "__main__":
    main(Betty())
