"""``Estimator``: how a hypergradient of a trained inner problem is found. A method is one class with one function.

Everything that a method must remember from one outer step to the next, the weights first of all, lies in the ``State`` that it is
given, and nowhere else: that is what makes a run continue bit for bit. Methods that move the weights, an adjoint variable and the
hyperparameters together (one loop), or that keep a second copy of the weights (penalty methods), fit in the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from hyperopt.bilevel.estimate import Estimate, State
from hyperopt.bilevel.problem import BilevelProblem


class Estimator(ABC):
    """A method for the hypergradient."""

    @abstractmethod
    def estimate(self, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
        """Bring the inner variables ``state.w`` where the method wants them, and return the hypergradient there.

        Args:
            problem: the losses and their batches.
            lam: the hyperparameters, a tree of tensors, in the units of the losses.
            state: what the method remembers; changed in place.
        """


def refuse_ignored(method: object, inner: object, products: Any, unused: Iterable[str]) -> None:
    """Refuse what was given to a method that has no use for it, rather than ignore it.

    Args:
        method: the method.
        inner: the inner solver, where the method trains the weights itself; else None.
        products: how products are to be taken, a ``ProductSettings``.
        unused: the fields of ``products`` that the method does not use.

    Raises:
        ValueError: names the argument.
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
            raise ValueError(f"{name} has no use for {field}={getattr(products, field)!r}; leave {field} out")
