"""Settings of the simulated quadratic: frozen, validated, free of torch; see ``hyperopt.core.checks``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperopt.core.checks import check_count, check_number, check_optional_count
from hyperopt.tasks.settings import BilevelTaskSettings


@dataclass(frozen=True)
class QuadraticSettings(BilevelTaskSettings):
    """Two finite sums of random quadratics, the simulated problem of benchopt's bilevel suite; see ``hyperopt.tasks.quadratic``.

    Attributes:
        lam: space of the hyperparameters.
        rows: terms of the inner loss.
        val_rows: terms of the outer loss.
        dim: inner variables.
        hyper_dim: hyperparameters.
        least: least eigenvalue of the mean Hessians, and least singular value of the mean cross terms.
        largest: largest eigenvalue of the mean Hessians.
        cross: largest singular value of the mean cross terms.
        batch_size: terms of one inner gradient (None: all).
        val_batch_size: terms of one outer gradient (None: all).
    """

    lam: Any = None
    rows: int = 32768
    val_rows: int = 1024
    dim: int = 100
    hyper_dim: int = 10
    least: float = 0.1
    largest: float = 1.0
    cross: float = 0.1
    batch_size: int | None = 64
    val_batch_size: int | None = 64

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("rows", "val_rows", "dim", "hyper_dim"):
            check_count(self, name)
        for name in ("least", "largest", "cross"):
            check_number(self, name, 0.0, open_low=True)
        for name in ("batch_size", "val_batch_size"):
            check_optional_count(self, name)
        if self.least > self.largest:
            raise ValueError(f"{type(self).__name__}: least={self.least!r} is above largest={self.largest!r}; lower least")
