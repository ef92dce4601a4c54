"""What a trap is, how it is judged, and what a library must offer to be put to it. Needs the standard library only.

A case (cases.py) measures numbers; the limits are here, one place for all libraries. A verdict is

- ``pass``: every number is within its limit, or the library said that something was wrong: it raised an error, warned, or gave
  back a status or a residual that shows it;
- ``fail``: a number is beyond its limit, and nothing was said;
- ``not applicable``: the library does not offer the thing, with the reason;
- ``error``: the measurement itself broke, which says nothing of the library and must be looked into.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

SECONDS = 120  # a case without an answer by then is a hang


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
        "The forward solve is exact, the adjoint solve may take 3 steps on a map of radius 0.99: the gradient is within 1e-3, or "
        "the library says that the solve failed.",
        {"relative error of the gradient": 1e-3},
    ),
    Trap(
        3,
        "linear solvers",
        "Every public linear solver gives 3 for 2x = 6, 4 for x/2 = 2, 2 for 3x/2 = 3, 0 for a right-hand side of 0, and a "
        "system of three, each within 1e-6, or says that it failed.",
        {"largest error": 1e-6},
        firm=("largest error",),
    ),
    Trap(
        4,
        "several backwards",
        "Two solves before one backward, and a second backward through one solve, give gradients within 1e-6 without a hang; "
        "what a solve made is freed when its result is dropped, with no backward made.",
        {"relative error, two solves": 1e-6, "relative error, second backward": 1e-6, "evaluations still alive": 0},
        firm=("relative error, two solves", "relative error, second backward", "evaluations still alive",),
    ),
    Trap(
        5,
        "one bad row",
        "One row of a batch of four has a NaN in its data: states and gradients of the others are within 1e-6.",
        {"relative error of the other states": 1e-6, "relative error of the other gradients": 1e-6},
        firm=("relative error of the other states", "relative error of the other gradients",),
    ),
    Trap(
        6,
        "damped iteration",
        "Damped by 0.01 at a tolerance of 1e-4, the state's true residual, absolute or relative, whichever is less, is at most "
        "twice the tolerance.",
        {"true residual / tolerance": 2.0},
    ),
    Trap(
        7,
        "Anderson's scale",
        "The same map at scales 1e-3, 1 and 1e3, tolerance scaled with it, takes as many evaluations, to a quarter; with "
        "max_steps=2 the state is nearer to the fixed point than the start.",
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
        "Eight rows, one at rate 0.99 and seven at 0.1: at most 1.5 times the row evaluations of the rows solved one by one.",
        {"row evaluations / one by one": 1.5},
        firm=("row evaluations / one by one",),
    ),
    Trap(
        10,
        "one-step gradients",
        "With the library's default settings, state and gradient are those of the fixed point, to 1e-2.",
        {"relative error of the state": 1e-2, "relative error of the gradient": 1e-2},
    ),
    Trap(
        11,
        "batch statistics",
        "A map with a BatchNorm in training mode: one forward and backward updates the running statistics at most once, or the "
        "map is refused.",
        {"updates": 1},
    ),
    Trap(
        12,
        "maps that do not contract",
        "3z + 1 by plain iteration: the residual of the state is at most 1e-3, or the library says that it is not; where the "
        "library estimates the contraction, it gives 0.9 for a rotation scaled by 0.9, to 0.05.",
        {"relative residual": 1e-3, "error of the contraction estimate": 0.05},
        firm=("error of the contraction estimate",),
    ),
    Trap(
        13,
        "stale Jacobian",
        "The library's fastest method (Newton, else quasi-Newton), stopped early at 1e-2: the gradient's relative error is at "
        "most 100 times that of the state.",
        {"error of the gradient / of the state": 100.0},
        firm=("error of the gradient / of the state",),
    ),
    Trap(
        14,
        "autocast",
        "float32 parameters under bfloat16 autocast: the gradient is float32 and within 5e-2, or an error is raised.",
        {"relative error of the gradient": 5e-2, "bits lost by the gradient": 0},
    ),
    Trap(
        15,
        "odd shapes",
        "Leaves of different leading dimensions, a dict, a 0-d state, a start that is not contiguous, a parameter that the map does "
        "not use, an empty batch: value and gradient within 1e-6, or an error is raised; never silently wrong.",
        {"silently wrong, of 6": 0},
        firm=("silently wrong, of 6",),
    ),
    Trap(
        16,
        "misspelt options",
        "A misspelt option is refused, and the caller's configuration is left as it was.",
        {"misspelt options taken": 0, "configurations changed": 0},
        firm=("misspelt options taken", "configurations changed",),
    ),
    Trap(
        17,
        "distributed",
        "One and two ranks give the same hypergradient to 12 digits.",
        {"relative difference of the gradient": 1e-12},
    ),
]


class NotOfferedError(Exception):
    """The library does not offer what the case needs; the message is the reason."""


@dataclass(frozen=True)
class Wish:
    """What a case asks of a solve, in words that every library can translate; ``None`` is the library's own default.

    Attributes:
        method: ``best`` (what the library recommends), ``picard``, ``anderson`` or ``newton`` (Newton, else quasi-Newton).
        tol: tolerance, relative where the library has relative ones, else absolute and times ``scale``.
        scale: size of the state.
        max_steps: most iterations.
        damping: of ``picard``.
        adjoint_tol: tolerance of the backward solve.
        adjoint_steps: most iterations of the backward solve.
        batch: the rows of the state are independent, in the library's way to have them so.
        row_params: places of the parameters that have one row for each row of the state.
        defaults: everything at the library's defaults.
    """

    method: str = "best"
    tol: float | None = 1e-11
    scale: float = 1.0
    max_steps: int | None = 5000
    damping: float = 1.0
    adjoint_tol: float | None = 1e-11
    adjoint_steps: int | None = 5000
    batch: bool = False
    row_params: tuple[int, ...] = ()
    defaults: bool = False


@dataclass
class Answer:
    """A solve's value, and ``said()``: what the library itself says is wrong with it ("" for nothing)."""

    value: Any
    said: Callable[[], str] = lambda: ""


class Library(ABC):
    """What a case needs. A method that is not overridden says that the library does not offer it."""

    name: str
    packages: tuple[str, ...]
    tolerance: str = "rtol"

    # ---- the array package

    @abstractmethod
    def array(self, numbers: Any, kind: str = "float64") -> Any:
        """Nested lists as an array."""

    @abstractmethod
    def numbers(self, array: Any) -> Any:
        """An array as nested lists."""

    @abstractmethod
    def gradient(self, f: Callable[[Any], Any], x: Any) -> Any:
        """Gradient of a scalar function at an array."""

    @abstractmethod
    def hvp(self, f: Callable[[Any], Any], x: Any, u: Any) -> Any:
        """Hessian-vector product."""

    @abstractmethod
    def second_backward(self, f: Callable[[Any], Any], x: Any) -> Any:
        """The gradient, from the second of two backwards through one forward."""

    @abstractmethod
    def counted(self, phi: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[], int]]:
        """The map, and how many evaluations, of one row each, have been made of it."""

    def alive(self, run: Callable[[Callable[..., Any]], Any], phi: Callable[..., Any]) -> int | None:
        """How many results of ``phi`` outlive the result of ``run``; None where there is no graph to keep them."""
        return None

    # ---- the library

    def solve(self, phi: Callable[..., Any], w0: Any, params: tuple[Any, ...], wish: Wish) -> Answer:
        """Solve ``w = phi(w, *params)``, differentiable in ``params``."""
        raise NotOfferedError("no fixed-point solver")

    def linear_solvers(self) -> dict[str, Callable[[list[list[float]], list[float]], Answer]]:
        """The public linear solvers of ``A x = b`` by name; positive definite A."""
        raise NotOfferedError("no public linear solver")

    def contraction(self, phi: Callable[..., Any], w0: Any) -> float:
        """The library's estimate of the contraction factor at the fixed point."""
        raise NotOfferedError("no estimate of the contraction")

    def batch_norm(self, width: int) -> tuple[Callable[..., Any], Callable[[], int]]:
        """A BatchNorm layer in training mode, and how often its statistics were updated."""
        raise NotOfferedError("maps are pure functions, there are no running statistics to change")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """A region of bfloat16 autocast."""
        raise NotOfferedError("there is no autocast")

    def entry(self, **options: Any) -> None:
        """Use the library's entry point with options of its own, among which ``tolerance`` names one."""
        raise NotOfferedError("no options")

    def config_changed(self) -> bool | None:
        """Whether a configuration passed in is changed by its use; None where no mutable one can be passed."""
        return None

    def distributed(self) -> float:
        """Relative difference of the hypergradient between one and two ranks."""
        raise NotOfferedError("no data-parallel hypergradient is offered")

    # ---- cases of its own

    def special(self, number: int) -> Callable[[], Measured] | None:
        """A case that takes the place of the common one, for a library without a fixed-point solver."""
        return None

    def remark(self, number: int) -> str:
        """What a reader must know beside the number: which documented setting it was, and what another one gives."""
        return ""


@dataclass
class Measured:
    """What a case found: the numbers, what the library said, and what was done."""

    numbers: dict[str, float]
    did: str
    said: str = ""


@dataclass
class Outcome:
    """One row of the results."""

    trap: int
    verdict: str
    numbers: dict[str, float | None] = field(default_factory=dict)
    said: str = ""
    did: str = ""
    reason: str = ""
    remark: str = ""


class HangError(BaseException):
    """No answer within ``SECONDS``; no library may catch it."""


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    """Raise ``HangError`` where a case takes too long."""

    def ring(signum: int, frame: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(call: Callable[[], Any]) -> tuple[Any, str]:
    """``(call(), "")``, or ``(None, what was raised)``."""
    try:
        return call(), ""
    except NotOfferedError:
        raise
    except Exception as found:
        return None, f"raised {type(found).__name__}: {brief(str(found))}"


def brief(text: str, limit: int = 200) -> str:
    """One line of at most ``limit`` characters, without stack traces, paths or addresses; of a long text, the gist."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if "stack" in line or line.startswith("Traceback")), None)
    if start is not None:  # errors of compiled programs carry their stack, and say what happened last
        told = [line for line in lines if SPOKEN.search(line)]
        lines = told[-1:] or lines[:start] or lines[-1:]
    text = re.sub(r"0x[0-9a-f]+", "0x", re.sub(r"(/[\w.+-]+){2,}", "PATH", " ".join(lines)))
    return text if len(text) <= limit else text[: limit - 3] + "..."


SPOKEN = re.compile(r"(Error: |maximum number|failed|converge|diverge|singular|not finite|nonfinite|breakdown)")


def judge(trap: Trap, found: Measured) -> Outcome:
    """The verdict."""
    unknown = set(found.numbers) - set(trap.limits)
    if unknown:
        raise KeyError(f"trap {trap.number} has no limit for {unknown}")
    beyond = [name for name, value in found.numbers.items() if not value <= trap.limits[name]]  # so is a NaN
    failed = [name for name in beyond if not found.said or name in trap.firm]
    numbers = {name: value if math.isfinite(value) else None for name, value in found.numbers.items()}
    return Outcome(trap.number, "fail" if failed else "pass", numbers, said=found.said, did=found.did)


IGNORED = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)


def try_trap(library: Library, trap: Trap, case: Callable[[Library], Measured]) -> Outcome:
    """Put the library to one trap. A warning given on the way counts as said, but for those of deprecation."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with deadline():
                own = library.special(trap.number)
                found = own() if own is not None else case(library)
        except NotOfferedError as found:
            return Outcome(trap.number, "not applicable", reason=str(found))
        except HangError:
            return Outcome(trap.number, "fail", did=f"no answer within {SECONDS} s")
        except Exception as found:
            print("".join(traceback.format_exception(found)), file=sys.stderr)
            return Outcome(trap.number, "error", reason=f"{type(found).__name__}: {brief(str(found))}")
    said = [found.said] if found.said else []
    for warning in caught:
        text = f"warned {warning.category.__name__}: {brief(str(warning.message))}"
        if not issubclass(warning.category, IGNORED) and text not in said:
            said.append(text)
    found.said = "; ".join(said)
    outcome = judge(trap, found)
    outcome.remark = library.remark(trap.number)
    return outcome


def run(library: Library, only: tuple[int, ...] = ()) -> Iterator[Outcome]:
    """Put the library to every trap (or those in ``only``)."""
    from cases import CASES

    for trap in TRAPS:
        if not only or trap.number in only:
            yield try_trap(library, trap, CASES[trap.number])


def main(library: Library) -> None:
    """Print one JSON object a trap, the versions first; numbers on the command line choose traps."""
    from importlib.metadata import version

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the results
    print(json.dumps({"library": library.name, "versions": {name: version(name) for name in library.packages}}), file=out, flush=True)
    for outcome in run(library, tuple(int(x) for x in sys.argv[1:])):
        print(json.dumps(vars(outcome)), file=out, flush=True)
