"""Cells as a config names them: settings that build a cell once the sizes are known."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from hyperopt.nn.contractive import HouseholderContraction, ProjectedMatrix
from hyperopt.nn.equilibrium import Cell, EquilibriumCell
from hyperopt.nn.settings import HouseholderCellSettings, ProjectedCellSettings


class CellFactory(ABC):
    """What ``task.cell._target_`` names; for a cell of your own, derive from it and from a frozen dataclass of settings."""

    @abstractmethod
    def build(self, features: int, state_size: int, generator: torch.Generator | None = None) -> Cell:
        """Return the cell.

        Args:
            features: entries of one input.
            state_size: entries of one state.
            generator: a CPU generator for the initial values (None: torch's global one).
        """


class ProjectedCell(ProjectedCellSettings, CellFactory):
    """``tanh(w A + B x + c)`` with a free A, projected after every outer step."""

    def build(self, features: int, state_size: int, generator: torch.Generator | None = None) -> EquilibriumCell:
        """Build it."""
        matrix = ProjectedMatrix(state_size, self.max_norm, self.init_scale, generator=generator)
        return EquilibriumCell(features, state_size, matrix, self.bias, input_scale=self.input_scale, generator=generator)


class HouseholderCell(HouseholderCellSettings, CellFactory):
    """``tanh(w A + B x + c)`` with ``A = P D P``."""

    def build(self, features: int, state_size: int, generator: torch.Generator | None = None) -> EquilibriumCell:
        """Build it.

        Raises:
            ValueError: more reflections than ``state_size``.
        """
        matrix = HouseholderContraction(state_size, self.reflections, self.margin, generator=generator)
        return EquilibriumCell(features, state_size, matrix, self.bias, input_scale=self.input_scale, generator=generator)
