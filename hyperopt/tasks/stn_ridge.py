"""Ridge regression with a tuned strength: a self-tuning network whose best response has a closed form.

    L(w, lam) = |X w - y|^2 / (2 n) + h |w|^2 / 2,   h = exp(lam)         w*(lam) = (X^T X / n + h I)^{-1} X^T y / n
    d w* / d lam = - h (X^T X / n + h I)^{-1} w*                           d E / d lam = (d w* / d lam)^T X'^T (X' w* - y') / n'

A row of a batch is the whole training set under its own strength, so the expected loss is that of the papers: the network
learns ``w*`` as an affine function of ``lam`` in the neighbourhood that the scale defines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from hyperopt.bilevel.batches import SameBatch
from hyperopt.core.checks import check_count, check_number
from hyperopt.stn.declare import Positive, Tuned
from hyperopt.stn.draw import Draw
from hyperopt.stn.network import STN
from hyperopt.tasks.base import Environment
from hyperopt.tasks.stn import SelfTuningSetup, SelfTuningTask


@dataclass(frozen=True)
class Ridge:
    """The closed forms of ridge regression.

    Attributes:
        x: training rows. shape: (n, features)
        y: their targets. shape: (n,)
        x_val: validation rows.
        y_val: their targets.
    """

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor

    def weights(self, strength: Tensor | float) -> Tensor:
        """Return ``w*``. shape: (features,)."""
        return torch.linalg.solve(self._hessian(strength), self.x.T @ self.y / len(self.y))

    def jacobian(self, strength: Tensor | float) -> Tensor:
        """Return ``d w* / d lam`` with ``lam = log strength``. shape: (features,)."""
        return -strength * torch.linalg.solve(self._hessian(strength), self.weights(strength))

    def slope(self, w: Tensor) -> Tensor:
        """Return ``d E / d w``. shape: (features,)."""
        return self.x_val.T @ (self.x_val @ w - self.y_val) / len(self.y_val)

    def loss(self, w: Tensor) -> Tensor:
        """Return ``E``. shape: ()."""
        return (self.x_val @ w - self.y_val).square().mean() / 2

    def best(self) -> float:
        """Return the strength with the smallest validation loss, by golden section search between 1e-6 and 1e4."""
        low, high = -13.8, 9.2
        ratio = (5**0.5 - 1) / 2
        for _ in range(60):
            a, b = high - ratio * (high - low), low + ratio * (high - low)
            left, right = (float(self.loss(self.weights(torch.tensor(lam).exp().item()))) for lam in (a, b))
            low, high = (low, b) if left < right else (a, high)
        return float(torch.tensor((low + high) / 2, dtype=torch.float64).exp())

    def _hessian(self, strength: Tensor | float) -> Tensor:
        eye = torch.eye(self.x.shape[1], dtype=self.x.dtype, device=self.x.device)
        return self.x.T @ self.x / len(self.y) + strength * eye


@dataclass(eq=False)
class StnRidgeTask(SelfTuningTask):
    """A linear model with a tuned L2 strength, whose best response is known.

    Attributes:
        decay: the tuned strength (None: positive, from 0.1).
        features: number of features.
        rows: number of training rows and of validation rows.
        noise: standard deviation of the noise in the targets, at least 0.
        draws: number of strengths in a batch.
        ridge: the closed forms, after ``setup``.
        best: the strength with the smallest validation loss, after ``setup``.
    """

    name = "stn_ridge"
    MEASURES: ClassVar[tuple[str, ...]] = (
        "outer/loss",
        "val/loss",
        "stn/response_norm",
        *(f"ridge/{name}" for name in ("decay_ratio", "hypergradient_ratio", "jacobian_error", "weights_error")),
    )

    decay: Tuned | None = None
    features: int = 20
    rows: int = 40
    noise: float = 3.0
    draws: int = 50

    ridge: Ridge = field(init=False, repr=False)
    best: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_count(self, "features")
        check_count(self, "rows")
        check_count(self, "draws")
        check_number(self, "noise", 0.0)

    def build(self, env: Environment) -> SelfTuningSetup:
        """Draw the rows of a linear model from ``env.generator``."""
        like = {"dtype": env.dtype, "device": env.device}

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=env.generator, dtype=torch.float64)

        true = normal(self.features)
        sets = []
        for _ in range(2):
            x = normal(self.rows, self.features)
            sets += [x.to(**like), (x @ true + self.noise * normal(self.rows)).to(**like)]
        self.ridge = Ridge(*sets)
        self.best = self.ridge.best()
        # Each row of a batch is the whole training set, for one draw.
        train = self.ridge.x.expand(self.draws, -1, -1)
        valid = self.ridge.x_val.expand(self.draws, -1, -1)
        return SelfTuningSetup(*self.plain(self.shape, 0), SameBatch(train), SameBatch(valid))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return (self.features,)

    def plain(self, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, Mapping[str, Tuned]]:
        """Return a linear model without intercept, and the strength."""
        return nn.Linear(shape[0], 1, bias=False), {"decay": self.decay or Positive(0.1)}

    def train_loss(self, model: STN, batch: Tensor, draw: Draw) -> Tensor:
        """Return the mean of ``L`` over the draws."""
        fit = (model(batch, draw)[..., 0] - self.ridge.y).square().mean() / 2
        return fit + (draw.h["decay"].detach() * model.squared_norm(draw)).mean() / 2

    def valid_loss(self, model: STN, batch: Tensor, draw: Draw | None) -> Tensor:
        """Return the mean of ``E`` over the draws."""
        return (model(batch)[..., 0] - self.ridge.y_val).square().mean() / 2

    def response(self) -> tuple[Tensor, Tensor]:
        """Return the learned ``w(lam)`` and its Jacobian ``d w / d lam``. shape of each: (features,)."""
        _, _, response = self.model.weights()["weight"]
        plain = self.model.collapse()
        return plain.weight.detach()[0], (response.gate @ response.direction).detach()[0]  # pyright: ignore

    def measure(self, model: STN) -> dict[str, float]:
        """Return the losses, and the errors of the learned response.

        ``ridge/weights_error`` and ``ridge/jacobian_error`` are relative errors. ``ridge/hypergradient_ratio`` is the learned
        hypergradient of the unperturbed validation loss divided by the exact one, and ``ridge/decay_ratio`` the present
        strength divided by the best one.
        """
        strength = torch.tensor(model.space.values()["decay"], dtype=self.ridge.x.dtype)
        w, jacobian = self.response()
        exact, slope = self.ridge.weights(strength), self.ridge.jacobian(strength)
        loss = float(self.ridge.loss(w))
        return {
            "outer/loss": loss,
            "val/loss": loss,
            "ridge/weights_error": float((w - exact).norm() / exact.norm()),
            "ridge/jacobian_error": float((jacobian - slope).norm() / slope.norm()),
            "ridge/hypergradient_ratio": float((jacobian @ self.ridge.slope(w)) / (slope @ self.ridge.slope(exact))),
            "ridge/decay_ratio": float(strength) / self.best,
        }
