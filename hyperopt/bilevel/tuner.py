"""``Tuner``: hyperparameters that learn beside a training loop which stays as it is.

    hyper = hyperopt.Hyperparameters({"decay": hyperopt.Positive(1e-3)})
    tuner = hyperopt.Tuner(model, hyper, train_loss=..., val_loss=..., optimizer=torch.optim.Adam(hyper.parameters(), lr=0.05))
    for batch in train_loader:
        optimizer.zero_grad(); tuner.loss(batch).backward(); optimizer.step()
    record = tuner.step(train_loader, val_loader)

A step takes the implicit hypergradient at the weights where they are, of ``val_loss`` through a minimum of ``train_loss`` and of
the weight decay of the optimizer that trains, and lets ``optimizer`` move the hyperparameters once. Nothing else is moved.

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

from hyperopt.bilevel.batches import SameBatch
from hyperopt.bilevel.estimator import Estimator
from hyperopt.bilevel.finite_difference import FiniteDifference
from hyperopt.bilevel.hypergradient import Bilevel, estimator_of
from hyperopt.bilevel.implicit import ProductSettings
from hyperopt.bilevel.own_batches import OwnBatches, check_counts, taken
from hyperopt.bilevel.own_losses import ModuleLosses, OwnLoss, in_words_of_the_tuner, plainly, without_trace
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.bilevel.record import Record
from hyperopt.bilevel.refusals import refuse_other_arguments
from hyperopt.bilevel.trained_by import TrainedBy
from hyperopt.core import distributed
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.state import check_entries
from hyperopt.spaces.hyperparameters import Hyperparameters

ENTRIES = ("hyper", "optimizer", "memory", "weights", "decays", "train", "val", "steps")


class Tuner:
    r"""Moves hyperparameters by hypergradients, beside a training loop of the user's.

    .. math:: dE/d\lambda = d_\lambda E - (d_\lambda \nabla_w L)^T u, \qquad H u = d_w E.

    Args:
        model: the module that is trained, as the loop uses it: compiled, or in ``DistributedDataParallel``, too.
        hyper: the hyperparameters.
        train_loss: ``L``, as ``train_loss(model, batch, lam)``: plain code that calls ``model``, with the hyperparameters by name
            in their own units, ``lam["decay"]``. Returns a scalar, a mean over the rows of the batch.
        val_loss: ``E``, likewise.
        optimizer: moves ``hyper.parameters()``, and nothing else.
        adjoint: ``"auto"``, which chooses by what it meets and says so in the record, or any implicit adjoint of the library.
        trained_by: the optimizer, or optimizers, that train the model, whose weight decay is a part of what is trained (default:
            those that are seen to step its parameters).

    Attributes:
        steps: steps made.

    Raises:
        TypeError, ValueError: an argument that does not fit, named with what to give instead.

    The weights are the parameters that require grad at the moment of a step, and which an optimizer trains, if one was seen. In
    ``torch.distributed`` each rank gives batches of its own, the losses are means over all rows, and each rank does the same.

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
        """Check the arguments, and look out for the optimizer that trains the model."""
        check_arguments(model, hyper, train_loss, val_loss, optimizer, adjoint)
        self.model, self.hyper, self.optimizer, self.adjoint = model, hyper, optimizer, adjoint
        self.train_loss, self.val_loss = train_loss, val_loss
        self.steps = 0
        self._memory: dict[str, Any] = {}
        self._weights: dict[str, list[int]] = {}  # whose memory it is: shapes by name
        self._batches = OwnBatches("train"), OwnBatches("val")
        given = [trained_by] if isinstance(trained_by, torch.optim.Optimizer) else trained_by
        if not isinstance(given, list | tuple) or any(not isinstance(each, torch.optim.Optimizer) for each in given):
            raise TypeError(f"trained_by={trained_by!r} is no optimizer of PyTorch; give that of the model, or a list of them")
        self._trained = TrainedBy(given)
        with in_words_of_the_tuner():
            self._losses()

    def __repr__(self) -> str:
        """The model's class, the hyperparameters in their own units, the adjoint and the number of steps."""
        values = ", ".join(f"{name.removeprefix('hyper/')}={value:.4g}" for name, value in self.hyper.metrics().items())
        return f"Tuner({type(self.model).__name__}, {values}, adjoint={self.adjoint!r}, steps={self.steps})"

    def _losses(self) -> ModuleLosses:
        """The losses at the present parameters; those that may be trained are looked out for."""

        def trained(parameters: dict[str, Tensor]) -> dict[str, float]:
            found = self._trained.look(parameters)
            self._trained.watch(parameters)
            return found

        return ModuleLosses(self.model, self.hyper, trained)

    def loss(self, batch: Any) -> Tensor:
        """``train_loss`` on a batch for a step of training, with the hyperparameters as constants."""
        self._trained.rest()
        return self.train_loss(self.model, batch, self.hyper.read())

    def step(self, train: Any, val: Any, *, batches: int | tuple[int, int] | None = None) -> Record:
        """One hypergradient at the weights where they are, and one step of ``optimizer``.

        Args:
            train: data of ``train_loss``: one batch (a tensor, tuple, mapping, or a list with tensors in it), a list of batches,
                an iterator, a ``DataLoader``, which goes on from step to step, a dataset, or a source such as ``Minibatches``.
            val: data of ``val_loss``, likewise.
            batches: how many batches of each, or of ``train`` and of ``val``; a loss is the mean over them (default: one of what
                batches are drawn from, and all of a list).

        Returns:
            ``Record``: what was found, what it cost, and how far it may be off.

        Raises:
            TypeError, ValueError, RuntimeError: a loss or data that do not fit, named with what to change.
            SolveError: the hypergradient is not finite.
            All of them are raised before anything is moved; what was taken from an iterator of the user's is not put back.
        """
        if not any(parameter.requires_grad for parameter in self.hyper.parameters()):
            raise ValueError("no hyperparameter requires grad, so that none would move; call hyper.requires_grad_()")
        with taken(self._batches, (train, val), check_counts(batches)) as drawn:
            return self._step(drawn)

    def _step(self, drawn: list[list[Any]]) -> Record:
        """A step on these batches of ``train`` and of ``val``."""
        counts = distributed.from_all([len(each) for each in drawn])
        if any(count != counts[0] for count in counts):
            raise ValueError(f"the ranks have different numbers of batches of train and val: {counts}; give each as many")
        hyper, optimizer = self.hyper, self.optimizer
        with plainly(self.model, self.train_loss, self.val_loss), in_words_of_the_tuner():
            losses = self._losses()
            inner, outer = losses.loss(self.train_loss, "train_loss", hyper), losses.loss(self.val_loss, "val_loss", hyper)
            device = next(iter(losses.w.values())).device.type
            problem = BilevelProblem(inner, without_trace(outer, device), SameBatch(drawn[0]), SameBatch(drawn[1]))
            decays = {name: self._trained.decays.get(name, 0.0) for name in losses.w}
            problem = problem.decayed(decays) if any(decays.values()) else problem
            bilevel = Bilevel(problem, losses.w, adjoint=self.adjoint, products=ProductSettings(keep=False))
            weights = {name: list(leaf.shape) for name, leaf in losses.w.items()}
            bilevel.state.memory = copy.deepcopy(self._memory) if weights == self._weights else {}
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
        if not isinstance(self.adjoint, FiniteDifference):  # whose products are gradients
            gradients += cost.hessian_products + cost.mixed_products
        return Record(self.steps, hyper.metrics(), gradients, cost.hessian_products, replace(estimate, w=None))

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on beside the model, as plain containers and tensors."""
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
        """Take back what ``state_dict`` returned: all of it, or nothing. Load the model's own state too.

        Raises:
            TypeError, ValueError: names the entry that is missing, unknown, or does not fit; nothing was changed.
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


def check_arguments(model: Any, hyper: Any, train_loss: Any, val_loss: Any, optimizer: Any, adjoint: Any) -> None:
    """Refuse arguments of a ``Tuner`` that do not fit.

    Raises:
        TypeError, ValueError: names the argument and what to give instead.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give the torch.nn.Module that is trained")
    if not isinstance(hyper, Hyperparameters):
        raise TypeError(
            f"hyper is a {type(hyper).__name__}; give hyperopt.Hyperparameters({{'decay': hyperopt.Positive(1e-3)}}), or the like"
        )
    for name, loss in (("train_loss", train_loss), ("val_loss", val_loss)):
        refuse_other_arguments(loss, name, "model, batch, lam")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r} is no optimizer of PyTorch; give one of the hyperparameters, such as "
            "torch.optim.Adam(hyper.parameters(), lr=0.05)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer is LBFGS, which looks at the loss for several hyperparameters, but the weights are trained for one; give "
            "torch.optim.Adam, SGD, or another that takes one gradient a step"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if missing := [name for name, p in hyper.named_parameters() if p.requires_grad and id(p) not in held]:
        raise ValueError(
            f"optimizer does not hold {', '.join(missing)} of hyper, so that they would never move; give it hyper.parameters()"
        )
    held -= {id(parameter) for parameter in hyper.parameters()}
    if held:
        weights = {id(parameter): name for name, parameter in model.named_parameters()}
        names = [weights[key] for key in held if key in weights] or ["other tensors"]
        raise ValueError(
            f"optimizer holds {', '.join(names[:8])} beside the hyperparameters, and would move them too; give it "
            "hyper.parameters() alone"
        )
    if isinstance(adjoint, Estimator):
        raise ValueError(
            f"adjoint={type(adjoint).__name__} trains the weights itself, which your loop does; give an implicit adjoint, such "
            'as "auto" or hyperopt.Implicit(hyperopt.CG())'
        )
    estimator_of(adjoint, None, ProductSettings())
