"""Functions that run eagerly beside the graphs of ``torch.compile``.

``torch.compiler.disable`` imports the compiler, which takes about as long as the rest of torch. Here this happens when
something is compiled, and not when this package is imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

MARKED: dict[str, tuple[Callable[..., Any], str]] = {}
"""The marked functions by their full names with underscores, each with the reason why it is not compiled."""


def runs_eagerly(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator of a function that ``torch.compile`` must not trace.

    Args:
        reason: why; ``fullgraph=True``, which refuses the function, prints it.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{function.__module__}.{function.__qualname__}".replace(".", "_")
        MARKED[name] = (function, reason)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                return function(*args, **kwargs)
            return getattr(sys.modules[__name__], name)(*args, **kwargs)

        return call

    return mark


@functools.cache
def __getattr__(name: str) -> Any:
    """Return a marked function as ``torch.compiler.disable`` returns it.

    The compiler runs this while it traces ``call``. A function that it traces may not use ``torch.compiler.disable`` itself.
    """
    if name not in MARKED:
        raise AttributeError(name)
    function, reason = MARKED[name]
    return torch.compiler.disable(function, reason=reason)
