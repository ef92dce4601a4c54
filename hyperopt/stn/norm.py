"""Rules of normalisations whose gain and shift respond.

    y = W * n(x) + b + (V delta) * H * n(x) + (V_b delta) * h,      n(x): x normalised

In training, batch statistics are those of the perturbed batch, like the layer's inputs; running statistics are updated once a
call.

In a linearised network n consists of elementary operations, even without a response. The reverse derivative of the forward
derivative of torch's own batch and layer normalisation is silently wrong, since it treats mean and variance as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from hyperopt.stn.response import Responding, answer, base, no_rule, primal, rule, use_of

Whole = Callable[[Tensor, Any, Any], Tensor]


def _normalised(
    x: Any,
    weight: Any,
    bias: Any,
    channel: int,
    whole: Whole,
    unit: Callable[[], Tensor],
    parts: Callable[[], Tensor],
    moves: bool,
) -> Tensor:
    """Compute a normalisation with gain and shift.

    Args:
        x: input.
        weight: gain, or None.
        bias: shift, or None.
        channel: the dimension of ``x`` for the first axis of gain and shift.
        whole: torch's function of input, gain and shift.
        unit: ``n(x)``, without a change of running statistics.
        parts: the same in elementary operations.
        moves: whether ``whole`` updates running statistics.
    """
    if isinstance(x, Responding):
        no_rule("nn.functional", x, why="normalises this weight, and has no rule for it")
    w, b = use_of(weight), use_of(bias)
    use = w or b
    dual = use is None or use.linear  # without a response, only the linearised network calls this
    if dual:
        value = forward_ad.unpack_dual(x).primal
        if moves:
            with torch.no_grad():
                whole(value, base(weight), base(bias))
        found = parts()
        y = found if weight is None else found * _gain(base(weight), x, channel)
        y = y if bias is None else y + _gain(base(bias), x, channel)
    else:
        y = whole(x, base(weight), base(bias))
    if use is None:
        return y
    change = None
    if b is not None and b.base.dim() == 1:
        change = b.spread(b.shift(), x, channel)
    elif b is not None:
        change = b.spread(b.gates(), x, channel) * _gain(b.direction, x, channel)
    if w is None:
        return answer(y, use, change)
    n = primal(found, use) if dual else unit()
    return answer(y, use, change, w.spread(w.gates(), x, channel), n * _gain(w.direction, x, channel))


def _gain(weight: Tensor, like: Tensor, channel: int) -> Tensor:
    """Return a gain in a shape that broadcasts against ``like``, with its first axis in dimension ``channel``."""
    return weight.view(*weight.shape, *[1] * (like.dim() - channel % like.dim() - weight.dim()))


def _standard(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """Return x with mean 0 and variance 1 over some dimensions."""
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _by_statistics(x: Tensor, mean: Any, variance: Any, eps: float) -> Tensor:
    """Return x normalised by given mean and variance of the channels."""
    return (x - _gain(mean, x, 1)) * _gain((variance + eps).rsqrt(), x, 1)


@rule(functional.batch_norm)
def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation, with the statistics of the batch in training, else with the running ones."""

    def whole(x: Tensor, w: Any, b: Any) -> Tensor:
        return functional.batch_norm(x, running_mean, running_var, w, b, training, momentum, eps)

    def unit() -> Tensor:
        statistics = (None, None) if training else (running_mean, running_var)
        return functional.batch_norm(input, *statistics, training=training, eps=eps)

    def parts() -> Tensor:
        if not training:
            return _by_statistics(input, running_mean, running_var, eps)
        return _standard(input, [0, *range(2, input.dim())], eps)

    return _normalised(input, weight, bias, 1, whole, unit, parts, training and running_mean is not None)


@rule(functional.instance_norm)
def _instance_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Instance normalisation: each channel of every row by itself."""

    def whole(x: Tensor, w: Any, b: Any) -> Tensor:
        return functional.instance_norm(x, running_mean, running_var, w, b, use_input_stats, momentum, eps)

    def unit() -> Tensor:
        statistics = (None, None) if use_input_stats else (running_mean, running_var)
        return functional.instance_norm(input, *statistics, use_input_stats=use_input_stats, eps=eps)

    def parts() -> Tensor:
        if not use_input_stats:
            return _by_statistics(input, running_mean, running_var, eps)
        return _standard(input, [*range(2, input.dim())], eps)

    return _normalised(input, weight, bias, 1, whole, unit, parts, use_input_stats and running_mean is not None)


@rule(functional.group_norm)
def _group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """Group normalisation."""

    def parts() -> Tensor:
        return _standard(input.reshape(input.shape[0], num_groups, -1), [2], eps).reshape(input.shape)

    def whole(x: Tensor, w: Any, b: Any) -> Tensor:
        return functional.group_norm(x, num_groups, w, b, eps)

    return _normalised(input, weight, bias, 1, whole, lambda: whole(input, None, None), parts, False)


@rule(functional.layer_norm)
def _layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimensions; the units are the entries of the first of these."""
    dims = [*range(-len(normalized_shape), 0)]

    def whole(x: Tensor, w: Any, b: Any) -> Tensor:
        return functional.layer_norm(x, normalized_shape, w, b, eps)

    return _normalised(
        input, weight, bias, dims[0], whole, lambda: whole(input, None, None), lambda: _standard(input, dims, eps), False
    )


@rule(functional.rms_norm)
def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    """Normalisation over the last dimensions by the root mean square."""
    dims = [*range(-len(normalized_shape), 0)]

    def whole(x: Tensor, w: Any, b: Any) -> Tensor:
        return functional.rms_norm(x, normalized_shape, w, eps)

    def parts() -> Tensor:
        small = torch.finfo(input.dtype).eps if eps is None else eps
        return input * (input.square().mean(dims, keepdim=True) + small).rsqrt()

    return _normalised(input, weight, None, dims[0], whole, lambda: whole(input, None, None), parts, False)
