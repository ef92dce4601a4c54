"""A check of the second derivatives of ``torch.autograd.Function`` classes that are not PyTorch's own.

The backward of a Function is differentiated once more for a product with the Hessian. A tensor that its ``forward`` computes and
keeps for it (as ``ctx.y = ...``, or by ``save_for_backward`` of what is neither an input nor an output) has no graph, so that its
part of the second derivative is missing. PyTorch does not say so. Nothing in the graph shows it either, since masks and data are
kept in the same way; a difference of gradients does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from hyperopt.core.jacobian import pull
from hyperopt.core.policy import warn
from hyperopt.core.tree import tree_norm

_checked: WeakSet[type] = WeakSet()

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def check_own_functions(
    nodes: Sequence[Any], loss: Loss, w: Sequence[Tensor], lam: Sequence[Tensor] = (), *, remedy: str = ""
) -> None:
    """Compare the derivative of a gradient with a difference, once for each Function class; warn where it is wrong.

    At a point z near ``(w, lam)``, since terms often vanish where training starts, with random ``u`` and ``v``::

        d <grad_w L(z), u> / dz v   against   (<grad_w L(z + h v), u> - <grad_w L(z - h v), u>) / 2h

    The difference is believed if that with ``h / 2`` is ten times closer to it than the derivative is. Nothing is said where the
    gradient itself is not that of the loss, as it is on purpose in a straight-through estimator. A call costs one product and
    five gradients.

    Args:
        nodes: nodes of the loss's graph that belong to a Function.
        loss: L, a function of the tensors in ``w`` and ``lam``.
        w: the weights.
        lam: the hyperparameters.
        remedy: what else the message recommends.
    """
    new = {kind: type(node)._forward_cls for node in nodes if (kind := type(node)) not in _checked and _foreign(kind)}
    moving = [leaf.requires_grad for leaf in (*w, *lam)]
    kinds = {leaf.dtype for leaf, moves in zip((*w, *lam), moving, strict=True) if moves}
    if not new or not kinds <= {torch.float32, torch.float64}:
        return
    _checked.update(new)
    for far in (0.1, 0.0):  # the loss may not be defined far from the point: a scale may become negative there
        try:
            numbers = _second_derivatives(loss, w, lam, far)
        except (ValueError, RuntimeError, ArithmeticError, AssertionError):
            continue
        if numbers is None or all(map(math.isfinite, numbers)):
            break
    else:
        return
    if numbers is None or not _differ(*numbers[4:]) or _differ(*numbers[:4]):  # that of the loss differs on purpose
        return
    names = ", ".join(sorted({function.__name__.removeprefix("GeneratedBackwardFor_") for function in new.values()}))
    warn(
        f"the second derivative through {names} is {numbers[4]:.4g} in a random direction, where differences of gradients give "
        f"{numbers[6]:.4g}: its backward uses a tensor that its forward computed, which has no graph. Let backward compute "
        f"that tensor again from the saved inputs{remedy}"
    )


def _second_derivatives(loss: Loss, w: Sequence[Tensor], lam: Sequence[Tensor], far: float) -> tuple[float, ...] | None:
    """Return the arguments of ``_differ`` for the loss and for its gradient, at a distance ``far`` of the point.

    None: the gradient is a constant.
    """
    at = [leaf.detach() for leaf in (*w, *lam)]
    moving = [leaf.requires_grad for leaf in (*w, *lam)]
    draw = torch.Generator().manual_seed(0)

    def random() -> list[Tensor]:
        """A direction of the length of the point, but at least 1; tensors that do not require grad stay."""
        drawn = [
            torch.randn(x.shape, generator=draw, dtype=x.dtype).to(x.device) if moves else torch.zeros_like(x)
            for x, moves in zip(at, moving, strict=True)
        ]
        return [part * (max(1.0, tree_norm(at)) / tree_norm(drawn)) for part in drawn]

    u, v, start = random()[: len(w)], random(), [x + far * part for x, part in zip(at, random(), strict=True)]

    def evaluate(h: float, *, create_graph: bool = False) -> tuple[Tensor, list[Tensor], list[Tensor | None], Tensor]:
        """Return the loss at ``z + h v``, what moves there, its gradient, and the product of its part in ``w`` with ``u``."""
        z = [(x + h * part).requires_grad_(moves) for x, part, moves in zip(start, v, moving, strict=True)]
        inputs = [x for x in z if x.requires_grad]
        with torch.enable_grad():
            value = loss(z[: len(w)], z[len(w) :])
            found = list(pull([value], inputs, [torch.ones_like(value)], create_graph=create_graph))
            along = sum((g * part).sum() for g, part in zip(found, u, strict=False) if g is not None)
        return value, inputs, found, torch.as_tensor(along)

    value, inputs, found, along = evaluate(0.0, create_graph=True)
    if not along.requires_grad:
        return None
    direction = [part for part, moves in zip(v, moving, strict=True) if moves]
    first = _dot(found, direction)
    second = _dot(pull([along], inputs, [torch.ones_like(along)]), direction)
    eps = max(torch.finfo(leaf.dtype).eps for leaf in inputs)
    step = eps**0.25

    def quotients(h: float) -> tuple[float, float]:
        """The differences of the loss and of the product with ``u``."""
        (high, _, _, above), (low, _, _, below) = evaluate(h), evaluate(-h)
        return float((high - low).detach()) / (2 * h), float(above - below) / (2 * h)

    (first_one, second_one), (first_two, second_two) = quotients(step), quotients(step / 2)
    rounding = eps / step
    size = tree_norm([g.detach() for g in found[: len(w)] if g is not None]) * tree_norm(u)
    return first, first_one, first_two, rounding * float(value.detach()), second, second_one, second_two, rounding * size


def _differ(derivative: float, one: float, two: float, rounding: float) -> bool:
    """Whether a derivative is far from two differences that are near to each other."""
    return abs(derivative - two) > 10 * abs(one - two) + 20 * abs(rounding) + 1e-3 * max(abs(derivative), abs(two))


def _dot(found: Sequence[Tensor | None], direction: Sequence[Tensor]) -> float:
    return sum(float((g.detach() * part).sum()) for g, part in zip(found, direction, strict=True) if g is not None)


def _foreign(kind: type) -> bool:
    """Whether a Function is neither this package's nor PyTorch's own; those of ``torch.library`` stand for a user's operator."""
    module: str = kind._forward_cls.__module__  # pyright: ignore[reportAttributeAccessIssue]
    return module.partition(".")[0] not in ("hyperopt", "torch") or module.startswith("torch._library")
