"""All hyperparameters of a self-tuning network: their names, and their values and scales in R."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions.transforms import SoftplusTransform
from torch.nn import functional

from hyperopt.spaces import space as spaces
from hyperopt.stn.declare import Tuned
from hyperopt.stn.draw import Draw

CATEGORICAL = (
    "a choice between things without an order has no direction in which a response could be learned; tune numbers, and try the "
    "choices in a sweep (hyperopt -m key=a,b)"
)


class HyperSpace(nn.Module):
    """Named hyperparameters, each moved and perturbed in R.

    Args:
        declared: the hyperparameters by name, ``{"dropout": Bounded(0.1, 0, 0.9)}``, or as pairs.
        centred: whether draws give ``delta = m - stopgrad(u)`` to the weights, or ``m`` itself.
        dtype: dtype of values and scales.
        device: device of values and scales.
        key: what messages call the hyperparameters.

    Attributes:
        names: the names, in the order of all vectors.
        declared: the hyperparameters by name.
        u: values in R. shape: (H,)
        s: scales in R, ``sigma = softplus(s)``. shape: (H,)

    Raises:
        ValueError: there are no hyperparameters, two have the same name, one is something else, or an initial value is outside
            of its space.

    Reference: MacKay et al., ICLR 2019, arXiv 1903.03088.

    Example:
        >>> from hyperopt.stn import Bounded, HyperSpace, Positive
        >>> space = HyperSpace({"dropout": Bounded(0.25, 0.0, 0.9), "decay": Positive(1e-3, per="batch")})
        >>> {name: round(value, 6) for name, value in space.values().items()}
        {'dropout': 0.25, 'decay': 0.001}
    """

    def __init__(
        self,
        declared: Mapping[str, Tuned] | Iterable[tuple[str, Tuned]],
        *,
        centred: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        key: str = "space",
    ) -> None:
        """Start at the initial values."""
        super().__init__()
        given: Any = declared.items() if isinstance(declared, Mapping) else declared
        pairs: list[Any] = list(given) if isinstance(given, Iterable) else [given]
        if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
            raise TypeError(f"{key}={declared!r} does not name its hyperparameters; give {{name: Positive(1e-3), ...}}")
        for place, (name, each) in enumerate(pairs):
            _check(name, each, key)
            if name in [other for other, _ in pairs[:place]]:
                raise ValueError(f"{key}: two hyperparameters are called {name!r}; rename one")
        if not pairs:
            raise ValueError(f"{key}: there are no hyperparameters to tune; declare at least one")
        self.declared: dict[str, Tuned] = dict(pairs)
        self.names = tuple(self.declared)
        self.centred = centred
        dtype = dtype or torch.get_default_dtype()
        raw = [each.raw(dtype, device, f"{key}.{name}") for name, each in pairs]
        self.u = nn.Parameter(torch.stack(raw))
        self.s = nn.Parameter(unsoftplus([each.scale for _, each in pairs]).to(device, dtype))
        shared = torch.tensor([each.per == "batch" for _, each in pairs], device=device)
        self.register_buffer("shared", shared, persistent=False)
        self._any_shared = bool(shared.any())

    shared: Tensor

    def extra_repr(self) -> str:
        """Return the hyperparameters with their values."""
        return ", ".join(f"{name}={value:.4g}" for name, value in self.values().items())

    @property
    def sigma(self) -> Tensor:
        """The scales, differentiable. shape: (H,)."""
        return functional.softplus(self.s, threshold=40.0)  # beyond torch's default of 20, 1e-10 of the scale would be lost

    def noise(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """Return standard normal numbers, equal in all rows for ``per="batch"`` hyperparameters. shape: (rows, H)."""
        eps = torch.randn(rows, len(self.names), generator=generator, dtype=self.u.dtype, device=self.u.device)
        return torch.where(self.shared, eps[:1], eps) if self._any_shared else eps

    def at(self, eps: Tensor) -> Draw:
        """Return the draw for a given noise, differentiable in values and scales. shape of eps: (rows, H)."""
        sigma = self.sigma
        step = sigma * eps
        m = self.u + step
        return Draw(self, m, m - self.u.detach() if self.centred else m, sigma)

    def draw(self, rows: int, generator: torch.Generator | None = None, perturb: bool = True) -> Draw:
        """Draw the hyperparameters of a batch.

        Args:
            rows: number of examples in the batch.
            generator: generator of the noise, on the device of the values (None: torch's own).
            perturb: whether to perturb; otherwise every row has the values themselves.

        Returns:
            The draw, differentiable in values and scales unless under ``torch.no_grad``.
        """
        if perturb:
            return self.at(self.noise(rows, generator))
        fixed = not torch.is_grad_enabled()
        m = (self.u.detach() if fixed else self.u).expand(rows, -1)  # a view requires grad even under no_grad
        delta = m - self.u.detach() if self.centred else m
        return Draw(self, m, delta, self.sigma, responds=not (self.centred and fixed))

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """Return the values of the hyperparameters."""
        return self._in_units(self.u.cpu())

    @torch.no_grad()
    def scales(self) -> dict[str, float]:
        """Return the scales of the perturbation, in R."""
        return dict(zip(self.names, self.sigma.tolist(), strict=True))

    @torch.no_grad()
    def band(self) -> dict[str, tuple[float, float]]:
        """Return the values one scale below and above each value."""
        u, sigma = self.u.cpu(), self.sigma.cpu()
        below, above = self._in_units(u - sigma), self._in_units(u + sigma)
        return {name: (below[name], above[name]) for name in self.names}

    def _in_units(self, m: Tensor) -> dict[str, float]:
        return {name: float(self.declared[name].value(m[i])) for i, name in enumerate(self.names)}

    @torch.no_grad()
    def clamp_scales_(self, low: float, high: float) -> None:
        """Clamp the scales between their smallest and largest value."""
        bounds = unsoftplus([low, high]).to(self.s)
        self.s.clamp_(bounds[0], bounds[1])


def unsoftplus(scales: list[float]) -> Tensor:
    """Return the inverse of softplus, in float64, stable for large scales, where ``log(exp(x) - 1)`` is inf."""
    return SoftplusTransform().inv(torch.tensor(scales, dtype=torch.float64))  # pyright: ignore[reportReturnType]


def _check(name: object, each: object, key: str) -> None:
    """Refuse anything that is not a hyperparameter that can be tuned."""
    if not isinstance(name, str) or not name or "/" in name:  # hyper/NAME/low is a quantity of the record
        raise ValueError(f"{key}: {name!r} cannot be the name of a hyperparameter; give a text that is not empty, without a /")
    if isinstance(each, Tuned):
        return
    if isinstance(each, spaces.Space):
        kind = type(each).__name__
        raise ValueError(
            f"{key}.{name}: hyperopt.{kind} has no scale of a perturbation; declare it with hyperopt.stn (Bounded, Positive, "
            "Discrete)"
        )
    if isinstance(each, str | list | tuple | set | frozenset | dict):
        raise ValueError(f"{key}.{name}={each!r}: {CATEGORICAL}")
    raise ValueError(f"{key}.{name}={each!r} is not a hyperparameter; declare it with hyperopt.stn (Bounded, Positive, Discrete)")
