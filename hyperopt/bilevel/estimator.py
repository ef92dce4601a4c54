"""``Estimator``: a method that computes the hypergradient of a trained inner problem, as one class with one function.

A method keeps everything that it must remember from one outer step to the next, the weights first of all, in the ``State`` that
it is given and nowhere else; therefore a resumed run continues bit for bit. This also fits methods that move the weights, an
adjoint variable and the hyperparameters in one loop, and penalty methods, which keep a second copy of the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import optree
import torch

from hyperopt.bilevel.estimate import Estimate, State
from hyperopt.bilevel.problem import BilevelProblem


class Estimator(ABC):
    """A method that computes a hypergradient.

    Attributes:
        estimate: the one method that a subclass defines; see below.

    Example:
        >>> import torch, hyperopt
        >>> class ZeroAdjoint(hyperopt.Estimator):
        ...     def estimate(self, problem, lam, state):
        ...         found = hyperopt.hypergradient(problem, state.w, lam, adjoint=hyperopt.T1T2())
        ...         found.grad = torch.zeros_like(lam)
        ...         return found
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> hyperopt.Bilevel(problem, torch.tensor([0.5]), adjoint=ZeroAdjoint()).step(torch.ones(())).grad
        tensor(0.)
    """

    @abstractmethod
    def estimate(self, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
        """Move the inner variables ``state.w`` as the method does, and return the hypergradient there.

        Args:
            problem: the losses and their batches.
            lam: the hyperparameters, a tree of tensors, in the units of the losses.
            state: the weights and what the method remembers; changed in place.
        """


def commit(problem: BilevelProblem, state: State, w: Any, lam: Any, batch: Any) -> None:
    """Write the tensors of ``w`` into the weights of the state, and refresh running statistics."""
    with torch.no_grad():
        for old, new in zip(optree.tree_leaves(state.w), optree.tree_leaves(w), strict=True):
            old.copy_(new)
    if problem.refresh is not None:
        problem.refresh(state.w, lam, batch)


def refuse_ignored(method: object, inner: object, products: Any, unused: Iterable[str]) -> None:
    """Refuse arguments that a method would ignore.

    Args:
        method: the method.
        inner: the inner solver, if the method trains the weights itself and so cannot use it; else None.
        products: the ``ProductSettings``.
        unused: the fields of ``products`` that the method does not use.

    Raises:
        ValueError: an argument would be ignored; the message names it.
    """
    name = type(method).__name__
    if inner is not None:
        raise ValueError(
            f"{name} trains the weights itself and would ignore inner={type(inner).__name__}(...); leave inner out, and set the "
            f"steps of {name}"
        )
    default = type(products)()
    for field in (f.name for f in fields(products) if f.name in unused):
        if getattr(products, field) != getattr(default, field):
            raise ValueError(f"{name} does not use {field}={getattr(products, field)!r}; leave {field} out")
