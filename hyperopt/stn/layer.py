"""Layers whose weights respond, and how a draw reaches them.

A hyper-layer is the plain layer with its class changed: parameters, hooks and names stay, it keeps its own forward, and
``collapse`` changes the class back. When the code of a network reads a weight of the layer during a call, it gets a tensor
that responds (see ``hyperopt.stn.response``). During a call, the draw is in a ``Context`` that all layers of the network
share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hyperopt.core.eager import runs_eagerly
from hyperopt.stn.draw import Draw
from hyperopt.stn.response import Response, Use, responding

UNTRACED = "a weight that responds to hyperparameters cannot be traced; under torch.compile it runs eagerly"


class Context:
    """The holder of the draw of the present call, shared by the layers of a network.

    Attributes:
        draw: that draw; None outside of a call.
        linear: whether outputs are linearised in the response, as tangents of a dual level.
        unsure: weights of layers whose inputs had two dimensions of the size of the draw; see ``STN.forward``.
        sure: the weights in ``unsure`` whose examples were found to lie along the first dimension.
    """

    def __init__(self) -> None:
        """Start outside of a call."""
        self.draw: Draw | None = None
        self.linear = False
        self.unsure: set[str] = set()
        self.sure: set[str] = set()

    @contextlib.contextmanager
    def holding(self, draw: Draw | None) -> Iterator[None]:
        """Hold a draw during the block, and restore the previous one at its end."""
        before, self.draw = self.draw, draw
        try:
            yield
        finally:
            self.draw = before


class InContext(nn.Module):
    """A module that reads the draw of the present call.

    Attributes:
        context: shared by the whole network; None before ``convert``.
        place: its name in the network.
        plain: the class from which it was made, and to which ``collapse`` changes it back.
    """

    context: Context | None = None
    place: str = ""
    plain: ClassVar[type[nn.Module]]

    def join(self, context: Context, place: str) -> None:
        """Become part of a network."""
        self.context, self.place = context, place

    @property
    def draw(self) -> Draw:
        """The draw of the present call.

        Raises:
            RuntimeError: there is none, since the layer was called outside of its network.
        """
        if self.context is None or self.context.draw is None:
            raise RuntimeError(
                f"{type(self).__name__} {self.place!r} was called without a draw: put it into a network, convert that "
                "(hyperopt.stn.convert), and call what convert gave back, as stn(x, draw); "
                "if torch.utils.checkpoint calls it again, take the gradient within `with stn.at(draw)`"
            )
        return self.context.draw

    def rows(self, found: int, draw: Draw) -> None:
        """Refuse an input whose number of rows is not that of the draw (a draw of one row fits all).

        Raises:
            ValueError: the message names the layer and both numbers.
        """
        if draw.rows not in (1, found):
            raise ValueError(
                f"{type(self).__name__} {self.place!r} got {found} rows, and the draw has {draw.rows}: the first dimension must "
                "be the examples; draw for this batch"
            )

    def collapse_(self, draw: Draw) -> None:
        """Become a plain module, with the values of the first row of ``draw``."""
        vars(self).pop("context", None)
        vars(self).pop("place", None)
        self.__class__ = self.plain  # pyright: ignore[reportAttributeAccessIssue]


class HyperLayer(InContext):
    """A layer whose weights respond.

    A subclass defines the response for a kind of layer; add your own to ``hyperopt.stn.KINDS``. If it is a subclass of the
    layer's class too, it has its own ``forward``, which reads weights by ``base`` and responses in ``responses``.

    Attributes:
        axis: the axis of a matrix or of filters along which the units are; a vector has only one axis.
        silent: weights that never respond.
        responses: the response of each responding weight, by its name in the layer.
        examples: the dimension of its inputs that has the examples.

    Reference: MacKay et al., ICLR 2019, arXiv 1903.03088, section 3.2.

    Example:
        >>> import torch
        >>> from hyperopt import stn
        >>> net = stn.convert(torch.nn.Linear(3, 1), stn.HyperSpace({"decay": stn.Positive(0.1)}))
        >>> isinstance(net.module, stn.HyperLayer), isinstance(net.module, torch.nn.Linear), sorted(net.module.responses)
        (True, True, ['bias', 'weight'])
    """

    axis: ClassVar[int] = 0
    silent: ClassVar[tuple[str, ...]] = ()

    responses: nn.ModuleDict
    examples: int = 0

    @runs_eagerly(UNTRACED)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the layer like the plain one, with the responding weights.

        Raises:
            RuntimeError: there is no draw.
        """
        _ = self.draw
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def base(self, name: str) -> Tensor:
        """Return a weight without its response: a parameter, or the result of a parametrization."""
        found = self._parameters.get(name)
        return getattr(super(type(self), self), name) if found is None else found

    def read(self, name: str) -> Tensor:
        """Return a weight for the code of the network: a responding one during a call whose draw needs this."""
        weight, context = self.base(name), self.context
        if context is None or context.draw is None or not context.draw.responds:
            return weight
        response: Any = self.responses[name]
        draw, direction, gate = context.draw, response.direction, response.gate
        if torch._C._len_torch_function_stack() > context.linear:  # show the parts to another mode, which cannot see them later
            weight, direction, gate, delta = (part.view_as(part) for part in (weight, direction, gate, draw.delta))
            draw = replace(draw, delta=delta)
        place = f"{self.place}.{name}" if self.place else name
        parts = (weight, direction, gate, response.axis, draw, context.linear)
        return responding(Use(*parts, type(self).__name__, place, self.examples, context.unsure))

    def respond(self, name: str, count: int, gate: str, std: float) -> Response:
        """Return a new response of one of its weights; see ``Response``."""
        weight = self.base(name).detach()
        return Response(self.fresh(weight), self.axis if weight.dim() > 1 else 0, count, gate, std)

    def fresh(self, weight: Tensor) -> Tensor:
        """Return the initial direction: as for torch's linear and convolutional layers, or ones for a vector."""
        found = torch.ones_like(weight)
        return nn.init.kaiming_uniform_(found, a=5**0.5) if weight.dim() > 1 else found

    def collapse_(self, draw: Draw) -> None:
        """Become the plain layer; ``STN.collapse`` sets its weights."""
        del self.responses
        vars(self).pop("examples", None)
        super().collapse_(draw)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the plain class, from which this one is made again."""
        return _remade, (_kind(type(self)), self.plain, tuple(self.responses)), self.__getstate__()


class HyperEmbedding(HyperLayer):
    """An embedding, whose units are the dimensions of its vectors."""

    axis = 1
    padding_idx: int | None

    @torch.no_grad()
    def fresh(self, weight: Tensor) -> Tensor:
        """Return normal entries, as for a plain embedding, with zeros in the padding row."""
        found = torch.randn_like(weight)
        if self.padding_idx is not None:
            found[self.padding_idx] = 0
        return found


class HyperTransposed(HyperLayer):
    """A transposed convolution, whose filters have their outputs on the second axis."""

    axis = 1


class HyperNorm(HyperLayer):
    """A normalisation: the direction of its gain is one, whatever its number of dimensions."""

    def fresh(self, weight: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(weight)


class HyperAttention(HyperLayer):
    """Attention, in which keys and values that are shared by all examples do not respond."""

    silent = ("bias_k", "bias_v")


class HyperRecurrent(HyperLayer):
    """A recurrent layer, which passes its weights to torch as one list."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        """The list of weights, made at each access."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        """Ignore the value, since no list is kept."""

    def collapse_(self, draw: Draw) -> None:
        """Make the plain layer's own list again."""
        super().collapse_(draw)
        self._init_flat_weights()  # pyright: ignore[reportCallIssue]


def hyper_class(kind: type[HyperLayer], plain: type[nn.Module], names: Sequence[str]) -> type[nn.Module]:
    """Return the class of a plain layer whose weights ``names`` respond."""

    def reading(name: str) -> Any:
        return property(lambda layer: layer.read(name))

    own = issubclass(kind, plain)  # then its forward reads the weights
    members: dict[str, Any] = {} if own else {name: reading(name) for name in names}
    bases = (kind,) if own else (kind, plain)
    return type(
        f"Hyper{plain.__name__.removeprefix('Parametrized')}", bases, {**members, "plain": plain, "__doc__": kind.__doc__}
    )


def _kind(made: type[nn.Module]) -> type[HyperLayer]:
    """Return the kind from which ``hyper_class`` made a class."""
    return made.__bases__[0]  # pyright: ignore[reportReturnType]


def _remade(kind: type[HyperLayer], plain: type[nn.Module], names: Sequence[str]) -> nn.Module:
    """Return an empty layer, whose state is set next."""
    made = hyper_class(kind, plain, names)
    return made.__new__(made)
