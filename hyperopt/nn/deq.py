"""``DEQ``: a layer whose output is the fixed point ``z = cell(z, x)``.

    net = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), DEQ(ResNetCell(48, 64)), nn.AvgPool2d(8), ...)

The cell is any module ``f(z, x)``, and z is any tree of tensors. Dropout masks and batch statistics are constant during a
solve and in every replay of it (``hyperopt.core.replay``), and are updated once for each forward. Lazy modules in the cell get
their sizes from the first input and initial state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import optree
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.captured import functorch_level
from hyperopt.core.checks import POLICIES, require_choice, require_kind
from hyperopt.core.eager import runs_eagerly
from hyperopt.core.fixed_point import fixed_point
from hyperopt.core.purity import lazy_names
from hyperopt.core.replay import FrozenMap
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.status import Solution
from hyperopt.core.tree import ROWS, layout_of
from hyperopt.nn.state import materialise, refuse_guess, rows_are_coupled, zero_state


class Observer(Protocol):
    """An object that a layer informs of its forward passes."""

    def before(self, layer: DEQ) -> Callable[[Any], None] | None:
        """Run before a solve; a function that it returns is called with every state at which the map is evaluated."""
        ...

    def after(self, phi: FrozenMap, terms: tuple[Any, ...], solution: Solution) -> None:
        """Run after a solve, with the frozen map, its arguments beside the state, and the solution with its graph."""
        ...


class DEQ(nn.Module):
    """The fixed point of a cell, as a layer.

    A cell may have, beside ``forward(z, x)``:
        initial(x): where a solve starts, a tree of tensors.
        terms(x), phi, row_args: as in ``hyperopt.nn.equilibrium.Cell``. The map is then ``phi(z, *terms(x))``, so that what
            does not depend on z is computed once a solve.

    Args:
        cell: the map.
        solver: how the fixed point is found (None: the default of ``hyperopt.fixed_point``).
        adjoint: how it is differentiated (None: the default of ``hyperopt.fixed_point``).
        rows: ``"batch"``, ``"joint"`` or ``"auto"``, see ``hyperopt.fixed_point``. ``"auto"`` also tests at the layer's first
            batch whether the rows depend on each other (the nodes of a graph, BatchNorm in training mode), and is then
            ``"joint"``.
        policy: what to do if a solve fails; see ``hyperopt.fixed_point``.
        fallback: solvers tried in turn under ``policy="fallback"``.
        initial: function of x that returns where a solve starts (None: the cell's own ``initial``, else zeros like x).
        drop_rows: whether converged rows are dropped from the batch; this is not done if rows depend on each other, or with
            dropout in the cell.

    Attributes:
        solution: the latest solve, with a detached value; ``solution.adjoint`` is set by backward. Copies of the layer start
            without it.
        observer: an object that is informed of every forward (None: nothing), see ``hyperopt.nn.stabilise``.

    Raises:
        TypeError, ValueError: an argument is of another kind.

    Reference: Bai, Kolter & Koltun, NeurIPS 2019, arXiv 1909.01377.

    Example:
        >>> import torch, hyperopt
        >>> class Cell(torch.nn.Module):
        ...     def forward(self, z, x):
        ...         return 0.5 * z + x
        >>> layer = hyperopt.nn.DEQ(Cell())
        >>> layer(torch.ones(1, 2)), layer.solution.status.name  # z = 0.5 z + x, so z = 2 x
        (tensor([[2.0000, 2.0000]]), 'converged')
    """

    _coupled: bool | None = None  # whether the cell's rows depend on each other; None: not tested yet

    def __init__(
        self,
        cell: nn.Module,
        solver: FixedPointSolver | None = None,
        adjoint: Adjoint | None = None,
        *,
        rows: str = "auto",
        policy: str = "warn",
        fallback: Sequence[FixedPointSolver] = (),
        initial: Callable[[Any], Any] | None = None,
        drop_rows: bool = True,
    ) -> None:
        """Check the arguments."""
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"DEQ: cell is a {type(cell).__name__}; give a module with forward(z, x)")
        for name, value, kind in (("solver", solver, FixedPointSolver), ("adjoint", adjoint, Adjoint)):
            if value is not None:
                require_kind("DEQ: ", name, value, kind)
        for i, value in enumerate(fallback):
            require_kind("DEQ: ", f"fallback[{i}]", value, FixedPointSolver)
        require_choice("DEQ: ", "rows", rows, ROWS)
        require_choice("DEQ: ", "policy", policy, POLICIES)
        if initial is not None and not callable(initial):
            raise TypeError(f"DEQ: initial={initial!r} must be a function of x that returns the initial state; change initial")
        self.cell = cell
        self.solver, self.adjoint, self.rows, self.policy = solver, adjoint, rows, policy
        self.fallback, self.initial, self.drop_rows = tuple(fallback), initial, drop_rows
        self.solution: Solution | None = None
        self.observer: Observer | None = None

    def forward(self, x: Any, z0: Any = None, v0: Any = None, trace: bool = False) -> Any:
        """Return the fixed point, in the structure of the initial state.

        Args:
            x: the cell's input; a tree is passed on as it is.
            z0: where the solve starts (None: at ``start(x)``), detached here.
            v0: where the adjoint solve starts, up to a factor for each row (None: at the gradient), such as a ``solution.v``.
            trace: whether to keep the residual after every iteration.
        """
        if torch.compiler.is_exporting():
            return self._exported(x, z0)
        return self._solve(x, z0, v0, trace)

    def _exported(self, x: Any, z0: Any) -> Any:
        """Solve with a fixed number of steps, which ``torch.export`` can record."""
        for name, module in self.cell.named_modules():
            if module.training and isinstance(module, _DropoutNd | _BatchNorm):
                raise RuntimeError(f"DEQ: torch.export would record cell.{name} = {module} in training mode; call .eval() first")
        phi, terms, _ = self._map(x)
        z0 = _detached(self.start(x) if z0 is None else z0)
        return fixed_point(phi, z0, args=terms, rows=self._rows(), solver=self.solver, adjoint=self.adjoint).value

    @runs_eagerly("a DEQ solves eagerly; compile its cell (compile_map)")
    def _solve(self, x: Any, z0: Any, v0: Any, trace: bool) -> Any:
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in optree.tree_leaves(x)):
            raise ValueError("DEQ: x is on the meta device, which has no numbers to solve for; move it to another device")
        guessed = z0 is None and self._initial is None
        z0 = _detached(self.start(x) if z0 is None else z0)
        if lazy_names(self.cell):
            z0 = materialise(self.cell, z0, x, guessed=guessed)
        phi, terms, row_args = self._map(x)
        try:
            return self._solved(phi, terms, row_args, z0, v0, trace)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if guessed and not functorch_level():
                refuse_guess(error, self.cell, phi, z0, terms)
            raise

    def _solved(
        self, phi: Callable[..., Any], terms: tuple[Any, ...], row_args: Sequence[int], z0: Any, v0: Any, trace: bool
    ) -> Any:
        """Return the fixed point from a given start."""
        layout = layout_of(z0, self._rows())
        frozen = FrozenMap(phi, [self.cell], optree.tree_leaves(z0)[0].device)
        if not layout.joint and phi is self.cell and layout.rows > 1:
            if self._coupled is None and not (functorch_level() or torch.is_inference_mode_enabled()):
                self._coupled = rows_are_coupled(frozen, z0, terms)
        if not layout.joint and self._coupled:
            if self.rows == "batch":
                raise ValueError(
                    "DEQ: rows='batch', but rows of the cell's output depend on other rows of the state; set rows='joint'"
                )
            layout = layout_of(z0, "joint")
        observer = self.observer
        frozen.watch = None if observer is None else observer.before(self)
        whole = layout.joint or frozen.watch is not None or not self._may_drop()
        solution = fixed_point(
            frozen,
            z0,
            args=terms,
            rows="joint" if layout.joint else "batch",
            row_args=() if whole else tuple(i for i in row_args if _has_rows(terms[i], layout.rows)),
            solver=self.solver,
            adjoint=self.adjoint,
            policy=self.policy,
            fallback=self.fallback,
            v0=v0,
            trace=trace,
        )
        frozen.commit()
        if observer is not None:
            observer.after(frozen, terms, solution)
        # A copy, since a following nn.ReLU(inplace=True) changes what is returned.
        self.solution = dataclasses.replace(solution, value=optree.tree_map(lambda x: x.detach().clone(), solution.value))
        return solution.value

    def start(self, x: Any) -> Any:
        """Return the initial state for ``x``, by ``initial`` or the cell, or zeros like x.

        Raises:
            TypeError: there is no ``initial``, and x is not a tensor.
        """
        if self._initial is not None:
            return self._initial(x)
        if not isinstance(x, Tensor):
            raise TypeError(f"DEQ: x is a {type(x).__name__}, which does not tell the shape of a state; set initial")
        return zero_state(x)

    @property
    def _initial(self) -> Callable[[Any], Any] | None:
        """The given ``initial``, or the cell's."""
        return self.initial or getattr(self.cell, "initial", None)

    def compile_map(self) -> None:
        """Compile the cell's map with ``torch.compile``, in place."""
        (getattr(self.cell, "compile_map", None) or self.cell.compile)()

    def _map(self, x: Any) -> tuple[Callable[..., Any], tuple[Any, ...], Sequence[int]]:
        """Return the map, its arguments beside the state, and which of these have one row for each example."""
        terms = getattr(self.cell, "terms", None)
        if terms is None:
            return self.cell, (x,), (0,)
        return self.cell.phi, terms(x), self.cell.row_args  # pyright: ignore[reportReturnType]

    def _rows(self) -> str:
        """Return how rows are treated, given the modes of the cell's modules."""
        for name, module in self.cell.named_modules():
            if isinstance(module, nn.SyncBatchNorm) and module.training:
                raise ValueError(
                    f"DEQ: cell.{name} = {module} waits for all processes at every evaluation, whose solves may take different "
                    f"numbers of them; call .eval() on it, or use BatchNorm, GroupNorm or LayerNorm"
                )
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                if self.rows == "batch":
                    raise ValueError(
                        f"DEQ: rows='batch', but cell.{name} = {module} takes the statistics of the whole batch, so that its "
                        f"rows depend on each other; set rows='joint', call .eval() on it, or use GroupNorm or LayerNorm"
                    )
                return "joint"
        return self.rows

    def _may_drop(self) -> bool:
        """Whether the map stays the same for some of the rows: dropout masks are drawn for all of them."""
        return self.drop_rows and not any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in self.cell.modules())

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles are made from: everything but the latest solve."""
        return {**self.__dict__, "solution": None, "observer": None}

    def extra_repr(self) -> str:
        """Return the methods."""
        return f"solver={self.solver}, adjoint={self.adjoint}, rows={self.rows!r}, policy={self.policy!r}"


def _detached(tree: Any) -> Any:
    """Return the tree without graphs."""
    return optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _has_rows(x: Any, rows: int) -> bool:
    """Whether x is a tensor with this number of leading rows."""
    return isinstance(x, Tensor) and x.shape[:1] == (rows,)
