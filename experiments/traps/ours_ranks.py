"""A rank of trap 17: hypergradients of an equilibrium model and of a trained model, on its share of twelve rows.

``python ours_ranks.py RANK WORLD STORE OUT``
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import hyperopt


def hypergradients(rank: int = 0, world: int = 1) -> list[torch.Tensor]:
    """By the implicit adjoint of an equilibrium, and for a trained model implicit and unrolled."""
    generator = torch.Generator().manual_seed(0)
    x, y, a = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((12, 3), (12, 3), (3, 3)))
    x, y = (part.tensor_split([5])[rank] if world > 1 else part for part in (x, y))
    a = (0.3 * a).requires_grad_()

    def fitted(a: torch.Tensor) -> torch.Tensor:
        solver, adjoint = hyperopt.Picard(1e-14, max_steps=500), hyperopt.Implicit(hyperopt.GMRES(1e-14))
        solution = hyperopt.fixed_point(lambda w: torch.tanh(w @ a + x), torch.zeros_like(x), solver=solver, adjoint=adjoint)
        return (solution.value - y).square().mean()

    found = list(torch.autograd.grad(hyperopt.mean_over_ranks(fitted, a, rows=len(x)), a))

    def training(w: torch.Tensor, lam: torch.Tensor, batch: None) -> torch.Tensor:
        def loss(w: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
            return (torch.tanh(x @ w) - y).square().mean() + (lam.exp() * w**2).sum() / 2

        return hyperopt.mean_over_ranks(loss, w, lam, rows=len(x))

    def validation(w: torch.Tensor, lam: torch.Tensor, batch: None) -> torch.Tensor:
        return hyperopt.mean_over_ranks(lambda w: (x @ w - y).abs().mean(), w, rows=len(x))

    problem = hyperopt.BilevelProblem(training, validation)
    for adjoint in (hyperopt.Implicit(hyperopt.CG(1e-14)), hyperopt.Unrolled()):
        start, inner = torch.zeros(3, 3, dtype=torch.float64), hyperopt.GradientDescent(step_size=0.3, max_steps=40)
        found.append(hyperopt.Bilevel(problem, start, inner=inner, adjoint=adjoint).step(start - 1).grad)
    return [each.detach() for each in found]


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
    torch.save(hypergradients(rank, world), Path(sys.argv[4]))
    dist.destroy_process_group()
