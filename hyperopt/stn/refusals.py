"""What is refused before a self-tuning network trains, beside the layers that ``convert`` refuses."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset, SubsetRandomSampler

if TYPE_CHECKING:
    from hyperopt.bilevel.outer import Schedule
    from hyperopt.stn.space import HyperSpace

FAR = 4
"""In scales: a normal number is farther away once in 16,000 draws."""


def refuse_same_data(train: Any, val: Any) -> None:
    """Refuse a validation set that has rows of the training set.

    Batches, lists of batches and the tensors of a ``TensorDataset`` are compared by their values, rows of a ``DataLoader`` by
    its dataset and sampler. Data that must be drawn to be seen are taken as they are.

    Raises:
        ValueError: says what is the same.
    """
    one, two = list(_tensors(train)), list(_tensors(val))
    if val is not None and train is val and not isinstance(val, Iterator):
        shared = "are the same object"
    elif _equal(one, two):
        shared = "have equal values"
    elif count := len(set(_rows(train)) & set(_rows(val))):
        shared = f"have {count} rows of the same dataset in common"
    else:
        return
    raise ValueError(
        f"train and val {shared}: on the rows that it is trained on, the validation loss would turn every regulariser off; give "
        "val rows of its own"
    )


def refuse_leaving(space: HyperSpace) -> None:
    """Refuse a perturbation whose values, four scales from where it is, are no longer inside of a hyperparameter's space.

    Raises:
        ValueError: names the hyperparameter, its scale and the bound.
    """
    for (name, each), u, sigma in zip(space.declared.items(), space.u.detach(), space.sigma.detach(), strict=True):
        for side in (-1, 1):
            value, end = (float(each.space.value(m)) for m in (u + side * FAR * sigma, u + side * math.inf))
            if value == end or not math.isfinite(value):
                way = "above" if side > 0 else "below"
                raise ValueError(
                    f"the perturbation of {name} with scale={float(sigma):g} leaves the space: {FAR} scales {way} "
                    f"{float(each.space.value(u)):g} is {value:g} in {u.dtype}, where the space ends; lower scale"
                )


def refuse_unread(space: HyperSpace, seen: Collection[str]) -> None:
    """Refuse hyperparameters that are not among those that the training loss has read.

    Raises:
        ValueError: names them.
    """
    unused = [name for name in space.names if name not in seen]
    if unused:
        raise ValueError(
            f"the training loss never reads {', '.join(unused)}: use draw.h[{unused[0]!r}] in train_loss (or "
            f"hyperopt.stn.Dropout({unused[0]!r}) in the network), or do not declare it"
        )


def refuse_without_derivative(loss: Tensor, name: str) -> None:
    """Refuse a loss, called ``name``, that has no derivative.

    Raises:
        ValueError: names the loss.
    """
    if not loss.requires_grad:
        raise ValueError(f"{name} does not depend on the weights: let it call the model that it is given, with gradients")


def refuse_optimizer(name: str, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
    """Refuse an optimizer that evaluates one loss many times, and a schedule that needs evaluations.

    Raises:
        ValueError: names the optimizer.
    """
    if isinstance(optimizer, torch.optim.LBFGS) and name != "values":
        raise ValueError(f"the optimizer of the {name} is LBFGS, which needs one function, and batches differ; use adam or sgd")
    if schedule.by_evaluation:
        raise ValueError(f"the schedule of the {name} goes by evaluations (ReduceLROnPlateau); use one that counts steps")


def _tensors(data: Any) -> Iterator[Tensor]:
    """The tensors of batches, or of the dataset of a loader that reads all of it; data that must be drawn are not opened."""
    found: Any = data.dataset if isinstance(data, DataLoader) and _whole(data) else data
    for leaf in optree.tree_leaves(getattr(found, "tensors", found)):
        if isinstance(leaf, Tensor) and leaf.numel():
            yield leaf


def _equal(one: list[Tensor], two: list[Tensor]) -> bool:
    """Whether all tensors have the same values; those without differences between rows count as no data."""
    if not one or len(one) != len(two) or any(a.shape != b.shape or a.device != b.device for a, b in zip(one, two, strict=True)):
        return False
    varied = any(a.dim() and bool((a != a[:1]).any()) for a in one)
    return varied and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def _rows(data: Any) -> Iterator[tuple[int, int]]:
    """Each row of a dataset, or of the dataset of a loader, as the dataset that holds it and its place there."""
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(data, DataLoader) and isinstance(data.sampler, SubsetRandomSampler):
        places: Any = data.sampler.indices
    elif isinstance(data, DataLoader) and not _whole(data):
        return
    elif isinstance(dataset, Subset) or isinstance(data, DataLoader):
        places = range(len(dataset))  # pyright: ignore[reportArgumentType]
    else:
        return
    for place in map(int, places):
        inside: Any = dataset
        while isinstance(inside, Subset):
            inside, place = inside.dataset, int(inside.indices[place])
        yield id(inside), place


def _whole(loader: DataLoader[Any]) -> bool:
    """Whether a loader reads all rows of its dataset."""
    return type(loader.sampler) in (SequentialSampler, RandomSampler) and hasattr(loader.dataset, "__len__")
