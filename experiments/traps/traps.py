"""The traps: what is asked, and the limits, one place for all libraries. Needs the standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trap:
    """One trap.

    Attributes:
        number: in the design.
        name: a few words.
        criterion: what is asked.
        limits: of every number that is measured.
        firm: numbers that must be within their limits whatever the library says; the others are excused by its saying so.
    """

    number: int
    name: str
    criterion: str
    limits: dict[str, float]
    firm: tuple[str, ...] = ()


TRAPS = [
    Trap(
        1,
        "double backward",
        "The Hessian-vector product through the implicit adjoint is within 1e-6 of the closed form, or an error is raised.",
        {"relative error of the Hessian-vector product": 1e-6},
    ),
    Trap(
        2,
        "failed backward solve",
        "The forward solve is exact, and the adjoint solve may take 3 steps on a map of radius 0.99. The gradient is within "
        "1e-3, or the library says that the solve failed.",
        {"relative error of the gradient": 1e-3},
    ),
    Trap(
        3,
        "linear solvers",
        "Every public linear solver solves 2x = 6, x/2 = 2, 3x/2 = 3, an equation with a right-hand side of 0, and a system of "
        "three equations. Each solution is within 1e-6, or the solver says that it failed.",
        {"largest error": 1e-6},
        firm=("largest error",),
    ),
    Trap(
        4,
        "several backwards",
        "Two solves before one backward, and a second backward through one solve, give gradients within 1e-6 without a hang. "
        "When a result is dropped before any backward, everything that its solve made is freed.",
        {"relative error, two solves": 1e-6, "relative error, second backward": 1e-6, "evaluations still alive": 0},
        firm=(
            "relative error, two solves",
            "relative error, second backward",
            "evaluations still alive",
        ),
    ),
    Trap(
        5,
        "one bad row",
        "One row of a batch of four has a NaN in its data. States and gradients of the other rows are within 1e-6.",
        {"relative error of the other states": 1e-6, "relative error of the other gradients": 1e-6},
        firm=(
            "relative error of the other states",
            "relative error of the other gradients",
        ),
    ),
    Trap(
        6,
        "damped iteration",
        "The iteration is damped by 0.01 and stops at a tolerance of 1e-4. The state's true residual is at most twice the "
        "tolerance; the smaller of the absolute and the relative residual counts.",
        {"true residual / tolerance": 2.0},
    ),
    Trap(
        7,
        "Anderson's scale",
        "The same map is solved at scales 1e-3, 1 and 1e3, with the tolerance scaled too. The numbers of evaluations are the "
        "same to a quarter. With max_steps=2 the state is nearer to the fixed point than the start.",
        {"most / least evaluations": 1.25, "distance after 2 steps / at the start": 0.999},
        firm=("most / least evaluations",),
    ),
    Trap(
        8,
        "absolute adjoint tolerance",
        "With the library's own adjoint settings, the gradient of 1e-6 times the loss is 1e-6 times the gradient, to 1e-3.",
        {"relative change of the gradient": 1e-3},
        firm=("relative change of the gradient",),
    ),
    Trap(
        9,
        "whole-batch stopping",
        "A batch has one row at rate 0.99 and seven at 0.1. It takes at most 1.5 times the row evaluations of the rows solved "
        "one by one.",
        {"row evaluations / one by one": 1.5},
        firm=("row evaluations / one by one",),
    ),
    Trap(
        10,
        "one-step gradients",
        "With the library's default settings, state and gradient are those of the fixed point to 1e-2.",
        {"relative error of the state": 1e-2, "relative error of the gradient": 1e-2},
    ),
    Trap(
        11,
        "batch statistics",
        "The map has a BatchNorm in training mode. One forward and one backward update its running statistics at most once, or "
        "the map is refused.",
        {"updates": 1},
    ),
    Trap(
        12,
        "maps that do not contract",
        "Plain iteration is applied to 3z + 1. The residual of the state is at most 1e-3, or the library says that it is larger. "
        "A library that estimates the contraction gives 0.9, to 0.05, for a rotation scaled by 0.9.",
        {"relative residual": 1e-3, "error of the contraction estimate": 0.05},
        firm=("error of the contraction estimate",),
    ),
    Trap(
        13,
        "stale Jacobian",
        "The library's fastest method (Newton, else quasi-Newton) is stopped early at 1e-2. The gradient's relative error is at "
        "most 100 times that of the state.",
        {"error of the gradient / of the state": 100.0},
        firm=("error of the gradient / of the state",),
    ),
    Trap(
        14,
        "autocast",
        "The parameters are float32 and run under bfloat16 autocast. The gradient is float32 and within 5e-2, or an error is "
        "raised.",
        {"relative error of the gradient": 5e-2, "bits lost by the gradient": 0},
    ),
    Trap(
        15,
        "odd shapes",
        "There are six cases: leaves of different leading dimensions, a dict, a 0-d state, a start that is not contiguous, a "
        "parameter that the map does not use, and an empty batch. Value and gradient are within 1e-6, or an error is raised.",
        {"silently wrong, of 6": 0},
        firm=("silently wrong, of 6",),
    ),
    Trap(
        16,
        "misspelt options",
        "A misspelt option is refused, and the caller's configuration is left as it was.",
        {"misspelt options taken": 0, "configurations changed": 0},
        firm=(
            "misspelt options taken",
            "configurations changed",
        ),
    ),
    Trap(
        17,
        "distributed",
        "One and two ranks give the same hypergradient to 12 digits.",
        {"relative difference of the gradient": 1e-12},
    ),
]
