"""Counts what a GPU and small problems pay for: kernels and host reads, the same on every machine.

A kernel is an operation that the dispatcher runs and that computes something: views and metadata are none. A host read is an
operation that has to wait for the device: a number taken out of a tensor, or a shape that depends on values.
"""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu")
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2")
FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh", "resize_")


class _Reads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


class Counter(TorchDispatchMode):
    """``with Counter() as count: ...``; then ``count.kernels``, ``count.reads`` and ``count.names``."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        super().__init__()
        self.kernels, self.waits, self.names = 0, 0, {}
        self._reads = _Reads()

    @property
    def reads(self) -> int:
        """Host reads."""
        return self._reads.reads + self.waits

    def __enter__(self) -> Counter:
        """Begin to count."""
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Count no more."""
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operation and run it."""
        name = func._schema.name.split("::")[1]
        if name in WAITS and name != "_local_scalar_dense":  # those of item are counted where it is called
            self.waits += 1
        if name not in FREE and name != "_local_scalar_dense" and not func.is_view:
            self.kernels += 1
            self.names[name] = self.names.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def per_iteration(solve: Any) -> tuple[float, float, dict[str, float]]:
    """Kernels and host reads an iteration of ``solve() -> stats``, the rest of the solve included, and which kernels."""
    solve()
    with Counter() as count:
        stats = solve()
    steps = int(stats.iterations.max())
    return count.kernels / steps, count.reads / steps, {name: n / steps for name, n in count.names.items()}
