"""``ModuleLosses``: a user's losses, which call a module, as functions ``(w, lam, batches)`` of a ``BilevelProblem``.

    loss(model, batch, lam)   ->   mean over batches and ranks of  loss(model at w, batch, lam)

The user's own module is called at other values of its parameters. They are replaced inside the module (``Functional``), and
also where the loss uses a parameter directly, from a list that was made earlier for example. An evaluation leaves no trace:
buffers, modes, counters and gradients are restored (``hyperopt.core.replay``). Compiled code, ``DistributedDataParallel`` and
autocast are bypassed, because they have no second derivative, or a different one on each rank.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hyperopt.bilevel.functional import Functional
from hyperopt.bilevel.refusals import refuse_no_rows, refuse_no_scalar, rows_of
from hyperopt.core import distributed
from hyperopt.core.captured import Swap, nodes
from hyperopt.core.graph_modes import autocast_kinds, refuse_reentrant, without_autocast
from hyperopt.core.norms import lean
from hyperopt.core.places import Places
from hyperopt.core.policy import ImpureMapError, SolveError
from hyperopt.core.replay import Replay
from hyperopt.spaces.hyperparameters import Hyperparameters

OwnLoss = Callable[[Any, Any, dict[str, Any]], Tensor]
"""``loss(model, batch, lam)`` returns a scalar; it calls the module and reads the hyperparameters in their own units."""


class _Called(nn.Module):
    """A module whose forward calls ``function(model, ...)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


class _Replaced(Swap):
    """A mode that replaces the parameters of a module in the arguments of every PyTorch function.

    The function also runs without autocast, and in a form whose second derivative takes little memory. One mode does all three,
    since each mode costs as much time as a small operator.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs, func = self.swap(args), self.swap(kwargs or {}), lean(func)
        if not autocast_kinds():
            return func(*args, **kwargs)
        with without_autocast():
            return func(*args, **kwargs)

    def _swap_tensor(self, tensor: Tensor) -> Tensor:
        entry = self.table.get(id(tensor))
        return tensor if entry is None else entry[1]


class ModuleLosses:
    """The losses of a module at its present parameters.

    Args:
        model: the module.
        hyper: the hyperparameters; their parameters are not weights, even if they are inside the module.
        trained: a function that takes the parameters that require grad, by name, and returns the names of those that are
            trained; these are the weights.

    Attributes:
        w: the weights by name, as in ``Functional``.
        parameters: the module's own parameters, by the same names.

    Raises:
        ValueError: no parameter requires grad, one is in half precision or sharded, or a lazy module has not been called yet.
    """

    def __init__(self, model: nn.Module, hyper: Hyperparameters, trained: Callable[[dict[str, Tensor]], Collection[str]]) -> None:
        called = _Called(model)
        own = dict(called.named_parameters())
        left = Functional(called, hyper.parameters()).w
        weights = trained({name: own[name] for name in left})
        self.functional = Functional(called, [p for name, p in own.items() if name not in weights])
        self.w = self.functional.w
        self.parameters = {name: own[name] for name in self.w}
        for name, parameter in self.parameters.items():
            if parameter.dtype.itemsize < 4:
                raise ValueError(
                    f"{_parameter(name)} has dtype {parameter.dtype}, which gives a hypergradient only two or three digits; "
                    "keep the weights in float32 and train under torch.autocast"
                )
            if hasattr(parameter, "placements"):
                raise ValueError(f"{_parameter(name)} is sharded (a DTensor), so each rank has only a part of it; use DDP")

    def loss(self, own: OwnLoss, name: str, hyper: Hyperparameters) -> Callable[[Any, Any, Sequence[Any]], Tensor]:
        """Return a user's loss, called ``name`` in messages, as a function of ``(w, lam, batches)``."""
        functional, parameters = self.functional, self.parameters
        raw = {id(parameter): path for path, parameter in hyper.named_parameters()}

        def one(w: dict[str, Tensor], lam: Any, batch: Any) -> Tensor:
            with _Replaced(((p, w[name]) for name, p in parameters.items()), discover=False):
                value = functional(w, own, batch, lam)
            refuse_no_scalar(value, name, batch)
            return value

        def mean(w: dict[str, Tensor], lam: Any, batches: Sequence[Any]) -> Tensor:
            for batch in batches:
                refuse_no_rows(name, batch)
            values = [distributed.mean_over_ranks(one, w, lam, batch, rows=rows_of(batch)) for batch in batches]
            if bad := [number for each in values if not math.isfinite(number := float(each.detach()))]:  # the same on all ranks
                raise ValueError(f"{name} is {bad[0]:g} on a batch: check the data, the weights and the hyperparameters")
            value = values[0] if len(values) == 1 else torch.stack([each.reshape(()) for each in values]).mean()
            leaves = {id(leaf): leaf for leaf in variables(value)}
            if strays := [path for key, path in raw.items() if key in leaves]:
                raise ValueError(
                    f"{name} reads {', '.join(strays)} from the Hyperparameters object, which has no hypergradient; "
                    "let it use its argument lam"
                )
            if strays := [key for key, p in parameters.items() if id(p) in leaves]:
                raise ValueError(
                    f"{name} gives {_parameter(strays[0])} to a custom autograd.Function outside the module, where it cannot "
                    "be replaced; let the module itself call the function"
                )
            if not any(id(leaf) in leaves for leaf in w.values()):
                refuse_reentrant(value)
                raise ValueError(
                    f"{name} does not depend on the parameters of the model that require grad, such as "
                    f"{_parameter(next(iter(w)))}; let it call its argument model, without detach, no_grad or .item()"
                )
            return value

        return mean


def without_trace(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Return ``function`` such that each call draws its own random numbers and leaves modules and objects unchanged."""
    return lambda *args: Replay(Places.of(function), device)(function, *args)


def variables(value: Tensor) -> list[Tensor]:
    """Return the leaves of the graph of a tensor."""
    if value.is_leaf:
        return [value]
    return [variable for node in nodes([value]) if (variable := getattr(node, "variable", None)) is not None]


@contextlib.contextmanager
def as_plain_modules(model: nn.Module, *functions: Callable[..., Any]) -> Iterator[None]:
    """Run the model, and the modules that the functions use, as plain modules in this block.

    Compiled code and ``DistributedDataParallel`` are bypassed, autocast is off, and gradients are enabled.
    """
    modules = [*model.modules(), *(module for function in functions for module in Places.of(function).modules)]
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            if module._compiled_call_impl is not None:
                stack.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
                module._compiled_call_impl = None
            if isinstance(module, DataParallel | DistributedDataParallel) and "forward" not in vars(module):
                stack.callback(vars(module).pop, "forward")
                vars(module)["forward"] = module.module
        stack.enter_context(without_autocast())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextlib.contextmanager
def in_words_of_the_tuner() -> Iterator[None]:
    """Let the library's errors in this block name the arguments of a ``Tuner``."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        text = str(error)
        for pattern, word in TUNER_WORDS:
            text = re.sub(pattern, word, text)
        if text == str(error) or type(error) not in (TypeError, ValueError, RuntimeError, SolveError, ImpureMapError):
            raise
        raise type(error)(text) from error


TUNER_WORDS = (
    (r"\bw\['model\.(?:_orig_mod\.|module\.)*([^']*)'\]", r"the model's parameter \1"),
    (r"\b(?:the inner loss|inner_loss)\b", "train_loss"),
    (r"\b(?:the outer loss|outer_loss)\b", "val_loss"),
    (r", or curvature='finite_differences'|, or finite differences of gradients.*", ""),
    (r"_Called", "the model"),
    (r"take it out of w", "freeze it (requires_grad_(False))"),
    (
        r"; a learning rate or momentum of the inner solver, .*",
        ". The weight decay of an optimizer is a constant: write a decay that is tuned as a penalty in train_loss instead",
    ),
)
"""Patterns in the library's messages, and their replacements for a ``Tuner``."""


def _parameter(name: str) -> str:
    return f"the model's parameter {re.sub(r'^model.(?:_orig_mod.|module.)*', '', name)}"
