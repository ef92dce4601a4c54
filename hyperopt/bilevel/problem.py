"""``BilevelProblem``: two losses, and where their batches come from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import optree
import torch
from torch import Tensor

from hyperopt.core.checks import check_number
from hyperopt.core.state import check_entries

Loss = Callable[[Any, Any, Any], Tensor]
"""``loss(w, lam, batch)``, a scalar."""


class BatchSource(Protocol):
    """Where the batches of a loss come from; what ``draw`` returns is handed to the loss as it is."""

    def draw(self) -> Any:
        """Return the next batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch stands, as plain containers and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        ...


class NoBatches:
    """For losses that have their data themselves: the batch is None."""

    def draw(self) -> Any:
        """Return None."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse the position of another source of batches; there is nothing to take back."""
        check_entries(state, (), type(self).__name__)


class SameBatch(NoBatches):
    """One batch, always."""

    def __init__(self, batch: Any) -> None:
        """Keep it."""
        self.batch = batch

    def draw(self) -> Any:
        """Return it."""
        return self.batch


@dataclass(frozen=True)
class InnerConstants:
    """What is known about the losses around ``w``: in a ball that holds it and the minimum.

    Attributes:
        strong_convexity: ``mu > 0``: the least eigenvalue of the Hessian of the inner loss is at least that.
        smoothness: ``L``: its largest is at most that.
        mixed_norm: largest norm of ``d_lam grad_w L``, all hyperparameters together.
        hessian_lipschitz: of ``w -> Hessian``; 0 for a quadratic loss.
        mixed_lipschitz: of ``w -> d_lam grad_w L``.
        outer_lipschitz: of ``w -> d_w E``.
        direct_lipschitz: of ``w -> d_lam E``.
    """

    strong_convexity: float
    smoothness: float
    mixed_norm: float
    hessian_lipschitz: float = 0.0
    mixed_lipschitz: float = 0.0
    outer_lipschitz: float = 0.0
    direct_lipschitz: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in vars(self):
            check_number(self, name, 0.0, open_low=name in ("strong_convexity", "smoothness"))
        if self.strong_convexity > self.smoothness:
            raise ValueError(f"InnerConstants: strong_convexity={self.strong_convexity} is above smoothness={self.smoothness}")


@dataclass(frozen=True)
class BilevelProblem:
    """``min over lam of E(w(lam), lam)`` where ``w(lam)`` minimises ``L(., lam)``.

    Attributes:
        inner_loss: ``L(w, lam, batch)``, a scalar that depends on both.
        outer_loss: ``E(w, lam, batch)``, a scalar.
        inner_batches: where the batches of the inner loss come from (default: the batch is None).
        outer_batches: where those of the outer loss come from.
        refresh: ``refresh(w, lam, batch)``, called once after each training to move running statistics, see ``Functional``.
        constants: ``constants(w, lam)``, what is known about the losses in closed form; makes the certificate a bound.
    """

    inner_loss: Loss
    outer_loss: Loss
    inner_batches: BatchSource = field(default_factory=NoBatches)
    outer_batches: BatchSource = field(default_factory=NoBatches)
    refresh: Callable[[Any, Any, Any], None] | None = None
    constants: Callable[[Any, Any], InnerConstants] | None = None

    def at_next_batch(self) -> BilevelProblem:
        """The problem on the next batch of each loss alone, which is not used up."""
        sources = []
        for source in (self.inner_batches, self.outer_batches):
            kept = copy.deepcopy(source.state_dict())
            sources.append(SameBatch(source.draw()))
            source.load_state_dict(kept)
        return replace(self, inner_batches=sources[0], outer_batches=sources[1])

    def inner(self, w: Any, lam: Any, batch: Any) -> Tensor:
        """The inner loss, checked to be a scalar."""
        return scalar(self.inner_loss(w, lam, batch), "inner_loss", batch)

    def outer(self, w: Any, lam: Any, batch: Any) -> Tensor:
        """The outer loss, checked to be a scalar."""
        return scalar(self.outer_loss(w, lam, batch), "outer_loss", batch)


def rows_of(batch: Any) -> int | None:
    """Rows of a batch, the first dimension of its leaves; None where it has none."""
    return next((leaf.shape[0] for leaf in optree.tree_leaves(batch) if len(leaf.shape)), None)


def scalar(loss: Any, name: str, batch: Any) -> Tensor:
    """``loss`` as a tensor without dimensions.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has more or fewer numbers than one, or the batch has no rows.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} returned a {type(loss).__name__}; it must return a tensor with one number")
    if loss.numel() != 1:
        raise ValueError(f"{name} returned a tensor of shape {tuple(loss.shape)}; it must be a scalar: take its mean or its sum")
    for leaf in optree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() and not leaf.shape[0]:
            kind = "training" if name == "inner_loss" else "validation"
            raise ValueError(f"{name}: the batch has no rows (shape {tuple(leaf.shape)}); is the {kind} set empty?")
    return loss.reshape(())


@dataclass
class Leaves:
    """The tensors of a tree as leaves of a new graph, which share the memory of those that were given.

    Attributes:
        tree: the tree of leaves.
        flat: its tensors in order.
        names: what to call each in a message.
    """

    tree: Any
    flat: list[Tensor]
    names: list[str]

    @staticmethod
    def of(tree: Any, what: str) -> Leaves:
        """Detach every tensor of ``tree``, called ``what`` in messages, and let it require grad.

        Raises:
            TypeError: a leaf that is no tensor, or not of a floating-point dtype.
            ValueError: a tree without tensors.
        """
        paths, leaves, spec = optree.tree_flatten_with_path(tree)
        names = [what + "".join(f"[{key!r}]" for key in path) for path in paths]
        if not leaves:
            raise ValueError(f"{what} has no tensors; give a tensor, or a tuple, list or dict of tensors")
        for name, leaf in zip(names, leaves, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name} is a {type(leaf).__name__}; every leaf must be a tensor")
            if not leaf.is_floating_point():
                raise TypeError(f"{name} has dtype {leaf.dtype}; it must be floating point (buffers that count go elsewhere)")
        flat = [leaf.detach().requires_grad_() for leaf in leaves]
        return Leaves(optree.tree_unflatten(spec, flat), flat, names)

    def like(self, values: Sequence[Tensor | None]) -> Any:
        """The tree with other tensors; zeros for None."""
        filled = [torch.zeros_like(leaf) if x is None else x for leaf, x in zip(self.flat, values, strict=True)]
        return optree.tree_unflatten(optree.tree_structure(self.tree), filled)


def outer_gradient(problem: BilevelProblem, w: Leaves, lam: Leaves, batch: Any) -> tuple[Tensor, list[Any], list[Any]]:
    """The outer loss, detached, and its partial gradients in ``w`` and ``lam``, None where it does not depend on one.

    Raises:
        ValueError: the loss does not depend on ``w`` at all.
    """
    with torch.enable_grad():
        loss = problem.outer(w.tree, lam.tree, batch)
        if not loss.requires_grad:
            raise ValueError("the outer loss depends neither on w nor on lam; is it computed from w, without detach or .item()?")
        found = torch.autograd.grad(loss, [*w.flat, *lam.flat], allow_unused=True)
    return loss.detach(), list(found[: len(w.flat)]), list(found[len(w.flat) :])
