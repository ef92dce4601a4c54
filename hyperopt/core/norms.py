"""Functions whose second derivatives take little memory: batch normalisation, and the activations SiLU, Mish, tanh and sigmoid.

    z = w y + b,        y = (x - mean) r,       r = (var + eps)^(-1/2)
    dx = w r q(g),      dw = sum g y,           db = sum g,         q(g) = g - m(g) - y m(g y)

with mean, variance and ``m`` over the rows of a channel. Values and first derivatives are PyTorch's own kernels; PyTorch's second
derivative holds ten tensors of the size of ``x`` at once. Here, for cotangents ``c`` of dx, ``cw`` of dw and ``cb`` of db:

    of g:  w r q(c) + cw y + cb         of w:  r sum c q(g)
    of x:  r q(e) - w r^2 y m(c q(g)),          e = cw g - w r (m(g y) c + m(c y) g)

PyTorch computes the derivative of SiLU and Mish by elementary operators if it is to be differentiated again, and these save four
tensors of the size of ``x`` or more. Here ``dx = g f'(x)`` is PyTorch's kernel, and for a cotangent ``c`` of dx:

    of g:  c f'(x)                      of x:  c g f''(x)

For tanh and the sigmoid PyTorch saves no more, but makes up to four temporary tensors. Here ``dx = g p(y)`` with ``y = f(x)`` and
``p(y) = 1 - y^2`` or ``y (1 - y)``, of which only ``y`` is saved:

    of g:  c p(y)                       of y:  c g p'(y)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperopt.core.captured import transformed


def lean(func: Callable[..., Any]) -> Callable[..., Any]:
    """The form of a function of PyTorch that is made here, else itself; transforms and compilers get PyTorch's."""
    made = LEAN.get(func)
    return func if made is None or transformed() or torch.compiler.is_compiling() else made


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training or input.numel() <= input.shape[1]:  # one row a channel: PyTorch says what to change
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        kept = torch.native_batch_norm(input, weight, bias, running_mean, running_var, True, momentum, eps)
    return _Normed.apply(input, weight, bias, *kept, eps)  # pyright: ignore[reportReturnType]


class _Normed(torch.autograd.Function):
    """``z``, which is given, with its derivative in ``x``, ``w`` and ``b``."""

    @staticmethod
    def forward(x: Tensor, w: Tensor | None, b: Tensor | None, z: Tensor, mean: Tensor, r: Tensor, eps: float) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, w, b, _, mean, r, ctx.eps = inputs
        ctx.shifted = b is not None
        ctx.save_for_backward(x, w, mean, r)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w, mean, r = ctx.saved_tensors
        dx, dw, db = _Pulled.apply(g, x, w, mean, r, ctx.eps)  # pyright: ignore[reportGeneralTypeIssues]
        return dx, None if w is None else dw, db if ctx.shifted else None, None, None, None, None


class _Pulled(torch.autograd.Function):
    """dx, dw and db, as functions of ``g``, ``x`` and ``w``."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor, eps: float) -> tuple[Tensor, ...]:
        ones = torch.ones_like(r) if w is None else w
        return torch.ops.aten.native_batch_norm_backward(g, x, ones, None, None, mean, r, True, eps, [True, True, True])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, x, w, mean, r, ctx.eps = inputs
        ctx.save_for_backward(g, x, w, mean, r)

    @staticmethod
    def backward(ctx: Any, c: Tensor, cw: Tensor, cb: Tensor) -> Any:
        g, x, weight, mean, r = ctx.saved_tensors
        dims = (0, *range(2, x.dim()))
        each = (1, -1, *[1] * (x.dim() - 2))
        mean, r, cw, cb = (part.view(each) for part in (mean, r, cw, cb))
        w = torch.ones_like(r) if weight is None else weight.view(each)
        if torch.is_grad_enabled():  # a third derivative is to be taken
            var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
            r = (var + ctx.eps).rsqrt()

        def m(value: Tensor) -> Tensor:
            return value.mean(dims, keepdim=True)

        y = (x - mean) * r
        gy, cy = m(g * y), m(c * y)
        cq = m(c * g) - m(c) * m(g) - cy * gy  # m(c q(g))
        scale = w * r
        to_g = torch.addcmul(cb - scale * m(c), c, scale)  # of q(c) all but y, whose factor is that of cw too
        to_g = torch.addcmul(to_g, y, cw - scale * cy)
        e = torch.addcmul((cw - scale * cy) * g, c, scale * gy, value=-1)
        ey = m(e * y)
        to_x = torch.addcmul(r * (e - m(e)), y, r * ey + scale * r * cq, value=-1)
        to_w = None if weight is None else (r * cq).flatten() * (x.numel() // x.shape[1])
        return to_g, to_x, to_w, None, None, None


def _smooth(func: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """Return the form of one of ``CURVES``; it leaves complex and sparse tensors, and other arguments, to PyTorch."""

    def form(input: Tensor, *others: Any, **given: Any) -> Tensor:
        plain = all(each is None or each is False for each in (*others, *given.values()))
        own = plain and input.is_floating_point() and input.layout == torch.strided
        return _Smooth.apply(input, name) if own else func(input, *others, **given)  # pyright: ignore[reportReturnType]

    return form


class _Smooth(torch.autograd.Function):
    """``f(x)`` of one of ``CURVES``."""

    @staticmethod
    def forward(x: Tensor, name: str) -> Tensor:
        return getattr(torch.ops.aten, name)(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, ctx.name = inputs
        ctx.save_for_backward(output if ctx.name in OF_VALUE else x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Slope.apply(g, *ctx.saved_tensors, ctx.name), None


class _Slope(torch.autograd.Function):
    """``g f'(x)``, as a function of ``g`` and ``x``; for a curve of ``OF_VALUE``, ``x`` is the value ``f(x)``."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, name: str) -> Tensor:
        return getattr(torch.ops.aten, f"{name}_backward")(g, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        g, x, ctx.name = inputs
        ctx.save_for_backward(g, x)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:
        g, x = ctx.saved_tensors
        to_g = _Slope.apply(c, x, ctx.name) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_g, None, None
        curve = CURVES[ctx.name](x)
        to_x = curve * c * g if torch.is_grad_enabled() else curve.mul_(c).mul_(g)
        return to_g, to_x, None


def _silu_curve(x: Tensor) -> Tensor:
    """``f'' = s (1 - s) (2 + x (1 - 2 s))`` with the sigmoid ``s``."""
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _mish_curve(x: Tensor) -> Tensor:
    """``f'' = (1 - t^2) s (2 + x (1 - s - 2 s t))`` with the sigmoid ``s`` and ``t = tanh(softplus(x))``."""
    s, t = torch.sigmoid(x), torch.tanh(F.softplus(x))
    return (1 - t * t) * s * (2 + x * (1 - s - 2 * s * t))


CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu_curve,
    "mish": _mish_curve,
    "tanh": lambda y: -2 * y,
    "sigmoid": lambda y: 1 - 2 * y,
}
OF_VALUE = ("tanh", "sigmoid")  # their slopes and ``CURVES`` are functions of the value
LEAN: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.silu: _smooth(F.silu, "silu"),
    F.mish: _smooth(F.mish, "mish"),
    **dict.fromkeys((torch.tanh, Tensor.tanh), _smooth(torch.tanh, "tanh")),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), _smooth(torch.sigmoid, "sigmoid")),
}
