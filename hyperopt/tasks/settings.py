"""Settings of the tasks and of the cells that they train: frozen, validated, and free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hyperopt.settings import check_choice, check_count, check_number

SPLITS = ("train", "val")


def _check_flag(owner: Any, name: str) -> None:
    """Refuse a field that is not true or false."""
    if not isinstance(getattr(owner, name), bool):
        raise ValueError(f"{type(owner).__name__}: {name}={getattr(owner, name)!r} must be true or false; change {name}")


@dataclass(frozen=True)
class CellSettings:
    """What every tanh-affine cell ``w -> tanh(w A + B x + c)`` has.

    Attributes:
        input_scale: standard deviation of the normal initial entries of B (None: ``torch.nn.Linear``'s uniform ones, of
            deviation ``1 / sqrt(3 features)``).
        bias: whether there is a c; it starts at zero.
    """

    input_scale: float | None = None
    bias: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.input_scale is not None:
            check_number(self, "input_scale", 0.0)
        _check_flag(self, "bias")


@dataclass(frozen=True)
class ProjectedCellSettings(CellSettings):
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


@dataclass(frozen=True)
class HouseholderCellSettings(CellSettings):
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


@dataclass(frozen=True)
class EquilibriumSettings:
    """The equilibrium model ``w_i = tanh(w_i A + B x_i + c)`` with a linear classifier on ``w_i``, fitted by hypergradients.

    Attributes:
        state_size: entries of one state ``w_i``.
        cell: the inner map with its own settings (None: a free, projected A); see ``hyperopt.nn.cells.CellFactory``.
        classifier_scale: standard deviation of the normal initial weights of the classifier, whose bias starts at zero (None:
            ``torch.nn.Linear``'s own initial values for both).
        fitted: the split of the dataset behind ``outer/*``: ``train`` or ``val``; the other one is behind ``val/*``.
        warm_start: start each inner solve on the fitted rows, and its adjoint solve, from the solutions before the last update.
        certificate_every: outer steps from one certificate (``hypergrad/error_estimate``) to the next.
        l2: ``{group: strength}``; ``strength / 2 * |group|^2`` is added to the outer loss of a step, not to ``outer/loss``.
        solver: how the states are found (None: Picard).
        adjoint: how the hypergradient is found (None: implicit, by the Neumann series).
        dataset: the rows (None: digits).
    """

    state_size: int = 100
    cell: Any = None
    classifier_scale: float | None = None
    fitted: str = "train"
    warm_start: bool = False
    certificate_every: int = 10
    l2: dict[str, float] = field(default_factory=dict)
    solver: Any = None
    adjoint: Any = None
    dataset: Any = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_count(self, "state_size")
        if self.classifier_scale is not None:
            check_number(self, "classifier_scale", 0.0)
        check_choice(self, "fitted", SPLITS)
        _check_flag(self, "warm_start")
        check_count(self, "certificate_every")
        if not isinstance(self.l2, Mapping):
            raise ValueError(f"EquilibriumSettings: l2={self.l2!r} must map groups to strengths, as {{B: 1e-4}}; change l2")
        for group, strength in self.l2.items():
            if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < float("inf"):
                raise ValueError(f"EquilibriumSettings: l2.{group}={strength!r} is not in [0, inf); change l2")


def check_open_unit(owner: Any, name: str) -> None:
    """Refuse a field of ``owner`` that is not in (0, 1)."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{type(owner).__name__}: {name}={value!r} is not in (0, 1); change {name}")
