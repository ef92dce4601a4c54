"""``ModuleLosses``: losses that call a module of the user's, as functions ``(w, lam, batches)`` of a ``BilevelProblem``.

    loss(model, batch, lam)   ->   mean over batches and ranks of  loss(model at w, batch, lam)

The module is called itself, at other values of its parameters: they are replaced in the module (``Functional``), and wherever
else the loss meets one of them (a list of the parameters that was made before). Nothing of an evaluation stays: buffers, modes,
counters and gradients are put back (``hyperopt.core.replay``), and the wrappers that serve training are passed by, since they
have no second derivative, or another one on each rank: compiled code, ``DistributedDataParallel``, autocast.
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
from hyperopt.core.captured import Swap
from hyperopt.core.draws import ImpureMapError
from hyperopt.core.graph_modes import autocast_kinds, refuse_reentrant, without_autocast
from hyperopt.core.norms import lean
from hyperopt.core.places import Places
from hyperopt.core.policy import SolveError
from hyperopt.core.replay import Replay
from hyperopt.spaces.hyperparameters import Hyperparameters

OwnLoss = Callable[[Any, Any, dict[str, Any]], Tensor]
"""``loss(model, batch, lam)``, a scalar: plain code that calls the module, with the hyperparameters in their own units."""


class _Called(nn.Module):
    """Runs a function of a module, which is a part of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


class _Plain(Swap):
    """Swaps the parameters of a module for their replacements, wherever a function of PyTorch is given one.

    The function runs without autocast, in a form whose second derivatives take little memory: one mode for all, since each takes
    as long as a small operator.
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
        hyper: the hyperparameters; none of their parameters is a weight, even inside of the module.
        trained: of the parameters that require grad, by name, those that are weights: which of them something trains.

    Attributes:
        w: the weights by name, as in ``Functional``.
        parameters: the same, as they are in the module.

    Raises:
        ValueError: no parameter requires grad, one is in half precision or sharded, or a lazy module has not been called yet.
    """

    def __init__(self, model: nn.Module, hyper: Hyperparameters, trained: Callable[[dict[str, Tensor]], Collection[str]]) -> None:
        """Take the parameters as they are now."""
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
                    f"{_parameter(name)} has dtype {parameter.dtype}, in which a hypergradient would have two or three digits; "
                    "keep the weights in float32 and train under torch.autocast"
                )
            if hasattr(parameter, "placements"):
                raise ValueError(f"{_parameter(name)} is sharded (a DTensor), and each rank has a part of it alone; use DDP")

    def loss(self, own: OwnLoss, name: str, hyper: Hyperparameters) -> Callable[[Any, Any, Sequence[Any]], Tensor]:
        """A loss of the user's, called ``name`` in messages, as a function of ``(w, lam, batches)``."""
        functional, parameters = self.functional, self.parameters
        raw = {id(parameter): path for path, parameter in hyper.named_parameters()}

        def one(w: dict[str, Tensor], lam: Any, batch: Any) -> Tensor:
            with _Plain(((p, w[name]) for name, p in parameters.items()), discover=False):
                value = functional(w, own, batch, lam)
            refuse_no_scalar(value, name, batch)
            return value

        def mean(w: dict[str, Tensor], lam: Any, batches: Sequence[Any]) -> Tensor:
            for batch in batches:
                refuse_no_rows(name, batch)
            values = [distributed.mean_over_ranks(one, w, lam, batch, rows=rows_of(batch)) for batch in batches]
            if bad := [number for each in values if not math.isfinite(number := float(each.detach()))]:  # on all ranks alike
                raise ValueError(f"{name} is {bad[0]:g} on a batch: check the data, the weights and the hyperparameters")
            value = values[0] if len(values) == 1 else torch.stack([each.reshape(()) for each in values]).mean()
            leaves = {id(leaf): leaf for leaf in variables(value)}
            if strays := [path for key, path in raw.items() if key in leaves]:
                raise ValueError(
                    f"{name} reads {', '.join(strays)} from the Hyperparameters themselves, where no hypergradient is taken; "
                    "let it use the lam that it is given"
                )
            if strays := [key for key, p in parameters.items() if id(p) in leaves]:
                raise ValueError(
                    f"{name} hands {_parameter(strays[0])} to a custom autograd.Function from outside of the module, where it "
                    "cannot be followed; let the module itself call the function"
                )
            if not any(id(leaf) in leaves for leaf in w.values()):
                refuse_reentrant(value)
                raise ValueError(
                    f"{name} does not depend on the parameters of the model that require grad, {_parameter(next(iter(w)))} among "
                    "them; let it call the model that it is given, without detach, no_grad or .item()"
                )
            return value

        return mean


def without_trace(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """``function``, every evaluation of which draws its own random numbers and leaves its modules and objects as they were."""
    return lambda *args: Replay(Places.of(function), device)(function, *args)


def variables(value: Tensor) -> list[Tensor]:
    """The leaves in the graph of a tensor."""
    found, seen, left = [], set(), [value.grad_fn]
    if value.is_leaf:
        return [value]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.append(variable)
        left += [following for following, _ in node.next_functions]
    return found


@contextlib.contextmanager
def plainly(model: nn.Module, *functions: Callable[..., Any]) -> Iterator[None]:
    """In this block the model, and the modules that the functions use, run as they were written.

    Compiled code and ``DistributedDataParallel`` are passed by, autocast is off, and derivatives are on.
    """
    modules = [*model.modules(), *(module for function in functions for module in Places.of(function).modules)]
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # without it, nothing is compiled
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
    """Errors of the library in this block speak of the arguments of a ``Tuner``."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        text = str(error)
        for pattern, word in WORDS:
            text = re.sub(pattern, word, text)
        if text == str(error) or type(error) not in (TypeError, ValueError, RuntimeError, SolveError, ImpureMapError):
            raise
        raise type(error)(text) from error


WORDS = (
    (r"\bw\['model\.(?:_orig_mod\.|module\.)*([^']*)'\]", r"the model's parameter \1"),
    (r"\b(?:the inner loss|inner_loss)\b", "train_loss"),
    (r"\b(?:the outer loss|outer_loss)\b", "val_loss"),
    (r", or curvature='finite_differences'|, or finite differences of gradients.*", ""),
    (r"_Called", "the model"),
    (r"take it out of w", "freeze it (requires_grad_(False))"),
    (r"; a learning rate or momentum of the inner solver, .*", ""),
)
"""What the library says, as a pattern, and what it is for a ``Tuner``."""


def _parameter(name: str) -> str:
    return f"the model's parameter {re.sub(r'^model.(?:_orig_mod.|module.)*', '', name)}"
