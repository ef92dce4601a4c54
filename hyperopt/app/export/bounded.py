"""A limit of the memory that building a model may take, so that a few bytes of settings cannot ask for all there is."""

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
"""Functions that make a tensor as large as a setting says."""


class Bounded(TorchFunctionMode):
    """Within it, no tensors can be made that need far more memory than those that are to be loaded into them.

    How large a new tensor would be is found by the same call on the device ``meta``, before any memory is taken.

    Args:
        tensors: to be loaded.
        numbers: that may be made whatever is to be loaded.
        calls: of functions that make tensors, likewise.
    """

    def __init__(self, tensors: Iterable[Tensor], numbers: int = 1_000_000, calls: int = 1000) -> None:
        """Nothing is made yet."""
        super().__init__()
        sizes = [tensor.numel() for tensor in tensors]
        self.held, self.numbers, self.calls = sum(sizes), numbers + 20 * sum(sizes), calls + 50 * len(sizes)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do one call, unless what it makes is too much."""
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
