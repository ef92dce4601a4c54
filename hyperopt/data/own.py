"""Your own rows: an ordinary ``torch.utils.data.Dataset``, a pair of arrays, or a function that returns one of these.

EquilibriumTask(dataset=TensorDataset(x, y))
EquilibriumTask(dataset=(x, y))
EquilibriumTask(dataset=Own(read_my_files, train=500, val=200, order="head_tail"))
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from hyperopt.core.checks import check_choice, check_optional_count, check_whole
from hyperopt.core.text import called, one_line
from hyperopt.data.reading import DataError
from hyperopt.data.splits import ORDERS, Dataset, DrawnDataset, Rows, Splits, draw_rows, scaled_by

MOST_CLASSES = 10_000
NUMBERS = (Tensor, np.ndarray, np.generic, int, float, list, tuple)


@dataclass(frozen=True, eq=False)
class Own:
    """A dataset of your own rows, from which three disjoint splits are drawn.

    Whole numbers ``0, 1, ...`` in ``y`` are labels, one for each row; floating numbers are targets of a regression. The values
    of ``x`` are taken as they are.

    Attributes:
        data: a ``torch.utils.data.Dataset`` whose items are pairs ``(x, y)``, a pair of arrays ``(x, y)`` with a row for each
            example, or a function without arguments that returns one of these; it is called when the rows are loaded.
        train: number of training rows (None: all that ``val`` and ``test`` leave).
        val: number of validation rows, 0 for none (None: a fifth of all rows).
        test: number of test rows (None: all that are left if ``train`` is given, and else a fifth of all rows).
        order: how they are drawn; see ``hyperopt.data.splits.DrawnDataset``.
        seed: seed of the draw, 0 to 2**32 - 1 (None: that of the run).

    Raises:
        TypeError: ``data`` is not one of these, or lacks a method.
        ValueError: no data can have such a size or order.
    """

    data: TorchDataset[Any] | tuple[Any, Any] | Callable[[], Any]
    train: int | None = None
    val: int | None = None
    test: int | None = None
    order: str = "shuffled"
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before the rows are loaded."""
        for name, least in (("train", 1), ("val", 0), ("test", 1)):
            check_optional_count(self, name, least)
        check_choice(self, "order", ORDERS)
        if self.seed is not None:
            check_whole(self, "seed", 0, 2**32 - 1)
        if (fault := _fault(self.data)) is not None:
            raise TypeError(f"{called(self.data)} {fault}")

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits; see ``Dataset.load``.

        Raises:
            DataError: items are not pairs of numbers, rows differ in shape, values are not finite, labels are not 0, 1, ...,
                or the splits are larger than the data.
        """
        name, data = "arrays" if isinstance(self.data, tuple | list) else called(self.data), self.data
        if not _is_rows(data):
            data = data()  # pyright: ignore[reportCallIssue]
            if not _is_rows(data) or (fault := _fault(data)) is not None:
                why = fault if _is_rows(data) else "is neither a torch.utils.data.Dataset nor a pair (x, y) of arrays"
                raise DataError(f"{name} returned {called(data)}, which {why}")
        x, y = _items(data, name) if isinstance(data, TorchDataset) else _pair(data, name)
        x, y = _checked(x, y, name)
        drawn = self._drawn(len(y), name)

        def split(part: str) -> Rows:
            at = drawn[part]
            return Rows.of(x[at].flatten(1), y[at], at, dtype, device)

        classes = 0 if y.is_floating_point() else int(y.max()) + 1
        raw = {"x": x.numpy().tobytes(), "y": y.numpy().tobytes()}
        checksums = {part: hashlib.md5(data, usedforsecurity=False).hexdigest() for part, data in raw.items()}
        rows = split("train"), split("val"), split("test")
        return Splits(*rows, classes, tuple(x.shape[1:]), name, checksums, scaled_by())

    def _drawn(self, rows: int, name: str) -> dict[str, np.ndarray]:
        """Return the row numbers of each split."""
        fifth = max(rows // 5, 1)
        val = fifth if self.val is None else self.val
        train, test = self.train, self.test
        if train is None:
            test = fifth if test is None else test
            train = rows - val - test
            if train < 1:
                raise DataError(f"{name} has {rows} rows, of which val={val} and test={test} leave none to train on; give less")
        try:
            return draw_rows(_Sized(train, val, test, self.order, self.seed or 0, train_images=rows))
        except ValueError as error:
            raise DataError(f"{name} has {rows} rows: {str(error).partition(': ')[2]}") from error


@dataclass(frozen=True)
class _Sized(DrawnDataset):
    """Sizes of the splits of a given number of rows."""

    train_images: int = 0  # pyright: ignore[reportIncompatibleVariableOverride]


def as_dataset(given: Any) -> Dataset | None:
    """Return a dataset as it is, ordinary rows as an ``Own``, and None for anything else.

    Raises:
        TypeError: a ``torch.utils.data.Dataset`` has no length, or its items have no numbers.
    """
    if issubclass(type(given), Dataset):
        return given
    return Own(given) if _is_rows(given) else None


def _is_rows(data: Any) -> bool:
    """Whether ``data`` is an ordinary dataset or a pair of arrays, and not a function that returns one."""
    return isinstance(data, TorchDataset) or (isinstance(data, tuple | list) and len(data) == 2)


def _fault(data: Any) -> str | None:
    """Return what can be seen to be wrong with data, or with the function that makes it, or None."""
    if isinstance(data, type):
        return "is a class; give an object of it, or a function that returns one"
    made = getattr(data, "func", data)  # the function of a functools.partial
    kind = made if isinstance(made, type) else type(made)
    if issubclass(kind, TorchDataset):
        lacks = [name for name in ("__len__", "__getitem__") if getattr(kind, name, None) in (None, TorchDataset.__getitem__)]
        if lacks:
            return f"has no {' and no '.join(lacks)}: a dataset needs a length, and an item (x, y) for each number below it"
    elif isinstance(made, type):
        return "is not a torch.utils.data.Dataset, and has no method load(dtype, device) that returns hyperopt.data.splits.Splits"
    elif not callable(data):
        return None if _is_rows(data) else "is not a torch.utils.data.Dataset, a pair (x, y) of arrays or a function"
    if not _is_rows(data):
        try:
            inspect.signature(data).bind()
        except TypeError as error:
            return f"cannot be called: {error}"
    return None


def _items(data: TorchDataset[Any], name: str) -> tuple[Tensor, Tensor]:
    """Return the items of a dataset as two arrays."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    for number in range(len(data)):  # pyright: ignore[reportArgumentType]
        item = data[number]
        if not isinstance(item, tuple | list) or len(item) != 2:
            what = f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else f"{type(item).__name__}"
            raise DataError(f"{name}: item {number} is a {what}, not a pair (x, y); return x and y from __getitem__")
        for part, value, found in (("x", item[0], xs), ("y", item[1], ys)):
            found.append(_numbers(value, f"{name}: {part} of item {number}"))
            if found[-1].shape != found[0].shape:
                shapes = f"shape {tuple(found[-1].shape)}, but that of item 0 has {tuple(found[0].shape)}"
                raise DataError(f"{name}: {part} of item {number} has {shapes}; make them alike")
    if not xs:
        raise DataError(f"{name} has no items")
    return torch.stack(xs), torch.stack(ys)


def _pair(data: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return a pair of arrays as tensors."""
    x, y = (_numbers(value, f"{name}: {part}") for part, value in zip("xy", data, strict=True))
    return x, y


def _numbers(value: Any, where: str) -> Tensor:
    """Return numbers as a tensor on the CPU."""
    if not isinstance(value, NUMBERS):
        raise DataError(f"{where} is a {type(value).__name__}, not numbers; give a tensor or an array")
    try:
        found = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} is not an array of numbers: {one_line(error)}; give a tensor or an array") from error
    if found.is_complex() or found.layout != torch.strided:
        raise DataError(f"{where} is {found.dtype} and {found.layout}; give real numbers, dense")
    return found


def _checked(x: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return ``x`` with at least one dimension beside the rows, and ``y`` with the rows alone."""
    x, y = x[:, None] if x.dim() == 1 else x, y[:, 0] if y.dim() == 2 and y.shape[1] == 1 else y
    if x.dim() == 0 or y.dim() != 1 or len(x) != len(y) or not x.numel():
        raise DataError(
            f"{name}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}, but each row needs its values in x, and one label or "
            "one number in y"
        )
    for part, values in (("x", x), ("y", y)):
        bad = (~values.reshape(len(values), -1).isfinite().all(1)).nonzero()
        if len(bad):
            raise DataError(f"{name}: {part} of row {int(bad[0])} is not finite ({len(bad)} such rows); drop or mend them")
    if not y.is_floating_point():
        y, most = y.long(), max(len(y), MOST_CLASSES)
        if int(y.min()) < 0 or int(y.max()) >= most:
            raise DataError(
                f"{name}: labels go from {int(y.min())} to {int(y.max())}, but {len(y)} rows have labels 0, 1, ...; number the "
                "classes from 0, or give numbers to predict as floating ones"
            )
    return x, y
