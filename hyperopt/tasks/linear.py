"""Linear models with an L2 strength for each feature, or with an L2 penalty around a learned centre.

    l2                    L = loss(X w, y) + sum_j lam_j |w_j|^2 / 2            E = loss(X' w, y')
    bias_regularization   L = loss(X w, y) + beta / 2 |w - lam|^2               E = loss(X' w, y')

The model has one output for numbers (half the squared error) and for two classes (logistic loss), and one for each of more
classes (cross-entropy). The rows of a dataset may be sparse, and then stay sparse.

References: C. B. Do, C.-S. Foo and A. Y. Ng, Efficient multiple hyperparameter learning for log-linear models, NIPS 2007;
G. Denevi et al., Learning-to-learn stochastic gradient descent with biased regularization, ICML 2019, arXiv 1903.10399.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt.bilevel.batches import Minibatches
from hyperopt.bilevel.problem import BilevelProblem, InnerConstants
from hyperopt.core.checks import check_flag, check_number
from hyperopt.data.sparse import SparseRows
from hyperopt.data.splits import Rows
from hyperopt.spaces.space import Space
from hyperopt.tasks.base import Environment
from hyperopt.tasks.bilevel import BilevelSetup
from hyperopt.tasks.scores import loss_of
from hyperopt.tasks.tuned import TunedTask

Batch = tuple[Any, Tensor]  # features, dense or ``SparseRows``, and targets

DENSE_FEATURES = 1000  # largest number of features for which the constants of the certificate are computed

RETRAINED = ("retrained/loss", "retrained/accuracy")


def outputs_of(classes: int) -> int:
    """Return the number of outputs: one for each class, but one for two classes and for numbers."""
    return classes if classes > 2 else 1


class LinearModel(nn.Module):
    """The linear map ``x w`` without intercept, for dense or sparse rows.

    Args:
        features: number of features.
        outputs: number of outputs.
    """

    def __init__(self, features: int, outputs: int) -> None:
        """Start with zero weights."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs. shapes: (rows, features) to (rows, outputs)."""
        return x @ self.weight


@dataclass(eq=False)
class LinearTask(TunedTask):
    """A linear model without intercept, trained with a penalty on the training rows and tuned on the validation rows.

    Attributes:
        retrain: whether evaluations also train on the training and validation rows together and test that model, as
            ``retrained/*``.
        batch_size: number of training rows of an inner gradient (None: all); evaluations train on all of them.
    """

    retrain: bool = False

    def __post_init__(self) -> None:
        """Check the flag."""
        super().__post_init__()
        check_flag(self, "retrain")
        if self.retrain:
            self.MEASURES = (*self.MEASURES, *RETRAINED)  # pyright: ignore[reportAttributeAccessIssue]  # of the object

    @abstractmethod
    def penalty(self, w: Tensor, lam: dict[str, Tensor]) -> Tensor:
        """Return the penalty on weights of shape (features, outputs)."""

    @abstractmethod
    def shape(self, features: int, outputs: int) -> tuple[int, ...]:
        """Return the shape of the hyperparameter."""

    @abstractmethod
    def _constants(self, gram: Tensor, outer: float, w: Tensor, lam: dict[str, Tensor]) -> InnerConstants:
        """Return the constants of a quadratic inner problem in closed form, from the results of ``_spectra``."""

    def build(self, env: Environment) -> BilevelSetup:
        """Build the problem, with zero initial weights."""
        splits = self.splits
        outputs = outputs_of(splits.num_classes)
        features = splits.train.x.shape[1]
        w = torch.zeros(features, outputs, dtype=env.dtype, device=env.device)

        def criterion(z: Tensor, w: Tensor, lam: dict[str, Tensor], batch: Batch) -> Tensor:
            return loss_of(z, batch[1]) + self.penalty(w, lam)

        quadratic = not splits.num_classes and features <= DENSE_FEATURES and splits.train.x.layout == torch.strided
        constants = functools.partial(self._constants, *self._spectra()) if quadratic else None
        shapes = {self.spaces[0]: self.shape(features, outputs)}
        train, val = (pairs(rows) for rows in (splits.train, self.fitted))
        problem = replace(self.problem(self.composite(criterion), env, train, val), constants=constants)
        whole = replace(problem, inner_batches=Minibatches(train), outer_batches=Minibatches(val))
        return BilevelSetup(problem, w, shapes, self.rows(), whole=whole)

    def predict(self, w: Tensor, x: Tensor) -> Tensor:
        """Return ``x w``."""
        return x @ w

    def state_of(self, w: Tensor) -> dict[str, Tensor]:
        """Return the weights by name."""
        return {"weight": w}

    def predictor(self, shape: tuple[int, ...], classes: int, hyperparameters: Mapping[str, Tensor]) -> LinearModel:
        """Build the model."""
        return LinearModel(math.prod(shape), outputs_of(classes))

    def _spectra(self) -> tuple[Tensor, float]:
        """Return ``X^T X / n`` of the training rows, and the largest eigenvalue of ``X^T X / n`` of the fitted rows."""
        gram = [rows.x.T @ rows.x / len(rows) for rows in (self.splits.train, self.fitted)]
        return gram[0], float(torch.linalg.eigvalsh(gram[1])[-1])

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of every trained problem and, with ``retrain``, also ``retrained/*``."""
        return {**super().evaluate(), **(self.retrained() if self.retrain else {})}

    def retrained(self) -> dict[str, float]:
        """Return test metrics of the model trained on training and validation rows at the present hyperparameters.

        The loss is a mean over rows, so a strength has the same meaning for more rows.
        """
        whole = joined(self.splits.train, self.splits.val)
        start, (x, y) = self._state(), pairs(whole)
        both = BilevelProblem(lambda w, lam, batch: loss_of(x @ w, y) + self.penalty(w, lam), self.built.problem.outer_loss)
        self._inner.solve(both, self.hyper.read(), self.bilevel.state)
        found = self.measure(self.bilevel.w)
        self._return_to(start)
        return {f"retrained/{name[5:]}": value for name, value in found.items() if name.startswith("test/")}


@dataclass(eq=False)
class L2Task(LinearTask):
    """An L2 strength for each feature, or one for all (``per: tensor``).

    Attributes:
        l2: space of the strengths.
    """

    name = "l2"
    spaces = ("l2",)

    l2: Space | None = None

    def shape(self, features: int, outputs: int) -> tuple[int, ...]:
        """Return (features, 1): the outputs share the strength of a feature."""
        return (features, 1)

    def penalty(self, w: Tensor, lam: dict[str, Tensor]) -> Tensor:
        """Return ``sum_j lam_j |w_j|^2 / 2``."""
        return (lam["l2"] * w.square()).sum() / 2

    def _constants(self, gram: Tensor, outer: float, w: Tensor, lam: dict[str, Tensor]) -> InnerConstants:
        """Return the constants, with ``d_lam grad_w L = diag(w)``, in a ball around ``w`` that contains the minimum."""
        hessian = gram + torch.diag(lam["l2"].expand(w.shape).reshape(-1))
        values = torch.linalg.eigvalsh(hessian)
        least, largest = float(values[0]), float(values[-1])
        slope = hessian @ w - self._cross
        radius = float(torch.linalg.vector_norm(slope)) / least
        single = lam["l2"].dim() == 0
        size = float(torch.linalg.vector_norm(w)) if single else float(w.abs().max())
        return InnerConstants(least, largest, size + radius, mixed_lipschitz=1.0, outer_lipschitz=outer)

    @functools.cached_property
    def _cross(self) -> Tensor:
        rows = self.splits.train
        return (rows.x.T @ rows.y / len(rows))[:, None]


@dataclass(eq=False)
class BiasRegularizationTask(LinearTask):
    """An L2 penalty of fixed strength around a learned centre.

    Attributes:
        centre: space of the centre.
        beta: strength of the penalty, above 0.
    """

    name = "bias_regularization"
    spaces = ("centre",)

    centre: Space | None = None
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        check_number(self, "beta", 0.0, open_low=True)

    def shape(self, features: int, outputs: int) -> tuple[int, ...]:
        """Return the shape of the weights."""
        return (features, outputs)

    def penalty(self, w: Tensor, lam: dict[str, Tensor]) -> Tensor:
        """Return ``beta / 2 |w - lam|^2``."""
        return self.beta / 2 * (w - lam["centre"]).square().sum()

    def _constants(self, gram: Tensor, outer: float, w: Tensor, lam: dict[str, Tensor]) -> InnerConstants:
        """Return the constants, with ``d_lam grad_w L = - beta I``."""
        values = torch.linalg.eigvalsh(gram) + self.beta
        return InnerConstants(float(values[0]), float(values[-1]), self.beta, outer_lipschitz=outer)


def pairs(rows: Rows) -> Batch:
    """Return the features, in a form that can be multiplied by weights, and the targets."""
    return (rows.x if rows.x.layout == torch.strided else SparseRows(rows.x), rows.y)


def joined(one: Rows, two: Rows) -> Rows:
    """Return the rows of both sets as one."""
    x = torch.cat([one.x, two.x]) if one.x.layout == torch.strided else torch.cat([r.x.to_sparse_coo() for r in (one, two)])
    return Rows(x, torch.cat([one.y, two.y]), torch.cat([one.index, two.index]))
