"""Products with the second derivatives of the inner loss at one point, from which an implicit hypergradient is made.

    matvec(v) = (d_w grad_w L) v         a product with the Hessian, or with a positive semidefinite matrix instead
    mixed(v) = (d_lam grad_w L)^T v      the mixed product; a hypergradient takes one

Each product is one backward pass through a graph of the gradient, which is built once and kept if its memory allows it.
"""

from __future__ import annotations

import contextlib
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.leaves import Leaves
from hyperopt.core import distributed
from hyperopt.core.graph_modes import refuse_constant_gradients, refuse_once, refuse_reentrant
from hyperopt.core.jacobian import pull
from hyperopt.core.memory import saved_bytes
from hyperopt.core.operator import LinearOperator
from hyperopt.core.own_functions import check_own_functions


class Curvature(LinearOperator):
    """The second derivatives of the inner loss at ``(w, lam)``: an operator H on (1, dim) matrices.

    Attributes:
        w, lam: the point.
        gradient: ``grad_w L``, shape (1, dim).
        missing: indices of the leaves of ``w`` on which the inner loss does not depend.
        gradients: number of inner gradients that were computed.
        mixed_products: number of mixed products that were computed.
    """

    symmetric = True
    gradient: Tensor
    missing: list[int]
    gradients: int
    mixed_products: int

    def __init__(self, w: Leaves, lam: Leaves) -> None:
        self.w, self.lam = w, lam
        self.missing = []
        self.gradients = self.mixed_products = 0

    @abstractmethod
    def mixed(self, v: Tensor) -> list[Tensor | None]:
        """Return ``(d_lam grad_w L)^T v`` for each hyperparameter, ``v`` of shape (1, dim); None if L does not depend on it."""

    def rough(self, v: Tensor) -> Tensor:
        """Return ``H v`` to two digits, which a step size needs, in a cheaper way than ``matvec`` if there is one."""
        return self.matvec(v)

    def release(self) -> None:
        """Free what products keep if it can be made again; the next product makes it."""


BY_DIFFERENCES = "use finite differences of gradients: adjoint=FiniteDifference(), or curvature='finite_differences'"
SMALL_GRAPH = 64 * 2**20  # bytes; such a graph is kept whatever its share of the memory is
STEPS_OF_TRAINING = 3  # so much memory of a training step may the products take, if the graph is larger
VECTORS = 6  # of the size of the weights are alive during a product
TEMPORARIES = 2  # of the size of the largest activation are made by the second derivative of one layer, and freed


class Hessian(Curvature):
    """The Hessian itself, by a second backward pass.

    Args:
        inner: the inner loss on a batch.
        w: the weights.
        lam: the hyperparameters.
        keep: whether all products share one graph of the gradient. If not, each product frees the graph and the next one builds
            it again, which costs one more gradient a product and saves a sixth to a quarter of the peak memory. None: it is kept
            if it takes at most 64 MiB, or if a product stays within the memory of three training steps, by the tensors that the
            graph has saved; of several ranks, if this holds on all of them.
        check: whether autograd Functions in the loss are checked; a step size needs no exact products.

    Raises:
        ValueError: the inner loss does not depend on ``w``.
    """

    def __init__(self, inner: Evaluation, w: Leaves, lam: Leaves, *, keep: bool | None = True, check: bool = True) -> None:
        """Compute the gradient with its graph."""
        super().__init__(w, lam)
        self._inner, self._keep, self._releases, self._check = inner, bool(keep), keep is not True, check
        loss, grads = self._differentiate()
        self.gradient = self.w.matrix([None if g is None else g.detach() for g in grads])
        self.missing = [i for i, g in enumerate(grads) if g is None]
        if keep is None:
            self._keep = all(distributed.from_all(self._affordable(loss)))

    def _affordable(self, loss: Tensor) -> bool:
        """Whether the graph may be kept; see the class."""
        saved = saved_bytes(self._grads, self.w.flat)
        if sum(saved) <= SMALL_GRAPH:
            return True
        # A product also makes a cotangent of each activation; a step of training saves the activations and makes a gradient.
        activations, weights = sum(saved_bytes([loss], self.w.flat)), sum(leaf.nbytes for leaf in self.w.flat)
        product = sum(saved) + activations + TEMPORARIES * max(saved, default=0) + VECTORS * weights
        return product <= STEPS_OF_TRAINING * (activations + weights)

    def _differentiate(self) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Return the inner loss and its gradient, and keep the graph."""

        def inner(w: Sequence[Tensor], lam: Sequence[Tensor]) -> Tensor:
            return self._inner(self.w.like(w), self.lam.like(lam))

        loss, grads = differentiate(inner, self.w.flat, self.lam.flat, check=self._check)
        self.gradients += 1
        # Entries of the gradient that are constant have no graph and contribute nothing to a product.
        kept = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._at, self._grads = [i for i, _ in kept], [g for _, g in kept]
        return loss, grads

    def release(self) -> None:
        """Free the graph, unless it was asked for."""
        if self._releases:
            self._grads = []

    def _matvec(self, v: Tensor) -> Tensor:
        """``H v``."""
        return self.w.matrix(self._pull(self.w.flat, v))

    def mixed(self, v: Tensor) -> list[Tensor | None]:
        """``(d_lam grad_w L)^T v``."""
        self.mixed_products += 1
        return self._pull(self.lam.flat, v)

    def _pull(self, leaves: Sequence[Tensor], v: Tensor) -> list[Tensor | None]:
        if not self._at:
            return [None] * len(leaves)
        if not self._grads:
            self._differentiate()
        parts = self.w.parts(v)
        given = [parts[i] for i in self._at]
        with second_derivatives():
            found = list(pull(self._grads, leaves, given, keep=self._keep))
        if not self._keep:
            self._grads = []
        return found


class Resampled(Curvature):
    """A curvature that is built on the next batch for each product, so that the noise of a batch enters only one product.

    Each product builds a graph of its own, which costs one more gradient than a product with a graph that is kept.

    Reference: Ji, Yang & Liang, ICML 2021, arXiv 2010.07962 (stocBiO), algorithm 2.
    """

    def __init__(self, make: Callable[[], Curvature]) -> None:
        """Compute the gradient on the first batch; ``make`` draws a batch and builds the curvature on it."""
        self._make = make
        first = make()
        super().__init__(first.w, first.lam)
        self.gradient, self.missing, self.gradients = first.gradient, first.missing, first.gradients

    def _matvec(self, v: Tensor) -> Tensor:
        now = self._make()
        image = now.matvec(v)
        self.gradients += now.gradients
        return image

    def mixed(self, v: Tensor) -> list[Tensor | None]:
        """Return the mixed product on the next batch."""
        now = self._make()
        self.mixed_products += 1
        found = now.mixed(v)
        self.gradients += now.gradients
        return found


COMPILED = ("aot_autograd does not currently support double backward", "compiled with non-empty donated buffers")
"""PyTorch's messages for a second derivative of compiled code; which one comes depends on what was compiled before."""


@contextlib.contextmanager
def second_derivatives() -> Iterator[None]:
    """Turn PyTorch's errors about second derivatives in this block into messages that say what to change.

    Raises:
        RuntimeError: an operator has no second derivative, or the loss changes a tensor in place.
    """
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise RuntimeError(
                "the inner loss changes a tensor in place that the derivative of an earlier step needs; make it a buffer of a "
                "module that the loss calls, or replace it by a new tensor instead"
            ) from error
        if "use_reentrant=True" in str(error):
            raise RuntimeError(
                "the inner loss calls torch.utils.checkpoint with use_reentrant=True, which torch.autograd.grad does not follow; "
                "give use_reentrant=False"
            ) from error
        if any(words in str(error) for words in COMPILED):
            raise RuntimeError(
                "the inner loss calls compiled code, which has no second derivative in PyTorch: give the module as it was before "
                f"torch.compile (its _orig_mod), or {BY_DIFFERENCES}"
            ) from error
        found = re.search(r"derivative for (\S+) is not implemented|(\S+) does not support .*double backward", str(error))
        if found is None and "once_differentiable" not in str(error):
            raise
        what = next((name for name in (found.groups() if found else ()) if name), "an operator that is differentiable once")
        raise RuntimeError(
            f"the inner loss uses {what}, which has no second derivative in PyTorch; replace the layer that calls it, or "
            f"{BY_DIFFERENCES}"
        ) from error


def differentiate(
    function: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
    leaves: Sequence[Tensor],
    others: Sequence[Tensor] = (),
    *,
    create_graph: bool = True,
    check: bool = True,
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Return the inner loss and its gradient, None for leaves on which the loss does not depend.

    Args:
        function: the inner loss of the weights and of other tensors.
        leaves: the weights.
        others: the hyperparameters.
        create_graph: whether the gradient has a graph.
        check: whether autograd Functions on the way are checked if it has one.

    Raises:
        ValueError: the loss does not depend on any leaf.
    """
    with torch.enable_grad():
        loss = function(leaves, others)
    found: Sequence[Tensor | None] = [None]
    if loss.requires_grad:
        with second_derivatives(), refuse_constant_gradients([loss] * create_graph, leaves) as nodes:
            found = pull([loss], leaves, [torch.ones_like(loss)], keep=create_graph, create_graph=create_graph)
            if create_graph:
                refuse_once(found, leaves)
        if nodes and check:
            check_own_functions(nodes, function, leaves, others, remedy=f", or {BY_DIFFERENCES}")
    if any(g is None for g in found):
        refuse_reentrant(loss)
    if all(g is None for g in found):
        unaffected()
    return loss, found


def unaffected() -> NoReturn:
    """Refuse an inner loss that does not depend on ``w``.

    Raises:
        ValueError: always.
    """
    raise ValueError("the inner loss does not depend on w: it must be computed from the w that it is given, without detach")


def unused_of(names: Sequence[str], *gradients: Sequence[Tensor | None]) -> tuple[str, ...]:
    """Return the names of the hyperparameters whose implicit hypergradient is exactly zero, since no part depends on them.

    Args:
        names: names of the hyperparameters.
        gradients: the parts of the hypergradient (direct gradient, mixed product), each with one entry for each hyperparameter;
            None if that part does not depend on it.

    Raises:
        ValueError: no part depends on any hyperparameter.
    """
    unused = tuple(name for name, *parts in zip(names, *gradients, strict=True) if all(x is None for x in parts))
    if len(unused) == len(names):
        raise ValueError(
            f"the outer loss does not depend on {', '.join(names)}, neither directly nor through the minimum of the inner loss: "
            "the implicit hypergradient is exactly zero. Use lam in one of the losses; a learning rate or momentum of the inner "
            "solver, or where training starts, needs unrolled differentiation: adjoint=Unrolled()"
        )
    return unused
