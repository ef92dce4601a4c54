"""``convert`` turns an existing network into a self-tuning one, an ``STN``."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad

from hyperopt.core.checks import require_choice, require_kind
from hyperopt.core.eager import runs_eagerly
from hyperopt.core.policy import note_once
from hyperopt.stn.draw import Draw
from hyperopt.stn.dual import Elementary
from hyperopt.stn.kinds import check_memory, check_wrapper, copied, respond_, weights_of
from hyperopt.stn.layer import UNTRACED, Context, HyperLayer, InContext
from hyperopt.stn.response import Response, RowsError
from hyperopt.stn.space import HyperSpace

GATES = ("unit", "scalar")
"""How many gates a response has: one for each output of the layer, or a single one."""


class STN(nn.Module):
    """A network whose weights respond to its hyperparameters, made by ``convert``.

    ``stn(x, draw)`` is the network at the draw's hyperparameters, row by row; ``stn(x)`` is the network at the present values.

    Attributes:
        module: the converted network.
        space: its hyperparameters.
        context: what its layers share during a call; ``convert`` makes it.

    Reference: MacKay et al., ICLR 2019, arXiv 1903.03088; Bae & Grosse, NeurIPS 2020, arXiv 2010.13514.

    Example:
        >>> import torch
        >>> from hyperopt import stn
        >>> plain = torch.nn.Linear(3, 1)
        >>> net = stn.convert(plain, stn.HyperSpace({"decay": stn.Positive(0.1)}))
        >>> x = torch.ones(2, 3)
        >>> torch.allclose(net(x), plain(x)), type(net.collapse()).__name__  # a new network does not respond yet
        (True, 'Linear')
    """

    def __init__(self, module: nn.Module, space: HyperSpace, context: Context) -> None:
        """Keep the parts."""
        super().__init__()
        self.module, self.space, self._context = module, space, context
        self._weights: dict[str, tuple[HyperLayer, str, Response]] | None = None

    @property
    def linear(self) -> bool:
        """Whether outputs are linearised in the response: ``f(x, w) + d_w f(x, w) (w(lam') - w)``."""
        return self._context.linear

    @linear.setter
    def linear(self, value: bool) -> None:
        self._context.linear = value

    @runs_eagerly(UNTRACED)
    def forward(self, x: Any, draw: Draw | None = None, *args: Any, **kwargs: Any) -> Any:
        """Call the network; see the class.

        Args:
            x: its first input, examples first.
            draw: the hyperparameters (None: those of ``at``, else the present values).
            *args: further inputs of the network.
            **kwargs: further inputs of the network by name.

        Raises:
            ValueError: the first dimension of a layer's input does not have the examples (if the sizes do not show this, the
                network is called once more with one more example), or a function of torch that reads a weight has no rule
                for its response.
        """
        draw = draw or self._context.draw or self.space.draw(leading(x), perturb=False)
        with self._context.holding(draw):
            if self.linear and draw.responds:
                with forward_ad.dual_level(), Elementary():
                    out = self.module(x, *args, **kwargs)
                    out = optree.tree_map(_sum_of_dual, out)  # pyright: ignore[reportArgumentType]
            else:
                out = self.module(x, *args, **kwargs)
        if self._context.unsure - self._context.sure:
            self._make_sure(x, draw, args, kwargs)
        return out

    @torch.no_grad()
    def _make_sure(self, x: Any, draw: Draw, args: Any, kwargs: Any) -> None:
        """Call a copy with one more example, so that only one dimension has their number; its layers refuse a wrong one."""
        context, more = self._context, torch.arange(draw.rows + 1, device=draw.m.device) % draw.rows
        context.sure |= context.unsure
        context.unsure.clear()
        if peek_interpreter_stack() is not None or torch._C._len_torch_function_stack():
            return  # under a transform of torch.func or another mode, the tensors cannot be copied like this

        def longer(leaf: Any) -> Any:
            return leaf[more.to(leaf.device)] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == draw.rows else leaf

        try:
            with torch.random.fork_rng():
                trial = copy.deepcopy(self).eval()
                trial.linear = False
                inputs: Any = optree.tree_map(longer, (x, args, kwargs))  # pyright: ignore[reportArgumentType]
                trial(inputs[0], replace(draw, m=draw.m[more], delta=draw.delta[more], seen=None), *inputs[1], **inputs[2])
        except RowsError:
            raise
        except Exception as error:  # the network may fail in any way if its other inputs are for the true number of examples
            note_once(
                f"{', '.join(sorted(context.sure))} got inputs whose second dimension is as long as there are examples; "
                f"the first was taken for the examples, and calling the network with one example more did not work ({error})",
                "the dimension of the examples",
            )

    @contextlib.contextmanager
    def at(self, draw: Draw) -> Iterator[None]:
        """Make calls without a draw use this one: ``with stn.at(draw): loss(stn(x))``."""
        with self._context.holding(draw):
            yield

    def hyper_layers(self) -> list[HyperLayer]:
        """Return the layers that respond."""
        return [module for module in self.module.modules() if isinstance(module, HyperLayer)]

    def weights(self) -> dict[str, tuple[HyperLayer, str, Response]]:
        """Return every responding weight once, by its first place in the network: layer, name in the layer, and response."""
        if self._weights is None:
            self._weights = self._found()
        return self._weights

    def _found(self) -> dict[str, tuple[HyperLayer, str, Response]]:
        """Search the network for the responding weights."""
        found: dict[int, tuple[str, tuple[HyperLayer, str, Response]]] = {}
        for layer in self.hyper_layers():
            for name, response in layer.responses.items():
                assert isinstance(response, Response)
                place = f"{layer.place}.{name}" if layer.place else name
                found.setdefault(id(response), (place, (layer, name, response)))
        return dict(found.values())

    def response_parameters(self) -> list[nn.Parameter]:
        """Return H and V of every responding weight."""
        return [parameter for _, _, response in self.weights().values() for parameter in response.parameters()]

    def base_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the original network."""
        response = {id(parameter) for parameter in self.response_parameters()}
        return [parameter for parameter in self.module.parameters() if id(parameter) not in response]

    def squared_norm(self, draw: Draw | None = None) -> Tensor:
        """Return ``|w(lam')|^2`` of each row over all weights that are matrices or filters, for weight decay. shape: (rows,).

        Each weight is counted once, however many layers share it. Biases and the vectors of normalisations are left out, as
        usual. Of a parametrized weight that responds, the weight itself is counted, and not its parameters.
        """
        return torch.stack([*self.squared_norms(draw).values()]).sum(0)

    def squared_norms(self, draw: Draw | None = None) -> dict[str, Tensor]:
        """Return ``|w(lam')|^2`` of each row for each weight that ``squared_norm`` counts, for weight decay per layer.

        The names are those of the plain network's parameters, ``"0.weight"``. shape of each: (rows,).
        """
        draw = draw or self._context.draw or self.space.draw(1, perturb=False)
        inside, found = {id(parameter) for parameter in self.response_parameters()}, {}
        for place, (layer, name, response) in self.weights().items():
            inside |= {id(parameter) for parameter in weights_of(layer)[name]}
            weight = layer.base(name)
            if weight.dim() > 1:
                found[place] = response.squares(weight, draw)
        for place, p in self.module.named_parameters():
            if p.dim() > 1 and id(p) not in inside:
                found[place] = p.square().sum().expand(draw.rows)
        if not found:
            raise ValueError("the network has no weights that are matrices or filters: there is nothing to decay")
        return found

    @torch.no_grad()
    def response_norm(self) -> float:
        """Return the Frobenius norm of the Jacobian ``d w / d lam`` of all weights."""
        return float(sum((response.slope() for _, _, response in self.weights().values()), torch.zeros(()))) ** 0.5

    @torch.no_grad()
    def collapse(self, draw: Draw | None = None) -> nn.Module:
        """Return a plain network with the weights at the present hyperparameters; this one is not changed.

        Args:
            draw: a draw whose first row gives the weights and rates instead (None: the present values).
        """
        draw = draw or self.space.draw(1, perturb=False)
        plain = copy.deepcopy(self)
        plain.respond_(draw.delta[0])
        for module in list(plain.module.modules()):
            if isinstance(module, InContext):
                module.collapse_(draw)
        return plain.module

    @torch.no_grad()
    def respond_(self, delta: Tensor) -> None:
        """Replace the weights by those that respond to ``delta``. shape: (K,)."""
        for layer, name, response in self.weights().values():
            weight = layer.base(name) + response.change(delta)
            parameter = layer._parameters.get(name)
            if parameter is not None:
                parameter.copy_(weight)  # in place, since other layers may share it
            else:
                parametrizations: Any = layer.parametrizations
                parametrizations[name].right_inverse(weight)


def convert(
    module: nn.Module, space: HyperSpace, *, gate: str = "unit", std: float = 0.0, skip: Sequence[str] = (), respond: bool = True
) -> STN:
    """Turn a network into a self-tuning one.

    The network is copied and keeps its weights. With ``std=0`` every gate is zero, and it is the same function at every draw.
    Each trained weight (``requires_grad``) gets one response, whoever reads it; see ``hyperopt.stn.response``.

    Args:
        module: the network; dropout at a tuned rate is ``hyperopt.stn.Dropout(name)`` inside it.
        space: the hyperparameters.
        gate: ``unit``: a gate for each output of a layer, as in the papers; ``scalar``: one for the layer.
        std: standard deviation of the initial gates.
        skip: names of modules whose weights do not respond, nor do those of the modules inside them.
        respond: False: no weights respond, as for a plain network that reads the same draws; see ``hyperopt.stn.replay``.

    Returns:
        ``STN``: the network, a copy of ``module`` whose weights respond.

    Raises:
        ValueError: a layer has parameters but no hyper-layer, or a parametrization that cannot be set to a given weight; the
            network is compiled or wrapped; a name in ``skip`` does not exist; a dropout has no hyperparameter; or nothing can
            respond. The message names it and says what to do.

    Reference: MacKay et al., ICLR 2019, arXiv 1903.03088.

    Example:
        >>> import torch
        >>> from hyperopt.stn import Bounded, Dropout, HyperSpace, convert
        >>> plain = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), Dropout("rate"), torch.nn.Linear(3, 1))
        >>> space = HyperSpace({"rate": Bounded(0.2, 0.0, 0.9)})
        >>> stn = convert(plain, space)
        >>> stn(torch.ones(5, 4), space.draw(rows=5)).shape
        torch.Size([5, 1])
    """
    require_choice("convert: ", "gate", gate, GATES)
    require_kind("convert: ", "module", module, nn.Module, "give the network")
    require_kind("convert: ", "space", space, HyperSpace, "give hyperopt.stn.HyperSpace of the declared hyperparameters")
    names = [name for name, _ in module.named_modules()]
    unknown = [name for name in skip if name not in names]
    if unknown:
        raise ValueError(f"convert: skip names {unknown[0]!r}, which is not a module of the network; its modules are {names[1:]}")
    other = next((p for p in module.parameters() if (p.dtype, p.device) != (space.u.dtype, space.u.device)), None)
    if other is not None and other.is_floating_point():
        raise ValueError(
            f"convert: the space is {space.u.dtype} on {space.u.device}, and the network {other.dtype} on {other.device}; give "
            "HyperSpace(dtype=..., device=...) those of the network"
        )
    for name, each in module.named_modules():
        check_wrapper(each, name)
    check_memory(module)
    module, context = copied(module), Context()
    for name, each in list(module.named_modules()):
        if isinstance(each, InContext):
            _join(each, context, name, space)
    if respond:
        respond_(module, context, len(space.names), gate, std, skip)
        if not any(isinstance(each, HyperLayer) for each in module.modules()):
            raise ValueError(
                f"convert: no layer of {type(module).__name__} has weights that could respond: those that are frozen "
                f"(requires_grad=False) and those in skip={list(skip)} do not"
            )
    return STN(module, space, context)


def leading(batch: Any) -> int:
    """Return the number of rows of a batch, the first dimension of its first tensor.

    Raises:
        ValueError: it has no such tensor.
    """
    for leaf in optree.tree_leaves(batch):  # pyright: ignore[reportArgumentType]
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError(f"a batch of type {type(batch).__name__} has no tensor with rows; give rows=")


def _join(module: InContext, context: Context, name: str, space: HyperSpace) -> None:
    """Add a module that reads a hyperparameter by name to the network."""
    if isinstance(module, HyperLayer):
        raise ValueError(f"convert: {name or 'the network'!r} is a hyper-layer already; convert the plain network, once")
    read = getattr(module, "name", None)
    if read is not None and read not in space.names:
        raise ValueError(f"{type(module).__name__}({read!r}) at {name!r}: the space has {', '.join(space.names)}; declare {read}")
    if read is not None and getattr(module, "shared", False) and (per := space.declared[read].per) != "batch":
        raise ValueError(
            f"{type(module).__name__}({read!r}) at {name!r} has one mask for all rows, and {read} has a value for each "
            f"(per={per!r}); declare it with per='batch'"
        )
    module.join(context, name)


def _sum_of_dual(out: Any) -> Any:
    """Return the value plus the tangent."""
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return out
    primal, tangent = forward_ad.unpack_dual(out)
    return primal if tangent is None else primal + tangent


def check_network(model: object, owner: str) -> None:
    """Refuse a model that is not from ``convert``.

    Raises:
        TypeError: the message names it and says what to give.
    """
    if isinstance(model, STN):
        return
    if isinstance(getattr(model, "module", None), STN) or isinstance(getattr(model, "_orig_mod", None), STN):
        what = "give the network that convert gave back, without a wrapper: SelfTuning takes its own means over the ranks"
    else:
        what = "give what hyperopt.stn.convert(network, space) gives back"
    raise TypeError(f"{owner}: model is a {type(model).__name__}; {what}")
