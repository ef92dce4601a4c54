"""``Tuner``: learns hyperparameters beside a training loop that stays as it is.

    hyper = hyperopt.Hyperparameters({"decay": hyperopt.Positive(1e-3)})
    tuner = hyperopt.Tuner(model, hyper, train_loss=..., val_loss=..., optimizer=torch.optim.Adam(hyper.parameters(), lr=0.05))
    for batch in train_loader:
        optimizer.zero_grad(); tuner.loss(batch).backward(); optimizer.step()
    record = tuner.step(train_loader, val_loader)

A step computes the implicit hypergradient at the present weights: that of ``val_loss`` through a minimum of ``train_loss`` plus
the weight decay of the training optimizer. Then ``optimizer`` moves the hyperparameters once. Nothing else changes.

References: Lorraine, Vicol & Duvenaud, AISTATS 2020, arXiv 1911.02590; Grazzi et al., ICML 2020, arXiv 2006.16218.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import optree
import torch
from torch import Tensor, nn

from hyperopt.bilevel.auto import Auto
from hyperopt.bilevel.batches import SameBatch
from hyperopt.bilevel.estimator import Estimator
from hyperopt.bilevel.finite_difference import FiniteDifference
from hyperopt.bilevel.hypergradient import Bilevel, estimator_of
from hyperopt.bilevel.implicit import ProductSettings
from hyperopt.bilevel.own_batches import OwnBatches, numbers_of_batches, taken
from hyperopt.bilevel.own_losses import ModuleLosses, OwnLoss, as_plain_modules, in_words_of_the_tuner, without_trace
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.bilevel.record import Record
from hyperopt.bilevel.refusals import refuse_other_arguments
from hyperopt.bilevel.step_map import PowerSettings
from hyperopt.bilevel.trained_by import TrainedBy
from hyperopt.core import distributed
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.adjoints.implicit import ImplicitAdjoint
from hyperopt.core.state import check_entries
from hyperopt.spaces.hyperparameters import Hyperparameters

ENTRIES = ("hyper", "optimizer", "memory", "weights", "decays", "train", "val", "steps")


class Tuner:
    r"""Move hyperparameters by hypergradients, beside the user's own training loop.

    $$dE/d\lambda = d_\lambda E - (d_\lambda \nabla_w L)^T u, \qquad H u = d_w E.$$

    Args:
        model: the module that is trained, as the loop uses it; it may be compiled or wrapped in ``DistributedDataParallel``.
        hyper: the hyperparameters.
        train_loss: ``L``, a function ``train_loss(model, batch, lam)`` that calls ``model`` and reads the hyperparameters by
            name, in their own units: ``lam["decay"]``. It returns a scalar that is a mean over the rows of the batch.
        val_loss: ``E``, a function of the same form.
        optimizer: the optimizer of ``hyper.parameters()``, which holds nothing else.
        adjoint: ``"auto"``, which follows the rule in ``hyperopt.bilevel.auto`` and reports its choice in the record, or any
            adjoint that does not train the weights itself, such as ``Implicit(CG())``, ``OneStep()`` or ``FiniteDifference()``.
        trained_by: the optimizer or optimizers that train the model; their weight decay is a constant part of the trained loss
            (default: the ones that step its parameters). A decay that is tuned is a penalty in ``train_loss``, and not in the
            optimizer too.

    Attributes:
        steps: number of steps so far.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and what to give instead.

    Reference: Lorraine et al., AISTATS 2020, arXiv 1911.02590; Grazzi et al., ICML 2020, arXiv 2006.16218.

    The weights are the parameters that require grad at the time of a step and, once an optimizer has stepped, that it holds. In
    ``torch.distributed`` each rank gives its own batches, and the losses are means over the rows of all ranks.

    Example:
        >>> import torch, hyperopt
        >>> model, hyper = torch.nn.Linear(2, 1), hyperopt.Hyperparameters({"decay": hyperopt.Positive(0.1)})
        >>> def fit(model, batch, lam):
        ...     return (model(batch[0]) - batch[1]).square().mean()
        >>> tuner = hyperopt.Tuner(
        ...     model,
        ...     hyper,
        ...     train_loss=lambda model, batch, lam: fit(model, batch, lam) + lam["decay"] * model.weight.square().sum(),
        ...     val_loss=fit,
        ...     optimizer=torch.optim.SGD(hyper.parameters(), lr=0.1),
        ... )
        >>> record = tuner.step((torch.eye(2), torch.ones(2, 1)), (torch.eye(2), torch.zeros(2, 1)))
        >>> record.status.name
        'converged'
    """

    def __init__(
        self,
        model: nn.Module,
        hyper: Hyperparameters,
        *,
        train_loss: OwnLoss,
        val_loss: OwnLoss,
        optimizer: torch.optim.Optimizer,
        adjoint: Adjoint | Estimator | str | None = "auto",
        trained_by: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        """Check the arguments, and watch for the optimizer that trains the model."""
        check_arguments(model, hyper, train_loss, val_loss, optimizer, adjoint)
        self.model, self.hyper, self.optimizer, self.adjoint = model, hyper, optimizer, adjoint
        self.train_loss, self.val_loss = train_loss, val_loss
        self.steps = 0
        self._memory: dict[str, Any] = {}
        self._weights: dict[str, list[int]] = {}  # shapes of the weights, by name, that ``_memory`` fits
        self._batches = OwnBatches("train"), OwnBatches("val")
        given = [trained_by] if isinstance(trained_by, torch.optim.Optimizer) else trained_by
        if not isinstance(given, list | tuple) or any(not isinstance(each, torch.optim.Optimizer) for each in given):
            raise TypeError(f"trained_by={trained_by!r} is not a torch.optim.Optimizer; give that of the model, or a list")
        self._trained = TrainedBy(given)
        with in_words_of_the_tuner():
            self._losses()

    def __repr__(self) -> str:
        """Return the model's class, the hyperparameters in their own units, the adjoint and the number of steps."""
        values = ", ".join(f"{name.removeprefix('hyper/')}={value:.4g}" for name, value in self.hyper.metrics().items())
        return f"Tuner({type(self.model).__name__}, {values}, adjoint={self.adjoint!r}, steps={self.steps})"

    def _losses(self) -> ModuleLosses:
        """Return the losses at the present parameters, and watch for the optimizers of these parameters."""

        def trained(parameters: dict[str, Tensor]) -> dict[str, float]:
            found = self._trained.look(parameters)
            self._trained.watch(parameters)
            return found

        return ModuleLosses(self.model, self.hyper, trained)

    def loss(self, batch: Any) -> Tensor:
        """Return ``train_loss`` on a batch, for a training step, with the hyperparameters as constants."""
        self._trained.rest()
        return self.train_loss(self.model, batch, self.hyper.read())

    def step(self, train: Any, val: Any, *, batches: int | tuple[int, int] | None = None) -> Record:
        """Compute one hypergradient at the present weights, and make one step of ``optimizer``.

        Args:
            train: data of ``train_loss``: one batch (a tensor, tuple, mapping, or a list that contains a tensor), a list of
                batches, an iterator, a ``DataLoader`` (which continues from step to step), a dataset, or a source such as
                ``Minibatches``.
            val: data of ``val_loss``, likewise.
            batches: number of batches, or a pair of numbers for ``train`` and ``val``, at least 1; a loss is the mean over its
                batches (default: all of a list, and one from anything that batches are drawn from).

        Returns:
            ``Record``: the loss, the hypergradient with its error estimate, and the cost.

        Raises:
            TypeError, ValueError, RuntimeError: a loss or the data do not fit; the message says what to change.
            SolveError: the hypergradient is not finite.
            Nothing has changed when an error is raised, except that an iterator has lost the batches drawn from it.
        """
        if not any(parameter.requires_grad for parameter in self.hyper.parameters()):
            raise ValueError("no hyperparameter requires grad, so none would change; call hyper.requires_grad_()")
        with taken(self._batches, (train, val), numbers_of_batches(batches)) as drawn:
            return self._step(drawn)

    def _step(self, drawn: list[list[Any]]) -> Record:
        """Make a step on these batches of ``train`` and of ``val``."""
        counts = distributed.from_all([len(each) for each in drawn])
        if any(count != counts[0] for count in counts):
            raise ValueError(f"the ranks have different numbers of batches of train and val: {counts}; give each rank as many")
        hyper, optimizer = self.hyper, self.optimizer
        with as_plain_modules(self.model, self.train_loss, self.val_loss), in_words_of_the_tuner():
            losses = self._losses()
            inner, outer = losses.loss(self.train_loss, "train_loss", hyper), losses.loss(self.val_loss, "val_loss", hyper)
            device = next(iter(losses.w.values())).device.type
            problem = BilevelProblem(inner, without_trace(outer, device), SameBatch(drawn[0]), SameBatch(drawn[1]))
            decays = {name: self._trained.decays.get(name, 0.0) for name in losses.w}
            problem = problem.decayed(decays) if any(decays.values()) else problem
            bilevel = Bilevel(problem, losses.w, adjoint=self.adjoint, products=products_of(self.adjoint))
            weights = {name: list(leaf.shape) for name, leaf in losses.w.items()}
            # A copy of the containers: their tensors are replaced and never changed.
            memory: Any = self._memory if weights == self._weights else {}
            kept: Any = optree.tree_map(lambda x: x, memory)
            bilevel.state.memory = kept
            lam = hyper.values()
            estimate = bilevel.step(lam)
            optimizer.zero_grad()
            estimate.backward(lam)
        optimizer.step()
        optimizer.zero_grad()
        hyper.project_()
        self._memory, self._weights = bilevel.state.memory, weights
        self.steps += 1
        cost = estimate.cost
        gradients = cost.inner_gradients + cost.outer_gradients
        if not isinstance(self.adjoint, FiniteDifference):  # its products are made of gradients, which are counted already
            gradients += cost.hessian_products + cost.mixed_products
        return Record(self.steps, hyper.metrics(), gradients, cost.hessian_products, replace(estimate, w=None))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on except the model, as plain containers and tensors."""
        train, val = (mine.state_dict() for mine in self._batches)
        state = {
            "hyper": self.hyper.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "memory": self._memory,
            "weights": self._weights,
            "decays": self._trained.decays,
            "train": train,
            "val": val,
            "steps": self.steps,
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; load the model's own state too. If an entry does not fit, nothing is changed.

        Raises:
            TypeError, ValueError: an entry is missing, unknown, or does not fit; the message names it.
        """
        check_entries(state, ENTRIES, "Tuner")
        state = copy.deepcopy(state)
        before = copy.deepcopy(self.hyper.state_dict())
        self.hyper.load_state_dict(state["hyper"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception:
            self.hyper.load_state_dict(before)
            raise
        device = next(self.model.parameters()).device
        memory: Any = optree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, state["memory"])
        self._memory, self._weights, self.steps = memory, state["weights"], state["steps"]
        self._trained.decays = state["decays"]
        for mine, kept in zip(self._batches, (state["train"], state["val"]), strict=True):
            mine.load_state_dict(kept)


def products_of(adjoint: Any) -> ProductSettings:
    """Return how a step computes its products: the graph is kept if that takes little memory, and a step size is a rough one.

    Each batch has another largest curvature, so that the digits of one say nothing about the next.
    """
    products = ProductSettings(keep=None)
    sized = adjoint is None or isinstance(adjoint, str | Auto) or (isinstance(adjoint, ImplicitAdjoint) and adjoint.iterates)
    return replace(products, power=PowerSettings(rtol=0.25)) if sized else products


def check_arguments(model: Any, hyper: Any, train_loss: Any, val_loss: Any, optimizer: Any, adjoint: Any) -> None:
    """Refuse arguments of a ``Tuner`` that do not fit.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and what to give instead.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give the torch.nn.Module that is trained")
    if not isinstance(hyper, Hyperparameters):
        raise TypeError(
            f"hyper is a {type(hyper).__name__}; give one such as hyperopt.Hyperparameters({{'decay': hyperopt.Positive(1e-3)}})"
        )
    for name, loss in (("train_loss", train_loss), ("val_loss", val_loss)):
        refuse_other_arguments(loss, name, "model, batch, lam")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r} is not a torch.optim.Optimizer; give the optimizer of the hyperparameters, "
            "such as torch.optim.Adam(hyper.parameters(), lr=0.05)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer is LBFGS, which evaluates the loss at several hyperparameters in one step, but the weights are trained "
            "for one; give torch.optim.Adam, SGD, or another that takes one gradient a step"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if missing := [name for name, p in hyper.named_parameters() if p.requires_grad and id(p) not in held]:
        raise ValueError(
            f"optimizer does not hold {', '.join(missing)} of hyper, so they would never change; give it hyper.parameters()"
        )
    held -= {id(parameter) for parameter in hyper.parameters()}
    if held:
        weights = {id(parameter): name for name, parameter in model.named_parameters()}
        names = [weights[key] for key in held if key in weights] or ["other tensors"]
        raise ValueError(
            f"optimizer holds {', '.join(names[:8])} beside the hyperparameters, and would change them too; give it "
            "hyper.parameters() only"
        )
    if isinstance(adjoint, Estimator):
        raise ValueError(
            f"adjoint={type(adjoint).__name__} trains the weights itself, but your loop does that; give an implicit adjoint "
            'such as "auto" or hyperopt.Implicit(hyperopt.CG())'
        )
    estimator_of(adjoint, None, ProductSettings())
