"""Hypergradients on one or several ranks, each on its share of the rows: run by ``test_distributed.py``, once a rank.

python rank_cases.py RANK WORLD STORE FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import hyperopt
from hyperopt.core.distributed import mean_over_ranks

CUTS = {1: (0, 11), 2: (0, 4, 11)}
EXACT = hyperopt.Implicit(hyperopt.GMRES(1e-14))
PICARD = hyperopt.Picard(1e-14, max_steps=500)


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def results(rank: int, world: int) -> dict[str, torch.Tensor]:
    """The derivatives of each case."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = slice(CUTS[world][rank], CUTS[world][rank + 1])
    x, y, a0, b0 = draw(11, 4)[rows], draw(11, 3)[rows], 0.3 * draw(3, 3), draw(4, 3)
    n, zeros = len(x), torch.zeros(4, 3, dtype=torch.float64)
    found = {}

    # An equilibrium model: gradients and a product with the Hessian.
    a, b = a0.clone().requires_grad_(), b0.clone().requires_grad_()

    def equilibrium(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        u, w0 = x @ b, torch.zeros(n, 3, dtype=torch.float64)
        solution = hyperopt.fixed_point(lambda w: torch.tanh(w @ a + u), w0, solver=PICARD, adjoint=EXACT)
        return (solution.value - y).square().mean()

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "args": lambda: mean_over_ranks(equilibrium, a, b, rows=n),
        "closure": lambda: mean_over_ranks(lambda: equilibrium(a, b), rows=n),
    }
    for name, outer in ways.items():
        first = torch.autograd.grad(outer(), (a, b), create_graph=True)
        found[f"equilibrium, {name}"] = flat(first)
        found[f"equilibrium, {name}, second"] = flat(
            torch.autograd.grad(torch.stack([(g * g.sin()).sum() for g in first]).sum(), (a, b))
        )

    # A trained problem, by every kind of estimator.
    def training(w: torch.Tensor, lam: torch.Tensor, batch: None) -> torch.Tensor:
        def loss(w: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
            return (torch.tanh(x @ w) - y).square().mean() + (lam.exp() * w**2).sum() / 2

        return mean_over_ranks(loss, w, lam, rows=n)

    def validation(w: torch.Tensor, lam: torch.Tensor, batch: None) -> torch.Tensor:
        return mean_over_ranks(lambda w: (x @ w - y).square().mean(), w, rows=n)

    problem, lam = hyperopt.BilevelProblem(training, validation), zeros - 1
    estimators = {
        "implicit": hyperopt.Implicit(hyperopt.CG(1e-14)),
        "unrolled": hyperopt.Unrolled(),
        "checkpointed": hyperopt.Checkpointed(),
        "t1t2": hyperopt.T1T2(),
    }
    for name, adjoint in estimators.items():
        inner = hyperopt.GradientDescent(step_size=0.3, max_steps=40)
        bilevel = hyperopt.Bilevel(problem, zeros.clone(), inner=inner, adjoint=adjoint)
        found[f"trained, {name}"] = flat([bilevel.step(lam).grad])

    # The mean inside of a map, which closes over what was computed outside.
    raw = lam.clone().requires_grad_()
    decay = raw.exp()

    def phi(w: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            v = w if w.requires_grad else w.detach().requires_grad_()
            loss = mean_over_ranks(lambda: (torch.tanh(x @ v) - y).square().mean() + (decay * v**2).sum() / 2, rows=n)
            (gradient,) = torch.autograd.grad(loss, v, create_graph=True)
        return w - 0.3 * gradient

    for name, adjoint in {"implicit": EXACT, "unrolled": hyperopt.Unrolled()}.items():
        w = hyperopt.fixed_point(phi, zeros, rows="joint", solver=PICARD, adjoint=adjoint).value
        found[f"map, {name}"] = flat(torch.autograd.grad(validation(w, lam, None), raw, retain_graph=True))

    # Forward mode and a batch of cotangents.
    found["jvp"] = flat([torch.func.jvp(lambda w: training(w, lam, None), (b0,), (b0.cos(),))[1]])
    found["hessian"] = flat([torch.func.jacrev(torch.func.grad(lambda w: training(w, lam, None)))(b0)])
    return found


def naive(rank: int, world: int) -> torch.Tensor:
    """What a plain all-reduce of the loss gives: the derivative of this rank's share alone."""
    a = torch.tensor([1.0, 2.0], dtype=torch.float64)[rank : rank + 1] if world > 1 else torch.tensor([1.0, 2.0]).double()
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = (a * w).square().mean()
    if world > 1:
        total = loss.detach().clone()
        dist.all_reduce(total)
        loss = loss + (total / world - loss.detach())
    return flat(torch.autograd.grad(loss, w))


if __name__ == "__main__":
    rank, world, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save({"results": results(rank, world), "naive": naive(rank, world)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
