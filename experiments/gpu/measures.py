"""What is measured on a device; each part returns its rows, and ``run.py`` calls them in turn.

Seconds are medians over rounds after three calls to warm up, by events on a GPU and by the wall clock on the CPU. What is
compared is taken in turn, and a ratio is the median over the rounds of the ratio in the same round. Memory is the peak of what
was allocated beyond the start of the call.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "deq")]

from counting import per_iteration
from models import ADJOINT, SOLVER  # pyright: ignore[reportMissingImports]

import hyperopt
from hyperopt import Implicit, fixed_point
from hyperopt.core.memory import peak_memory
from hyperopt.core.operator import FunctionOperator
from hyperopt.core.solvers.iterate import iterate
from hyperopt.nn.equilibrium import TanhAffine
from hyperopt.nn.networks import resnet_network
from hyperopt.nn.resnet_cell import ResNetCell

Row = dict[str, Any]
Call = Callable[[], Any]
STEPS = 20  # T and K where they are fixed


def elapsed(call: Call, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def compared(ours: Call, alone: Call, device: torch.device, rounds: int) -> Row:
    """Seconds of a call and of its arithmetic alone, in turn; their ratio; the call's peak of memory in bytes."""
    ours()  # libraries take their workspaces at the first call
    with peak_memory(device) as memory:
        ours()
    pairs = [(elapsed(ours, device), elapsed(alone, device)) for _ in range(rounds + 1)][1:]
    seconds, least = (statistics.median(each) for each in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return {"seconds": seconds, "seconds alone": least, "ratio": ratio, "peak bytes": memory.peak}


def solved(stats: Any) -> Row:
    """How a solve ended."""
    return {"status": stats.status.name, "iterations": int(stats.iterations.max()), "residual": stats.worst_residual()}


# ---- is it right


def right(device: torch.device, small: bool) -> Iterator[Row]:
    """The largest relative difference of a gradient from that on the CPU, float64, for pairs of a solver and an adjoint."""
    pairs = {
        "picard, neumann": (hyperopt.Picard(1e-12, max_steps=400), hyperopt.Neumann(1e-12, max_steps=400)),
        "anderson, linear anderson": (hyperopt.Anderson(1e-12), hyperopt.LinearAnderson(1e-12)),
        "broyden, bicgstab": (hyperopt.Broyden(1e-12), hyperopt.BiCGStab(1e-12)),
        "newton-krylov, gmres": (hyperopt.NewtonKrylov(1e-12), hyperopt.GMRES(1e-12)),
        "newton, dense": (hyperopt.Newton(1e-12), hyperopt.Dense()),
        "chord, normal cg": (hyperopt.Chord(1e-12), hyperopt.NormalCG(1e-12)),
    }
    for name, (solver, linear) in pairs.items():
        found, adjoint = [], Implicit(linear)
        for place in (device, torch.device("cpu")):
            u, A = equilibrium(64, 16, place, torch.float64)
            sol = fixed_point(lambda w, u=u, A=A: torch.tanh(w @ A + u), torch.zeros_like(u), solver=solver, adjoint=adjoint)
            found.append(torch.autograd.grad(sol.value.square().mean(), A)[0].cpu())
        there, here = found
        yield {"case": name, "difference": float((there - here).abs().max() / here.abs().max())}


# ---- counts


def counts(device: torch.device, small: bool) -> Iterator[Row]:
    """Kernels and host reads an iteration of a map or product of three kernels, as in ``tests/core/test_core_counts.py``.

    On a GPU also what its driver is asked for: launches an iteration, copies included, and calls that wait for the device.
    """
    forward = (hyperopt.Picard, hyperopt.Anderson, hyperopt.Broyden)
    adjoint = (hyperopt.Neumann, hyperopt.LinearAnderson, hyperopt.CG, hyperopt.MINRES, hyperopt.BiCGStab, hyperopt.GMRES)
    for rows, dim in ((1, 10), (32, 20)) if small else ((1, 10), (32, 20), (1000, 20), (5000, 200)):
        generator = torch.Generator().manual_seed(0)
        q = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
        A = (q * torch.linspace(-0.7, 0.7, dim, dtype=torch.float64) @ q.T).to(device)
        b = torch.randn(rows, dim, generator=generator, dtype=torch.float64).to(device)
        operator = FunctionOperator(lambda v, A=A: (v @ A) * 1.0 + 0.0, symmetric=True)

        def phi(w: Tensor, A: Tensor = A, u: Tensor = 0.3 * b) -> Tensor:
            return torch.tanh(w @ A + u)

        for kind in (*forward, *adjoint):
            for fixed in (False, True):
                method = kind(0, 0, STEPS) if fixed else kind()

                def solve(method: Any = method, b: Tensor = b, operator: Any = operator, phi: Any = phi) -> Any:
                    if isinstance(method, forward):
                        return iterate(method, phi, torch.zeros_like(b)).stats
                    return method.solve(operator, b).stats

                with torch.no_grad():
                    kernels, reads, _ = per_iteration(solve)
                    row = {"case": f"{kind.__name__}, {rows} x {dim}, {'fixed' if fixed else 'tolerance'}"}
                    row |= {"kernels": kernels, "host reads": reads, **solved(solve())}
                    yield row | (asked_of_the_gpu(solve) if device.type == "cuda" else {})


def asked_of_the_gpu(solve: Call) -> Row:
    """Launches and waits an iteration, by the profiler and by torch's own warnings."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        stats = solve()
        torch.cuda.synchronize()
    steps = int(stats.iterations.max())
    launches = sum(event.device_type.name == "CUDA" for event in profile.events() or ())
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            solve()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waiting = sum("synchronizing" in str(each.message) for each in waits)
    return {"launches": launches / steps, "waits": waiting / steps}


# ---- the equilibrium model


def equilibrium(rows: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``u`` and ``A`` of ``w = tanh(w A + u)`` with ``|A| = .9``, drawn on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    A *= 0.9 / torch.linalg.matrix_norm(A, 2)
    u = 0.3 * torch.randn(rows, dim, generator=generator)
    return u.to(device, dtype).requires_grad_(), A.to(device, dtype).requires_grad_()


def hypergradients(device: torch.device, small: bool) -> Iterator[Row]:
    """One gradient of the equilibrium model in ``u`` and ``A``, fp32, against as many matrix products alone.

    With the products of TensorFloat-32 once more on a GPU. "fixed" has T = K = 20, the others end at a relative residual of 1e-5.
    """
    ways = {
        "fixed, closure": (hyperopt.Picard(0, 0, STEPS), hyperopt.Neumann(0, 0, STEPS), False),
        "fixed, cell": (hyperopt.Picard(0, 0, STEPS), hyperopt.Neumann(0, 0, STEPS), True),
        "picard and neumann": (hyperopt.Picard(1e-5), hyperopt.Neumann(1e-5), True),
        "anderson": (hyperopt.Anderson(1e-5), hyperopt.LinearAnderson(1e-5), True),
    }
    for rows, dim in ((64, 16), (256, 32)) if small else ((32, 20), (5000, 200), (60_000, 200), (60_000, 1000)):
        u, A = equilibrium(rows, dim, device, torch.float32)
        start = torch.zeros_like(u)

        def products(T: int, K: int, u: Tensor = u, A: Tensor = A, start: Tensor = start) -> Tensor:
            with torch.no_grad():
                w = start
                for _ in range(T):
                    w = w @ A
                for _ in range(K):
                    w = w @ A.T
                return u.T @ w

        def by_hand(u: Tensor = u, A: Tensor = A, start: Tensor = start) -> Tensor:
            with torch.no_grad():
                w = start
                for _ in range(STEPS):
                    w = torch.addmm(u, w, A).tanh_()
                slope, v = 1 - w * w, 2 * w / w.numel()
                g = v
                for _ in range(STEPS):
                    v = torch.addmm(g, v * slope, A.T)
                return w.T @ (v * slope)

        for precision in ("highest", "high") if device.type == "cuda" else ("highest",):
            torch.set_float32_matmul_precision(precision)
            facts = {"rows": rows, "dim": dim, "precision": precision}
            alone = compared(by_hand, lambda: products(STEPS, STEPS), device, 7)
            yield {"case": "fixed, by hand", **facts, **alone, "peak states": alone["peak bytes"] / u.nbytes}
            for name, (solver, linear, closed) in ways.items():
                how = {"solver": solver, "adjoint": Implicit(linear, policy="ignore"), "policy": "ignore"}

                def one(how: Any = how, closed: bool = closed, start: Tensor = start, u: Tensor = u, A: Tensor = A) -> Any:
                    if closed:
                        sol = fixed_point(TanhAffine(), start, (u, A), row_args=(0,), **how)
                    else:
                        sol = fixed_point(lambda w: torch.tanh(torch.addmm(u, w, A)), start, **how)
                    torch.autograd.grad(sol.value.square().mean(), (u, A))
                    return sol

                sol = one()
                T, K = sol.forward.evaluations, sol.adjoint.vjps - 1  # the closing product is the last of products()
                found = compared(one, lambda T=T, K=K: products(T, K), device, 7)
                row = {"case": name, **facts, **found, "peak states": found["peak bytes"] / u.nbytes}
                yield {**row, "evaluations": T, "products": K, "forward": solved(sol.forward), "adjoint": solved(sol.adjoint)}
            torch.set_float32_matmul_precision("highest")


# ---- a DEQ


def deq(device: torch.device, small: bool) -> Iterator[Row]:
    """A step of the DEQ of ``experiments/deq`` on random images, against as many evaluations and products of the cell alone."""
    size, batches = (8, (2,)) if small else (32, (32, 256))
    for images in batches:
        torch.manual_seed(0)
        cell = ResNetCell(8, 16, 4) if small else ResNetCell()
        model = resnet_network(cell, (3, size, size), solver=SOLVER, adjoint=ADJOINT, policy="ignore").to(device)
        x, y = torch.randn(images, 3, size, size).to(device), torch.randint(10, (images,)).to(device)
        optimizer, layer = torch.optim.Adam(model.parameters(), 1e-4), model.get_submodule("deq")

        def step(model: Any = model, x: Tensor = x, y: Tensor = y, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        step()
        stats: Any = layer.solution
        T, K = stats.forward.evaluations, stats.adjoint.vjps - 1
        injected = torch.randn(images, cell.channels, size, size, device=device)

        def alone(cell: Any = cell, x: Tensor = injected, T: int = T, K: int = K) -> None:
            with torch.no_grad():
                z = torch.zeros_like(x)
                for _ in range(T - 1):
                    z = cell(z, x)
            z.requires_grad_()
            out = cell(z, x)
            v = torch.ones_like(x)
            for _ in range(K):
                (v,) = torch.autograd.grad(out, z, v, retain_graph=True)

        found = compared(step, alone, device, 5)
        solution: Any = layer.solution
        ends = {"forward": solved(solution.forward), "adjoint": solved(solution.adjoint)}
        yield {"case": f"{images} images of {size} x {size}", **found, "evaluations": T, "products": K, **ends}


# ---- a trained problem


def trained(device: torch.device, small: bool) -> Iterator[Row]:
    """A hypergradient of a network of 10 million weights by 10 steps of a linear solver, against as many Hessian products."""
    width, rows, steps = (32 if small else 2236), 256, 10
    torch.manual_seed(0)
    layers = torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, width)
    model = hyperopt.Functional(torch.nn.Sequential(*layers).to(device))
    x, other = (torch.randn(rows, width).to(device) for _ in range(2))
    decay = torch.tensor(1.0, device=device)

    def inner(w: Any, lam: Tensor, batch: Any) -> Tensor:
        return (model(w, x) - x).square().mean() + lam * sum(each.square().sum() for each in w.values()) / 2

    def outer(w: Any, lam: Any, batch: Any) -> Tensor:
        return (model(w, other) - other).square().mean()

    problem = hyperopt.BilevelProblem(inner, outer)

    def by_hand() -> Tensor:
        leaves = {name: each.detach().requires_grad_() for name, each in model.w.items()}
        lam, flat = decay.clone().requires_grad_(), list(leaves.values())
        gradient = torch.autograd.grad(inner(leaves, lam, None), flat, create_graph=True)
        v = torch.autograd.grad(outer(leaves, lam, None), flat)
        for _ in range(steps):
            v = torch.autograd.grad(gradient, flat, v, retain_graph=True)
        return torch.autograd.grad(gradient, lam, v)[0]

    for linear, step in ((hyperopt.CG(0, 0, steps), None), (hyperopt.Neumann(0, 0, steps), 0.5)):

        def one(linear: Any = linear, step: Any = step) -> Any:
            return hyperopt.hypergradient(problem, model.w, decay, step=step, adjoint=Implicit(linear, policy="ignore"))

        estimate = one()
        row = {"case": type(linear).__name__, "weights": sum(each.numel() for each in model.w.values())}
        row |= {"hessian products": estimate.cost.hessian_products, "hypergradient": float(estimate.grad)}
        yield row | compared(one, by_hand, device, 5)


PARTS = {"right": right, "counts": counts, "equilibrium": hypergradients, "deq": deq, "trained": trained}
