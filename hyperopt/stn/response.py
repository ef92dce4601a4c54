"""The response of one weight to the hyperparameters, and the weight as the code of a network reads it during a call.

    W(lam') = W + diag(V delta) H          V: (units, K) or (1, K) for K hyperparameters,    H: the shape of W

Each row of a batch has its own weights, affine in its hyperparameters. The diagonal acts on one axis of the weight: its
outputs, or the dimensions of an embedding. A function that is linear in the weight therefore needs a second product, but no
weight for each row: ``f(x, W(lam')) = f(x, W) + (V delta) * f(x, H)``.

The response belongs to the weight and not to the module. A layer returns its weight as a ``Responding`` tensor, and torch
calls the rule of each of its functions that gets this tensor. The response thus reaches every use of the weight: by the layer,
by another layer that shares the weight, or by ``torch.nn.functional``. A function without a rule is refused by name.

Reference: MacKay et al., ICLR 2019, arXiv 1903.03088, section 3.2; Bae & Grosse, NeurIPS 2020, arXiv 2010.13514, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from hyperopt.stn.draw import Draw

RULES: dict[Any, Callable[..., Any]] = {}
"""For each function of torch, its rule for weights that respond; filled by ``rule``."""
_PROPERTIES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes"),
    *("is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_nested", "is_sparse", "is_quantized", "is_mkldnn"),
)
METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_contiguous),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.__len__, Tensor.get_device, Tensor.is_signed),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
"""Functions that do not use the values of a weight."""


class Response(nn.Module):
    """The response of one weight.

    Args:
        direction: initial H. shape: that of the weight
        axis: the axis of the weight whose entries are the units.
        count: number of hyperparameters K.
        gate: ``unit``: a gate for each unit; ``scalar``: one for the weight.
        std: standard deviation of the initial V.

    Attributes:
        direction: H.
        gate: V. shape: (units or 1, K)
    """

    def __init__(self, direction: Tensor, axis: int, count: int, gate: str, std: float) -> None:
        """Draw V."""
        super().__init__()
        self.axis = axis
        self.direction = nn.Parameter(direction)
        units = direction.shape[axis] if gate == "unit" else 1
        self.gate = nn.Parameter(std * torch.randn(units, count).to(direction))

    def change(self, delta: Tensor) -> Tensor:
        """Return ``diag(V delta) H`` of one row. shapes: delta (K,), result that of the weight."""
        shape = [1] * self.direction.dim()
        shape[self.axis] = -1
        return (self.gate @ delta).view(shape) * self.direction

    def squares(self, weight: Tensor, draw: Draw) -> Tensor:
        """Return ``|W + diag(V delta) H|^2`` of every row. shape: (rows,)."""
        w, h = self._by_unit(weight), self._by_unit(self.direction)
        total = w.square().sum()
        if draw.responds:
            gates = functional.linear(draw.delta, self.gate)  # shape: (rows, units or 1)
            cross, square = (w * h).sum(1), h.square().sum(1)
            total = total + (2 * gates * cross + gates.square() * square).sum(1)
        return total.expand(draw.rows)

    def slope(self) -> Tensor:
        """Return the squared Frobenius norm of the Jacobian ``d W / d lam``. shape: ()."""
        return (self.gate.square().sum(1) * self._by_unit(self.direction).square().sum(1)).sum()

    def _by_unit(self, weight: Tensor) -> Tensor:
        """Return the weight as a matrix with one row for each unit."""
        return weight.movedim(self.axis, 0).reshape(weight.shape[self.axis], -1)


class RowsError(ValueError):
    """A layer got another number of examples than the draw has rows; the message names the layer and both numbers."""


@dataclass(frozen=True, eq=False)
class Use:
    """A weight with its response, during one call of the network.

    Attributes:
        base: W.
        direction: H, of the same shape.
        gate: V. shape: (units or 1, K)
        axis: the axis of W that has the units.
        draw: the draw of the call.
        linear: whether outputs are linearised in the response, as tangents of a dual level.
        layer: class name of the layer.
        place: the weight's name in the network.
        examples: the dimension of the layer's inputs and outputs that has the examples.
        unsure: gets ``place`` if another dimension might be that of the examples.
    """

    base: Tensor
    direction: Tensor
    gate: Tensor
    axis: int
    draw: Draw
    linear: bool
    layer: str
    place: str
    examples: int
    unsure: set[str]

    def gates(self) -> Tensor:
        """Return ``V delta``. shape: (rows or 1, units or 1)."""
        return functional.linear(self.draw.delta, self.gate)

    def shift(self) -> Tensor:
        """Return ``(V delta) * H`` of a vector. shape: (rows or 1, entries)."""
        return functional.linear(self.draw.delta, self.gate * self.direction[:, None])

    def spread(self, units: Tensor, like: Tensor, channel: int) -> Tensor:
        """Return the numbers of each row and unit in a shape that broadcasts against ``like``, with units in ``channel``.

        Raises:
            RowsError: ``like`` has another number of examples than the draw has rows (one row is for all).
        """
        dims, channel = like.dim(), channel % like.dim()
        found = like.shape[self.examples] if self.examples < dims and self.examples != channel else None
        if units.shape[0] != 1 and found != units.shape[0]:
            got = f"{found} rows" if found is not None else f"a tensor of shape {tuple(like.shape)} without examples"
            raise RowsError(
                f"{self.layer} {self.place!r} got {got}, and the draw has {units.shape[0]}: "
                f"{'the second' if self.examples else 'the first'} dimension must be the examples; draw for this batch"
            )
        if dims > 2 and channel == dims - 1 and self.examples == 0 and like.shape[1] == units.shape[0] != 1:
            self.unsure.add(self.place)
        if like.shape[channel] != units.shape[1] != 1:  # groups of channels with the same units
            units = units.repeat(1, like.shape[channel] // units.shape[1])
        if dims == 2:
            return units
        shape = [1] * dims
        shape[self.examples if units.shape[0] != 1 else 0] = units.shape[0]
        shape[channel] = units.shape[1]
        return units.view(shape)

    def refuse(self, what: str) -> NoReturn:
        """Raise an error that says what cannot be done with the weight."""
        raise ValueError(
            f"{self.place!r} of a {self.layer} responds to the hyperparameters, a value for each example: {what}. "
            "Use the weight in a layer that hyperopt.stn.KINDS lists or in its function of torch.nn.functional, use "
            "model.squared_norm(draw) for a penalty, or leave the weight without a response: "
            f"skip=[{self.place.rpartition('.')[0]!r}]"
        )


class Responding(Tensor):
    """The tensor that a layer returns instead of a weight during a call. It has a ``Use`` and no values of its own."""

    use: Use

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the rule of a function.

        Raises:
            RuntimeError: under ``torch.compile``, which then runs the code that reads the weight eagerly.
            ValueError: there is no rule; the message names weight and function.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("a weight that responds cannot be traced; compile what hyperopt.stn.convert gave back")
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (found := RULES.get(func)) is None:
            no_rule(getattr(func, "__name__", str(func)), *args, *kwargs.values())
        return found(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse operators that did not pass through ``__torch_function__``, since there are no values here.

        Only the alias that torch makes to look for a dual number is allowed: the parts may be dual, this tensor is not.
        """
        if func is torch.ops.aten.alias.default:
            return responding(args[0].use)
        no_rule(str(func), *args, *(kwargs or {}).values())

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Return the name and the shape."""
        return f"Responding({self.use.place!r}, shape={tuple(self.shape)})"


def responding(use: Use) -> Responding:
    """Wrap a weight with its response."""
    how: dict[str, Any] = {"dtype": use.base.dtype, "device": use.base.device}
    found = torch.Tensor._make_wrapper_subclass(Responding, use.base.shape, use.base.stride(), **how)  # type: ignore[attr-defined]
    found.use = use
    return found


def rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the rule of some of torch's; it gets their arguments, some of which are ``Responding``."""

    def register(found: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(functions, found))
        return found

    return register


def no_rule(name: str, *values: Any, why: str = "has no rule for it") -> NoReturn:
    """Refuse a function of some arguments, one of which is a weight that responds.

    Args:
        name: name of the function in torch.
        values: the arguments.
        why: what the function cannot do, or in which case.

    Raises:
        ValueError: always; the message names weight and function.
    """
    inside = [leaf for value in values for leaf in (value if isinstance(value, list | tuple) else [value])]
    found = next((leaf for leaf in inside if isinstance(leaf, Responding)), None)
    if found is None:
        raise ValueError(f"torch.{name} of a self-tuning network {why}")
    found.use.refuse(f"torch.{name} {why}")


@rule(Tensor.requires_grad.__get__)  # pyright: ignore[reportAttributeAccessIssue]
def _requires_grad(weight: Any) -> bool:
    """Whether the weight or its response requires grad."""
    use: Use = weight.use
    return any(part.requires_grad for part in (use.base, use.direction, use.gate, use.draw.delta))


def use_of(weight: Any) -> Use | None:
    """Return the ``Use`` of a responding weight, and None for any other weight."""
    return weight.use if isinstance(weight, Responding) else None


def base(weight: Any) -> Any:
    """Return a weight without its response."""
    return weight.use.base if isinstance(weight, Responding) else weight


def at_examples(weight: Any, dimension: int) -> Any:
    """Return the weight for inputs that have the examples in this dimension."""
    return responding(replace(weight.use, examples=dimension)) if isinstance(weight, Responding) else weight


def primal(x: Tensor, use: Use) -> Tensor:
    """Return the value of a tensor that may be dual."""
    return forward_ad.unpack_dual(x).primal if use.linear else x


def answer(y: Tensor, use: Use, change: Tensor | None, gates: Tensor | None = None, product: Tensor | None = None) -> Tensor:
    """Return ``y + change + gates * product``; in a linearised network the additions go to the tangent of ``y``.

    Args:
        y: output at the base weights, a dual if the network is linearised.
        use: a weight of the call.
        change: a first addition (None: nothing).
        gates: factors that broadcast against ``product``.
        product: the output at the response's direction (None: nothing).
    """
    if not use.linear:
        if change is not None:
            y = y + change.to(y.dtype)
        return y if gates is None or product is None else torch.addcmul(y, gates.to(y.dtype), product.to(y.dtype))
    value, tangent = forward_ad.unpack_dual(y)
    if gates is not None and product is not None:
        change = gates * product if change is None else torch.addcmul(change, gates, product)
    assert change is not None
    change = change.expand_as(value)
    return forward_ad.make_dual(value, change if tangent is None else tangent + change)
