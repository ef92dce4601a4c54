"""Spaces of hyperparameters; ``hyperopt.spaces.hyperparameters.Hyperparameters`` has one for each name.

    raw --(the space's map, or none)--> value

A reparametrised space is open: a value on its bound has no raw variable. ``torch.distributions`` would map such a value to -87
or +16 in float32, where the gradient vanishes; here it is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import SoftplusTransform, Transform

from hyperopt.core.checks import check_below, check_choice, check_number
from hyperopt.core.text import described

WAYS = ("reparametrisation", "projection")


def shape_of(init: Any) -> tuple[int, ...]:
    """Return the shape of an initial value, () for None and for what is refused where the space is built."""
    try:
        return () if init is None else tuple(torch.as_tensor(init).shape)
    except (RuntimeError, TypeError, ValueError):
        return ()


@dataclass(frozen=True, repr=False)
class Space(ABC):
    """A hyperparameter's own space and its map to the unbounded variables that an optimizer moves.

    Attributes:
        init: initial value: a number for all entries, or nested lists with one for each entry.
        by: how the value stays in the space. ``reparametrisation``: the optimizer moves an unbounded variable, which is mapped
            into the interior of the space. ``projection``: it moves the value itself, which is projected back after every
            step.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Example:
        >>> import torch, hyperopt
        >>> space = hyperopt.Positive(0.1, by="projection")
        >>> hyper = hyperopt.Hyperparameters({"x": space}, shapes={"x": ()}, dtype=torch.float64)
        >>> isinstance(space, hyperopt.Space), hyper.raw["x"].item()  # the optimizer moves the value itself
        (True, 0.1)
    """

    init: Any = 0.0
    by: str = "reparametrisation"

    def __post_init__(self) -> None:
        """Check the choice."""
        check_choice(self, "by", WAYS)

    def __repr__(self) -> str:
        """Return the settings; an initial value of many entries as its first ones, or as a shape."""
        return described(self, **{each.name: getattr(self, each.name) for each in fields(self)})

    @abstractmethod
    def transform(self) -> Transform:
        """Return the map from raw variable to value, onto the interior of the space."""

    @abstractmethod
    def inside(self, value: Tensor, *, interior: bool) -> Tensor:
        """Whether each entry (or vector, or matrix) is in the space, or in its interior."""

    @abstractmethod
    def project(self, value: Tensor) -> Tensor:
        """Return the nearest point of the space."""

    @property
    def bounds(self) -> str:
        """The space, in words, for messages."""
        return "the real numbers"

    def start(self, shape: torch.Size) -> Any:
        """Return the initial value for ``init=None``."""
        raise ValueError(f"{type(self).__name__}: init=None; give an initial value")

    def shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of the value for a tensor of ``shape``."""
        return shape

    def raw(self, shape: torch.Size, dtype: torch.dtype, device: torch.device | str, key: str) -> Tensor:
        """Return the initial raw variable.

        Raises:
            ValueError: ``init`` is outside of the space, or on the bound of an open one; the message names ``key`` and the
                value.
        """
        shape = self.shape(shape)
        given = self.start(shape) if self.init is None else self.init
        try:
            exact = torch.as_tensor(given, dtype=torch.float64).expand(shape)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{key}.init={given!r} does not fit shape {tuple(shape)}; change {key}.init") from error
        return self.inverse(exact, dtype, device, f"{key}.init")

    def inverse(self, exact: Tensor, dtype: torch.dtype, device: torch.device | str, key: str) -> Tensor:
        """Return the raw variable of a value, the inverse of ``value``.

        Args:
            exact: the value, in float64.
            dtype: dtype of the raw variable.
            device: device of the raw variable.
            key: what messages call the value.

        Raises:
            ValueError: the value is outside of the space, or on the bound of an open one; the message names ``key``.
        """
        value = exact.to(dtype=dtype, device=device).contiguous()
        open_ = self.by == "reparametrisation"
        good = self.inside(value, interior=open_)
        if not bool(good.all()):
            bad = exact[tuple((~good).nonzero()[0].tolist())].tolist()
            where = f"is not inside {self.bounds}" + (": by reparametrisation it cannot be a bound itself" if open_ else "")
            raise ValueError(f"{key}={bad} {where}; change {key}")
        if not open_:
            return value.clone()
        raw = cast(Tensor, self.transform().inv(value))
        off = (self.value(raw) - value).abs()
        if not bool(raw.isfinite().all()) or float(off.max()) > 1e-3 * float(value.abs().max() + 1e-30):
            bad = exact.reshape(-1)[int(off.nan_to_num(float("inf")).argmax())].item()
            if torch.finfo(dtype).eps > 1e-3:
                raise ValueError(
                    f"{key}={bad} would be off by more than 0.1 % in {dtype}, which is too coarse; use torch.float32"
                )
            raise ValueError(f"{key}={bad} is too near to a bound of {self.bounds} for {dtype}; change {key}")
        return raw.clone()

    def value(self, raw: Tensor) -> Tensor:
        """Return the hyperparameter's value, differentiable in ``raw``."""
        return cast(Tensor, self.transform()(raw)) if self.by == "reparametrisation" else raw


@dataclass(frozen=True, repr=False)
class Number(Space):
    """A space of numbers, each of which is mapped separately.

    Attributes:
        per: ``tensor``: one number for a whole tensor; ``element``: one for each of its entries.
    """

    per: str = "tensor"

    def __post_init__(self) -> None:
        """Check the choices."""
        super().__post_init__()
        check_choice(self, "per", ("tensor", "element"))

    def raw(self, shape: torch.Size, dtype: torch.dtype, device: torch.device | str, key: str) -> Tensor:
        """Return the initial raw variable; see ``Space.raw``."""
        if self.per == "tensor" and (own := shape_of(self.init)):
            raise ValueError(
                f"{key}.init has shape {own}, but {key}.per='tensor' is one number for the whole tensor; give per='element', "
                "which is one for each entry, or a single number as init"
            )
        return super().raw(shape, dtype, device, key)

    def shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of one number for the whole tensor, or of one for each entry."""
        return shape if self.per == "element" else torch.Size()


@dataclass(frozen=True, repr=False)
class Real(Number):
    """Any real number; projection and reparametrisation are the same.

    Attributes:
        init: initial value: a number for all entries, or nested lists with one for each entry.
        by: how the value stays in the space, ``"reparametrisation"`` or ``"projection"``, see ``Space``.
        per: ``"tensor"``: one number for a whole tensor; ``"element"``: one for each of its entries.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Example:
        >>> import torch, hyperopt
        >>> space = hyperopt.Real(-2.0)
        >>> hyper = hyperopt.Hyperparameters({"x": space}, shapes={"x": ()}, dtype=torch.float64)
        >>> float(hyper.read()["x"])
        -2.0
    """

    def transform(self) -> Transform:
        """Return the identity."""
        return biject_to(constraints.real)

    def inside(self, value: Tensor, *, interior: bool) -> Tensor:
        """Whether each entry is finite."""
        return value.isfinite()

    def project(self, value: Tensor) -> Tensor:
        """Return the value."""
        return value


@dataclass(frozen=True, repr=False)
class Positive(Number):
    """A number above 0 (by projection: at least 0).

    Attributes:
        init: initial value: a number for all entries, or nested lists with one for each entry.
        by: how the value stays in the space, ``"reparametrisation"`` or ``"projection"``, see ``Space``.
        per: ``"tensor"``: one number for a whole tensor; ``"element"``: one for each of its entries.
        map: ``exp``, whose steps are relative, or ``softplus``, whose steps are absolute for large values.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Example:
        >>> import torch, hyperopt
        >>> space = hyperopt.Positive(0.1)
        >>> hyper = hyperopt.Hyperparameters({"x": space}, shapes={"x": ()}, dtype=torch.float64)
        >>> round(float(hyper.read()["x"]), 6), round(hyper.raw["x"].item(), 4)  # the optimizer moves log(0.1)
        (0.1, -2.3026)
    """

    init: Any = 1.0
    map: str = "exp"

    def __post_init__(self) -> None:
        """Check the choices."""
        super().__post_init__()
        check_choice(self, "map", ("exp", "softplus"))

    @property
    def bounds(self) -> str:
        """The half-line."""
        return "(0, inf)"

    def transform(self) -> Transform:
        """Return ``exp`` or softplus."""
        return SoftplusTransform() if self.map == "softplus" else biject_to(constraints.positive)

    def inside(self, value: Tensor, *, interior: bool) -> Tensor:
        """Whether each entry is above 0 (or at least 0)."""
        return value.isfinite() & ((value > 0) if interior else (value >= 0))

    def project(self, value: Tensor) -> Tensor:
        """Raise negative entries to 0."""
        return value.clamp(min=0)


@dataclass(frozen=True, repr=False)
class Bounded(Number):
    """A number between ``low`` and ``high``, by a scaled sigmoid.

    Attributes:
        init: initial value, or None for the middle of the interval.
        by: how the value stays in the space, ``"reparametrisation"`` or ``"projection"``, see ``Space``.
        per: ``"tensor"``: one number for a whole tensor; ``"element"``: one for each of its entries.
        low: the lower bound, finite.
        high: the upper bound, finite and above ``low``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Example:
        >>> import torch, hyperopt
        >>> space = hyperopt.Bounded(low=0.0, high=0.8)
        >>> hyper = hyperopt.Hyperparameters({"x": space}, shapes={"x": ()}, dtype=torch.float64)
        >>> float(hyper.read()["x"])  # the middle
        0.4
    """

    init: Any = None
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_number(self, "low", float("-inf"))
        check_number(self, "high", float("-inf"))
        check_below(self, "low", "high")

    @property
    def bounds(self) -> str:
        """The interval."""
        return f"({self.low:g}, {self.high:g})"

    def start(self, shape: torch.Size) -> Any:
        """Return the middle of the interval."""
        return (self.low + self.high) / 2

    def transform(self) -> Transform:
        """Return a scaled sigmoid."""
        return biject_to(constraints.interval(float(self.low), float(self.high)))

    def inside(self, value: Tensor, *, interior: bool) -> Tensor:
        """Whether each entry is between the bounds."""
        if interior:
            return (value > self.low) & (value < self.high)
        return (value >= self.low) & (value <= self.high)

    def project(self, value: Tensor) -> Tensor:
        """Clamp to the bounds."""
        return value.clamp(self.low, self.high)


@dataclass(frozen=True, repr=False)
class Simplex(Space):
    """Probability vectors: along the last dimension, positive entries that sum to 1.

    Attributes:
        init: initial value, nested lists of probabilities, or None for equal entries.
        by: how the value stays in the space, ``"reparametrisation"`` or ``"projection"``, see ``Space``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Duchi, Shalev-Shwartz, Singer & Chandra, ICML 2008, figure 1 (the projection).

    Example:
        >>> import torch, hyperopt
        >>> space = hyperopt.Simplex()
        >>> hyper = hyperopt.Hyperparameters({"x": space}, shapes={"x": (4,)}, dtype=torch.float64)
        >>> [round(float(p), 2) for p in hyper.read()["x"]]
        [0.25, 0.25, 0.25, 0.25]
    """

    init: Any = None

    @property
    def bounds(self) -> str:
        """The simplex."""
        return "the simplex (entries above 0 that sum to 1)"

    def start(self, shape: torch.Size) -> Any:
        """Return the value of equal entries."""
        return 1 / shape[-1]

    def transform(self) -> Transform:
        """Return stick breaking, whose raw variable has one entry fewer."""
        return biject_to(constraints.simplex)

    def inside(self, value: Tensor, *, interior: bool) -> Tensor:
        """Whether the entries of each vector are positive (or at least 0) and sum to 1, shape (...,)."""
        positive = (value > 0) if interior else (value >= 0)
        near = (value.sum(-1) - 1).abs() <= 100 * torch.finfo(value.dtype).eps * value.shape[-1]
        return positive.all(-1) & near

    def project(self, value: Tensor) -> Tensor:
        """Return the nearest vector of the simplex, in the Euclidean norm."""
        ordered = value.sort(-1, descending=True).values
        counts = torch.arange(1, value.shape[-1] + 1, dtype=value.dtype, device=value.device)
        excess = (ordered.cumsum(-1) - 1) / counts
        last = (ordered > excess).sum(-1, keepdim=True) - 1
        return (value - excess.gather(-1, last)).clamp(min=0)
