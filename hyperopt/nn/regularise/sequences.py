r"""Regularisers of recurrent networks: dropout with one mask for a whole sequence, dropped words and weights, activations.

.. math:: y_t = x_t \circ m / (1 - p), \quad m \sim \mathrm{Bernoulli}(1 - p) \text{ once for all times } t

The modules have a fixed rate p, as torch's own dropout has. ``hyperopt.stn`` has the same ones with a rate that is tuned. All
of them are the identity in eval mode. Sequences have the examples first: (rows, time, features).

References: Gal & Ghahramani, NeurIPS 2016, arXiv 1512.05287 (variational and word dropout); Merity, Keskar & Socher, ICLR 2018,
arXiv 1708.02182, sections 3 and 4 (dropped weights, activation regularisation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hyperopt.nn.regularise.strength import column


def kept(rate: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return factors of dropout, ``1 / (1 - p)`` with probability ``1 - p`` and else 0; all are 0 at p = 1.

    Args:
        rate: p, in [0, 1], without a gradient. shape: broadcasts against ``shape``.
        shape: shape of the factors.
        like: tensor of their dtype and device.
    """
    keep = 1 - rate.to(like.dtype)
    factor = keep.clamp(min=torch.finfo(like.dtype).tiny).reciprocal()  # a rate of 1 has no finite factor
    return torch.where(torch.rand(shape, dtype=like.dtype, device=like.device) < keep, factor, torch.zeros_like(factor))


class Dropping(nn.Module):
    """A module with a fixed rate of dropout.

    Args:
        p: the rate, in [0, 1].

    Raises:
        ValueError: the rate is out of range.
    """

    def __init__(self, p: float = 0.5) -> None:
        """Keep the rate."""
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"{type(self).__name__}: p={p!r} is not in [0, 1]; change p")
        self.p = p

    def rate(self, input: Tensor) -> Tensor:
        """Return the rate. shape: (rows,), or (1,) for all rows."""
        return torch.tensor([self.p], dtype=torch.float64, device=input.device)

    def extra_repr(self) -> str:
        """Return the rate."""
        return f"p={self.p}"


class VariationalDropout(Dropping):
    """Dropout of features with one mask for all times of an example.

    Args:
        p: the rate, in [0, 1].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drop features. shape: (rows, ..., features)."""
        if not self.training:
            return input
        middle = [1] * (input.dim() - 2)
        return input * kept(self.rate(input).view(-1, *middle, 1), (len(input), *middle, input.shape[-1]), input)


class EmbeddingDropout(Dropping):
    """An embedding that drops words: each word is 0 at all its places in an example, or nowhere.

    Args:
        module: the embedding.
        p: the rate, in [0, 1].
    """

    def __init__(self, module: nn.Embedding, p: float = 0.5) -> None:
        """Keep the embedding and the rate."""
        super().__init__(p)
        self.module = module

    def forward(self, input: Tensor) -> Tensor:
        """Return the vectors of tokens. shapes: (rows, ...), result (rows, ..., features)."""
        found = self.module(input)
        if not self.training:
            return found
        words = kept(self.rate(input)[:, None], (len(input), self.module.num_embeddings), found)
        return found * words.gather(1, input.flatten(1)).view(*input.shape, 1)


class DropConnect(Dropping):
    """A layer some of whose weights are dropped, with one mask for a call, such as hidden-to-hidden weights for all times.

    Args:
        module: the layer.
        weights: names of the weights in it (none: the hidden-to-hidden matrices of a recurrent layer).
        p: the rate, in [0, 1].

    Raises:
        ValueError: the layer has no such weight.
    """

    def __init__(self, module: nn.Module, weights: Sequence[str] = (), p: float = 0.5) -> None:
        """Keep the layer, the names and the rate."""
        super().__init__(p)
        names = [name for name, _ in module.named_parameters(recurse=False)]
        self.module, self.weights = module, tuple(weights) or tuple(name for name in names if name.startswith("weight_hh"))
        missing = [name for name in self.weights if name not in names]
        if missing or not self.weights:
            what = f"has no weight {missing[0]!r}" if missing else "has no hidden-to-hidden weight"
            raise ValueError(f"{type(self).__name__}: {type(module).__name__} {what}; its weights are {names}; change weights")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer with dropped weights, and with the same entries of their responses dropped."""
        if not self.training:
            return self.module(*args, **kwargs)
        parameters, changed = dict(self.module.named_parameters()), {}
        for name in self.weights:
            weight = parameters[name]
            factors = kept(self.rate(args[0]).view(-1, *[1] * (weight.dim() - 1)), tuple(weight.shape), weight)
            for each in (name, f"responses.{name}.direction"):
                if each in parameters:
                    changed[each] = parameters[each] * factors
        try:
            return functional_call(self.module, changed, args, kwargs)
        finally:
            if isinstance(self.module, nn.RNNBase):  # torch's list of weights would keep the dropped ones, with their graph
                self.module._init_flat_weights()


def activation(states: Tensor, strength: Tensor | float) -> Tensor:
    """Return the activation regularisation of each example: strength times the mean square of its (dropped) outputs.

    Args:
        states: shape: (n, time, features), floating.
        strength: at least 0; it has the exact gradient. shape: (n,), or a number.

    Returns:
        A penalty for each example, whose mean is to be added to the loss. shape: (n,).

    Reference: arXiv 1708.02182, section 4.3 (AR); as in the authors' code, the mean of squares and not the norm.
    """
    return _penalty(states, strength, "activation")


def temporal_activation(states: Tensor, strength: Tensor | float) -> Tensor:
    """Return the temporal activation regularisation of each example: strength times the mean square of ``h_{t+1} - h_t``.

    Args:
        states: outputs without dropout. shape: (n, time, features), floating, with at least two times.
        strength: at least 0; it has the exact gradient. shape: (n,), or a number.

    Returns:
        A penalty for each example, whose mean is to be added to the loss. shape: (n,).

    Reference: arXiv 1708.02182, section 4.3 (TAR).
    """
    if states.dim() < 2 or states.shape[1] < 2:
        raise ValueError(f"temporal_activation: states of shape {tuple(states.shape)}, expected (n, time > 1, features)")
    return _penalty(states[:, 1:] - states[:, :-1], strength, "temporal_activation")


def _penalty(states: Tensor, strength: Tensor | float, what: str) -> Tensor:
    """Return strength times the mean square of each example. shape: (n,)."""
    return (column(strength, states, 0.0, math.inf, what).flatten() * states.flatten(1).square().mean(1)).expand(len(states))
