"""Several ranks (``torchrun``): one mean in the loss, and every derivative is that of the whole problem on every rank.

    mean_over_ranks(l, *args)  =  sum_r rows_r l_r(*args) / sum_r rows_r        l_r: the function on the rows of rank r

All that carries a derivative is the same on every rank (hyperparameters, weights); the rows are not. Such a tensor enters the
function through ``share`` and the value leaves it through ``total``, which are each other's transposes:

    share    forward: the tensor itself            backward: the sum over the ranks
    total    forward: the sum over the ranks       backward: the cotangent itself

so that gradients of any order, products with Hessians, unrolled and implicit hypergradients come out whole, and alike on every
rank. An all-reduce whose backward is one more all-reduce, or none, as in a gradient of gradients through
DistributedDataParallel, gives each rank a number of its own instead.
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
"""Environment variable: seconds that a rank waits for the others (default 600) before it ends with an error."""


class RankError(RuntimeError):
    """The ranks cannot meet; the message says what to change."""


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect the ranks that ``torchrun`` has started, for the time of the block; nothing where there is one.

    Raises:
        RankError: another program has the port where the ranks would meet.
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
        from_all(None)  # none leaves while another still listens
    finally:
        dist.destroy_process_group()


def ranks() -> int:
    """Number of ranks; 1 where ``torch.distributed`` was not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def share_of(count: int) -> slice:
    """This rank's share of ``count`` things: ranks have neighbouring shares, whose sizes differ by one at most."""
    return slice(count * rank() // ranks(), count * (rank() + 1) // ranks())


def own(index: Tensor | None, count: int) -> Tensor | slice | None:
    """Which of the places ``index`` (None: all) of ``count`` things are in this rank's share; None: all of them are."""
    if ranks() == 1:
        return index
    mine = share_of(count)
    return mine if index is None else index[(index >= mine.start) & (index < mine.stop)]


def from_first(value: Any) -> Any:
    """The value of rank 0, on every rank; any object that can be pickled, between processes of one program."""
    if ranks() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def from_all(value: Any) -> list[Any]:
    """The values of all ranks in order, on every rank; see ``from_first``."""
    if ranks() == 1:
        return [value]
    held: list[Any] = [None] * ranks()
    dist.all_gather_object(held, value)
    return held


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over the ranks, the same bits on each; without a derivative."""
    summed = value.detach().clone(memory_format=torch.contiguous_format)
    if ranks() > 1:
        dist.all_reduce(summed)
    return summed


def average(value: Tensor, rows: int | None = None) -> Tensor:
    """The mean of ``value`` over the ranks, weighted by ``rows`` (None: all alike); without a derivative, the value on one rank.

    A rank may have no rows: its value, whatever it is, does not count.
    """
    if ranks() == 1:
        return value
    wide = value.detach().to(torch.promote_types(value.dtype, torch.float32))  # half precision could not count the rows
    weight = wide.new_full((1,), float(1 if rows is None else rows))
    weighted = wide * weight if rows != 0 else torch.zeros_like(wide)
    total = sum_over_ranks(torch.cat([weighted.flatten(), weight]))  # one message
    return (total[:-1] / total[-1]).view(value.shape).to(value.dtype)


class _Share(torch.autograd.Function):
    """``share``: see the module."""

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors."""
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to keep: missing cotangents are zeros, so that all ranks send as much."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Sum the cotangents."""
        return _Total.apply(*grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        """The tangents are the same on every rank too."""
        return tuple(x.view_as(x) for x in tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> tuple[Any, Any]:
        """Entry by entry."""
        return _Share.apply(*tensors), in_dims


class _Total(torch.autograd.Function):
    """``total``: see the module. One message a dtype, whatever the number of tensors."""

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        """Sum."""
        found: list[Tensor] = list(tensors)
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            places = [i for i, x in enumerate(tensors) if x.dtype == dtype]
            flat = sum_over_ranks(torch.cat([tensors[i].detach().reshape(-1) for i in places]))
            for i, part in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
                found[i] = part.view(tensors[i].shape)
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The cotangents, which are the same on every rank."""
        return _Share.apply(*grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        """Sum the tangents."""
        return _Total.apply(*tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> tuple[Any, Any]:
        """Entry by entry."""
        return _Total.apply(*tensors), in_dims


def share(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``share`` of the module, in the open: a map around it, which follows what it closes over, sees the call."""
    if has_torch_function(tensors):
        return handle_torch_function(share, tensors, *tensors)
    return _Share.apply(*tensors)  # pyright: ignore[reportReturnType]


class _Sharing(Swap):
    """Shares every tensor from outside that carries a derivative, the first time that the function meets it."""

    def __init__(self) -> None:
        """Know none."""
        super().__init__(discover=True)

    def replacement(self, tensor: Tensor) -> Tensor:
        """The tensor, shared, even where a solve meets it first, which builds no graph."""
        with torch.enable_grad():
            return share(tensor)[0]

    def share(self, tree: Any) -> Any:
        """All leaves of ``tree`` that carry a derivative, shared by one message."""
        leaves, spec = optree.tree_flatten(tree)
        found = list({id(x): x for x in leaves if isinstance(x, Tensor) and self._outside(x)}.values())
        for outside, inside in zip(found, share(*found) if found else (), strict=True):
            self.enter(outside, inside)
        return optree.tree_unflatten(spec, [self.swap(x) if isinstance(x, Tensor) else x for x in leaves])


def mean_over_ranks(function: Callable[..., Tensor], *args: Any, rows: int | None = None) -> Tensor:
    """The mean over the ranks of ``function(*args)``, each rank on its own rows, with the derivative of the whole mean.

    Use it once, around the loss; all ranks must call it, and differentiate it, in the same order. On one rank it is the function.

    Args:
        function: a mean over the rows of this rank. What it closes over (the parameters of a module) counts as much as ``args``.
        args: trees; every tensor in them that requires grad must be the same on every rank.
        rows: how many rows the mean is over on this rank, where ranks have different numbers of them (None: all have as many).

    Returns:
        The value, the same on every rank.

    Raises:
        ValueError: a rank has no rows.
        ClosureError: the function uses a tensor that requires grad through a custom ``autograd.Function``, not through ``args``:
            its derivative would be that of this rank's rows alone.

    Example:
        >>> import torch, hyperopt
        >>> w = torch.ones(3, requires_grad=True)
        >>> x = torch.randn(8, 3)  # this rank's rows
        >>> hyperopt.mean_over_ranks(lambda: (x @ w).square().mean(), rows=len(x)).backward()
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
