"""Settings of the stochastic methods for trained inner problems: frozen, checked, free of torch; see ``hyperopt.core.checks``."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt.core.checks import check_count, check_number, check_optional


@dataclass(frozen=True)
class StochasticSettings:
    """What every method that trains ``w`` itself has.

    step_size: of the gradient steps in ``w``.
    """

    step_size: float = 0.1

    def __post_init__(self) -> None:
        """Check the range."""
        check_number(self, "step_size", 0.0, open_low=True)


@dataclass(frozen=True)
class SOBASettings(StochasticSettings):
    """``w`` and the adjoint variable ``u`` move by one step each per outer step.

    adjoint_step: of the steps in ``u`` (None: ``step_size``).
    decay: both steps are multiplied by ``(1 + t / horizon)^-decay`` in outer step ``t``; 0 keeps them.
    horizon: see ``decay``, in outer steps.
    """

    adjoint_step: float | None = None
    decay: float = 0.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_optional(self, "adjoint_step", 0.0, open_low=True)
        check_number(self, "decay", 0.0, 1.0)
        check_number(self, "horizon", 0.0, open_low=True)

    def factor(self, t: int) -> float:
        """What the steps are multiplied by in outer step ``t``."""
        return (1 + t / self.horizon) ** -self.decay


@dataclass(frozen=True)
class SABASettings(SOBASettings):
    """SOBA with tables of the last directions of every batch.

    seed: of the order in which batches are visited.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "seed", 0)


@dataclass(frozen=True)
class StocBiOSettings(StochasticSettings):
    """Some steps of training, then a Neumann series with a batch for each of its terms.

    steps: of training per outer step (D).
    terms: products with the Hessian (Q).
    adjoint_step: of the series, ``eta`` (None: ``step_size``).
    """

    steps: int = 10
    terms: int = 10
    adjoint_step: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "steps")
        check_count(self, "terms")
        check_optional(self, "adjoint_step", 0.0, open_low=True)


@dataclass(frozen=True)
class F2SASettings(StochasticSettings):
    """The penalty of the inner problem grows by the same amount in every outer step, without end.

    steps: of both copies of ``w`` per outer step (T).
    multiplier: the first penalty, ``lambda_0``; the bias of the hypergradient is ``O(1 / lambda)``.
    growth: what it grows by, ``delta``.
    """

    steps: int = 10
    multiplier: float = 1.0
    growth: float = 0.01

    def __post_init__(self) -> None:
        """Check the ranges, and that the penalty grows."""
        super().__post_init__()
        check_count(self, "steps")
        check_number(self, "multiplier", 0.0, open_low=True)
        check_number(self, "growth", float("-inf"))
        if not self.growth > 0:
            raise ValueError(
                f"{type(self).__name__}: growth={self.growth!r}: the penalty does not grow, and the bias of the hypergradient, "
                "O(1 / penalty), does not vanish; set growth above 0"
            )

    def penalty(self, t: int) -> float:
        """The penalty in outer step ``t``."""
        return self.multiplier + self.growth * t


@dataclass(frozen=True)
class VPBGDSettings(StochasticSettings):
    """The penalty of the inner problem grows linearly from ``start`` to ``end``, and stays there.

    steps: of the copy of ``w`` that solves the inner problem, per outer step (T). With batches 1 is best: the copies then move on
        the same ones.
    inner_step: of those steps (None: ``step_size``, which is that of the penalised copy).
    start: the first penalty, ``gamma``.
    end: the last; the bias of the hypergradient is ``O(1 / end)``.
    ramp: outer steps from one to the other.
    """

    steps: int = 1
    inner_step: float | None = None
    start: float = 1.0
    end: float = 10.0
    ramp: int = 1000

    def __post_init__(self) -> None:
        """Check the ranges, and that the penalty grows."""
        super().__post_init__()
        check_count(self, "steps")
        check_optional(self, "inner_step", 0.0, open_low=True)
        check_number(self, "start", 0.0)
        check_number(self, "end", 0.0)
        check_count(self, "ramp")
        if not self.end > self.start:
            raise ValueError(
                f"{type(self).__name__}: end={self.end!r}: the penalty does not grow, from start={self.start!r}; set end above "
                "start"
            )

    def penalty(self, t: int) -> float:
        """The penalty in outer step ``t``."""
        return self.start + (self.end - self.start) * min(t / self.ramp, 1.0)
