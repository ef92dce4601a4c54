"""Losses over several ranks (``torchrun``): the loss is one mean, and every rank gets the derivative of the whole mean.

    mean_over_ranks(l, *args)  =  sum_r rows_r l_r(*args) / sum_r rows_r        l_r: the function on the rows of rank r

Everything that carries a derivative (hyperparameters, weights) is the same on every rank; the rows are not. A tensor enters
the function through ``share`` and the value leaves it through ``total``, which are transposes of each other:

    share    forward: the tensor itself            backward: the sum over the ranks
    total    forward: the sum over the ranks       backward: the cotangent itself

Gradients of any order, products with Hessians, and unrolled and implicit hypergradients are therefore complete and equal on
every rank. An all-reduce whose backward is another all-reduce, or none (as for a gradient of gradients through
DistributedDataParallel), gives a different number on each rank instead.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any

import optree
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from hyperopt.core.captured import ClosureError, Swap, foreign_leaves

TIMEOUT = "HYPEROPT_RANK_TIMEOUT"
"""Environment variable: how many seconds a rank waits for the others before it ends with an error (default 600)."""


class RankError(RuntimeError):
    """The ranks cannot meet; the message says what to change."""


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect the ranks that ``torchrun`` has started, for the duration of the block; do nothing for a single process.

    Raises:
        RankError: another program uses the port at which the ranks would meet.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=float(os.environ.get(TIMEOUT, "600"))))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise RankError(
            f"port MASTER_PORT={os.environ.get('MASTER_PORT')} is taken, and the ranks cannot meet there; start them by torchrun "
            "--standalone, which finds a free one, or give torchrun --master-port, or MASTER_PORT, another"
        ) from error
    try:
        yield
        from_all(None)  # wait until no rank expects a message from this one
    finally:
        dist.destroy_process_group()


def ranks() -> int:
    """Return the number of ranks, 1 if ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def share_of(count: int) -> slice:
    """Return this rank's share of ``count`` things. Shares are contiguous, and their sizes differ by at most one."""
    return slice(count * rank() // ranks(), count * (rank() + 1) // ranks())


def own(index: Tensor | None, count: int) -> Tensor | slice | None:
    """Return the entries of ``index`` (None: all of ``count``) in this rank's share; None stands for all."""
    if ranks() == 1:
        return index
    mine = share_of(count)
    return mine if index is None else index[(index >= mine.start) & (index < mine.stop)]


def from_first(value: Any) -> Any:
    """Return the value of rank 0 on every rank; it may be any object that can be pickled."""
    if ranks() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def from_all(value: Any) -> list[Any]:
    """Return the values of all ranks in order, on every rank; see ``from_first``."""
    if ranks() == 1:
        return [value]
    held: list[Any] = [None] * ranks()
    dist.all_gather_object(held, value)
    return held


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum over the ranks, with the same bits on each; it has no derivative."""
    summed = value.detach().clone(memory_format=torch.contiguous_format)
    if ranks() > 1:
        dist.all_reduce(summed)
    return summed


def average(value: Tensor, rows: int | None = None) -> Tensor:
    """Return the mean of ``value`` over the ranks, weighted by ``rows`` (None: equally); it has no derivative.

    A rank may have no rows: its value, whatever it is, does not count. On a single rank the value is returned as it is.
    """
    if ranks() == 1:
        return value
    wide = value.detach().to(torch.promote_types(value.dtype, torch.float32))  # half precision could not hold the weight
    weight = wide.new_full((1,), float(1 if rows is None else rows))
    weighted = wide * weight if rows != 0 else torch.zeros_like(wide)
    total = sum_over_ranks(torch.cat([weighted.flatten(), weight]))  # one message
    return (total[:-1] / total[-1]).view(value.shape).to(value.dtype)


class _Share(torch.autograd.Function):
    """The function ``share`` of the module's docstring."""

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors."""
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing. Missing cotangents become zeros, so that all ranks send the same amount."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Sum the cotangents."""
        return _Total.apply(*grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        """Return the tangents, which are the same on every rank."""
        return tuple(x.view_as(x) for x in tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> tuple[Any, Any]:
        """Apply the function to the batched tensors: it acts on each entry alone."""
        return _Share.apply(*tensors), in_dims


class _Total(torch.autograd.Function):
    """The function ``total`` of the module's docstring. It sends one message for each dtype."""

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        """Sum over the ranks."""
        found: list[Tensor] = list(tensors)
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            places = [i for i, x in enumerate(tensors) if x.dtype == dtype]
            flat = sum_over_ranks(torch.cat([tensors[i].detach().reshape(-1) for i in places]))
            for i, part in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
                found[i] = part.view(tensors[i].shape)
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the cotangents, which are the same on every rank."""
        return _Share.apply(*grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        """Sum the tangents."""
        return _Total.apply(*tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> tuple[Any, Any]:
        """Apply the function to the batched tensors: it acts on each entry alone."""
        return _Total.apply(*tensors), in_dims


def share(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Call ``share`` as a function that a ``TorchFunctionMode`` sees, so that a solve around it can follow the tensors."""
    if has_torch_function(tensors):
        return handle_torch_function(share, tensors, *tensors)
    return _Share.apply(*tensors)  # pyright: ignore[reportReturnType]


class _Sharing(Swap):
    """Shares every tensor from outside that carries a derivative, the first time that the function meets it."""

    def __init__(self) -> None:
        super().__init__(discover=True)

    def replacement(self, tensor: Tensor) -> Tensor:
        """Return the tensor, shared, with a graph even if a solve without gradients meets it first."""
        with torch.enable_grad():
            return share(tensor)[0]

    def share(self, tree: Any) -> Any:
        """Return ``tree`` with all leaves that carry a derivative shared, by one message."""
        leaves, spec = optree.tree_flatten(tree)
        found = list({id(x): x for x in leaves if isinstance(x, Tensor) and self._outside(x)}.values())
        for outside, inside in zip(found, share(*found) if found else (), strict=True):
            self.enter(outside, inside)
        return optree.tree_unflatten(spec, [self.swap(x) if isinstance(x, Tensor) else x for x in leaves])


def mean_over_ranks(function: Callable[..., Tensor], *args: Any, rows: int | None = None) -> Tensor:
    """Return the mean over the ranks of ``function(*args)``, each on its own rows, with the derivative of the whole mean.

    Use it once, around the loss. All ranks must call and differentiate it in the same order. On one rank it is the function.

    Args:
        function: a mean over the rows of this rank. Tensors that it captures (the parameters of a module) are handled like
            ``args``.
        args: trees; every tensor in them that requires grad must be the same on every rank.
        rows: number of rows of this rank's mean, if ranks have different numbers of them (None: all have the same number).

    Returns:
        The value, the same on every rank.

    Raises:
        ValueError: a rank has no rows.
        ClosureError: a custom ``autograd.Function`` uses a tensor that requires grad and is not in ``args``; its derivative
            would be that of this rank's rows alone.

    Example:
        >>> import torch, hyperopt
        >>> w = torch.ones(3, requires_grad=True)
        >>> x = torch.eye(3)  # this rank's rows
        >>> loss = hyperopt.mean_over_ranks(lambda: (x @ w).square().mean(), rows=len(x))
        >>> loss.backward()  # without torch.distributed there is one rank
        >>> round(loss.item(), 3), [round(x, 3) for x in w.grad.tolist()]
        (1.0, [0.667, 0.667, 0.667])
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows={rows} on this rank: each needs one at least; use fewer ranks, or larger batches")
    if ranks() == 1:
        return function(*args)
    sharing = _Sharing()
    args = sharing.share(args)
    with sharing:
        value = function(*args)
    inside = [sharing.inside(x) for x in sharing.outside]
    for leaf in foreign_leaves(value, (), sharing.start, until=inside):
        raise ClosureError(
            f"the function uses a tensor of shape {tuple(leaf.shape)} that requires grad through a custom autograd.Function: its "
            "derivative would be that of this rank's rows alone; pass it through args"
        )
    # The value and the rows travel in one message.
    part, weight = (value, 1.0) if rows is None else (value * rows, float(rows))
    total, whole = _Total.apply(part, value.detach().new_tensor(weight))  # pyright: ignore[reportGeneralTypeIssues]
    return total / whole.detach()
