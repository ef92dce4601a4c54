"""The implicit function theorem as one ``autograd.Function``, closed under differentiation.

    z = m(z, x)        dz = (I - d_z m)^{-1} d_x m dx

- backward: ``v = J^T v + g`` is itself a fixed point, in ``v``, with inputs ``(g, z, x)``; then ``x_bar = (d_x m)^T v``.
- jvp: ``s = J s + d_x m dx`` is one too, in ``s``, with inputs ``(d_x m dx, z, x)``.

Both are again ``System``s that the same Function makes differentiable, so derivatives of every order (forward, reverse, mixed)
are right by recursion, and ``vmap`` is one rule. A first-order backward does not recurse: it works on one graph of the map at
the solution, which is built beforehand.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead  # pyright: ignore[reportMissingImports]
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual
from torch.overrides import handle_torch_function, has_torch_function

from hyperopt.core import legacy
from hyperopt.core.captured import functorch_level, transformed
from hyperopt.core.graph_modes import refuse_constant_gradients, refuse_once
from hyperopt.core.jacobian import Jacobian
from hyperopt.core.operator import Linearization, LinearOperator, Reshaped
from hyperopt.core.own_functions import check_own_functions

SolveLinear = Callable[[LinearOperator, Tensor, Tensor | None, str], Tensor]


class InexactError(RuntimeError):
    """A second derivative was asked for through an adjoint that is not exact.

    Example:
        >>> import torch, hyperopt
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> w = hyperopt.fixed_point(lambda w: a * w + 1, torch.zeros(1, 1), adjoint=hyperopt.OneStep()).value
        >>> try:
        ...     torch.autograd.grad(torch.autograd.grad(w.sum(), a, create_graph=True)[0], a)
        ... except hyperopt.InexactError as error:
        ...     print("OneStep" in str(error))
        True
    """


class System(ABC):
    """A fixed point ``z = map(z, *inputs)``; ``z`` has shape (..., dim), and every leading index is a row of its own.

    Attributes:
        linear: a function ``(J, b, start, what)`` of matrices of shape (rows, dim). With ``what="adjoint"`` it solves
            ``(I - J^T) v = b`` and with ``what="tangent"`` it solves ``(I - J) s = b``, as the adjoint's settings say.
        exact: whether ``linear`` solves to a tolerance.
        remedy: what to change to get a system that is exact, for messages.
        states: how many of the leading inputs have the shape of the state.
        derived: whether this system is a derivative of another one.
    """

    linear: SolveLinear
    exact: bool
    remedy: str
    states = 0
    derived = True

    @abstractmethod
    def map(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """Evaluate the map, differentiably in everything."""

    @abstractmethod
    def solve(self, start: Tensor, *inputs: Tensor) -> Tensor:
        """Solve for detached tensors, without a graph."""

    @abstractmethod
    def vmapped(self, dims: tuple[int | None, ...], randomness: str) -> System:
        """Return this system for a batch (leading dimension 0) of states and of the inputs whose entry in ``dims`` is 0.

        ``randomness`` is the argument of ``torch.vmap``.
        """

    def linearize(self, z: Tensor, inputs: Sequence[Tensor]) -> Linearization:
        """Return the map's Jacobians at detached tensors."""
        with torch.enable_grad():
            leaf, leaves = z.detach().requires_grad_(), [x.detach().requires_grad_(x.requires_grad) for x in inputs]
            return Jacobian(self.map(leaf, *leaves), leaf, leaves)

    def close(self, lin: Linearization, v: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        """Return ``(d_x m)^T v`` for each input that needs it."""
        return lin.arguments(v, needs)

    def solve_linear(self, lin: LinearOperator, b: Tensor, start: Tensor | None, what: str) -> Tensor:
        """Call ``linear`` for tensors of any shape (..., dim)."""
        if b.dim() == 2:
            return self.linear(lin, b, start, what)
        dim = b.shape[-1]
        start = None if start is None else start.reshape(-1, dim)
        return self.linear(Reshaped(lin, b.shape), b.reshape(-1, dim), start, what).view_as(b)


class AdjointSystem(System):
    """``v = J(z, x)^T v + g`` with inputs ``(g, z, *x)``."""

    what = "adjoint"

    def __init__(self, parent: System) -> None:
        """Use the linear solver of the parent."""
        self.parent, self.linear, self.exact, self.remedy = parent, parent.linear, parent.exact, parent.remedy
        self.states = parent.states + 2

    def map(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """Return ``J^T v + g``."""
        g, at, *rest = inputs
        return pull_state(self.parent.map, at, rest, z) + g

    def solve(self, start: Tensor, *inputs: Tensor) -> Tensor:
        """Solve the linear system."""
        b, at, *rest = inputs
        return self.solve_linear(self.parent.linearize(at, [x.detach() for x in rest]), b, start, self.what)

    def vmapped(self, dims: tuple[int | None, ...], randomness: str) -> System:
        """Return the adjoint system of the batched parent."""
        return AdjointSystem(self.parent.vmapped(dims[2:], randomness))


class TangentSystem(AdjointSystem):
    """``s = J(z, x) s + u`` with inputs ``(u, z, *x)``."""

    what = "tangent"

    def map(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """Return ``J s + u``."""
        u, at, *rest = inputs
        return push(lambda y: self.parent.map(y, *rest), [at], [z]) + u

    def vmapped(self, dims: tuple[int | None, ...], randomness: str) -> System:
        """Return the tangent system of the batched parent."""
        return TangentSystem(self.parent.vmapped(dims[2:], randomness))


def pull_state(fn: Callable[..., Tensor], z: Tensor, inputs: Sequence[Tensor], v: Tensor) -> Tensor:
    """Return ``(d_z fn(z, *inputs))^T v``, differentiable in everything."""
    product = pull_some(fn, [z, *inputs], v, [True, *[False] * len(inputs)], check=True)[0]
    return torch.zeros_like(v) if product is None else product


def pull_some(
    fn: Callable[..., Tensor], at: Sequence[Tensor], v: Tensor, needs: Sequence[bool], *, check: bool = False
) -> list[Tensor | None]:
    """Return ``(d_x fn(*at))^T v`` for each x in ``at`` that needs it, differentiable in everything.

    With ``check`` the second derivatives of autograd Functions on the way are checked.
    """
    wanted = [x for x, need in zip(at, needs, strict=True) if need]
    if not wanted:
        return [None] * len(needs)

    def mixed(some: Sequence[Tensor]) -> list[Tensor]:
        given = iter(some)
        return [next(given) if need else x for x, need in zip(at, needs, strict=True)]

    if functorch_level():
        products = torch.func.vjp(lambda *some: fn(*mixed(some)), *wanted)[1](v)
    else:
        with torch.enable_grad():
            # Aliases make the derivatives partial: an input may have been computed from another one, and z depends on all.
            aliases = [alias_of(x) for x in wanted]
            point = mixed(aliases)
            out = fn(*point)
            if not out.requires_grad:
                return [None] * len(needs)
            with refuse_constant_gradients([out], point) as nodes:
                products = torch.autograd.grad(out, aliases, v, create_graph=True, allow_unused=True)
            refuse_once(products, [*point, v])
            if check and nodes:
                check_own_functions(nodes, lambda at, _: (fn(*at) * v.detach()).sum(), point)
    found = iter(products)
    return [next(found) if need else None for need in needs]


def alias_of(x: Tensor) -> Tensor:
    """Return a view of ``x`` with the same derivatives, in which a partial derivative can be taken."""
    alias = x.view_as(x)
    return alias if alias.requires_grad else alias.requires_grad_()


def push(fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """Return ``d fn(*primals) tangents`` as the vjp of the vjp, which needs no forward-mode formulas."""
    if functorch_level():
        out, pull, *_ = torch.func.vjp(fn, *primals)
        return torch.func.vjp(pull, torch.zeros_like(out))[1](tuple(tangents))[0]
    with torch.enable_grad():
        aliases = [alias_of(x) for x in primals]
        out = fn(*aliases)
        v = torch.zeros_like(out).requires_grad_()
        if out.requires_grad:
            with refuse_constant_gradients([out], aliases):
                pulled = torch.autograd.grad(out, aliases, v, create_graph=True, allow_unused=True)
            refuse_once(pulled, [*aliases, v])
            moving = [(p, t) for p, t in zip(pulled, tangents, strict=True) if p is not None and p.requires_grad]
            if moving:
                products, given = zip(*moving, strict=True)
                (pushed,) = torch.autograd.grad(products, v, given, create_graph=True, allow_unused=True)
                if pushed is not None:
                    return pushed
        return torch.zeros_like(out)


class Attach(torch.autograd.Function):
    """``apply(system, start, *inputs)`` is the solution, differentiable in the inputs."""

    @staticmethod
    def forward(system: System, start: Tensor, *inputs: Tensor) -> Tensor:
        """Solve."""
        with torch.no_grad():
            value = system.solve(start, *inputs)
            # Return a view. Autograd refuses an output that is itself an input (a start that is the solution), and a system
            # that keeps the value would form a reference cycle with the output's graph.
            return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the solution and the inputs."""
        ctx.system = inputs[0]
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve the adjoint system, then form one vjp with the inputs."""
        if legacy.batched(g):
            return legacy.each(lambda g: Attach.backward(ctx, g), g)
        # A vjp of torch.func may be called after its transform has ended.
        value, *inputs = (unwrap_if_dead(x) for x in ctx.saved_tensors)
        system: System = ctx.system
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or transformed():
            if not system.exact and (system.derived or not transformed()):
                raise InexactError(
                    f"this adjoint is not solved to a tolerance, so its derivative is not the second derivative: {system.remedy}"
                )
            v = attach(AdjointSystem(system), g.detach(), g, value, *inputs)
            return None, None, *pull_some(system.map, [value, *inputs], v, [False, *needs])[1:]
        lin = system.linearize(value, inputs)
        return None, None, *system.close(lin, system.solve_linear(lin, g, None, "adjoint"), needs)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve the tangent system."""
        if any(legacy.batched(t) for t in tangents if t is not None):
            return legacy.each(lambda *some: Attach.jvp(ctx, None, None, *some), *tangents)
        value, *inputs = (unpack_dual(x).primal for x in ctx.saved_tensors)
        system: System = ctx.system
        if not system.exact and system.derived:
            raise InexactError(f"this adjoint is not solved to a tolerance, so its derivative is refused: {system.remedy}")
        moving = [i for i, t in enumerate(tangents) if t is not None]

        def at(*some: Tensor) -> Tensor:
            given = dict(zip(moving, some, strict=True))
            return system.map(value, *(given.get(i, x) for i, x in enumerate(inputs)))

        # PyTorch disables forward mode around this method, which would lose the outer tangents of a nested jvp.
        with _set_fwd_grad_enabled(functorch_level() > 0):
            u = push(at, [inputs[i] for i in moving], [tangents[i] for i in moving])
            return attach(TangentSystem(system), u.detach(), u, value, *inputs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, system: System, start: Tensor, *inputs: Tensor) -> tuple[Tensor, int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve a batch of systems as one system with more rows."""

        def leading(x: Tensor, dim: int | None) -> Tensor:
            return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

        # An input of the state's shape always gets the batch dimension, since the system solves for all rows at once.
        dims = tuple(None if dim is None and i >= system.states else 0 for i, dim in enumerate(in_dims[2:]))
        moved = [x if now is None else leading(x, dim) for x, dim, now in zip(inputs, in_dims[2:], dims, strict=True)]
        return attach(system.vmapped(dims, info.randomness), leading(start, in_dims[1]), *moved), 0


# PyTorch binds the arguments of ``forward`` to its signature in every call; a stored signature is not computed each time.
Attach.forward.__signature__ = inspect.signature(Attach.forward)  # pyright: ignore[reportFunctionMemberAccess]


def attach(system: System, start: Tensor, *inputs: Tensor) -> Tensor:
    """Call ``Attach.apply`` as a function that a ``TorchFunctionMode`` sees, so that a solve inside a map can be followed."""
    if has_torch_function((start, *inputs)):
        return handle_torch_function(attach, (start, *inputs), system, start, *inputs)
    return Attach.apply(system, start, *inputs)  # pyright: ignore[reportReturnType]
