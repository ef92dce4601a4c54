"""What all hyper-layers share: their response parameters, and how a draw reaches them.

    y = W x + b + (V delta) * (H x) + (C delta) * h          V: (units, K) or (1, K), C the same, for K hyperparameters

so that a row's weights are ``W + diag(V delta) H``, affine in the hyperparameters of that row, at the price of a second product.

A hyper-layer is the plain layer with its class changed: parameters, hooks and names stay where they were, and ``collapse``
changes the class back. The draw lies in a ``Context`` that all layers of a network share, for as long as one call of it.

Reference: MacKay et al., ICLR 2019, arXiv 1903.03088, section 3.2; Bae & Grosse, NeurIPS 2020, arXiv 2010.13514, section 4.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from hyperopt.stn.draw import Draw


class Context:
    """Where the layers of a network find the draw of the call under way.

    Attributes:
        draw: that draw; None outside of a call.
        linear: whether outputs are linearised in the response, as tangents of a dual level.
    """

    def __init__(self) -> None:
        """No call yet."""
        self.draw: Draw | None = None
        self.linear = False

    @contextlib.contextmanager
    def holding(self, draw: Draw | None) -> Iterator[None]:
        """Hold a draw, and put back what was there, whatever happens."""
        before, self.draw = self.draw, draw
        try:
            yield
        finally:
            self.draw = before


class InContext(nn.Module):
    """A module that reads the draw of the call under way.

    Attributes:
        context: shared by the whole network; None before ``convert``.
        place: its name in the network.
        plain: the class that it was made from, and that ``collapse`` gives back.
    """

    context: Context | None = None
    place: str = ""
    plain: ClassVar[type[nn.Module]]

    def join(self, context: Context, place: str) -> None:
        """Become part of a network."""
        self.context, self.place = context, place

    @property
    def draw(self) -> Draw:
        """The draw of the call under way.

        Raises:
            RuntimeError: there is none: the layer was called on its own.
        """
        if self.context is None or self.context.draw is None:
            raise RuntimeError(
                f"{type(self).__name__} {self.place!r} was called without a draw: put it into a network, convert that "
                "(hyperopt.stn.convert), and call what convert gave back, as stn(x, draw)"
            )
        return self.context.draw

    def rows(self, found: int, draw: Draw) -> None:
        """Refuse an input of another number of rows than the draw has (one row is for all).

        Raises:
            ValueError: names the layer and both numbers.
        """
        if draw.rows not in (1, found):
            raise ValueError(
                f"{type(self).__name__} {self.place!r} got {found} rows, and the draw has {draw.rows}: the first dimension must "
                "be the examples; draw for this batch"
            )

    def collapse_(self, draw: Draw) -> None:
        """Become a plain module at the first row of ``draw``."""
        vars(self).pop("context", None)
        vars(self).pop("place", None)
        self.__class__ = self.plain  # pyright: ignore[reportAttributeAccessIssue]


class HyperLayer(InContext):
    """A layer whose weights respond.

    Attributes:
        responds_by: names of its weights; each has a response ``response_<name>``.
        shifts_by: names of its biases; all share the response ``response_bias`` of the first.
        gate: V. shape: (units or 1, K)
        bias_gate: C, where there is a bias. shape: (units or 1, K)
    """

    responds_by: ClassVar[tuple[str, ...]] = ("weight",)
    shifts_by: ClassVar[tuple[str, ...]] = ("bias",)
    channels: ClassVar[int] = -1  # the dimension of the outputs that has the units

    gate: nn.Parameter
    bias_gate: nn.Parameter | None
    response_bias: nn.Parameter

    @classmethod
    def become(cls, module: nn.Module, context: Context, place: str, count: int, gate: str, std: float) -> None:
        """Turn a plain layer into this one, in place; with gates at zero it is the same function.

        Args:
            module: the plain layer.
            context: of the network.
            place: its name there.
            count: number of hyperparameters.
            gate: ``unit`` or ``scalar``.
            std: standard deviation of the gates.
        """
        module.__class__ = cls
        assert isinstance(module, HyperLayer)
        module.join(context, place)
        weight = getattr(module, cls.responds_by[0])
        if weight is None:
            raise ValueError(f"{cls.plain.__name__} {place!r} has no weight that could respond; name it in convert(skip=...)")
        for name in cls.responds_by:
            module.register_parameter(f"response_{name}", nn.Parameter(module.fresh(getattr(module, name))))
        units = module.units() if gate == "unit" else 1
        module.gate = nn.Parameter(std * torch.randn(units, count).to(weight))
        bias = getattr(module, cls.shifts_by[0], None) if cls.shifts_by else None
        module.register_parameter("response_bias", None if bias is None else nn.Parameter(torch.ones_like(bias)))
        gates = None if bias is None else nn.Parameter(std * torch.randn(units, count).to(weight))
        module.register_parameter("bias_gate", gates)

    def units(self) -> int:
        """Outputs that have a gate each."""
        return getattr(self, self.responds_by[0]).shape[0]

    def response(self) -> list[nn.Parameter]:
        """The response parameters: H, h, V, C."""
        names = [*(f"response_{name}" for name in self.responds_by), "response_bias", "gate", "bias_gate"]
        return [found for name in names if (found := getattr(self, name)) is not None]

    def respond(self, y: Tensor, product: Tensor, draw: Draw) -> Tensor:
        """``y + (V delta) * product + (C delta) * h``.

        Args:
            y: the plain layer's outputs, as duals under ``context.linear``. shape: (rows, ..., units)
            product: ``H x``. The same shape.
            draw: of the call.
        """
        self.rows(y.shape[0], draw)
        delta, dims = draw.delta, y.dim()
        gates = self.spread(functional.linear(delta, self.gate), dims)
        shift = None
        if self.bias_gate is not None:
            shift = self.spread(functional.linear(delta, self.bias_gate * self.response_bias[:, None]), dims)
        if self.context is None or not self.context.linear:
            return torch.addcmul(y if shift is None else y + shift, gates, product)
        primal, tangent = forward_ad.unpack_dual(y)
        found = gates * product if shift is None else torch.addcmul(shift, gates, product)
        return forward_ad.make_dual(primal, found if tangent is None else tangent + found)

    def spread(self, units: Tensor, dims: int) -> Tensor:
        """A number for each row and unit, as outputs of so many dimensions have them. shape: (rows, ..., units)."""
        if dims == 2:
            return units
        shape = [units.shape[0]] + [1] * (dims - 1)
        shape[self.channels] = -1
        return units.view(shape)

    def primal(self, x: Tensor) -> Tensor:
        """The value of what may be a dual."""
        return forward_ad.unpack_dual(x).primal if self.context is not None and self.context.linear else x

    def squares(self, draw: Draw) -> Tensor:
        """``|W + diag(V delta) H|^2`` of every row, without the biases. shape: (rows,)."""
        gates = functional.linear(draw.delta, self.gate)  # shape: (rows, units or 1)
        total: Any = 0.0
        for name in self.responds_by:
            w, h = getattr(self, name), getattr(self, f"response_{name}")
            w, h = self.by_unit(w), self.by_unit(h)
            total = total + w.square().sum()
            if draw.responds:
                cross, square = (w * h).sum(1), h.square().sum(1)
                total = total + (2 * gates * cross + gates.square() * square).sum(1)
        return torch.as_tensor(total).expand(draw.rows)

    def by_unit(self, weight: Tensor) -> Tensor:
        """A weight with one row for each unit."""
        return weight.flatten(1) if weight.dim() > 1 else weight[:, None]

    @torch.no_grad()
    def slope(self) -> Tensor:
        """Squared Frobenius norm of the response's Jacobian ``d weights / d lam``. shape: ()."""
        gates = self.gate.square().sum(1)
        total: Any = 0.0
        for name in self.responds_by:
            total = total + (gates * self.by_unit(getattr(self, f"response_{name}")).square().sum(1)).sum()
        if self.bias_gate is not None:
            total = total + (self.bias_gate.square().sum(1) * self.response_bias.square()).sum()
        return total

    @torch.no_grad()
    def collapse_(self, draw: Draw) -> None:
        """Become the plain layer with the weights of the first row of ``draw``."""
        delta = draw.delta[0]
        gates = self.gate @ delta
        for name in self.responds_by:
            w, h = getattr(self, name), getattr(self, f"response_{name}")
            setattr(self, name, nn.Parameter(w + self.scaled(gates, h)))  # a new one: w may be shared by another layer
        if self.bias_gate is not None:
            shift = (self.bias_gate @ delta) * self.response_bias
            setattr(self, self.shifts_by[0], nn.Parameter(getattr(self, self.shifts_by[0]) + shift))
        for name in ("gate", "bias_gate", "response_bias", *(f"response_{name}" for name in self.responds_by)):
            delattr(self, name)
        super().collapse_(draw)

    def scaled(self, gates: Tensor, weight: Tensor) -> Tensor:
        """``diag(gates) weight``."""
        return gates.view(-1, *[1] * (weight.dim() - 1)) * weight

    def fresh(self, weight: Tensor) -> Tensor:
        """Initial response weights: those of torch's linear and convolutional layers; ones for the vector of a normalisation."""
        found = torch.ones_like(weight)
        return nn.init.kaiming_uniform_(found, a=5**0.5) if weight.dim() > 1 else found
