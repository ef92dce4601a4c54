"""Hessian products of a trained inner problem against a hand-written loop of the same products.

    python experiments/benchmarks/products.py [--pairs 7]

A hypergradient by a fixed number of conjugate-gradient steps, 1,000 images of random pixels, one weight decay a parameter: of
softmax regression (7,850 parameters), and of a network 784-300-10 (238,510) at a decay of 3, under which its Hessian is positive
definite at the random weights. The hand-written loop makes the gradient once with a graph, differentiates it K times, and neither
looks whether a direction has negative curvature nor measures its residual at the end, for which ours makes one product more.
Process CPU seconds, one thread, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from facts import facts, store
from torch import Tensor
from torch.nn import functional

import hyperopt

PROBLEMS = {"784-10": (0, 0.01, 50), "784-300-10": (300, 3.0, 20)}  # hidden units, decay, K


def ways(name: str) -> tuple[Callable[[], int], Callable[[], int]]:
    """Ours and the hand-written one; each returns the products that it has made."""
    generator = torch.Generator().manual_seed(0)
    x, xv = (torch.rand(1000, 784, generator=generator) for _ in range(2))
    y, yv = (torch.randint(10, (1000,), generator=generator) for _ in range(2))
    hidden, decay, steps = PROBLEMS[name]
    sizes = {"W": (hidden, 784), "b": (hidden,), "V": (10, hidden or 784), "c": (10,)}
    sizes = {leaf: size for leaf, size in sizes.items() if size[0]}
    w = {leaf: 0.05 * torch.randn(size, generator=generator) for leaf, size in sizes.items()}
    lam = {leaf: torch.full(size, decay) for leaf, size in sizes.items()}

    def logits(w: Any, x: Tensor) -> Tensor:
        h = torch.tanh(functional.linear(x, w["W"], w["b"])) if hidden else x
        return functional.linear(h, w["V"], w["c"])

    def inner(w: Any, lam: Any, batch: Any) -> Tensor:
        return functional.cross_entropy(logits(w, x), y) + sum((lam[leaf] * w[leaf].square()).sum() for leaf in sizes) / 2

    problem = hyperopt.BilevelProblem(inner, lambda w, lam, batch: functional.cross_entropy(logits(w, xv), yv))
    adjoint = hyperopt.Implicit(hyperopt.CG(rtol=0, atol=0, max_steps=steps), policy="ignore")

    def ours() -> int:
        return hyperopt.hypergradient(problem, w, lam, adjoint=adjoint).cost.hessian_products

    def by_hand() -> int:
        leaves = {leaf: each.clone().requires_grad_() for leaf, each in w.items()}
        strengths = {leaf: each.clone().requires_grad_() for leaf, each in lam.items()}
        flat = list(leaves.values())
        gradient = torch.autograd.grad(inner(leaves, strengths, None), flat, create_graph=True)
        b = torch.autograd.grad(functional.cross_entropy(logits(leaves, xv), yv), flat)
        u, r = [torch.zeros_like(each) for each in b], list(b)
        p, rr = list(r), sum(float(each.square().sum()) for each in r)
        for _ in range(steps):
            hp = torch.autograd.grad(gradient, flat, p, retain_graph=True)
            alpha = rr / sum(float((a * c).sum()) for a, c in zip(p, hp, strict=True))
            u = [a + alpha * c for a, c in zip(u, p, strict=True)]
            r = [a - alpha * c for a, c in zip(r, hp, strict=True)]
            old, rr = rr, sum(float(each.square().sum()) for each in r)
            p = [a + (rr / old) * c for a, c in zip(r, p, strict=True)]
        torch.autograd.grad(gradient, list(strengths.values()), u)
        return steps

    return ours, by_hand


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| Hessian products a second | ours | by hand | ours / by hand |", "|---|---|---|---|"]
    found: dict[str, list[tuple[float, float]]] = {}
    for name, (_, _, steps) in PROBLEMS.items():
        rates: list[tuple[float, float]] = []
        both = ways(name)
        for _ in range(options.pairs + 1):
            pair = []
            for way, due in zip(both, (steps + 1, steps), strict=True):
                start = time.process_time()
                products = way()
                pair.append(products / (time.process_time() - start))
                if products != due:
                    raise SystemExit(f"{name}: {products} products, not {due}: the two would not do the same work")
            rates.append((pair[0], pair[1]))
        found[name] = rates[1:]
        ours, hand = (statistics.median(each) for each in zip(*found[name], strict=True))
        ratio = statistics.median(a / b for a, b in found[name])
        lines.append(f"| {name}, 1,000 rows, {steps} steps of conjugate gradients | {ours:.1f} | {hand:.1f} | {ratio:.2f} |")
    store("products", {**facts(), "pairs": options.pairs, "rates": found}, lines)


if __name__ == "__main__":
    main()
