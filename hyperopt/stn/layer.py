"""Layers that give their weights out with a response, and how a draw reaches them.

A hyper-layer is the plain layer with its class changed: parameters, hooks and names stay where they were, its forward is its
own, and ``collapse`` changes the class back. What changes is what the code of a network gets when it reads a weight of the layer
during a call: a tensor that responds, see ``hyperopt.stn.response``. The draw lies in a ``Context`` that all layers of a network
share, for as long as one call of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hyperopt.stn.draw import Draw
from hyperopt.stn.response import Response, Use, responding


class Context:
    """Where the layers of a network find the draw of the call under way.

    Attributes:
        draw: that draw; None outside of a call.
        linear: whether outputs are linearised in the response, as tangents of a dual level.
        unsure: weights whose layer got inputs with two dimensions as long as there are examples, see ``STN.forward``.
        sure: those of them whose first dimension has turned out to be that of the examples.
    """

    def __init__(self) -> None:
        """No call yet."""
        self.draw: Draw | None = None
        self.linear = False
        self.unsure: set[str] = set()
        self.sure: set[str] = set()

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
                "(hyperopt.stn.convert), and call what convert gave back, as stn(x, draw); "
                "if torch.utils.checkpoint calls it again, take the gradient within `with stn.at(draw)`"
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

    A subclass says how those of a kind of layer do; one of your own goes into ``hyperopt.stn.KINDS``. A subclass of both this
    class and the layer has a ``forward`` of its own, which reads weights by ``base`` and responses in ``responses``.

    Attributes:
        axis: of a matrix or filters, that has the units; vectors have one axis.
        silent: weights that never respond.
        responses: the response of each weight that has one, by its name in the layer.
        examples: the dimension of its inputs that has the examples.
    """

    axis: ClassVar[int] = 0
    silent: ClassVar[tuple[str, ...]] = ()

    responses: nn.ModuleDict
    examples: int = 0

    @torch.compiler.disable(
        reason="a weight that responds is no tensor that could be traced; under torch.compile it runs eagerly"
    )
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the layer as the plain one does, which reads the responding weights.

        Raises:
            RuntimeError: there is no draw.
        """
        _ = self.draw
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def base(self, name: str) -> Tensor:
        """A weight without its response: a parameter, or what a parametrization makes of its parameters."""
        found = self._parameters.get(name)
        return getattr(super(type(self), self), name) if found is None else found

    def read(self, name: str) -> Tensor:
        """A weight as the code of the network gets it: responding during a call at a draw that asks for it."""
        weight, context = self.base(name), self.context
        if context is None or context.draw is None or not context.draw.responds:
            return weight
        response: Any = self.responses[name]
        draw, direction, gate = context.draw, response.direction, response.gate
        if torch._C._len_torch_function_stack() > context.linear:  # a mode of others, which sees no more of them after this
            weight, direction, gate, delta = (part.view_as(part) for part in (weight, direction, gate, draw.delta))
            draw = replace(draw, delta=delta)
        place = f"{self.place}.{name}" if self.place else name
        parts = (weight, direction, gate, response.axis, draw, context.linear)
        return responding(Use(*parts, type(self).__name__, place, self.examples, context.unsure))

    def respond(self, name: str, count: int, gate: str, std: float) -> Response:
        """Make a response of one of its weights; see ``Response``."""
        weight = self.base(name).detach()
        return Response(self.fresh(weight), self.axis if weight.dim() > 1 else 0, count, gate, std)

    def fresh(self, weight: Tensor) -> Tensor:
        """The direction at first: that of torch's linear and convolutional layers; ones for a vector."""
        found = torch.ones_like(weight)
        return nn.init.kaiming_uniform_(found, a=5**0.5) if weight.dim() > 1 else found

    def collapse_(self, draw: Draw) -> None:
        """Become the plain layer; its weights are the business of ``STN.collapse``."""
        del self.responses
        vars(self).pop("examples", None)
        super().collapse_(draw)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the plain class, of which this one is made anew."""
        return _remade, (_kind(type(self)), self.plain, tuple(self.responses)), self.__getstate__()


class HyperEmbedding(HyperLayer):
    """Looking up, whose units are the dimensions of a vector."""

    axis = 1
    padding_idx: int | None

    @torch.no_grad()
    def fresh(self, weight: Tensor) -> Tensor:
        """Normal, as a plain embedding, with a padding row that stays at zero."""
        found = torch.randn_like(weight)
        if self.padding_idx is not None:
            found[self.padding_idx] = 0
        return found


class HyperTransposed(HyperLayer):
    """A transposed convolution, whose filters have their outputs on the second axis."""

    axis = 1


class HyperNorm(HyperLayer):
    """A normalisation: the gain's direction is one, whatever its dimensions."""

    def fresh(self, weight: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(weight)


class HyperAttention(HyperLayer):
    """Attention; keys and values that are the same for all examples stay so."""

    silent = ("bias_k", "bias_v")


class HyperRecurrent(HyperLayer):
    """A recurrent layer, which hands its weights to torch as one list."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        """The list, made whenever it is asked for."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        """Nothing is kept."""

    def collapse_(self, draw: Draw) -> None:
        """Make the plain layer's own list again."""
        super().collapse_(draw)
        self._init_flat_weights()  # pyright: ignore[reportCallIssue]


def hyper_class(kind: type[HyperLayer], plain: type[nn.Module], names: Sequence[str]) -> type[nn.Module]:
    """The class of a plain layer whose weights ``names`` respond."""

    def reading(name: str) -> Any:
        return property(lambda layer: layer.read(name))

    own = issubclass(kind, plain)  # and then its forward reads the weights
    members: dict[str, Any] = {} if own else {name: reading(name) for name in names}
    bases = (kind,) if own else (kind, plain)
    return type(
        f"Hyper{plain.__name__.removeprefix('Parametrized')}", bases, {**members, "plain": plain, "__doc__": kind.__doc__}
    )


def _kind(made: type[nn.Module]) -> type[HyperLayer]:
    """What ``hyper_class`` made a class from."""
    return made.__bases__[0]  # pyright: ignore[reportReturnType]


def _remade(kind: type[HyperLayer], plain: type[nn.Module], names: Sequence[str]) -> nn.Module:
    """An empty layer, whose state comes next."""
    made = hyper_class(kind, plain, names)
    return made.__new__(made)
