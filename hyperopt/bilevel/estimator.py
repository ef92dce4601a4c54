"""``Estimator``: how a hypergradient of a trained inner problem is found. A method is one class with one function.

Everything that a method must remember from one outer step to the next, the weights first of all, lies in the ``State`` that it is
given, and nowhere else: that is what makes a run continue bit for bit. Methods that move the weights, an adjoint variable and the
hyperparameters together (one loop), or that keep a second copy of the weights (penalty methods), fit in the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
