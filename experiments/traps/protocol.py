"""How a trap is judged, and what a library must offer to be put to it. Needs the standard library only.

A case (cases.py) measures numbers; their limits are in traps.py. A verdict is

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

from traps import TRAPS, Trap

SECONDS = 120  # a case without an answer by then is a hang


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
    text = re.sub(r'File "[^"]*", line \d+, in \S+', "", " ".join(lines))
    text = " ".join(re.sub(r"0x[0-9a-f]+", "0x", re.sub(r"(/[\w.+-]+){2,}", "PATH", text)).split())
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
    versions = {name: version(name) for name in library.packages}
    print(json.dumps({"library": library.name, "versions": versions}), file=out, flush=True)
    for outcome in run(library, tuple(int(x) for x in sys.argv[1:])):
        print(json.dumps(vars(outcome)), file=out, flush=True)
