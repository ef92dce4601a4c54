"""Settings of the tasks: frozen, validated, and free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hyperopt.settings import POLICIES, check_choice, check_count, check_flag, check_number

SPLITS = ("train", "val")


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
        policy: what to do when the solver fails: ``raise``, ``warn`` (once a run and kind), ``fallback`` or ``ignore``.
        fallback: solvers tried in turn under ``policy=fallback`` (none: Anderson, Broyden, Newton-Krylov).
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
    policy: str = "warn"
    fallback: Any = field(default_factory=tuple)
    dataset: Any = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_count(self, "state_size")
        if self.classifier_scale is not None:
            check_number(self, "classifier_scale", 0.0)
        check_choice(self, "fitted", SPLITS)
        check_flag(self, "warm_start")
        check_count(self, "certificate_every")
        check_choice(self, "policy", POLICIES)
        if not isinstance(self.l2, Mapping):
            raise ValueError(f"EquilibriumSettings: l2={self.l2!r} must map groups to strengths, as {{B: 1e-4}}; change l2")
        for group, strength in self.l2.items():
            if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < float("inf"):
                raise ValueError(f"EquilibriumSettings: l2.{group}={strength!r} is not in [0, inf); change l2")
