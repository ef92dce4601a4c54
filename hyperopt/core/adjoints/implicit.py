"""Implicit differentiation: solve ``(I - J^T) v = g`` at the solution, then take one vjp with the inputs.

    w* = phi(w*, lam)      dE/dlam = d_lam E + (d_lam phi)^T v,      v = J^T v + d_w E

The last evaluation of the forward solve builds the graph of ``phi`` at the solution. A first-order backward is K vjps on this
graph. It calls ``phi`` again only to drop rows that are solved (``hyperopt.core.adjoints.base.graph_part``). Memory does not
grow with the number of iterations, forward or backward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hyperopt.core.adjoints.base import Adjoint, Problem, graph_part
from hyperopt.core.captured import ClosureError, Swap, foreign_leaves, leaf_of, transformed
from hyperopt.core.checks import POLICIES, check_choice, check_flag, check_kind, check_kinds
from hyperopt.core.differentiate import System, attach
from hyperopt.core.forward import solve_forward
from hyperopt.core.graph_modes import twice_differentiable
from hyperopt.core.jacobian import Jacobian
from hyperopt.core.linear.base import LinearSolver
from hyperopt.core.linear.fallback import solve_chain
from hyperopt.core.linear.gmres import GMRES
from hyperopt.core.linear.neumann import Neumann
from hyperopt.core.linear.normal_cg import NormalCG
from hyperopt.core.loop import rounding_floor
from hyperopt.core.operator import Linearization, LinearOperator
from hyperopt.core.policy import report, report_floor
from hyperopt.core.solvers.iterate import Iterate
from hyperopt.core.solvers.point import ClosedMap
from hyperopt.core.status import AdjointBox, Solution, SolveStats


@dataclass(frozen=True)
class LinearSystem:
    """A system ``(I - M) v = b`` that an adjoint is asked to solve.

    Attributes:
        operator: M, which is ``J^T`` (``what="adjoint"``) or ``J`` (``"tangent"``).
        b: right-hand side, shape (rows, dim).
        start: where to start; None: the method's own start.
        what: ``"adjoint"`` or ``"tangent"``.
        box: holder for the solution and its statistics.
        forward: the forward solve, if there was one at this point.
        trace: whether to measure the residual at every iteration.
    """

    operator: LinearOperator
    b: Tensor
    start: Tensor | None
    what: str
    box: AdjointBox
    forward: Iterate | None = None
    trace: bool = False

    def keep(self, v: Tensor, stats: SolveStats) -> None:
        """Store a solution and its statistics for the user."""
        self.box.stats, self.box.v = stats, v.detach()


class ImplicitAdjoint(Adjoint):
    """An adjoint by the implicit function theorem; a subclass says how ``v`` is found.

    Attributes:
        exact: whether it may be differentiated again.
        remedy: what to change if it may not, for messages.
        iterates: whether its value, or its convergence, depends on the scaling of the map; see ``LinearSolver.iterates``.
        policy: what to do if its solve fails; ``ignore`` if there is none.
    """

    exact: bool
    iterates = True
    policy: str = "ignore"
    remedy = "give its linear solver rtol > 0, or set allow_inexact=True"

    def run(self, problem: Problem) -> Solution:
        """Solve, keeping the graph of the last evaluation."""
        box = AdjointBox()
        system = FixedPoint(self, problem, box)
        if transformed():
            system.discover()
            matrix = attach(system, problem.start, *system.inputs)
        else:
            matrix = system.prepare()
            if system.inputs:
                matrix = attach(system, problem.start, *system.inputs)
        assert box.forward is not None
        return Solution(problem.layout.tree(matrix), box.forward, problem.layout, box)

    @abstractmethod
    def solve(self, system: LinearSystem) -> Tensor:
        """Solve the system, and ``keep`` the solution with its statistics."""

    def warm(self, operator: LinearOperator, b: Tensor, near: Tensor) -> Tensor:
        """Return a start, given the solution ``near`` of a similar system."""
        return near

    def ignoring(self) -> ImplicitAdjoint:
        """Return the same adjoint with ``policy="ignore"``; one with another policy is a dataclass that has this field."""
        return self if self.policy == "ignore" else replace(self, policy="ignore")  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Implicit(ImplicitAdjoint):
    """The implicit adjoint with any linear solver.

    Args:
        linear_solver: solves the adjoint system.
        policy: what to do if that fails: ``raise``, ``warn`` (the 1st, 10th, ... time), ``fallback`` or ``ignore``.
        fallback: linear solvers tried in turn under ``policy="fallback"``, each on the rows still unsolved (default: GMRES,
            then NormalCG).
        allow_inexact: whether an adjoint with a fixed number of steps may be differentiated again, although its second
            derivative is not exact.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Bai et al., NeurIPS 2019, arXiv 1909.01377, theorem 1; Grazzi et al., ICML 2020, arXiv 2006.16218.

    Example:
        >>> import torch, hyperopt
        >>> a, adjoint = torch.tensor(0.5, requires_grad=True), hyperopt.Implicit(hyperopt.GMRES(rtol=1e-6))
        >>> solution = hyperopt.fixed_point(lambda w: a * w + 1, torch.zeros(1, 1), adjoint=adjoint)
        >>> solution.value.sum().backward()  # the exact derivative of w = 1 / (1 - a) is 1 / (1 - a)^2 = 4
        >>> round(float(a.grad), 3)
        4.0
    """

    linear_solver: LinearSolver = field(default_factory=Neumann)
    policy: str = "warn"
    fallback: Sequence[LinearSolver] = field(default_factory=tuple)
    allow_inexact: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "policy", POLICIES)
        check_flag(self, "allow_inexact")
        check_kind(self, "linear_solver", LinearSolver)
        check_kinds(self, "fallback", LinearSolver)
        if self.fallback and self.policy != "fallback":
            raise ValueError(
                f"Implicit: fallback is only used under policy='fallback', but policy={self.policy!r}; change one of them"
            )

    @property
    def exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every linear solver works to a tolerance, or ``allow_inexact`` was given."""
        return self.allow_inexact or not any(solver.fixed for solver in self.chain)

    @property
    def iterates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any of the linear solvers iterates ``v <- M v + b``."""
        return any(solver.iterates for solver in self.chain)

    @property
    def chain(self) -> tuple[LinearSolver, ...]:
        """The linear solvers in the order in which they are tried."""
        if self.policy != "fallback":
            return (self.linear_solver,)
        return (self.linear_solver, *(self.fallback or self._default_fallback()))

    def _default_fallback(self) -> tuple[LinearSolver, ...]:
        """Return GMRES and normal CG, with the tolerance and at least the steps of the first solver."""
        first = self.linear_solver
        limits: dict[str, Any] = {"max_steps": max(200, first.max_steps)}
        if not first.fixed:
            limits |= {"rtol": first.rtol, "atol": first.atol, "relative_to": first.relative_to}
        return GMRES(**limits, window=40), NormalCG(**limits)

    def warm(self, operator: LinearOperator, b: Tensor, near: Tensor) -> Tensor:
        """Ask the linear solver for a start."""
        with torch.no_grad():
            return self.linear_solver.warm(operator, b, near)

    def solve(self, system: LinearSystem) -> Tensor:
        """Solve with the linear solver and its fallbacks, under the policy."""
        dtype = system.b.dtype
        report_floor(
            self.linear_solver, rounding_floor(dtype, system.b.device, system.operator.rounding), dtype, self.policy, system.what
        )
        with torch.no_grad():
            found = solve_chain(self.chain, system.operator, system.b, system.start, system.what, trace=system.trace)
        system.keep(found.value, found.stats)
        report(found.stats, self.policy, system.what)
        return found.value


class FixedPoint(System):
    """The user's fixed point as a system: all tensors that the map depends on, in ``args`` or captured, become inputs."""

    derived = False

    def __init__(self, adjoint: ImplicitAdjoint, problem: Problem, box: AdjointBox) -> None:
        self.adjoint, self.problem, self.box = adjoint, problem, box
        self.exact, self.remedy = adjoint.exact, adjoint.remedy
        self.run: Iterate | None = None  # the forward solve
        self.inputs: list[Tensor] = []
        self.value: Tensor | None = None
        self.at: Linearization | None = None
        self.places: list[int] | None = None  # with a closed form: positions of the inputs in ``args``
        self.out: Tensor | None = None  # phi at the point of linearization, to check that a replay gives the same
        self.point: Tensor | None = None
        self.fixed_leaves: set[int] = set()  # parameters that the map uses in a custom Function

    def linear(self, lin: LinearOperator, b: Tensor, start: Tensor | None, what: str) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Solve with the adjoint's linear solver; its statistics count all products, including the one with the inputs."""
        before = lin.rmatvecs, lin.matvecs, lin.evaluations
        operator = lin.T if what == "adjoint" else lin
        near = self.problem.adjoint_start
        if start is None and near is not None and near.shape == b.shape:  # under vmap there are more rows
            start = self.adjoint.warm(operator, b, near)
        value = self.adjoint.solve(LinearSystem(operator, b, start, what, self.box, self.run, self.problem.trace))
        stats = self.box.stats
        if stats is not None:
            after = lin.rmatvecs + (what == "adjoint"), lin.matvecs, lin.evaluations
            stats.vjps, stats.jvps, stats.evaluations = (now - then for now, then in zip(after, before, strict=True))
        return value

    def close(self, lin: Linearization, v: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        """Return ``(d_x phi)^T v`` for each input; a closed form has it for all arguments."""
        if self.places is None:
            return lin.arguments(v, needs)
        wanted = dict(zip(self.places, needs, strict=True))
        found = lin.arguments(v, tuple(wanted.get(i, False) for i in range(len(self.problem.args))))
        return [found[i] for i in self.places]

    # ---- eager: solve first, then attach

    def prepare(self) -> Tensor:
        """Solve, with a graph only for the last evaluation, which finds the inputs; returns the value."""
        problem = self.problem
        wanted = torch.is_grad_enabled()
        closed = problem.pullback is not None
        phi = problem.bind(tuple(a.detach() if closed and isinstance(a, Tensor) else a for a in problem.args))

        def last(w: Tensor) -> Tensor:
            if not wanted:
                return phi(w)
            return self._last_closed_form(w, phi) if isinstance(phi, ClosedMap) else self._last_graph(w)

        with torch.no_grad():
            run = solve_forward(problem, phi, last)
        self.value = self._solved(run)
        return self.value

    def _solved(self, run: Iterate) -> Tensor:
        """Keep a forward solve, report a failure, and return its value."""
        self.run, self.box.forward = run, run.stats
        report(run.stats, self.problem.policy, "inner")
        return run.value

    def _last_closed_form(self, w: Tensor, phi: ClosedMap) -> Tensor:
        problem, fw = self.problem, phi(w)
        self.places = [i for i, a in enumerate(problem.args) if isinstance(a, Tensor) and a.requires_grad]
        self.inputs = [problem.args[i] for i in self.places]
        if self.places:
            self.at = phi.closed_form(w, fw)
            if problem.droppable:

                def part(index: Tensor) -> LinearOperator:
                    some = problem.part(index)
                    assert isinstance(some, ClosedMap)
                    return some.closed_form(w[index], fw[index])

                self.at.part = part
        self.point, self.out = w, fw
        return fw

    def _last_graph(self, w: Tensor) -> Tensor:
        with torch.enable_grad():
            swap = Swap(discover=True)
            leaf = leaf_of(w)
            with twice_differentiable():
                out = self.problem.call(leaf, self.problem.args, swap)
            outside = swap.outside
            leaves = [swap.inside(x) for x in outside]
            self.fixed_leaves = set()
            if out.requires_grad:
                foreign = foreign_leaves(out, [leaf, *leaves], swap.start)
                outside, leaves = [*outside, *foreign], [*leaves, *foreign]
                self.fixed_leaves = {id(x) for x in foreign}
        self.inputs = outside
        self.at = Jacobian(out, leaf, leaves)
        self.point, self.out = w, out.detach()
        if self.problem.droppable:
            self.at.part = graph_part(self.problem, w, self.out)
        return self.out

    # ---- under torch.func and with dual numbers: find the inputs first, solve inside the Function

    def discover(self) -> None:
        """Call the map once, under the running transform, to find what it depends on."""
        swap = Swap(discover=True)
        with twice_differentiable():
            self.problem.call(self.problem.start, self.problem.args, swap)
        self.inputs = swap.outside

    # ---- System

    def map(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """Call the map at other values of its inputs; refuse if it is no longer the map that was solved."""
        if self.fixed_leaves:
            raise ClosureError(
                "a higher derivative was asked for, but the map uses a parameter through a custom autograd.Function, or a "
                "transform of torch.func, where it cannot be replaced: pass it through args="
            )
        known = list(zip(self.inputs, inputs, strict=True))
        swap = Swap(known, discover=False)
        with twice_differentiable():
            out = self.problem.call(z, self.problem.args, swap)
        if len(swap.used) < len(known):
            raise ClosureError(
                "the map no longer uses a tensor that it used when it was solved (a loop variable in a lambda, or parameters "
                "swapped by functional_call): pass such tensors through args="
            )
        self._check_same(z, out)
        return out

    def _check_same(self, z: Tensor, out: Tensor) -> None:
        """Refuse a map that gives another result at the solution than it gave in the solve."""
        if self.out is None or transformed() or self.value is None or z.shape != self.value.shape:
            return
        if not torch.equal(z.detach(), self.value):
            return
        with torch.no_grad():
            size = torch.linalg.vector_norm(self.out)
            moved = torch.linalg.vector_norm(self.value - self.point) if self.point is not None else 0.0
            change = torch.linalg.vector_norm(out.detach() - self.out)
            if bool(change > 100 * moved + 1e-3 * size):
                raise ClosureError(
                    f"the map gives another result now than when it was solved (relative change {float(change / size):.1e}): it "
                    "depends on something that changed since, or is random; pass it through args="
                )

    def solve(self, start: Tensor, *inputs: Tensor) -> Tensor:
        """Return the prepared value, or solve at ``inputs``."""
        if self.value is not None:
            return self.value
        given = [x.detach() for x in inputs]

        def phi(w: Tensor) -> Tensor:
            return self.map(w.view_as(start), *given).reshape(-1, start.shape[-1])

        return self._solved(solve_forward(self.problem, phi, phi, start.reshape(-1, start.shape[-1]))).view_as(start)

    def linearize(self, z: Tensor, inputs: Sequence[Tensor]) -> Linearization:
        """Return the graph of the last evaluation, if there is one."""
        return self.at if self.at is not None else super().linearize(z, inputs)

    def vmapped(self, dims: tuple[int | None, ...], randomness: str) -> System:
        """Return a batch of these fixed points."""
        return VmappedFixedPoint(self, dims, randomness)


class VmappedFixedPoint(FixedPoint):
    """A batch of fixed points, solved as one with more rows; the map runs under ``vmap``."""

    def __init__(self, parent: FixedPoint, dims: tuple[int | None, ...], randomness: str) -> None:
        """Batch the inputs whose entry in ``dims`` is 0."""
        super().__init__(parent.adjoint, parent.problem, parent.box)
        self.one, self.dims, self.randomness = parent.map, dims, randomness

    def map(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """Call the parent's map under ``vmap``."""
        return torch.vmap(self.one, in_dims=(0, *self.dims), randomness=self.randomness)(z, *inputs)
