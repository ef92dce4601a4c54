"""Rules of functions that are linear in a weight (matrix products, convolutions, embeddings), and of parts of a weight.

y = f(x, W) + b + (V delta) * f(x, H) + (V_b delta) * h          units are outputs
y = f(x, W) + b + f((V delta) * x, H) + (V_b delta) * h          units are inputs, as for an embedding that is also the last
layer
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperopt.stn.response import Responding, Use, answer, base, no_rule, primal, responding, rule, use_of

Call = Callable[[Tensor, Any, Any], Tensor]


def applied(call: Call, name: str, x: Any, weight: Any, bias: Any, out_axis: int, outer: int, inner: int) -> Tensor:
    """Compute ``call(x, weight, bias)``, linear in weight and bias together, one or both of which respond.

    Args:
        call: the plain function; the bias may be None.
        name: its name in messages.
        x: input, without a response.
        weight: a matrix or filters.
        bias: a vector, or None.
        out_axis: axis of the weight that has the outputs; its inputs are on axis ``1 - out_axis``.
        outer: dimension of the output that has the outputs.
        inner: dimension of the input that has the inputs.
    """
    w, b = use_of(weight), use_of(bias)
    use = w or b
    if use is None or isinstance(x, Responding):
        no_rule(name, x, weight, bias)
    y = call(x, base(weight), base(bias))
    change = None if b is None else b.spread(b.shift(), y, outer)
    if w is None:
        return answer(y, use, change)
    gates = w.gates()
    if w.axis == out_axis or gates.shape[1] == 1:
        return answer(y, use, change, w.spread(gates, y, outer), call(primal(x, w), w.direction, None))
    if w.axis != 1 - out_axis:
        no_rule(name, weight)
    product = call(primal(x, w) * w.spread(gates, x, inner).to(x.dtype), w.direction, None)
    return answer(y, use, product if change is None else change + product)


def _linear_in_weight(function: Any, out_axis: int, channel: int) -> None:
    """Register a rule for ``function(input, weight, bias, *more)``."""

    def found(input: Any, weight: Any, bias: Any = None, *more: Any, **options: Any) -> Tensor:
        def call(x: Tensor, w: Any, b: Any) -> Tensor:
            return function(x, w, b, *more, **options)

        name = function.__name__
        if input.is_nested or (channel == 1 and input.dim() != weight.dim()):
            shape = "nested" if input.is_nested else tuple(input.shape)
            no_rule(name, weight, bias, why=f"gets an input ({shape}) without a dimension of examples")
        return applied(call, name, input, weight, bias, out_axis, channel, channel)

    rule(function)(found)


_linear_in_weight(functional.linear, 0, -1)
for each in (functional.conv1d, functional.conv2d, functional.conv3d):
    _linear_in_weight(each, 0, 1)
for each in (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d):
    _linear_in_weight(each, 1, 1)


@rule(functional.bilinear)
def _bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Tensor:
    """``x1^T W x2`` for each output."""
    if isinstance(input2, Responding) or ((use := use_of(weight)) is not None and use.axis != 0):
        no_rule("bilinear", input2, weight)

    def call(x: Tensor, w: Any, b: Any) -> Tensor:
        return functional.bilinear(x, primal(input2, use) if w is not base(weight) and use is not None else input2, w, b)

    use = use_of(weight)
    return applied(call, "bilinear", input1, weight, bias, 0, -1, -1)


@rule(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def _matmul(input: Any, other: Any) -> Tensor:
    """Rows times a responding matrix."""
    x, weight = input, other
    if not isinstance(weight, Responding) or weight.dim() != 2 or x.dim() < 2:
        no_rule("matmul", x, weight)
    return applied(lambda x, w, b: x @ w, "matmul", x, weight, None, 1, -1, -1)


@rule(torch.addmm)
def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """A product with a matrix, plus a vector."""
    if beta != 1 or alpha != 1:
        no_rule("addmm", input, mat1, mat2, why="has a rule for beta=1 and alpha=1 alone")
    return mat1 @ mat2 + input


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    """The sum of a tensor and a responding vector along the last dimension."""
    x, vector = (other, input) if isinstance(input, Responding) else (input, other)
    if isinstance(x, Responding) or alpha != 1 or vector.dim() != 1 or not isinstance(x, Tensor) or x.dim() < 2:
        no_rule("add", vector, x)
    use = vector.use
    return answer(x + use.base, use, use.spread(use.shift(), x, -1))


@rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(input: Any, other: Any) -> Any:
    """A weight times a number, or a tensor times a responding vector along the last dimension."""
    x, weight = (other, input) if isinstance(input, Responding) else (input, other)
    if isinstance(x, int | float):
        return _each(weight.use, lambda value: value * x)
    if isinstance(x, Responding) or weight.dim() != 1 or not isinstance(x, Tensor) or x.dim() < 2:
        no_rule("mul", weight, x)
    use = weight.use
    return answer(x * use.base, use, primal(x, use) * use.spread(use.shift(), x, -1).to(x.dtype))


@rule(torch.div, Tensor.div, Tensor.__truediv__)
def _div(weight: Any, other: Any) -> Any:
    """A weight divided by a number."""
    if not isinstance(other, int | float):
        no_rule("div", weight, other)
    return _each(weight.use, lambda value: value / other)


@rule(functional.prelu)
def _prelu(input: Any, weight: Any) -> Tensor:
    """``max(0, x) + W min(0, x)`` for each channel."""
    use: Use | None = use_of(weight)
    if use is None or isinstance(input, Responding):
        no_rule("prelu", input, weight)
    channel = 1 if input.dim() > 1 else 0
    negative = primal(input, use).clamp(max=0)
    return answer(functional.prelu(input, use.base), use, None, use.spread(use.shift(), input, channel), negative)


@rule(functional.embedding)
def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of the weight by their numbers."""
    if max_norm is not None:
        no_rule("embedding", weight, why=f"with max_norm={max_norm} changes the weight itself")
    how: dict[str, Any] = {"padding_idx": padding_idx, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
    use: Use = weight.use
    y, product, gates = (
        functional.embedding(input, use.base, **how),
        functional.embedding(input, use.direction, **how),
        use.gates(),
    )
    if use.axis == 1 or gates.shape[1] == 1:
        return answer(y, use, None, use.spread(gates, y, -1), product)
    if gates.shape[0] == 1:
        return answer(y, use, None, gates[0][input][..., None], product)
    use.spread(gates[:, :1], y, -1)  # only for its check of the number of rows
    rows = input.movedim(use.examples, 0)
    found = gates.gather(1, rows.reshape(len(rows), -1)).view(rows.shape).movedim(0, use.examples)
    return answer(y, use, None, found[..., None], product)


@rule(functional.embedding_bag)
def _embedding_bag(input: Any, weight: Any, offsets: Any = None, max_norm: Any = None, *more: Any, **options: Any) -> Tensor:
    """Sums or means of rows of the weight."""
    use: Use | None = use_of(weight)
    mode = options["mode"] if "mode" in options else more[2] if len(more) > 2 else "mean"
    if use is None or max_norm is not None or mode == "max" or (use.axis != 1 and use.gate.shape[0] != 1):
        why = f"has no rule for mode={mode!r}, max_norm={max_norm} and a weight of this kind"
        no_rule("embedding_bag", weight, *more, *options.values(), why=why)

    def call(w: Tensor) -> Tensor:
        return functional.embedding_bag(input, w, offsets, None, *more, **options)

    y = call(use.base)
    return answer(y, use, None, use.spread(use.gates(), y, -1), call(use.direction))


@rule(Tensor.__getitem__)
def _getitem(weight: Any, index: Any) -> Any:
    """Rows by their numbers, as for an embedding; or a slice of the first axis."""
    if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64) and weight.dim() == 2:
        return _embedding(index, weight)
    if not isinstance(index, slice):
        no_rule("Tensor.__getitem__", weight)
    return _parts(weight.use, 0, lambda value: (value[index],))[0]


def _each(use: Use, change: Callable[[Tensor], Tensor]) -> Responding:
    """Apply a linear map that keeps all axes to W and H of a weight."""
    return responding(replace(use, base=change(use.base), direction=change(use.direction)))


def _parts(use: Use, axis: int, cut: Callable[[Tensor], Any]) -> tuple[Responding, ...]:
    """Return the parts of a weight along an axis; ``cut`` cuts a tensor along its first axis."""

    def along(value: Tensor) -> list[Tensor]:
        return [part.movedim(0, axis) for part in cut(value.movedim(axis, 0))]

    bases, directions = along(use.base), along(use.direction)
    whole = axis % use.base.dim() != use.axis or use.gate.shape[0] == 1
    gates = [use.gate] * len(bases) if whole else cut(use.gate)
    return tuple(responding(replace(use, base=w, direction=h, gate=v)) for w, h, v in zip(bases, directions, gates, strict=True))


@rule(torch.chunk, Tensor.chunk)
def _chunk(weight: Any, chunks: int, dim: int = 0) -> tuple[Responding, ...]:
    """Parts of about equal size."""
    return _parts(weight.use, dim, lambda value: value.chunk(chunks))


@rule(torch.split, Tensor.split)
def _split(weight: Any, split_size_or_sections: Any, dim: int = 0) -> tuple[Responding, ...]:
    """Parts of given sizes."""
    return _parts(weight.use, dim, lambda value: value.split(split_size_or_sections))


@rule(torch.narrow, Tensor.narrow)
def _narrow(weight: Any, dim: int, start: int, length: int) -> Responding:
    """A slice along one dimension."""
    return _parts(weight.use, dim, lambda value: (value[start : start + length],))[0]


@rule(torch.t, Tensor.t, *(getattr(Tensor, name).__get__ for name in ("T", "mT")))
def _transposed(weight: Any) -> Responding:
    """The transposed matrix."""
    use: Use = weight.use
    if weight.dim() != 2:
        no_rule("t", weight, why="has a rule for a matrix alone")
    return responding(replace(use, base=use.base.mT, direction=use.direction.mT, axis=1 - use.axis))


@rule(torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes)
def _transpose(weight: Any, dim0: int, dim1: int) -> Responding:
    """The transposed matrix."""
    if weight.dim() != 2 or (dim0 - dim1) % 2 == 0:
        no_rule("transpose", weight, why="has a rule for a matrix alone")
    return _transposed(weight)


def _same_values(function: Any) -> None:
    """Register a rule for a function that keeps values and axes."""

    def found(weight: Any, *more: Any, **options: Any) -> Responding:
        if not isinstance(weight, Responding):  # another tensor, which gets the type of the weight
            return function(weight, *map(base, more), **{key: base(value) for key, value in options.items()})
        return _each(weight.use, lambda value: function(value, *more, **options))

    rule(function)(found)


for each in (
    Tensor.to,
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.type_as,
    Tensor.contiguous,
    Tensor.clone,
):
    _same_values(each)
_same_values(torch.clone)


def _without_values(function: Any) -> None:
    """Register a rule for a function that only uses shape, dtype and device of a weight."""

    def found(*values: Any, **options: Any) -> Any:
        return function(*map(base, values), **options)

    rule(function)(found)


for each in (torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like):
    _without_values(each)
for each in (Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor):
    _without_values(each)


@rule(Tensor.detach, torch.detach, *(getattr(Tensor, name).__get__ for name in ("data",)))
def _detach(weight: Any) -> Responding:
    """The weight without derivatives in itself and its response, as a constant."""
    use: Use = weight.use
    m = replace(use.draw, m=use.draw.m.detach(), delta=use.draw.delta.detach())
    return responding(replace(use, base=use.base.detach(), direction=use.direction.detach(), gate=use.gate.detach(), draw=m))
