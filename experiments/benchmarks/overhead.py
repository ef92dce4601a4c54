"""Cost of one outer gradient of the equilibrium model against a hand-written loop of the same arithmetic.

    python experiments/benchmarks/overhead.py [--rows 5000] [--state 200] [--steps 20] [--pairs 7] [--out results.json]

The hand-written loop ("floor") is ``addmm`` and in-place ``tanh`` T times, ``v <- g + (v (1 - w^2)) A^T`` K times, three closing
products. All variants run in turn, one thread, process CPU seconds; a ratio is the median over the rounds of its ratio to the
floor of the same round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import hyperopt
from hyperopt.nn.equilibrium import TanhAffine

Gradient = Callable[[], list[Tensor]]


def variants(rows: int, features: int, state: int, classes: int, steps: int) -> dict[str, Gradient]:
    """The ways to the same gradient (A, B, c, W, b) of the mean cross-entropy."""
    gen = torch.Generator().manual_seed(0)
    x = torch.rand(rows, features, generator=gen)
    y = torch.randint(classes, (rows,), generator=gen)
    A = torch.randn(state, state, generator=gen)
    A = (A * 0.9 / torch.linalg.matrix_norm(A, 2)).requires_grad_()
    B = (0.05 * torch.randn(state, features, generator=gen)).requires_grad_()
    c = torch.zeros(state, requires_grad=True)
    W = (0.05 * torch.randn(classes, state, generator=gen)).requires_grad_()
    b = torch.zeros(classes, requires_grad=True)
    params = [A, B, c, W, b]
    w0 = torch.zeros(rows, state)
    solver = hyperopt.Picard(rtol=0, atol=0, max_steps=steps)
    adjoint = hyperopt.Implicit(hyperopt.Neumann(rtol=0, atol=0, max_steps=steps))

    def floor() -> list[Tensor]:
        with torch.no_grad():
            u = functional.linear(x, B, c)
            w = w0
            for _ in range(steps):
                w = torch.addmm(u, w, A).tanh_()
        leaf = w.detach().requires_grad_()
        loss = functional.cross_entropy(functional.linear(leaf, W, b), y)
        g, gW, gb = torch.autograd.grad(loss, (leaf, W, b))
        with torch.no_grad():
            slope = 1 - w * w
            v = g
            for _ in range(steps):
                v = torch.addmm(g, v * slope, A.T)
            v = v * slope
            return [w.T @ v, v.T @ x, v.sum(0), gW, gb]

    def closure() -> list[Tensor]:
        u = functional.linear(x, B, c)
        sol = hyperopt.fixed_point(lambda w: torch.tanh(torch.addmm(u, w, A)), w0, solver=solver, adjoint=adjoint)
        return list(torch.autograd.grad(functional.cross_entropy(functional.linear(sol.value, W, b), y), params))

    cell = TanhAffine()

    def closed_form() -> list[Tensor]:
        u = functional.linear(x, B, c)
        sol = hyperopt.fixed_point(cell, w0, (u, A), row_args=(0,), solver=solver, adjoint=adjoint)
        return list(torch.autograd.grad(functional.cross_entropy(functional.linear(sol.value, W, b), y), params))

    def unrolled() -> list[Tensor]:
        u = functional.linear(x, B, c)
        w = w0
        for _ in range(steps):
            w = torch.tanh(torch.addmm(u, w, A))
        return list(torch.autograd.grad(functional.cross_entropy(functional.linear(w, W, b), y), params))

    return {"floor": floor, "fixed_point, closure": closure, "fixed_point, tanh-affine cell": closed_form, "autograd": unrolled}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 5000), ("features", 784), ("state", 200), ("steps", 20), ("pairs", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=None, help="write the measured rows here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = variants(options.rows, options.features, options.state, 10, options.steps)
    reference = ways["floor"]()
    errors = {}
    for name, way in ways.items():
        errors[name] = max(float((a - r).norm() / r.norm()) for a, r in zip(way(), reference, strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.pairs):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    rows = []
    print(f"{'variant':32s} {'seconds':>8s} {'x floor':>8s} {'rel. difference':>16s}")
    for name in ways:
        ratio = statistics.median(t / f for t, f in zip(seconds[name], seconds["floor"], strict=True))
        median = statistics.median(seconds[name])
        print(f"{name:32s} {median:8.3f} {ratio:8.2f} {errors[name]:16.1e}")
        rows.append({"variant": name, "cpu_seconds": median, "ratio": ratio, "difference_to_floor": errors[name]})
    if options.out is not None:
        machine = platform.processor() or platform.machine()
        facts = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "machine": machine}
        settings = {k: v for k, v in vars(options).items() if k != "out"}
        options.out.write_text(json.dumps({**facts, "threads": 1, **settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
