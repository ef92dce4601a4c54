"""Turns a map that closes over tensors into a function of them.

A map is called under a ``TorchFunctionMode`` that swaps every tensor from outside, the first time that a torch function is given
it, for a detached leaf. The graph so built ends in those leaves, so that one vjp gives the partial derivative in each tensor,
also where one closed-over tensor was computed from another (``A`` and ``2 * A``). The same swap, with other replacements, calls
the map at other values of what it closes over: higher derivatives and ``torch.func`` need that.

A custom ``autograd.Function`` is not seen by such a mode, nor is what a transform of ``torch.func`` is called on. What a Python
function closes over is therefore swapped in its closure too. For the rest a walk over the finished graph finds what came in
unseen: a leaf (a parameter) is taken as it is; anything else is refused, since its derivative would be silently lost.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import CellType, FunctionType
from typing import Any

import optree
import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._autograd import _get_sequence_nr  # pyright: ignore[reportMissingImports]
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.overrides import TorchFunctionMode


def functorch_level() -> int:
    """Level of the innermost running ``torch.func`` transform; 0 outside of all."""
    top = functorch.peek_interpreter_stack()
    return 0 if top is None else top.level()


def transformed() -> bool:
    """Whether derivatives are on their way that ``no_grad`` does not stop: those of ``torch.func``, or of dual numbers."""
    return functorch_level() > 0 or forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    """Whether the tensor is a dual number."""
    if forward_ad._current_level < 0:
        return False
    with below(0):
        return forward_ad.unpack_dual(tensor).tangent is not None


def seen(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that transforms of ``torch.func`` have wrapped, those of all members of a batch, to be read."""
    while functorch.maybe_get_level(tensor) > 0:
        tensor = functorch.get_unwrapped(tensor)
    return tensor.detach()


@contextlib.contextmanager
def underived() -> Iterator[None]:
    """No derivatives, backward or forward."""
    with torch.no_grad(), _set_fwd_grad_enabled(False):
        yield


@contextlib.contextmanager
def below(level: int) -> Iterator[None]:
    """Leave the transforms of ``torch.func`` that run above ``level``, for a while."""
    with contextlib.ExitStack() as left:
        while functorch_level() > level:
            left.enter_context(temporarily_pop_interpreter_stack())
        yield


_births = itertools.count(1)
SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # pyright: ignore[reportAttributeAccessIssue]


class ClosureError(RuntimeError):
    """The map depends on a tensor in a way that would lose its derivative."""


class Swap(TorchFunctionMode):
    """Swaps tensors from outside for replacements, while a map runs.

    Args:
        known: pairs of a tensor from outside and its replacement.
        discover: make a detached leaf for every other tensor from outside that carries a derivative; without it, meeting one
            raises ``ClosureError``: the map has changed since it was captured.
    """

    def __init__(self, known: Iterable[tuple[Tensor, Tensor]] = (), *, discover: bool) -> None:
        """Start with the known replacements."""
        super().__init__()
        self.discover = discover
        self.table: dict[int, tuple[Tensor, Tensor]] = {id(outside): (outside, inside) for outside, inside in known}
        self.used: set[int] = set()
        self.rebound: set[int] = set()  # the functions that were looked at
        self.made: dict[int, Tensor] = {id(inside): inside for _, inside in self.table.values()}
        self.start, self.born = _get_sequence_nr(), next(_births)
        self.level, self.transformed = functorch_level(), transformed()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` with every tensor from outside swapped."""
        out = func(*self.swap(args), **{key: self.swap(value) for key, value in (kwargs or {}).items()})
        if self.transformed:
            self.own(out)
        else:
            made = args[0] if func is SET_REQUIRES_GRAD else out
            if isinstance(made, Tensor) and made.requires_grad and made.is_leaf:  # what has a graph is known by its place in it
                self.own(made)
        return out

    def own(self, value: Any) -> None:
        """Note tensors as made by the map itself: under a transform nothing in them tells them from others."""
        for leaf in optree.tree_leaves(value):
            while isinstance(leaf, Tensor):
                self.made[id(leaf)] = leaf
                # What a transform inside of the map has made comes out of it without its wrapper.
                leaf = functorch.get_unwrapped(leaf) if functorch.maybe_get_level(leaf) > self.level else None

    def swap(self, value: Any) -> Any:
        """``value``, a tensor or a nest of lists, tuples and dicts, with the tensors from outside replaced; else as it is."""
        if isinstance(value, Tensor):
            return self._swap_tensor(value)
        if type(value) in (list, tuple):
            items = [self.swap(item) for item in value]
            return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
        if type(value) is dict:
            found = {key: self.swap(item) for key, item in value.items()}
            return found if any(found[key] is not item for key, item in value.items()) else value
        return value

    def call(self, function: Callable[..., Any], state: Any, args: tuple[Any, ...]) -> Any:
        """``function(state, *args)`` with everything from outside swapped; the state is its own."""
        self.own(state)
        args = tuple(arg if arg is None else optree.tree_map(self.swap, arg, none_is_leaf=True) for arg in args)
        function = self.rebind(function)
        with self:
            return function(state, *args)

    def rebind(self, function: Any) -> Any:
        """A Python function with the tensors that it closes over swapped; anything else as it is.

        The mode does not see a closed-over tensor that a transform of ``torch.func`` inside of the map is called on.
        """
        if isinstance(function, functools.partial):
            args, keywords = self.swap(function.args), self.swap(function.keywords)
            return functools.partial(self.rebind(function.func), *args, **keywords)
        if not isinstance(function, FunctionType) or not (function.__closure__ or function.__defaults__):
            return function
        before = tuple(function.__closure__ or ())
        cells = tuple(self._rebind_cell(cell) for cell in before)
        defaults = self.swap(function.__defaults__)
        if all(a is b for a, b in zip(cells, before, strict=True)) and defaults is function.__defaults__:
            return function
        found = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells)
        found.__kwdefaults__ = function.__kwdefaults__
        return found

    def _rebind_cell(self, cell: CellType) -> CellType:
        try:
            content = cell.cell_contents
        except ValueError:  # a variable that is not assigned yet
            return cell
        if isinstance(content, FunctionType):  # a function of its own may be in its closure
            if id(content) in self.rebound:
                return cell
            self.rebound.add(id(content))
            found = self.rebind(content)
        else:
            found = self.swap(content)
        return cell if found is content else CellType(found)

    def _swap_tensor(self, tensor: Tensor) -> Tensor:
        entry = self.table.get(id(tensor))
        if entry is not None:
            self.used.add(id(tensor))
            return entry[1]
        # A compiled map has no such wrappers, and its compiler traces this very line.
        if not torch.compiler.is_compiling() and functorch.maybe_get_level(tensor) > self.level:
            if self.transformed and self._outside(self._content(tensor)):
                raise ClosureError(
                    f"the map gives a tensor of shape {tuple(tensor.shape)} from outside to a transform of torch.func, where its "
                    "derivative cannot be followed: pass it through args="
                )
            return tensor  # made by a transform inside of the map
        if not self._outside(tensor):
            return tensor
        if not self.discover:
            raise ClosureError(
                f"the map now uses a tensor of shape {tuple(tensor.shape)} that it did not use when it was solved (a loop "
                "variable in a lambda, or parameters swapped by functional_call): pass such tensors through args="
            )
        inside = self.replacement(tensor)
        self.enter(tensor, inside)
        return inside

    def replacement(self, tensor: Tensor) -> Tensor:
        """What takes the place of a tensor from outside that was not known."""
        if self.transformed:
            return tensor
        with torch._C.DisableTorchFunction(), below(0):  # a transform inside of the map lets no leaves be made
            return leaf_of(tensor)

    def enter(self, outside: Tensor, inside: Tensor) -> None:
        """Know a tensor from outside by its replacement, which is in use."""
        self.table[id(outside)] = (outside, inside)
        self.made[id(inside)] = inside
        self.used.add(id(outside))

    def _content(self, tensor: Tensor) -> Tensor:
        """What the transforms inside of the map have wrapped."""
        while functorch.maybe_get_level(tensor) > self.level:
            tensor = functorch.get_unwrapped(tensor)
        return tensor

    def _outside(self, tensor: Tensor) -> bool:
        """Whether the tensor carries a derivative (or a batch of ``vmap``) from before the map was called."""
        with torch._C.DisableTorchFunction():  # another mode would answer for its own replacement
            return self._before(tensor)

    def _before(self, tensor: Tensor) -> bool:
        if id(tensor) in self.made:
            return False
        if self.transformed and (functorch.maybe_get_level(tensor) > 0 or has_tangent(tensor)):
            return tensor.grad_fn is None or tensor.grad_fn._sequence_nr() < self.start
        if not tensor.requires_grad or getattr(tensor, "_hyperopt_born", 0) > self.born:
            return False
        if tensor.grad_fn is None:  # a leaf, or a view made under no_grad, which says that it requires grad and leads nowhere
            return tensor._base is None or not tensor._base.requires_grad
        return tensor.grad_fn._sequence_nr() < self.start

    @property
    def outside(self) -> list[Tensor]:
        """The tensors from outside that the map used, in the order in which it met them."""
        return [outside for key, (outside, _) in self.table.items() if key in self.used]

    def inside(self, outside: Tensor) -> Tensor:
        """The replacement of a tensor from outside."""
        return self.table[id(outside)][1]


def leaf_of(tensor: Tensor) -> Tensor:
    """A detached leaf with the values of ``tensor``, dated: to a swap that began earlier it is not from outside."""
    leaf = tensor.detach().requires_grad_()
    leaf._hyperopt_born = next(_births)  # pyright: ignore[reportAttributeAccessIssue]
    return leaf


def foreign_leaves(out: Tensor, known: Iterable[Tensor], start: int, until: Iterable[Tensor] = ()) -> list[Tensor]:
    """Leaves in the graph of ``out`` that are not in ``known``: parameters that came in through a custom Function.

    The walk ends at the tensors of ``until``.

    Raises:
        ClosureError: the graph goes back to before the sequence number ``start``, through a tensor that is no leaf.
    """
    mine = {id(leaf) for leaf in known}
    found: dict[int, Tensor] = {}
    stack = [out.grad_fn] if out.grad_fn is not None else []
    seen = {*stack, *(tensor.grad_fn for tensor in until)}
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            if id(variable) not in mine:
                found[id(variable)] = variable
            continue
        if node._sequence_nr() < start:
            raise ClosureError(
                f"the map uses a tensor computed outside of it ({node.name()}) through a custom autograd.Function or a transform "
                "of torch.func, where its derivative cannot be followed: pass it through args="
            )
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return list(found.values())
