"""Checks of a hypergradient: ``check_hypergradient`` compares it with three references, ``compare_adjoints`` shows its price.

The references share as little as possible with what they check:

- finite differences of the outer objective along random directions, with the inner problem solved to the rounding floor;
- ``dense``: the adjoint system solved by an LU factorisation of the Jacobian at that solution;
- ``unrolled``: autograd through the iteration from the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.adjoints.unrolled import Unrolled
from hyperopt.core.linear.dense import Dense
from hyperopt.core.loop import rounding_floor
from hyperopt.core.memory import peak_memory
from hyperopt.core.policy import SolveError
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.picard import Picard
from hyperopt.core.status import Solution
from hyperopt.core.text import aligned, described

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Objective = Callable[[FixedPointSolver, Adjoint], tuple[Tensor, Solution]]
"""``objective(solver, adjoint)`` solves the inner problem with these and returns the outer loss, a scalar, and the solution."""

STEPS = 10_000  # budget of the references' solves; a contracting solve reaches its rounding floor in fewer steps


@dataclass(frozen=True)
class Comparison:
    """One hypergradient compared with a reference.

    Attributes:
        name: name of the method, or of the reference.
        error: ``|g - reference| / |reference|`` in the Euclidean norm over all hyperparameters; NaN if there is none.
        cosine: cosine of the angle between the two.
        vjps: vector-Jacobian products of the backward solve.
        jvps: Jacobian-vector products of the backward solve.
        seconds: wall time of one forward and backward run, after a warm-up.
        peak_bytes: largest memory in tensors during forward and backward, beyond what was there before.
        note: how a failed solve ended, or why there is no number.
    """

    name: str
    error: float
    cosine: float = math.nan
    vjps: int = 0
    jvps: int = 0
    seconds: float = math.nan
    peak_bytes: int = 0
    note: str = ""


@dataclass(frozen=True, repr=False)
class HypergradientCheck:
    """The result of ``check_hypergradient``; ``print`` it for the table.

    Attributes:
        rows: one comparison for each reference.
        tolerance: largest relative error that passes.
        norm: norm of the hypergradient that was checked.
    """

    rows: tuple[Comparison, ...]
    tolerance: float
    norm: float

    def __repr__(self) -> str:
        return described(self, passed=self.passed, tolerance=self.tolerance, rows=[row.name for row in self.rows])

    @property
    def passed(self) -> bool:
        """Whether at least one reference could be computed, and all of these agree within the tolerance."""
        known = [row.error for row in self.rows if not math.isnan(row.error)]
        return bool(known) and max(known) <= self.tolerance

    def __str__(self) -> str:
        """Return the table."""
        lines = [("against", "relative error", "cosine", "")]
        lines += [(row.name, _number(row.error, ".1e"), _number(row.cosine, ".9f"), row.note) for row in self.rows]
        verdict = "passed" if self.passed else "FAILED"
        return f"{aligned(lines)}\n{verdict}: tolerance {self.tolerance:.1e}, norm of the hypergradient {self.norm:.6g}"


@dataclass(frozen=True, repr=False)
class AdjointComparison:
    """The result of ``compare_adjoints``; ``print`` it for the table, ``figure()`` draws error against time."""

    rows: tuple[Comparison, ...]

    def __repr__(self) -> str:
        return described(self, rows=[row.name for row in self.rows])

    def __str__(self) -> str:
        """Return the table."""
        lines = [("adjoint", "relative error", "1 - cosine", "vjps", "jvps", "seconds", "peak MB", "")]
        for row in self.rows:
            cost = (str(row.vjps), str(row.jvps), _number(row.seconds, ".4f"), _number(row.peak_bytes / 1e6, ".1f"))
            lines.append((row.name, _number(row.error, ".1e"), _number(1 - row.cosine, ".1e"), *cost, row.note))
        return aligned(lines)

    def figure(self) -> Figure:
        """Draw relative error against seconds, one point for each adjoint."""
        from matplotlib.figure import Figure  # imported here since it takes half a second

        figure = Figure(figsize=(6.5, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for row in self.rows:
            if row.error > 0 and math.isfinite(row.error):
                axes.loglog(row.seconds, row.error, "o")
                axes.annotate(row.name, (row.seconds, row.error), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axes.set(xlabel="seconds, forward and backward", ylabel="relative error of the hypergradient")
        axes.grid(alpha=0.3, which="both")
        return figure


def check_hypergradient(
    objective: Objective,
    hyperparameters: Mapping[str, Sequence[Tensor]] | Sequence[Tensor],
    *,
    solver: FixedPointSolver | None = None,
    adjoint: Adjoint | None = None,
    tolerance: float = 1e-3,
    directions: int = 4,
    generator: torch.Generator | None = None,
) -> HypergradientCheck:
    """Compare the hypergradient of an estimator with finite differences, a dense adjoint and unrolling.

    Use float64: in float32 finite differences are correct to three digits at best.

    Args:
        objective: see ``Objective``; it must be deterministic.
        hyperparameters: the leaf tensors that the outer loss depends on, in a list, or in groups.
        solver: forward solver of the estimator (default ``Picard()``).
        adjoint: adjoint of the estimator (default ``Implicit()``).
        tolerance: largest relative error that passes.
        directions: number of random directions of the finite differences, for all hyperparameters together.
        generator: generator of the directions (None: a new one with seed 0).

    Returns:
        The table; ``passed`` says whether every reference that could be computed agrees.

    Raises:
        ValueError: the loss is not a scalar, there are no hyperparameters, or one is not a leaf that requires grad.

    Example:
        >>> import torch, hyperopt
        >>> lam = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> def objective(solver, adjoint):
        ...     w0 = torch.zeros((), dtype=torch.float64)
        ...     sol = hyperopt.fixed_point(lambda w: torch.cos(lam * w), w0, solver=solver, adjoint=adjoint)
        ...     return sol.value**2, sol
        >>> bool(hyperopt.check_hypergradient(objective, [lam]).passed)
        True
    """
    tensors = _tensors(hyperparameters)
    solver, adjoint = solver or Picard(), adjoint or Implicit()
    loss, gradient, _ = _gradient(objective, tensors, solver, adjoint)
    exact = tight(solver, loss.dtype)
    rows = [_finite_differences(objective, tensors, exact, gradient, directions, generator or torch.Generator().manual_seed(0))]
    for name, way in (("dense", Implicit(Dense(), policy="raise")), ("unrolled", Unrolled())):
        try:
            _, reference, _ = _gradient(objective, tensors, exact if name == "dense" else Picard(exact.rtol, 0.0, STEPS), way)
            rows.append(Comparison(name, *_distance(gradient, reference)))
        except (SolveError, ValueError) as error:
            rows.append(Comparison(name, math.nan, note=f"not available: {error}"))
    return HypergradientCheck(tuple(rows), tolerance, float(gradient.norm()))


def compare_adjoints(
    objective: Objective,
    hyperparameters: Mapping[str, Sequence[Tensor]] | Sequence[Tensor],
    adjoints: Mapping[str, Adjoint],
    *,
    solver: FixedPointSolver | None = None,
    reference: Adjoint | None = None,
) -> AdjointComparison:
    """Compare error, cost and memory of several adjoints on one problem.

    Args:
        objective: see ``Objective``.
        hyperparameters: as for ``check_hypergradient``.
        adjoints: the adjoints, by the names that the table shows.
        solver: the forward solver of all of them (default ``Picard()``).
        reference: adjoint to which the errors are relative, after a forward solve to the rounding floor (default: dense).

    Returns:
        ``AdjointComparison``, which prints as a table: error, products, seconds and peak memory of each adjoint.

    Raises:
        ValueError: as ``check_hypergradient``, or there are no adjoints.

    Example:
        >>> import torch, hyperopt
        >>> lam = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> def objective(solver, adjoint):
        ...     w0 = torch.zeros(1, 1, dtype=torch.float64)
        ...     solution = hyperopt.fixed_point(lambda w: torch.cos(lam * w), w0, solver=solver, adjoint=adjoint)
        ...     return solution.value.sum(), solution
        >>> adjoints = {"one step": hyperopt.OneStep(), "GMRES": hyperopt.Implicit(hyperopt.GMRES())}
        >>> table = hyperopt.compare_adjoints(objective, [lam], adjoints)
        >>> [(row.name, row.error < 1e-3) for row in table.rows]
        [('one step', False), ('GMRES', True)]
    """
    tensors = _tensors(hyperparameters)
    if not adjoints:
        raise ValueError("compare_adjoints: there is nothing to compare; give adjoints={'neumann': Implicit(Neumann()), ...}")
    solver = solver or Picard()
    dtype = tensors[0].dtype
    _, exact, _ = _gradient(objective, tensors, tight(solver, dtype), reference or Implicit(Dense(), policy="raise"))
    rows = []
    for name, adjoint in adjoints.items():
        try:
            _gradient(objective, tensors, solver, adjoint)  # the warm-up
            started = time.perf_counter()
            _, gradient, solution = _gradient(objective, tensors, solver, adjoint)
            seconds = time.perf_counter() - started
            with peak_memory(gradient.device) as memory:
                _gradient(objective, tensors, solver, adjoint)
        except (SolveError, ValueError, TypeError) as error:
            rows.append(Comparison(name, math.nan, note=str(error)))
            continue
        stats = solution.adjoint
        solves = {"inner": solution.forward, "adjoint": stats}
        failed = [f"{what}: {solve.status.name}" for what, solve in solves.items() if solve and solve.status.failed]
        cost = (stats.vjps, stats.jvps) if stats else (0, 0)
        rows.append(Comparison(name, *_distance(gradient, exact), *cost, seconds, memory.peak, "; ".join(failed)))
    return AdjointComparison(tuple(rows))


def tight(solver: FixedPointSolver, dtype: torch.dtype) -> FixedPointSolver:
    """Return ``solver`` with a tolerance at the rounding floor of ``dtype`` and a large budget."""
    return replace(solver, rtol=rounding_floor(dtype), atol=0.0, max_steps=max(STEPS, solver.max_steps))


def _tensors(hyperparameters: Mapping[str, Sequence[Tensor]] | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(hyperparameters, Mapping):
        tensors = [tensor for group in hyperparameters.values() for tensor in group]
    else:
        tensors = list(hyperparameters)
    if not tensors:
        raise ValueError("there are no hyperparameters to differentiate in; give the leaf tensors that the outer loss depends on")
    for i, tensor in enumerate(tensors):
        if not (tensor.is_leaf and tensor.requires_grad):
            raise ValueError(f"hyperparameter {i}, of shape {tuple(tensor.shape)}, is not a leaf that requires grad")
    return tensors


def _gradient(
    objective: Objective,
    tensors: Sequence[Tensor],
    solver: FixedPointSolver,
    adjoint: Adjoint,
) -> tuple[Tensor, Tensor, Solution]:
    """Return the outer loss, its hypergradient as one vector, and the solution."""
    loss, solution = objective(solver, adjoint)
    if loss.numel() != 1:
        raise ValueError(f"the outer loss has shape {tuple(loss.shape)}; it must be a scalar: take its mean or its sum")
    found = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.cat([g.reshape(-1) for g in found]), solution


@torch.no_grad()
def _finite_differences(
    objective: Objective,
    tensors: Sequence[Tensor],
    solver: FixedPointSolver,
    gradient: Tensor,
    directions: int,
    generator: torch.Generator,
) -> Comparison:
    """Compare central differences along random directions of unit length with the directional derivatives.

    The step balances truncation, of order h^2, and rounding, of order eps / h: ``h = eps^(1/3) max(1, |lam|)``.
    """
    eps = torch.finfo(gradient.dtype).eps
    size = math.hypot(1.0, *(float(t.norm()) for t in tensors))
    h = eps ** (1 / 3) * size
    before = [tensor.clone() for tensor in tensors]
    measured, predicted = [], []
    try:
        for _ in range(directions):
            flat = torch.randn(gradient.numel(), generator=generator, dtype=torch.float64).to(gradient)
            flat /= flat.norm()
            parts = flat.split([tensor.numel() for tensor in tensors])
            values = []
            for shift in (h, -h):
                for tensor, middle, part in zip(tensors, before, parts, strict=True):
                    tensor.copy_(middle + shift * part.view_as(middle))
                values.append(float(objective(solver, Implicit())[0]))
            measured.append((values[0] - values[1]) / (2 * h))
            predicted.append(float(flat @ gradient))
    finally:
        for tensor, middle in zip(tensors, before, strict=True):
            tensor.copy_(middle)
    return Comparison("finite differences", *_distance(torch.tensor(predicted).double(), torch.tensor(measured).double()))


def _distance(gradient: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return relative error and cosine, computed in float64; the error is 0 where both are 0."""
    g, r = gradient.double(), reference.double()
    gap, size = float((g - r).norm()), float(r.norm())
    error = 0.0 if gap == 0 else gap / size if size > 0 else math.inf
    both = float(g.norm()) * size
    return error, float(g @ r) / both if both > 0 else math.nan


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
