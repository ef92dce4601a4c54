"""``fixed_point``: the one primitive. How you solve and how you differentiate are separate arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.core.adjoints.base import Adjoint, Problem
from hyperopt.core.adjoints.compiled import exported, fixed_trips, outside, traceable
from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.captured import functorch_level
from hyperopt.core.checks import POLICIES, require_choice, require_kind
from hyperopt.core.loop import rounding_floor
from hyperopt.core.policy import report_floor
from hyperopt.core.purity import refuse_changing, refuse_changing_modules
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.picard import Picard
from hyperopt.core.status import Solution
from hyperopt.core.tree import layout_of

SOLVER, ADJOINT = Picard(), Implicit()  # the defaults, made once: torch.compile cannot build them inside a graph


def fixed_point(
    phi: Callable[..., Any],
    w0: Any,
    args: tuple[Any, ...] = (),
    *,
    rows: str = "auto",
    row_args: Sequence[int] = (),
    solver: FixedPointSolver | None = None,
    adjoint: Adjoint | None = None,
    policy: str = "warn",
    fallback: Sequence[FixedPointSolver] = (),
    scales: Any = None,
    v0: Any = None,
    trace: bool = False,
    has_aux: bool = False,
) -> Solution:
    r"""Solve ``w = phi(w, *args)``, differentiably.

    The value is differentiable in the tensors of ``args`` and in all that ``phi`` captures. With the implicit adjoint,

    $$dE/d\lambda = (d_\lambda \phi)^T v, \qquad (I - d_w \phi)^T v = d_w E.$$

    Args:
        phi: the map. It takes the state in the structure of ``w0`` and returns the same structure, shapes and dtypes. It must
            be deterministic and must not change the state in place.
        w0: where the solve starts: a tensor, or a (nested) tuple, list or dict of floating-point or complex tensors. They must
            not require grad, except with ``Unrolled`` without ``last`` or ``Checkpointed``, which differentiate in ``w0`` too.
        args: further arguments of ``phi``. Tensors that ``phi`` captures are differentiated too; pass them here under
            ``torch.compile``, and if they change between the forward pass and a second derivative.
        rows: ``"batch"``: the leaves share a leading dimension of independent rows, each solved on its own; ``"joint"``:
            everything is one row; ``"auto"``: batch if all leaves have at least two dimensions and share the first.
        row_args: positions in ``args`` of tensors with one leading entry for each row. If ``phi`` gets everything that belongs
            to a row this way, converged rows are dropped from the batch, forward and backward. Backward, ``phi`` is then
            called again for the remaining rows; ``solution.adjoint.evaluations`` counts these calls.
        solver: how to solve (default ``Picard()``).
        adjoint: how to differentiate (default ``Implicit()``: Neumann to a tolerance).
        policy: what to do if the solve fails: ``"warn"`` (the 1st, 10th, ... time), ``"raise"``, ``"fallback"``, ``"ignore"``.
        fallback: solvers tried in turn under ``policy="fallback"`` (default Anderson, Broyden, Newton-Krylov).
        scales: the typical size of each variable, positive numbers in the structure of ``w0`` (default: 1 for all). Norms,
            tolerances and the weights of accelerated methods then refer to ``w / scales``, forward and backward, so that small
            variables are solved to the same relative accuracy as large ones.
        v0: where an implicit adjoint's linear solver starts, in the structure of ``w0``, such as ``solution.v`` of a nearby
            problem (default: at the gradient ``g``). Neumann and Anderson first fit a factor to each row, by one more vjp,
            since a gradient may change its size by orders of magnitude and hardly its direction.
        trace: whether to measure the residual at every iteration, forward and backward.
        has_aux: whether ``phi`` returns ``(state, aux)``. ``solution.aux`` is then the detached ``aux`` of its last
            evaluation, whose state is within the tolerance of the solution, and no rows are dropped. For a differentiable
            ``aux`` call ``phi`` once more at ``solution.value``.

    Returns:
        ``Solution``: ``value``; ``forward`` and, after a backward, ``adjoint`` with status, iterations, residuals and costs.

    Raises:
        TypeError, ValueError: ``w0``, ``rows``, ``policy`` or another argument is wrong, or the map changes its input, or the
            structure, shape or dtype of the state.
        SolveError: a solve failed under ``policy="raise"``.
        ClosureError: the map uses a tensor in a way that would lose its derivative.
        ImpureMapError: the map is random or updates running statistics.

    Reference: Grazzi et al., ICML 2020, arXiv 2006.16218; Bai et al., NeurIPS 2019, arXiv 1909.01377.

    Example:
        >>> import torch, hyperopt
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> solution = hyperopt.fixed_point(lambda w: a * w + 1, torch.zeros(1, 1))
        >>> solution.value.sum().backward()  # w = 1 / (1 - a), whose derivative is 1 / (1 - a)^2
        >>> round(solution.value.item(), 2), round(a.grad.item(), 2)
        (2.0, 4.0)
    """
    require_choice("fixed_point: ", "policy", policy, POLICIES)
    if not isinstance(args, tuple):
        raise TypeError(f"fixed_point: args is a {type(args).__name__}; give a tuple, args=(x,) for one argument")
    solver = SOLVER if solver is None else solver
    adjoint = ADJOINT if adjoint is None else adjoint
    require_kind("fixed_point: ", "solver", solver, FixedPointSolver, "give Picard(...), Anderson(...), ...")
    require_kind("fixed_point: ", "adjoint", adjoint, Adjoint, "give Implicit(...), Unrolled(...), ...")
    if (why := adjoint.unfit(solver)) is not None:
        raise ValueError(f"fixed_point: adjoint={type(adjoint).__name__}() {why}")
    for i, each in enumerate(fallback):
        require_kind("fixed_point: ", f"fallback[{i}]", each, FixedPointSolver, "give Picard(...), Anderson(...), ...")
    if fallback and policy != "fallback":
        raise ValueError(f"fixed_point: fallback is only used under policy='fallback', but policy={policy!r}; change one of them")
    refuse_untraceable()
    layout = layout_of(w0, rows, scales)
    if layout.device.type == "meta":
        raise ValueError(
            "fixed_point: w0 is on the meta device, where there are no numbers to solve for; move it to the CPU or a GPU"
        )
    if any(leaf.requires_grad for leaf in optree.tree_leaves(w0)) and not adjoint.reaches_start(solver):
        raise ValueError(
            "fixed_point: w0 requires grad, but a solution does not depend on where a solve starts: use w0.detach(). The iterate "
            "after a number of steps does: Unrolled() without last, and Checkpointed(), differentiate it in w0 too"
        )
    for i in row_args:
        if not 0 <= i < len(args) or not isinstance(args[i], Tensor) or args[i].shape[:1] != (layout.rows,):
            raise ValueError(f"fixed_point: row_args names argument {i}, which is not a tensor with {layout.rows} leading rows")
    start = layout.matrix(w0 if adjoint.reaches_start(solver) else optree.tree_map(lambda x: x.detach(), w0))
    adjoint_start = None if v0 is None else layout.matrix(optree.tree_map(lambda x: x.detach(), v0), dual=True)
    problem = Problem(phi, args, row_args, layout, start, solver, policy, tuple(fallback), adjoint_start, trace, has_aux=has_aux)
    if torch.compiler.is_exporting():
        return exported(problem)
    if torch.compiler.is_compiling():  # the checks below cannot be traced
        if traceable(adjoint, problem):
            return fixed_trips(adjoint, problem)
        methods = {"solver": solver, "adjoint": adjoint, "policy": policy, "fallback": fallback, "scales": scales}
        return outside(fixed_point, phi, w0, args, rows=rows, row_args=row_args, **methods, v0=v0, trace=trace, has_aux=has_aux)
    # Under autocast the lower precision is found when the map is evaluated, so no device is given here.
    device = None if torch.is_autocast_enabled(start.device.type) else start.device
    floor = rounding_floor(start.dtype, device, layout.rounding)
    report_floor(solver, floor, start.dtype, policy, "inner")
    refuse_changing_modules(phi, args)
    solution = adjoint.run(problem)
    solution.value = optree.tree_map(writable, solution.value)
    if has_aux:
        solution.aux = problem.aux[0]
    if problem.watched and problem.watched[0].written and not functorch_level():
        refuse_changing(phi, solution.value, args, problem.watched[0].written)
    return solution


def writable(leaf: Tensor) -> Tensor:
    """Return the tensor in memory of its own if it has a graph: PyTorch forbids to change a view that a Function has returned."""
    return leaf.clone() if leaf.requires_grad and leaf._is_view() else leaf


def refuse_untraceable() -> None:
    """Refuse tracers that would record the steps of this one solve instead of the solve itself.

    Raises:
        RuntimeError: such a tracer is running; the message names it.
    """
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise RuntimeError(
            "fixed_point: torch.jit.trace would record the number of steps of this one solve; use torch.export with fixed trips "
            "(rtol=0, atol=0), or trace without the solve"
        )
    known = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    if not known and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise RuntimeError(
            "fixed_point: torch.func.linearize and make_fx would record the number of steps of this one solve; use "
            "torch.func.jvp, vjp or jacfwd"
        )
