"""``convert``: an existing network becomes a self-tuning one; ``STN``: what it becomes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hyperopt.stn.conv import HyperConv1d, HyperConv2d, HyperConv3d
from hyperopt.stn.dense import HyperEmbedding, HyperLinear
from hyperopt.stn.draw import Draw
from hyperopt.stn.layer import Context, HyperLayer, InContext
from hyperopt.stn.lstm import HyperLSTMCell
from hyperopt.stn.norm import HyperBatchNorm1d, HyperBatchNorm2d, HyperBatchNorm3d, HyperGroupNorm, HyperLayerNorm
from hyperopt.stn.settings import GATES
from hyperopt.stn.space import HyperSpace

KINDS: dict[type[nn.Module], type[HyperLayer]] = {
    kind.plain: kind
    for kind in (
        HyperLinear,
        HyperEmbedding,
        HyperConv1d,
        HyperConv2d,
        HyperConv3d,
        HyperBatchNorm1d,
        HyperBatchNorm2d,
        HyperBatchNorm3d,
        HyperGroupNorm,
        HyperLayerNorm,
        HyperLSTMCell,
    )
}
"""The hyper-layer of each plain one; one of your own is a subclass of ``HyperLayer`` with ``plain`` and ``forward``."""

FUSED = (nn.LSTM, nn.GRU, nn.RNN)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm)


class STN(nn.Module):
    """A network whose weights respond to its hyperparameters; made by ``convert``.

    ``stn(x, draw)`` is the network at the hyperparameters of the draw, row by row; ``stn(x)`` at the hyperparameters themselves.

    Attributes:
        module: the converted network.
        space: its hyperparameters.
    """

    def __init__(self, module: nn.Module, space: HyperSpace, context: Context) -> None:
        """Put the parts together."""
        super().__init__()
        self.module, self.space, self._context = module, space, context

    @property
    def linear(self) -> bool:
        """Whether outputs are linearised in the response: ``f(x, w) + d_w f(x, w) (w(lam') - w)``.

        Raises:
            ValueError: the network has a normalisation that cannot be linearised.
        """
        return self._context.linear

    @linear.setter
    def linear(self, value: bool) -> None:
        for name, module in self.module.named_modules():
            if value and isinstance(module, NORMS) and not isinstance(module, HyperLayer):
                raise ValueError(
                    f"stn.mode=delta_linear: {name!r} is a {type(module).__name__} without a response, of whose linearisation "
                    "torch has no right derivative; give it a gain (affine=True), or use mode=delta"
                )
        self._context.linear = value

    def forward(self, x: Any, draw: Draw | None = None, *args: Any, **kwargs: Any) -> Any:
        """Call the network; see the class.

        Args:
            x: its first input, examples first.
            draw: the hyperparameters (None: those of ``at``, else the hyperparameters themselves).
            *args: further inputs of the network.
            **kwargs: the same.
        """
        draw = draw or self._context.draw or self.space.draw(leading(x), perturb=False)
        with self._context.holding(draw):
            if not (self.linear and draw.responds):
                return self.module(x, *args, **kwargs)
            with forward_ad.dual_level():
                out = self.module(x, *args, **kwargs)
                return optree.tree_map(_sum_of_dual, out)  # pyright: ignore[reportArgumentType]

    @contextlib.contextmanager
    def at(self, draw: Draw) -> Iterator[None]:
        """Let calls without a draw be at this one: ``with stn.at(draw): loss(stn(x))``."""
        with self._context.holding(draw):
            yield

    def hyper_layers(self) -> list[HyperLayer]:
        """The layers that respond."""
        return [module for module in self.module.modules() if isinstance(module, HyperLayer)]

    def response_parameters(self) -> list[nn.Parameter]:
        """V, H, C, h of every layer."""
        return [parameter for layer in self.hyper_layers() for parameter in layer.response()]

    def base_parameters(self) -> list[nn.Parameter]:
        """The parameters of the network as it was."""
        response = {id(parameter) for parameter in self.response_parameters()}
        return [parameter for parameter in self.module.parameters() if id(parameter) not in response]

    def squared_norm(self, draw: Draw | None = None) -> Tensor:
        """``|w(lam')|^2`` row by row over all weights that are matrices or filters, for weight decay. shape: (rows,).

        Biases and the vectors of normalisations are left out, as usual.
        """
        draw = draw or self._context.draw or self.space.draw(1, perturb=False)
        layers = self.hyper_layers()
        found = [layer.squares(draw) for layer in layers if getattr(layer, layer.responds_by[0]).dim() > 1]
        inside = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
        rest = [p.square().sum().expand(draw.rows) for p in self.module.parameters() if p.dim() > 1 and id(p) not in inside]
        if not found + rest:
            raise ValueError("the network has no weights that are matrices or filters: there is nothing to decay")
        return torch.stack(found + rest).sum(0)

    def response_norm(self) -> float:
        """Frobenius norm of the Jacobian ``d w / d lam`` of all weights."""
        return float(sum((layer.slope() for layer in self.hyper_layers()), torch.zeros(()))) ** 0.5

    def collapse(self) -> nn.Module:
        """Return a plain network with the weights at the hyperparameters themselves; this one stays as it is."""
        draw = self.space.draw(1, perturb=False)
        plain = copy.deepcopy(self.module)
        with torch.no_grad():
            for module in list(plain.modules()):
                if isinstance(module, InContext):
                    module.collapse_(draw)
        return plain


def convert(
    module: nn.Module, space: HyperSpace, *, gate: str = "unit", std: float = 0.0, skip: Sequence[str] = (), respond: bool = True
) -> STN:
    """Turn a network into a self-tuning one.

    The network is copied, and keeps its weights; with ``std=0`` every gate is zero and it is the same function at every draw.

    Args:
        module: the network; dropout at a tuned rate is ``hyperopt.stn.Dropout(name)`` inside of it.
        space: the hyperparameters.
        gate: ``unit``: a gate for each output of a layer, as in the papers; ``scalar``: one for the layer.
        std: standard deviation of the gates at first.
        skip: names of modules whose weights shall not respond; what lies inside of them is left alone too.
        respond: False: no weights respond at all; for a plain network that reads the same draws, see ``hyperopt.stn.replay``.

    Raises:
        ValueError: a layer with parameters of a kind that has no hyper-layer, a name in ``skip`` that is not there, a dropout of
            no hyperparameter, or nothing that could respond; says what to do.

    Example:
        >>> import torch
        >>> from hyperopt.stn import Bounded, Dropout, HyperSpace, convert
        >>> plain = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), Dropout("rate"), torch.nn.Linear(3, 1))
        >>> space = HyperSpace({"rate": Bounded(0.2, 0.0, 0.9)})
        >>> stn = convert(plain, space)
        >>> stn(torch.ones(5, 4), space.draw(rows=5)).shape
        torch.Size([5, 1])
    """
    if gate not in GATES:
        raise ValueError(f"convert: gate={gate!r} is none of {', '.join(GATES)}; change gate")
    names = [name for name, _ in module.named_modules()]
    unknown = [name for name in skip if name not in names]
    if unknown:
        raise ValueError(f"convert: skip names {unknown[0]!r}, which is no module of the network; its modules are {names[1:]}")
    other = next((p for p in module.parameters() if (p.dtype, p.device) != (space.u.dtype, space.u.device)), None)
    if other is not None and other.is_floating_point():
        raise ValueError(
            f"convert: the space is {space.u.dtype} on {space.u.device}, and the network {other.dtype} on {other.device}; give "
            "HyperSpace(dtype=..., device=...) those of the network"
        )
    module, context = copy.deepcopy(module), Context()
    for name, each in list(module.named_modules()):
        if isinstance(each, InContext):
            _join(each, context, name, space)
        elif respond and not any(name == outer or name.startswith(f"{outer}.") for outer in skip):
            kind = KINDS.get(type(each))
            if kind is None:
                _check(each, name)
            elif any(True for _ in each.parameters(recurse=False)):
                _check_shape(each, name)
                kind.become(each, context, name, len(space.names), gate, std)
    stn = STN(module, space, context)
    if respond and not stn.hyper_layers():
        raise ValueError(f"convert: no layer of {type(module).__name__} has weights that could respond")
    return stn


def leading(batch: Any) -> int:
    """How many rows a batch has: the first dimension of its first tensor.

    Raises:
        ValueError: it has none.
    """
    for leaf in optree.tree_leaves(batch):  # pyright: ignore[reportArgumentType]
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError(f"a batch of type {type(batch).__name__} has no tensor with rows; give rows=")


def _join(module: InContext, context: Context, name: str, space: HyperSpace) -> None:
    """Take a module into the network that reads a hyperparameter by name."""
    if isinstance(module, HyperLayer):
        raise ValueError(f"convert: {name or 'the network'!r} is a hyper-layer already; convert the plain network, once")
    read = getattr(module, "name", None)
    if read is not None and read not in space.names:
        raise ValueError(f"{type(module).__name__}({read!r}) at {name!r}: the space has {', '.join(space.names)}; declare {read}")
    module.join(context, name)


def _check(module: nn.Module, name: str) -> None:
    """Refuse a module that has parameters of its own and no hyper-layer."""
    own = [key for key, _ in module.named_parameters(recurse=False)]
    if not own:
        return
    kind = type(module).__name__
    if isinstance(module, FUSED):
        what = (
            f"write it as a loop over torch.nn.{'LSTM' if kind == 'LSTM' else kind}Cell" if kind == "LSTM" else "use an LSTMCell"
        )
    else:
        what = "subclass hyperopt.stn.HyperLayer and put it into hyperopt.stn.KINDS"
    known = ", ".join(each.__name__ for each in KINDS)
    raise ValueError(
        f"convert: {name or 'the network'!r} is a {kind} with parameters of its own ({', '.join(own)}), a kind without a "
        f"hyper-layer (there are {known}); {what}, or leave its weights without a response: skip=[{name!r}]"
    )


def _check_shape(module: nn.Module, name: str) -> None:
    """Refuse a layer normalisation over more than the last dimension: its units would be no vector."""
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        raise ValueError(
            f"convert: {name!r} is a LayerNorm over {tuple(module.normalized_shape)}, and a response has a gate for each entry "
            f"of the last dimension alone; use GroupNorm(1, channels), or leave it without a response: skip=[{name!r}]"
        )


def _sum_of_dual(out: Any) -> Any:
    """Value plus tangent."""
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return out
    primal, tangent = forward_ad.unpack_dual(out)
    return primal if tangent is None else primal + tangent
