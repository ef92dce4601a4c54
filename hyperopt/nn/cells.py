"""Cells as a config names them: settings that build a cell once the sizes are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from hyperopt.core.checks import check_count, check_flag, check_number, check_open_unit, check_optional
from hyperopt.nn.contractive import ContractiveMatrix, HouseholderContraction, ProjectedMatrix
from hyperopt.nn.equilibrium import Cell, EquilibriumCell


class CellFactory(ABC):
    """What ``task.cell._target_`` names; for a cell of your own, derive a frozen dataclass from it."""

    @abstractmethod
    def build(self, features: int, state_size: int, generator: torch.Generator | None = None) -> Cell:
        """Return the cell.

        Args:
            features: entries of one input.
            state_size: entries of one state.
            generator: a CPU generator for the initial values (None: torch's global one).
        """


@dataclass(frozen=True)
class TanhAffineCell(CellFactory):
    """A cell ``w -> tanh(w A + B x + c)``; a subclass says what keeps the spectral norm of A below 1.

    Attributes:
        input_scale: standard deviation of the normal initial entries of B (None: ``torch.nn.Linear``'s uniform ones, of
            deviation ``1 / sqrt(3 features)``).
        bias: whether there is a c; it starts at zero.
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
        """Build it; see ``CellFactory.build``."""
        matrix = self.matrix(state_size, generator)
        return EquilibriumCell(features, state_size, matrix, self.bias, input_scale=self.input_scale, generator=generator)


@dataclass(frozen=True)
class ProjectedCell(TanhAffineCell):
    """A free matrix A, projected onto ``||A|| <= max_norm`` after every outer step.

    Attributes:
        input_scale: as above; here large enough to bend the tanh, which raises the accuracy on digits.
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
    """``A = P D P``, P a product of Householder reflections and ``D = diag((1 - margin) sigmoid(d))``: ``||A|| < 1 - margin``.

    Attributes:
        reflections: number of reflections, at least 1 and at most ``task.state_size`` (more reach no other P).
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
            ValueError: more reflections than ``size``.
        """
        return HouseholderContraction(size, self.reflections, self.margin, generator=generator)
