"""The layers whose weights can respond, and the networks that ``convert`` refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from hyperopt.stn import attention, norm, products, recurrent  # the rules of torch's functions  # noqa: F401
from hyperopt.stn.layer import (
    Context,
    HyperAttention,
    HyperEmbedding,
    HyperLayer,
    HyperNorm,
    HyperRecurrent,
    HyperTransposed,
    InContext,
    hyper_class,
)
from hyperopt.stn.response import Response

KINDS: dict[type[nn.Module], type[HyperLayer]] = {
    **dict.fromkeys((nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.PReLU), HyperLayer),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), HyperTransposed),
    **dict.fromkeys((nn.Embedding, nn.EmbeddingBag), HyperEmbedding),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm), HyperNorm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), HyperNorm),
    **dict.fromkeys((nn.LSTMCell, nn.GRUCell, nn.RNNCell), HyperLayer),
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), HyperRecurrent),
    nn.MultiheadAttention: HyperAttention,
}
"""How the weights of each kind of layer, and of its subclasses, respond; for your own kind derive from ``HyperLayer``."""

WRAPPERS = {
    "DistributedDataParallel": "convert the network inside (its .module), and wrap what convert gives back",
    "DataParallel": "convert the network inside (its .module); DataParallel itself does not split a draw",
    "FullyShardedDataParallel": "convert the network inside, and leave it whole",
    "OptimizedModule": "convert the plain network (its _orig_mod), and compile what convert gives back",
}
"""Wrappers of a network that would keep using the weights that they know, and what to do instead."""


def _kind_of(module: nn.Module) -> type[HyperLayer] | None:
    """Return how the weights of a layer respond, by its class or the nearest base class."""
    return next((KINDS[each] for each in type(module).__mro__ if each in KINDS), None)


def weights_of(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the weights that a module itself reads by name, each with its parameters (several for a parametrization)."""
    own: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    found = {name: list(each.parameters(recurse=False)) for name, each in own.items()}
    return found | {name: [parameter] for name, parameter in module.named_parameters(recurse=False)}


def _sequence_first(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers inside torch's transformers whose inputs are (length, examples, features)."""
    for each in module.modules():
        if isinstance(each, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            first: Any = each.self_attn
            if not first.batch_first:
                yield from each.modules()
        elif isinstance(each, nn.TransformerEncoder | nn.TransformerDecoder) and each.norm is not None and each.num_layers:
            inner: Any = each.layers[0]
            if not inner.self_attn.batch_first:
                yield each.norm


def check_wrapper(module: nn.Module, name: str) -> None:
    """Refuse a module that wraps a network, or was compiled from one.

    Raises:
        ValueError: the message names it and says what to convert.
    """
    kind = type(module).__name__
    what = WRAPPERS.get(kind)
    hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values() if type(hook).__module__.startswith("torch.nn.")]
    if hooks:
        raise ValueError(
            f"convert: {name or 'the network'!r} is a {kind} whose weight a hook computes before each call ({', '.join(hooks)}); "
            "use torch.nn.utils.parametrizations.weight_norm for a weight norm, and remove other hooks (as by prune.remove)"
        )
    if what is None and getattr(module, "_compiled_call_impl", None) is not None:
        kind, what = f"compiled {kind}", "convert the plain network, and compile what convert gives back"
    if what is None and isinstance(module, torch.jit.ScriptModule):
        what = "convert the network that it was made from"
    if what is not None:
        raise ValueError(f"convert: {name or 'the network'!r} is a {kind}: {what}")


def _check_kind(module: nn.Module, name: str, own: list[str]) -> None:
    """Refuse a module of an unknown kind with trained weights ``own``."""
    known = ", ".join(each.__name__ for each in KINDS)
    raise ValueError(
        f"convert: {name or 'the network'!r} is a {type(module).__name__} with parameters of its own ({', '.join(own)}), a kind "
        f"without a hyper-layer (there are {known}); subclass hyperopt.stn.HyperLayer and put it into hyperopt.stn.KINDS, or "
        f"leave its weights without a response: skip=[{name!r}]"
    )


@torch.no_grad()
def _check_parametrized(module: nn.Module, weight: str, name: str) -> None:
    """Refuse a parametrization that cannot be set to a given weight, since ``collapse`` must do this."""
    if not parametrize.is_parametrized(module, weight):
        return
    trial = copy.deepcopy(module).eval()
    value = getattr(trial, weight)
    value = 1.5 * value + value.abs().mean() * torch.linspace(-1, 1, value.numel()).to(value).view_as(value)
    try:
        setattr(trial, weight, value)
        good = torch.allclose(getattr(trial, weight), value, rtol=1e-3, atol=1e-5)
    except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError):
        good = False
    if not good:
        which = ", ".join(type(each).__name__ for each in module.parametrizations[weight])  # type: ignore[index, union-attr]
        raise ValueError(
            f"convert: {weight!r} of {name or 'the network'!r} has a parametrization ({which}) that cannot take any weight, and "
            f"collapse must write the weight that is found into it; leave it without a response: skip=[{name!r}]"
        )


def copied(module: nn.Module) -> nn.Module:
    """Return a copy of a network. A parametrized recurrent layer keeps a weight with a graph, which must be removed first."""
    with torch.no_grad():
        for each in module.modules():
            if isinstance(each, nn.RNNBase) and parametrize.is_parametrized(each):
                each._init_flat_weights()
    return copy.deepcopy(module)


def respond_(module: nn.Module, context: Context, count: int, gate: str, std: float, skip: Sequence[str]) -> None:
    """Give every weight that is trained and not skipped its response, one for all layers that share the weight."""
    still = {id(parameter) for name in skip for parameter in module.get_submodule(name).parameters()}
    second = {id(each) for each in _sequence_first(module)}
    made: dict[Any, Response] = {}
    readers: dict[int, tuple[Any, str]] = {}
    for name, each in list(module.named_modules()):
        weights = {
            key: those for key, those in weights_of(each).items() if any(_trained(p) and id(p) not in still for p in those)
        }
        kind = _kind_of(each)
        if not weights or isinstance(each, InContext | parametrize.ParametrizationList):
            continue
        if kind is None:
            _check_kind(each, name, list(weights))
            continue
        names = [key for key in weights if key not in kind.silent]
        for key in names:
            _check_parametrized(each, key, name)
        each.__class__ = hyper_class(kind, type(each), names)
        assert isinstance(each, HyperLayer)
        each.join(context, name)
        if id(each) in second:
            each.examples = 1
        responses = {}
        for key in names:
            place = f"{name}.{key}" if name else key
            behind = (key in each._parameters, *map(id, weights[key]))
            for parameter in weights[key]:
                other, there = readers.setdefault(id(parameter), (behind, place))
                if other != behind:
                    raise ValueError(
                        f"convert: {place!r} and {there!r} are two weights, made of a parameter that they share; leave one "
                        f"without a response: skip=[{name!r}]"
                    )
            if behind not in made:
                made[behind] = each.respond(key, count, gate, std)
            responses[key] = made[behind]
        each.responses = nn.ModuleDict(responses)


def _trained(parameter: nn.Parameter) -> bool:
    """Whether a parameter is trained, so that it can respond."""
    if isinstance(parameter, UninitializedParameter):
        raise ValueError("convert: the network has a lazy layer without weights as yet; call the network once, then convert it")
    if parameter.is_complex():
        raise ValueError("convert: the network has complex weights, and a response is real; leave them out: skip=[their module]")
    return parameter.requires_grad and parameter.is_floating_point()


def check_memory(module: nn.Module) -> None:
    """Refuse two parameters in the same memory, which would become independent in a copy of the network.

    Raises:
        ValueError: there are such parameters; the message names them and says how to tie them.
    """
    seen: dict[int, str] = {}
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter) or not parameter.requires_grad or parameter.device.type == "meta":
            continue
        if parameter.numel():
            other = seen.setdefault(parameter.data_ptr(), name)
            if other != name:
                raise ValueError(
                    f"convert: {other!r} and {name!r} share their memory, and are two parameters; tie them as one: "
                    f"network.{name} = network.{other}"
                )
