"""A limit of the memory for building a model, so that a few bytes of settings cannot ask for all of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hyperopt.app.export.file import ExportError

NEW = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm, torch.eye),
    *(torch.arange, torch.linspace, torch.empty_strided),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
}
"""Functions that make a tensor of a given size."""


class Bounded(TorchFunctionMode):
    """Limits the memory of new tensors within a block, relative to the tensors that will be loaded into them.

    The size of a new tensor is found by the same call on the device ``meta``, before any memory is taken.

    Args:
        tensors: the tensors to be loaded.
        numbers: how many entries may be created whatever the tensors are.
        calls: how many tensors may be created whatever the tensors are.
    """

    def __init__(self, tensors: Iterable[Tensor], numbers: int = 1_000_000, calls: int = 1000) -> None:
        """Start with nothing created."""
        super().__init__()
        sizes = [tensor.numel() for tensor in tensors]
        self.held, self.numbers, self.calls = sum(sizes), numbers + 20 * sum(sizes), calls + 50 * len(sizes)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make one call, unless its result is too large."""
        given = dict(kwargs or {})
        if func in NEW:
            sketch = {name: value for name, value in given.items() if name not in ("generator", "out", "pin_memory")}
            self.numbers -= func(*args, **{**sketch, "device": "meta"}).numel()
            self.calls -= 1
            if self.numbers < 0 or self.calls < 0:
                raise ExportError(
                    f"its settings ask for far more numbers than its tensors have ({self.held}), and nothing was built"
                )
        return func(*args, **given)
