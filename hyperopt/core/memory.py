"""The memory that tensors take, on the CPU as on a GPU: at its peak in a block, and in a graph."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hyperopt.core.captured import nodes


class Peak(TorchDispatchMode):
    """Counts the bytes of storages that are created while the mode is active, until they are freed.

    Attributes:
        peak: largest number of bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count the new storages among its results."""
        out = func(*args, **(kwargs or {}))
        # An in-place or view operation returns a storage that exists already.
        known = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(out):
            if storage._cdata not in known:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.alive -= size
        self.seen.discard(key)


def storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages behind the tensors of a tree; a compressed sparse tensor has three."""
    for leaf in optree.tree_leaves(tree):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.layout == torch.sparse_csr:
            yield from (part.untyped_storage() for part in (leaf.crow_indices(), leaf.col_indices(), leaf.values()))
        else:
            yield leaf.untyped_storage()


def saved_bytes(outputs: Iterable[Tensor | None], leaves: Sequence[Tensor]) -> list[int]:
    """Return the bytes of each storage that the graph of ``outputs`` has saved for derivatives in ``leaves``.

    The storages of the leaves themselves are not counted.

    Args:
        outputs: tensors with a graph.
        leaves: leaves of the graph.
    """
    children: dict[Any, list[Any]] = {}
    for node in nodes(outputs):
        for parent, _ in node.next_functions:
            children.setdefault(parent, []).append(node)
    wanted = set(map(id, leaves))
    stack = [node for node in children if id(getattr(node, "variable", None)) in wanted]
    leading = set(stack)  # the nodes from which a leaf is reached
    while stack:
        for node in children.get(stack.pop(), ()):
            if node not in leading:
                leading.add(node)
                stack.append(node)
    own = {storage._cdata for storage in storages(list(leaves))}
    sizes = {storage._cdata: storage.nbytes() for node in leading for storage in storages(_saved(node))}
    return [size for key, size in sizes.items() if key not in own]


def _saved(node: Any) -> list[Any]:
    """What a node of a graph has saved: tensors, or what a hook of ``saved_tensors_hooks`` has made of them."""
    found = []
    for name in _saved_names(type(node)):
        raw = getattr(node, name)
        found += [part.data for part in (raw if isinstance(raw, tuple) else (raw,)) if part is not None]
    return found


@functools.cache
def _saved_names(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


@contextlib.contextmanager
def peak_memory(device: torch.device | str) -> Iterator[Any]:
    """Measure a block's peak of tensor memory beyond what was alive before; read ``.peak`` (bytes) after the block.

    On the CPU every operation is watched, which slows the block down; on a GPU the allocator is asked.
    """
    device = torch.device(device)
    if device.type != "cuda":
        with Peak() as found:
            yield found
        return
    found = Peak()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    torch.cuda.synchronize(device)
    found.peak = torch.cuda.max_memory_allocated(device) - before
