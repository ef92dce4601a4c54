"""Hessian products of a trained inner problem against a hand-written loop of the same products.

    python experiments/benchmarks/products.py [--pairs 7]

A network 784-300-10 on 1,000 images of random pixels with one weight decay a parameter (238,510 of them), its hypergradient by a
fixed number of conjugate-gradient steps; the hand-written loop makes the gradient once with a graph and differentiates it K
times. Process CPU seconds, one thread, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from facts import facts, store
from torch import Tensor
from torch.nn import functional

import hyperopt

K = 50


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, xv = (torch.rand(1000, 784, generator=generator) for _ in range(2))
    y, yv = (torch.randint(10, (1000,), generator=generator) for _ in range(2))
    sizes = {"W": (300, 784), "b": (300,), "V": (10, 300), "c": (10,)}
    w = {name: 0.05 * torch.randn(size, generator=generator) for name, size in sizes.items()}
    lam = {name: torch.full(size, 0.5) for name, size in sizes.items()}

    def logits(w: Any, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(functional.linear(x, w["W"], w["b"])), w["V"], w["c"])

    def inner(w: Any, lam: Any, batch: Any) -> Tensor:
        return functional.cross_entropy(logits(w, x), y) + sum((lam[name] * w[name].square()).sum() for name in sizes) / 2

    problem = hyperopt.BilevelProblem(inner, lambda w, lam, batch: functional.cross_entropy(logits(w, xv), yv))
    adjoint = hyperopt.Implicit(hyperopt.CG(rtol=0, atol=0, max_steps=K), policy="ignore")

    def ours() -> int:
        return hyperopt.hypergradient(problem, w, lam, adjoint=adjoint).cost.vjps

    def by_hand() -> int:
        leaves = {name: each.clone().requires_grad_() for name, each in w.items()}
        strengths = {name: each.clone().requires_grad_() for name, each in lam.items()}
        flat = list(leaves.values())
        gradient = torch.autograd.grad(inner(leaves, strengths, None), flat, create_graph=True)
        b = torch.autograd.grad(functional.cross_entropy(logits(leaves, xv), yv), flat)
        u, r = [torch.zeros_like(each) for each in b], list(b)
        p, rr = list(r), sum(float(each.square().sum()) for each in r)
        for _ in range(K):
            hp = torch.autograd.grad(gradient, flat, p, retain_graph=True)
            alpha = rr / sum(float((a * c).sum()) for a, c in zip(p, hp, strict=True))
            u = [a + alpha * c for a, c in zip(u, p, strict=True)]
            r = [a - alpha * c for a, c in zip(r, hp, strict=True)]
            old, rr = rr, sum(float(each.square().sum()) for each in r)
            p = [a + (rr / old) * c for a, c in zip(r, p, strict=True)]
        torch.autograd.grad(gradient, list(strengths.values()), u)
        return K

    rates: list[tuple[float, float]] = []
    for k in range(options.pairs + 1):
        pair = []
        for way in (ours, by_hand):
            start = time.process_time()
            products = way()
            pair.append(products / (time.process_time() - start))
        if k:
            rates.append((pair[0], pair[1]))
    found = [statistics.median(each) for each in zip(*rates, strict=True)]
    ratio = statistics.median(a / b for a, b in rates)
    lines = ["| Hessian products a second | ours | by hand | ours / by hand |", "|---|---|---|---|"]
    lines.append(f"| 784-300-10, 1,000 rows, {K} steps of conjugate gradients | {found[0]:.1f} | {found[1]:.1f} | {ratio:.2f} |")
    store("products", {**facts(), "pairs": options.pairs, "rates": rates}, lines)


if __name__ == "__main__":
    main()
