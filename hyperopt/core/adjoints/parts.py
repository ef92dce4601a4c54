"""The linearization of some of the rows, so that a linear solve spends nothing on rows that are solved.

A map in closed form gives it from what is at hand. A graph knows all of its rows or none: there the map is called once more, on
the rows that are left, and only where the caller has said that it takes all that belongs to a row through ``row_args``. If that
call does not give what the solve gave, the map is no longer the one that was solved (``functional_call`` has put other parameters
into it, say), and the graph of all rows is used on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hyperopt.core.adjoints.base import Problem
from hyperopt.core.jacobian import Jacobian


def graph_part(problem: Problem, point: Tensor, out: Tensor) -> Callable[[Tensor], Jacobian | None]:
    """Return ``part(index)``: a new graph of some rows at ``point``, None where the map no longer gives ``out`` there."""

    def part(index: Tensor) -> Jacobian | None:
        with torch.enable_grad():
            leaf = point[index].detach().requires_grad_()
            graph = problem.part(index)(leaf)
        want = out[index]
        change, size = torch.linalg.vector_norm(graph.detach() - want), torch.linalg.vector_norm(want)
        if not bool(change <= math.sqrt(torch.finfo(want.dtype).eps) * size):
            return None
        found = Jacobian(graph, leaf)
        found.evaluations = 1
        return found

    return part
