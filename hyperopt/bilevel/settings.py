"""Settings of trained inner problems: frozen, validated, and free of torch; see ``hyperopt.core.checks``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hyperopt.core.checks import (
    IterativeSettings,
    check_betas,
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_optional,
    check_optional_count,
)

CURVATURES = ("hessian", "gauss_newton", "finite_differences")


def check_rate(owner: object, name: str, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Like ``check_number``, for a field that may be the name of a hyperparameter instead."""
    value = getattr(owner, name)
    if isinstance(value, str) and value and "${" not in value:
        return
    check_number(owner, name, low, high, open_low=open_low)


@dataclass(frozen=True)
class InnerSettings(IterativeSettings):
    """What every inner solver has.

    rtol: the solve stops at ``|grad L| <= atol + rtol scale``, where the scale is the larger of ``|grad L(w_0)|`` and
        ``|H(w_0) w_0|`` at the very first start ``w_0`` of the run, with the Hessian H; 0 with ``atol=0`` means exactly
        ``max_steps``. It is raised to the rounding floor of the dtype.
    max_steps: most steps, of one inner gradient each unless a method says otherwise.
    """

    rtol: float = 0.0
    max_steps: int = 100


@dataclass(frozen=True)
class GradientDescentSettings(InnerSettings):
    """``w <- w - step_size grad L(w)``.

    step_size: a number, or the name of the hyperparameter that holds it (an entry of a mapping ``lam``): one number, or a tree
        like ``w`` of numbers or of tensors that broadcast to the weights, a rate for each.
    """

    step_size: Any = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_rate(self, "step_size", 0.0, open_low=True)


@dataclass(frozen=True)
class HeavyBallSettings(GradientDescentSettings):
    """``m <- momentum m + grad L(w)``, ``w <- w - step_size m``, from ``m = 0``.

    momentum: a number in [0, 1), or the name of the hyperparameter that holds it, as for ``step_size``.
    """

    momentum: Any = 0.9

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_rate(self, "momentum", 0.0, 1.0)
        if self.momentum == 1:
            raise ValueError(f"{type(self).__name__}: momentum=1 never forgets; change momentum")


@dataclass(frozen=True)
class InnerAdamSettings(InnerSettings):
    """Adam from zero moments, which can be differentiated through.

    lr: learning rate, a number, or the name of the hyperparameter that holds it, as for ``GradientDescent.step_size``.
    betas: how much of the mean and of the mean square of the gradient is kept each step, both in [0, 1).
    eps: added to the root of the mean square.
    """

    lr: Any = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Check the ranges; a list given as ``betas`` becomes a tuple."""
        super().__post_init__()
        check_rate(self, "lr", 0.0, open_low=True)
        check_betas(self)
        check_number(self, "eps", 0.0)


@dataclass(frozen=True)
class TorchOptimizerSettings(InnerSettings):
    """Any optimizer of ``torch.optim``.

    optimizer: its name there (``Adam``, ``AdamW``, ``RMSprop``, ``SGD``, ...).
    lr: learning rate.
    options: its further arguments by name.
    keep: whether its moments live on from one outer step to the next.
    """

    optimizer: str = "Adam"
    lr: float = 0.001
    options: dict[str, Any] = field(default_factory=dict)
    keep: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_number(self, "lr", 0.0, open_low=True)
        check_flag(self, "keep")


@dataclass(frozen=True)
class LBFGSSettings(InnerSettings):
    """L-BFGS with a strong Wolfe line search, for smooth problems on all their data.

    rtol: as for every inner solver, on the gradient.
    history: pairs of differences that are kept.
    """

    rtol: float = 1e-6
    history: int = 10

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "history")


@dataclass(frozen=True)
class AutoSettings:
    """The adjoint chosen by what it meets: CG, MINRES or a truncated Neumann series.

    rtol: relative tolerance of CG and MINRES.
    max_steps: most products of one attempt by CG or MINRES.
    terms: most terms of the Neumann series (None: as many as ``inner`` takes steps, at least 20 and at most 100).
    """

    rtol: float = 1e-6
    max_steps: int = 100
    terms: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_number(self, "rtol", 0.0, open_low=True)
        check_count(self, "max_steps")
        check_optional_count(self, "terms")


@dataclass(frozen=True)
class T1T2Settings:
    """The Hessian taken for the identity: ``u = d_w E``; nothing to set."""


@dataclass(frozen=True)
class FiniteDifferenceSettings:
    """One step (``v = d_w E``), its mixed product by central differences of two gradients.

    length: of the difference's step in ``w`` (None: where truncation and rounding balance; DARTS: 0.01).
    """

    length: float | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        check_optional(self, "length", 0.0, open_low=True)


@dataclass(frozen=True)
class PowerSettings:
    """Power iteration for the largest curvature ``L`` of the inner loss.

    rtol: it stops when the estimate changes by less than this part.
    max_steps: most products.
    """

    rtol: float = 1e-2
    max_steps: int = 30

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_number(self, "rtol", 0.0)
        check_count(self, "max_steps")


@dataclass(frozen=True)
class ProductSettings:
    """How an implicit hypergradient takes its products.

    step: of the gradient-step map, for adjoints that iterate it (None: the inner solver's, else from declared constants, else
        ``1 / L`` by power iteration).
    warm: start the adjoint, and the power iteration, where those of the last outer step ended.
    curvature: ``hessian``, ``gauss_newton`` (which needs an inner loss that is a ``Composite``) or ``finite_differences``.
    resample: a batch of its own for each product.
    power: the power iteration.
    """

    step: float | None = None
    warm: bool = True
    curvature: str = "hessian"
    resample: bool = False
    power: PowerSettings = field(default_factory=PowerSettings)

    def __post_init__(self) -> None:
        """Check the choices."""
        check_optional(self, "step", 0.0, open_low=True)
        check_flag(self, "warm")
        check_choice(self, "curvature", CURVATURES)
        check_flag(self, "resample")
