"""``BilevelProblem``: two losses and the sources of their batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.batches import BatchSource, NoBatches, SameBatch, source_of
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.refusals import named, refuse_no_scalar, refuse_other_arguments, refuse_shared, refuse_unlike, rows_of
from hyperopt.core import distributed
from hyperopt.core.captured import functorch_level
from hyperopt.core.checks import check_number
from hyperopt.core.graph_modes import KeepsGraph
from hyperopt.core.text import described

Loss = Callable[[Any, Any, Any], Tensor]
"""``loss(w, lam, batch)`` returns a scalar."""


@dataclass(frozen=True)
class InnerConstants:
    """Constants of the losses that hold in a ball containing ``w`` and the minimum.

    Attributes:
        strong_convexity: ``mu > 0``, a lower bound of the eigenvalues of the Hessian of the inner loss.
        smoothness: ``L >= mu``, an upper bound of these eigenvalues.
        mixed_norm: upper bound of the norm of ``d_lam grad_w L``, for all hyperparameters together.
        hessian_lipschitz: Lipschitz constant of ``w -> Hessian``; 0 for a quadratic loss.
        mixed_lipschitz: Lipschitz constant of ``w -> d_lam grad_w L``.
        outer_lipschitz: Lipschitz constant of ``w -> d_w E``.
        direct_lipschitz: Lipschitz constant of ``w -> d_lam E``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Grazzi et al., ICML 2020, arXiv 2006.16218, assumptions of theorem 2.2.

    Example:
        >>> import torch, hyperopt
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: (w - lam).square().sum() / 2,  # its Hessian is the identity
        ...     outer_loss=lambda w, lam, batch: w.square().sum() / 2,
        ...     constants=lambda w, lam: hyperopt.InnerConstants(1.0, 1.0, mixed_norm=1.0, outer_lipschitz=1.0),
        ... )
        >>> certificate = hyperopt.hypergradient(problem, torch.tensor([1.1]), torch.ones(1)).certificate  # the exact one is 1
        >>> certificate.is_bound, certificate.error >= 0.1 - 1e-6
        (True, True)
    """

    strong_convexity: float
    smoothness: float
    mixed_norm: float
    hessian_lipschitz: float = 0.0
    mixed_lipschitz: float = 0.0
    outer_lipschitz: float = 0.0
    direct_lipschitz: float = 0.0

    def __post_init__(self) -> None:
        for name in vars(self):
            check_number(self, name, 0.0, open_low=name in ("strong_convexity", "smoothness"))
        if self.strong_convexity > self.smoothness:
            raise ValueError(
                f"InnerConstants: strong_convexity={self.strong_convexity} is above smoothness={self.smoothness}; change one"
            )


@dataclass(frozen=True)
class Composite:
    """An inner loss made of a model and a criterion, which Gauss-Newton products need separately.

    Attributes:
        model: ``z(w, lam, batch)``, returns one tensor.
        criterion: ``c(z, w, lam, batch)``, returns a scalar that is convex in ``z``; penalties on ``w`` belong here.
        ranks: whether a batch is this rank's share and the loss is a mean over the ranks; ``over_ranks`` sets it.

    Reference: Schraudolph, Neural Computation 14, 2002 (Gauss-Newton products).

    Example:
        >>> import torch, hyperopt
        >>> x, y = torch.eye(2), torch.tensor([1.0, 2.0])
        >>> loss = hyperopt.Composite(
        ...     model=lambda w, lam, batch: x @ w,
        ...     criterion=lambda z, w, lam, batch: (z - y).square().sum() + lam * w.square().sum(),
        ... )
        >>> loss(torch.ones(2), torch.tensor(0.5), None)
        tensor(2.)
    """

    model: Callable[[Any, Any, Any], Tensor]
    criterion: Callable[[Tensor, Any, Any, Any], Tensor]
    ranks: bool = False

    def __call__(self, w: Any, lam: Any, batch: Any) -> Tensor:
        """Return the inner loss."""
        if not self.ranks:
            return self._own(w, lam, batch)
        return distributed.mean_over_ranks(self._own, w, lam, batch, rows=rows_of(batch))

    def __repr__(self) -> str:
        return described(self, model=self.model, criterion=self.criterion, ranks=self.ranks)

    def _own(self, w: Any, lam: Any, batch: Any) -> Tensor:
        return self.criterion(self.model(w, lam, batch), w, lam, batch)

    def of(self, expand: Callable[[Any], Any]) -> Composite:
        """Return the loss as a function of other variables ``x``, where ``w = expand(x)``."""
        return replace(
            self,
            model=lambda w, lam, batch: self.model(expand(w), lam, batch),
            criterion=lambda z, w, lam, batch: self.criterion(z, expand(w), lam, batch),
        )

    def plus(self, penalty: Callable[[Any], Tensor]) -> Composite:
        """Return the loss plus a penalty on the weights."""
        return replace(self, criterion=lambda z, w, lam, batch: self.criterion(z, w, lam, batch) + penalty(w))

    def whole(self, product: Tensor, batch: Any) -> Tensor:
        """Return the product with the matrix of the rows of all ranks, given the product for this rank's rows."""
        return distributed.average(product, rows_of(batch)) if self.ranks else product


@dataclass(frozen=True, repr=False)
class BilevelProblem:
    """``min over lam of E(w(lam), lam)`` where ``w(lam)`` minimises ``L(., lam)``.

    Attributes:
        inner_loss: ``L(w, lam, batch)``, returns a scalar that depends on ``w``.
        outer_loss: ``E(w, lam, batch)``, returns a scalar.
        inner_batches: the batches of the inner loss: ``Minibatches``, a loader or dataset of ``torch.utils.data``, or one
            batch; see ``hyperopt.bilevel.batches.source_of`` (default: the batch is None).
        outer_batches: the batches of the outer loss, likewise.
        refresh: ``refresh(w, lam, batch)``, called once after each training to update running statistics, see ``Functional``.
        constants: ``constants(w, lam)``, returns the constants of the losses; they make the certificate a bound.
        initial: ``initial(lam)``, returns the start of every training as a tree like ``w``, so that the start can be learned,
            as in MAML (None: training starts from the present weights). ``Unrolled`` and ``Checkpointed`` differentiate through
            it; the hypergradient of an implicit adjoint is zero there, since a minimum does not depend on the start.

    Raises:
        TypeError, ValueError: a loss does not take ``(w, lam, batch)``, or a source of batches is of no known kind.

    Example:
        >>> import torch, hyperopt
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: (w - lam).square().sum(),
        ...     outer_loss=lambda w, lam, batch: w.sum(),
        ... )
        >>> problem.inner(torch.ones(2), torch.zeros(2), None)
        tensor(2.)
    """

    inner_loss: Loss
    outer_loss: Loss
    inner_batches: BatchSource | Any = field(default_factory=NoBatches)
    outer_batches: BatchSource | Any = field(default_factory=NoBatches)
    refresh: Callable[[Any, Any, Any], None] | None = None
    constants: Callable[[Any, Any], InnerConstants] | None = None
    initial: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for name in ("inner_loss", "outer_loss"):
            refuse_other_arguments(getattr(self, name), name)
        for name in ("inner_batches", "outer_batches"):
            object.__setattr__(self, name, source_of(getattr(self, name), name))

    def __repr__(self) -> str:
        return described(self, **{name: part for name, part in vars(self).items() if part is not None})

    def start(self, w: Any, lam: Any) -> Any:
        """Return the start of training: ``initial(lam)``, differentiable in ``lam``, or ``w`` without ``initial``.

        Raises:
            TypeError, ValueError: ``initial`` returned something that is not like ``w``.
        """
        if self.initial is None:
            return w
        found = self.initial(lam)
        refuse_unlike(found, w, "initial(lam)")
        return found

    def place(self, w: Any, lam: Any) -> None:
        """Check ``lam``, and write the start of training into ``w`` in place if there is ``initial``.

        Raises:
            TypeError, ValueError: ``lam`` is not a tree of floating-point tensors, ``w`` shares memory with it, or ``initial``
                returned something that is not like ``w``.
        """
        Leaves.of(lam, "lam")
        refuse_shared(w, lam)
        if self.initial is not None:
            with torch.no_grad():
                for old, new in zip(optree.tree_leaves(w), optree.tree_leaves(self.start(w, lam)), strict=True):
                    old.copy_(new)

    def at_next_batch(self) -> BilevelProblem:
        """Return the problem on the next batch of each loss only; the positions of the sources do not change."""
        sources = []
        for source in (self.inner_batches, self.outer_batches):
            kept = copy.deepcopy(source.state_dict())
            sources.append(SameBatch(source.draw()))
            source.load_state_dict(kept)
        return replace(self, inner_batches=sources[0], outer_batches=sources[1])

    def inner(self, w: Any, lam: Any, batch: Any) -> Tensor:
        """Return the inner loss, after a check that it is a scalar and did not change its arguments."""
        return self._evaluated(self.inner_loss, "inner_loss", w, lam, batch)

    def of(self, expand: Callable[[Any], Any], collect: Callable[[Any], Any]) -> BilevelProblem:
        """Return the problem in other variables ``x``, where ``w = expand(x)`` and ``x = collect(w)``."""

        def at(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda w, *others: function(expand(w), *others)

        inner, initial = self.inner_loss, self.initial
        return replace(
            self,
            inner_loss=inner.of(expand) if isinstance(inner, Composite) else at(inner),
            outer_loss=at(self.outer_loss),
            refresh=None if self.refresh is None else at(self.refresh),
            constants=None if self.constants is None else at(self.constants),
            initial=None if initial is None else lambda lam: collect(initial(lam)),
        )

    def decayed(self, decay: Any) -> BilevelProblem:
        """Return the problem with ``decay |w|^2 / 2`` added to the inner loss; ``decay`` is a number or a tree like ``w``."""
        inner, constants, decays = self.inner_loss, self.constants, optree.tree_leaves(decay)

        def penalty(w: Any) -> Tensor:
            leaves = optree.tree_leaves(w)
            each = decays * len(leaves) if len(decays) == 1 else decays
            return torch.stack([d / 2 * leaf.square().sum() for d, leaf in zip(each, leaves, strict=True) if d]).sum()

        def known(w: Any, lam: Any) -> InnerConstants:
            assert constants is not None
            given = constants(w, lam)
            low, high = given.strong_convexity + min(decays), given.smoothness + max(decays)
            return replace(given, strong_convexity=low, smoothness=high)

        whole = inner.plus(penalty) if isinstance(inner, Composite) else lambda w, lam, batch: inner(w, lam, batch) + penalty(w)
        return replace(self, inner_loss=whole, constants=None if constants is None else known)

    def inner_on(self, batch: Any) -> Callable[[Any, Any], Tensor]:
        """Return the inner loss on a batch, as a function of ``(w, lam)``."""

        def loss(w: Any, lam: Any) -> Tensor:
            with KeepsGraph():
                return self.inner(w, lam, batch)

        return loss

    def outer_on(self, batch: Any) -> Callable[[Any, Any], Tensor]:
        """Return the outer loss on a batch, as a function of ``(w, lam)``."""
        return lambda w, lam: self.outer(w, lam, batch)

    def outer(self, w: Any, lam: Any, batch: Any) -> Tensor:
        """Return the outer loss, after the checks of ``inner``."""
        with KeepsGraph():
            return self._evaluated(self.outer_loss, "outer_loss", w, lam, batch)

    @staticmethod
    def _evaluated(loss: Loss, name: str, w: Any, lam: Any, batch: Any) -> Tensor:
        """Return a loss.

        Raises:
            TypeError, ValueError: the loss is not a scalar, its batch is empty, or it changed one of its arguments in place.
        """
        with torch._C.DisableTorchFunction():  # these checks must not be seen by modes around the loss
            given = [] if functorch_level() else [x for tree in (w, lam, batch) for x in optree.tree_leaves(tree)]
            counts = [x._version if isinstance(x, Tensor) and not x.is_inference() else None for x in given]
        value = loss(w, lam, batch)
        with torch._C.DisableTorchFunction():
            for i, (x, count) in enumerate(zip(given, counts, strict=True)):
                if count is not None and x._version != count:
                    names = [key for tree, what in ((w, "w"), (lam, "lam"), (batch, "batch")) for key, _ in named(tree, what)]
                    raise ValueError(
                        f"{name} changed {names[i]} in place, but is evaluated on it again; compute a new tensor instead "
                        "(inplace=False in a module)"
                    )
            refuse_no_scalar(value, name, batch)
            single = not value.dim()
        return value if single else value.reshape(())


def outer_gradient(problem: BilevelProblem, w: Leaves, lam: Leaves, batch: Any) -> tuple[Tensor, list[Any], list[Any]]:
    """Return the outer loss on a batch and its gradients; see ``partial_gradients``."""
    return partial_gradients(problem.outer_on(batch), w, lam, "the outer loss", "w")


def partial_gradients(
    loss: Callable[[Any, Any], Tensor], w: Leaves, lam: Leaves, name: str = "a loss", source: str = "them"
) -> tuple[Tensor, list[Any], list[Any]]:
    """Return a detached loss and its partial gradients in ``w`` and ``lam``; None for leaves that it does not use.

    Raises:
        ValueError: the loss depends neither on ``w`` nor on ``lam``; the message has its ``name``, and the ``source`` to use.
    """
    with torch.enable_grad():
        value = loss(w.tree, lam.tree)
        if not value.requires_grad:
            raise ValueError(f"{name} depends neither on w nor on lam; is it computed from {source}, without detach or .item()?")
        found = torch.autograd.grad(value, [*w.flat, *lam.flat], allow_unused=True)
    # An embedding with sparse=True has a sparse gradient.
    found = [g if g is None or g.layout == torch.strided else g.to_dense() for g in found]
    return value.detach(), list(found[: len(w.flat)]), list(found[len(w.flat) :])
