"""Turns a map that captures tensors into a function of these tensors.

A map is called under a ``TorchFunctionMode``. When a tensor from outside is first given to a torch function, the mode replaces
it by a detached leaf. The graph of the call ends in those leaves, so one vjp gives the partial derivative in each tensor, even
if one captured tensor was computed from another (``A`` and ``2 * A``). With other replacements, the same mode calls the map at
other values of its captured tensors, as higher derivatives and ``torch.func`` need.

Such a mode sees neither the tensors of a custom ``autograd.Function`` nor those that a transform of ``torch.func`` is called
on. The tensors in a Python function's closure are therefore replaced there too. A walk over the finished graph then finds any
other tensor that came in unseen: a leaf (a parameter) is accepted, and anything else is refused, since its derivative would be
lost.
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
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode


def node_name(node: Any) -> str:
    """Return the name of a node of the graph, ``AddBackward0`` for example.

    The node of an ``autograd.Function`` is the object that its author calls ``ctx``: what its ``forward`` keeps as ``ctx.name``
    hides the method of that name.
    """
    return type(node).__name__ if isinstance(node, BackwardCFunction) else node.name()


def nodes(outputs: Iterable[Tensor | None], until: Iterable[Tensor] = ()) -> Iterator[Any]:
    """Iterate over the nodes of the graph of ``outputs``, each once; the search stops at the tensors of ``until``."""
    seen: set[Any] = {None, *(tensor.grad_fn for tensor in until)}
    stack: list[Any] = list(dict.fromkeys(out.grad_fn for out in outputs if out is not None and out.grad_fn not in seen))
    seen.update(stack)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)


def functorch_level() -> int:
    """Return the level of the innermost running ``torch.func`` transform, 0 if there is none."""
    top = functorch.peek_interpreter_stack()
    return 0 if top is None else top.level()


def transformed() -> bool:
    """Whether derivatives are being taken that ``no_grad`` does not stop: by ``torch.func`` or dual numbers."""
    return functorch_level() > 0 or forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    """Whether the tensor is a dual number."""
    if forward_ad._current_level < 0:
        return False
    with below(0):
        return forward_ad.unpack_dual(tensor).tangent is not None


def unwrapped(tensor: Tensor, level: int = 0) -> Tensor:
    """Return what the transforms of ``torch.func`` above ``level`` have wrapped."""
    while functorch.maybe_get_level(tensor) > level:
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def seen(tensor: Tensor) -> Tensor:
    """Return the numbers inside a tensor that transforms of ``torch.func`` have wrapped (for ``vmap``, of all members)."""
    return unwrapped(tensor).detach()


@contextlib.contextmanager
def underived() -> Iterator[None]:
    """Disable derivatives, backward and forward, in a block."""
    with torch.no_grad(), _set_fwd_grad_enabled(False):
        yield


@contextlib.contextmanager
def below(level: int) -> Iterator[None]:
    """Leave the transforms of ``torch.func`` that run above ``level`` for the duration of a block."""
    with contextlib.ExitStack() as left:
        while functorch_level() > level:
            left.enter_context(temporarily_pop_interpreter_stack())
        yield


_births = itertools.count(1)
SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # pyright: ignore[reportAttributeAccessIssue]


class ClosureError(RuntimeError):
    """The map depends on a tensor in a way that would lose its derivative.

    Example:
        >>> import torch, hyperopt
        >>> class Times(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, w, b):
        ...         return w * b
        >>> b = 0.5 * torch.ones((), requires_grad=True)  # computed outside of the map
        >>> holder = [b]
        >>> try:
        ...     hyperopt.fixed_point(lambda w: Times.apply(w, holder[0]), torch.ones(1, 1))
        ... except hyperopt.ClosureError as error:
        ...     print("args=" in str(error))
        True
    """


class Swap(TorchFunctionMode):
    """Replaces tensors from outside while a map runs.

    Args:
        known: pairs of a tensor from outside and its replacement.
        discover: whether to make a detached leaf for every other tensor from outside that carries a derivative. If false, such
            a tensor raises ``ClosureError``: the map has changed since its tensors were captured.
    """

    def __init__(self, known: Iterable[tuple[Tensor, Tensor]] = (), *, discover: bool) -> None:
        super().__init__()
        self.discover = discover
        self.table: dict[int, tuple[Tensor, Tensor]] = {id(outside): (outside, inside) for outside, inside in known}
        self.used: set[int] = set()
        self.rebound: set[int] = set()  # the functions whose closures were searched
        self.made: dict[int, Tensor] = {id(inside): inside for _, inside in self.table.values()}
        self.start, self.born = _get_sequence_nr(), next(_births)
        self.level, self.transformed = functorch_level(), transformed()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` with every tensor from outside replaced."""
        out = func(*self.swap(args), **{key: self.swap(value) for key, value in (kwargs or {}).items()})
        if self.transformed:
            self.own(out)
        else:
            made = args[0] if func is SET_REQUIRES_GRAD else out
            if isinstance(made, Tensor) and made.requires_grad and made.is_leaf:  # other tensors are known by their graph
                self.own(made)
        return out

    def own(self, value: Any) -> None:
        """Note tensors as made by the map itself; under a transform they cannot be told from tensors from outside."""
        for leaf in optree.tree_leaves(value):
            while isinstance(leaf, Tensor):
                self.made[id(leaf)] = leaf
                # A tensor that an inner transform has made leaves it without its wrapper.
                leaf = functorch.get_unwrapped(leaf) if functorch.maybe_get_level(leaf) > self.level else None

    def swap(self, value: Any) -> Any:
        """Return ``value`` (a tensor, list, tuple or dict, nested) with the tensors from outside replaced."""
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
        """Return ``function(state, *args)`` with everything from outside replaced; the state counts as the map's own."""
        self.own(state)
        args = tuple(arg if arg is None else optree.tree_map(self.swap, arg, none_is_leaf=True) for arg in args)
        function = self.rebind(function)
        with self:
            return function(state, *args)

    def rebind(self, function: Any) -> Any:
        """Return a Python function with the tensors in its closure replaced, and anything else as it is.

        The mode alone does not see a captured tensor that a transform of ``torch.func`` inside the map is called on.
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
        if isinstance(content, FunctionType):  # a recursive function is in its own closure
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
        # A compiled map has no such wrappers. Its compiler traces this line, so the test must come first.
        if not torch.compiler.is_compiling() and functorch.maybe_get_level(tensor) > self.level:
            if self.transformed and self._outside(unwrapped(tensor, self.level)):
                raise ClosureError(
                    f"the map gives a tensor of shape {tuple(tensor.shape)} from outside to a transform of torch.func, where its "
                    "derivative cannot be followed: pass it through args="
                )
            return tensor  # made by a transform inside the map
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
        """Return the replacement of a tensor from outside that is met for the first time."""
        if self.transformed:
            return tensor
        with torch._C.DisableTorchFunction(), below(0):  # leaves cannot be made inside a transform
            return leaf_of(tensor)

    def enter(self, outside: Tensor, inside: Tensor) -> None:
        """Register a tensor from outside and its replacement as used."""
        self.table[id(outside)] = (outside, inside)
        self.made[id(inside)] = inside
        self.used.add(id(outside))

    def _outside(self, tensor: Tensor) -> bool:
        """Whether the tensor carries a derivative (or a batch of ``vmap``) from before the call of the map."""
        with torch._C.DisableTorchFunction():  # another mode would answer for its own replacement of the tensor
            return self._before(tensor)

    def _before(self, tensor: Tensor) -> bool:
        if id(tensor) in self.made:
            return False
        if self.transformed and (functorch.maybe_get_level(tensor) > 0 or has_tangent(tensor)):
            return tensor.grad_fn is None or tensor.grad_fn._sequence_nr() < self.start
        if not tensor.requires_grad or getattr(tensor, "_hyperopt_born", 0) > self.born:
            return False
        if tensor.grad_fn is None:  # a leaf, or a view made under no_grad: it requires grad although it has no graph
            return tensor._base is None or not tensor._base.requires_grad
        return tensor.grad_fn._sequence_nr() < self.start

    @property
    def outside(self) -> list[Tensor]:
        """The tensors from outside that the map has used, in the order of their first use."""
        return [outside for key, (outside, _) in self.table.items() if key in self.used]

    def inside(self, outside: Tensor) -> Tensor:
        """Return the replacement of a tensor from outside."""
        return self.table[id(outside)][1]


def leaf_of(tensor: Tensor) -> Tensor:
    """Return a detached leaf with the values of ``tensor`` and a date, by which an earlier ``Swap`` knows it as new."""
    leaf = tensor.detach().requires_grad_()
    leaf._hyperopt_born = next(_births)  # pyright: ignore[reportAttributeAccessIssue]
    return leaf


def foreign_leaves(out: Tensor, known: Iterable[Tensor], start: int, until: Iterable[Tensor] = ()) -> list[Tensor]:
    """Return the leaves in the graph of ``out`` that are not ``known``: parameters used by a custom autograd Function.

    The search stops at the tensors of ``until``.

    Raises:
        ClosureError: the graph reaches a tensor that is not a leaf and is older than the sequence number ``start``.
    """
    mine = {id(leaf) for leaf in known}
    found: dict[int, Tensor] = {}
    for node in nodes([out], until):
        variable = getattr(node, "variable", None)
        if variable is not None:
            found[id(variable)] = variable
        elif node._sequence_nr() < start:
            raise ClosureError(
                f"the map uses a tensor computed outside of it ({node_name(node)}) through a custom autograd.Function or a "
                "transform of torch.func, where its derivative cannot be followed: pass it through args="
            )
    return [variable for key, variable in found.items() if key not in mine]
