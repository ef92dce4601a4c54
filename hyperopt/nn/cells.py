"""Settings of cells, as a config names them: each builds its cell once the sizes are known."""

from __future__ import annotations

import contextlib
import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hyperopt.core.checks import check_count, check_flag, check_number, check_open_unit, check_optional
from hyperopt.core.random import drawing
from hyperopt.core.text import called, one_line
from hyperopt.nn.contractive import ContractiveMatrix, HouseholderContraction, ProjectedMatrix
from hyperopt.nn.equilibrium import Cell, EquilibriumCell, ModuleCell
from hyperopt.nn.state import materialise


class CellError(ValueError):
    """A module that cannot be a cell; the message says what it lacks."""


class CellFactory(ABC):
    """The base class of ``task.cell._target_``; for a cell of your own use ``OwnCell``, or derive a frozen dataclass."""

    @abstractmethod
    def build(self, features: int, state_size: int, generator: torch.Generator | None = None) -> Cell:
        """Return the cell.

        Args:
            features: number of entries of one input.
            state_size: number of entries of one state.
            generator: CPU generator of the initial values (None: torch's global one).
        """


@dataclass(frozen=True)
class TanhAffineCell(CellFactory):
    """A cell ``w -> tanh(w A + B x + c)``; a subclass keeps the spectral norm of A below 1.

    Attributes:
        input_scale: standard deviation of the normal initial entries of B (None: uniform as in ``torch.nn.Linear``, with
            deviation ``1 / sqrt(3 features)``).
        bias: whether there is a ``c``, which starts at zero.
    """

    input_scale: float | None = None
    bias: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_optional(self, "input_scale", 0.0)
        check_flag(self, "bias")

    @abstractmethod
    def matrix(self, size: int, generator: torch.Generator | None) -> ContractiveMatrix:
        """Return A, of ``size`` rows and columns."""

    def build(self, features: int, state_size: int, generator: torch.Generator | None = None) -> EquilibriumCell:
        """Build the cell; see ``CellFactory.build``."""
        matrix = self.matrix(state_size, generator)
        return EquilibriumCell(features, state_size, matrix, self.bias, input_scale=self.input_scale, generator=generator)


@dataclass(frozen=True)
class ProjectedCell(TanhAffineCell):
    """A free matrix A that is projected onto ``||A|| <= max_norm`` after every outer step.

    Attributes:
        input_scale: as in ``TanhAffineCell``; the default is large enough to saturate the tanh, which helps on digits.
        max_norm: largest spectral norm, in (0, 1).
        init_scale: standard deviation of the normal initial entries of A.
    """

    input_scale: float | None = 0.3
    max_norm: float = 0.99
    init_scale: float = 0.01

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_open_unit(self, "max_norm")
        check_number(self, "init_scale", 0.0)

    def matrix(self, size: int, generator: torch.Generator | None) -> ProjectedMatrix:
        """Draw A."""
        return ProjectedMatrix(size, self.max_norm, self.init_scale, generator=generator)


@dataclass(frozen=True)
class HouseholderCell(TanhAffineCell):
    """``A = P D P`` with P a product of reflections and ``D = diag((1 - margin) sigmoid(d))``: ``||A|| < 1 - margin``.

    Attributes:
        reflections: number of reflections, at least 1 and at most ``task.state_size`` (more give no further P).
        margin: distance of the spectral norm from 1, in (0, 1).
    """

    reflections: int = 3
    margin: float = 0.8

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "reflections")
        check_open_unit(self, "margin")

    def matrix(self, size: int, generator: torch.Generator | None) -> HouseholderContraction:
        """Draw P and D.

        Raises:
            ValueError: there are more reflections than ``size``.
        """
        return HouseholderContraction(size, self.reflections, self.margin, generator=generator)


@dataclass(frozen=True, eq=False)
class OwnCell(CellFactory):
    """An ordinary module as a cell: its ``forward(z, x)`` is the map, and all of its parameters are hyperparameters.

    The state has as many entries as the module's attribute ``state_size`` says, or else the task. Nothing makes the map a
    contraction; the module's ``forward`` must take care of this.

    Attributes:
        module: the module, which is copied, or a class or function that returns it. If the class or function takes arguments
            ``features`` and ``state_size`` that are not set yet, it gets those of ``CellFactory.build``.

    Raises:
        TypeError: ``module`` is something else, needs other arguments, or has no ``forward(z, x)``.
    """

    module: nn.Module | Callable[..., nn.Module]

    def __post_init__(self) -> None:
        """Check what can be checked before the sizes are known."""
        made = getattr(self.module, "func", self.module)  # the function of a functools.partial
        kind = made if isinstance(made, type) else type(made)
        fault = None
        if issubclass(kind, nn.Module):
            fault = _fault(kind)
        elif isinstance(made, type) or not callable(made):
            fault = "is neither a torch.nn.Module nor a hyperopt.nn.cells.CellFactory"
        if fault is None and not isinstance(self.module, nn.Module):
            try:
                inspect.signature(self.module).bind(**dict.fromkeys(self._sizes()))
            except TypeError as error:
                fault = f"cannot be made with {' and '.join(self._sizes()) or 'no arguments'} alone: {error}"
        if fault is not None:
            raise TypeError(f"{called(self.module)} {fault}")

    def _sizes(self) -> list[str]:
        """Return which of the sizes the class or function takes and does not have yet."""
        takes, has = inspect.signature(self.module).parameters, getattr(self.module, "keywords", {})
        return [name for name in ("features", "state_size") if name in takes and name not in has]

    def build(self, features: int, state_size: int, generator: torch.Generator | None = None) -> Cell:
        """Build the cell; see ``CellFactory.build``.

        Raises:
            CellError: the function returned no module, or ``forward`` does not map states of this size to such states.
        """
        with contextlib.nullcontext() if generator is None else drawing(generator):
            return self._built(features, state_size)

    def _built(self, features: int, state_size: int) -> Cell:
        """Build the cell with the present sources of initial values."""
        name, sizes = called(self.module), {"features": features, "state_size": state_size}
        if isinstance(self.module, nn.Module):
            made: Any = copy.deepcopy(self.module)
        else:
            made = self.module(**{each: sizes[each] for each in self._sizes()})
        if isinstance(made, Cell):
            return made
        fault = _fault(type(made)) if isinstance(made, nn.Module) else "is not a torch.nn.Module"
        if fault is not None:
            raise CellError(f"{name} made {called(made)}, which {fault}")
        size = getattr(made, "state_size", state_size)
        if not isinstance(size, int) or size < 1:
            raise CellError(f"{name} has state_size={size!r}, which must be a whole number >= 1; change its state_size")
        _check_state(made, size, features, name)
        return ModuleCell(made, size)


def _fault(kind: type[nn.Module]) -> str | None:
    """Return what is wrong with the ``forward`` of a module's class, or None."""
    if issubclass(kind, Cell):
        return None
    if kind.forward is nn.Module.forward:
        return "has no method forward(z, x), which takes states and inputs and returns states"
    try:
        inspect.signature(kind.forward).bind(None, None, None)
    except TypeError as error:
        return f"has forward{inspect.signature(kind.forward)}, which cannot be called as forward(z, x): {error}"
    return None


def _check_state(module: nn.Module, size: int, features: int, name: str) -> None:
    """Call a copy of a module on two rows of zeros, and give its lazy modules their sizes; see ``OwnCell.build``."""
    known = (each for each in module.parameters() if not is_lazy(each) and each.is_floating_point())
    dtype = next((each.dtype for each in known), torch.get_default_dtype())
    z, x = torch.zeros(2, size, dtype=dtype), torch.zeros(2, features, dtype=dtype)
    what = f"{name}: forward(z, x) on z of shape {tuple(z.shape)} and x of shape {tuple(x.shape)}"
    change = "change forward, or say by an attribute state_size of the module, or by state_size, how many entries z has"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = copy.deepcopy(module).eval()(z, x)
    except Exception as error:  # whatever the module raises
        raise CellError(f"{what} failed: {one_line(error)}; {change}") from error
    if not isinstance(out, torch.Tensor) or out.shape != z.shape:
        found = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
        raise CellError(f"{what} returned {found}, which cannot be the next z; {change}")
    if any(map(is_lazy, module.parameters())):
        materialise(module, z, x, guessed=False)
