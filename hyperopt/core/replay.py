"""A module's map as a function: random numbers, running statistics and modes stand still for a solve and all its replays.

A solve calls its map many times, and a backward may call it again; each call of a module may draw a dropout mask and move batch
statistics or the vectors of a power iteration. Here every call starts from one state of the module and of the generators, that
of the moment at which the map was frozen, and leaves no trace:

    frozen = FrozenMap(cell, [cell])
    solution = fixed_point(frozen, ...)      one mask, one set of buffers, in forward and in every replay
    frozen.commit()                          as if the cell had been called once, at the solution

The buffers that a call changes are copies, so that none that a graph has saved is written to.

Reference for one mask for a whole solve: Gal & Ghahramani, NeurIPS 2016, arXiv 1512.05287 (variational dropout).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hyperopt.core.captured import functorch_level
from hyperopt.core.purity import random_states

Slot = tuple[dict[str, Any], str, Any]


class FrozenMap:
    """``phi`` with the modules that it uses as they are now.

    Args:
        phi: the map, called ``phi(z, *terms)``.
        modules: what it uses; their parameters, buffers and training flags are put back for every call.
        device: where the map runs: its generator and its autocast state are kept.
        watch: told the state of every call until ``commit``.

    Attributes:
        random: whether a call draws random numbers; None before the first.
    """

    def __init__(
        self,
        phi: Callable[..., Any],
        modules: Iterable[nn.Module],
        device: torch.device,
        watch: Callable[[Any], None] | None = None,
    ) -> None:
        """Take note of everything."""
        self.phi, self.device, self.watch = phi, device, watch
        inner = list(dict.fromkeys(module for root in modules for module in root.modules()))
        self.slots: list[Slot] = [(vars(m), "training", m.training) for m in inner]
        self.slots += [(m._parameters, name, p) for m in inner for name, p in m._parameters.items() if p is not None]
        self.slots += [(m._buffers, name, b) for m in inner if not m.training for name, b in m._buffers.items()]
        # Buffers that a call may change; after the first call, those that it did.
        self.moving: list[Slot] = [
            (m._buffers, name, b) for m in inner if m.training for name, b in m._buffers.items() if b is not None
        ]
        self.norms = {id(m._buffers) for m in inner if isinstance(m, _NormBase)}  # their kernels count no version
        self.compiled = any(m._compiled_call_impl is not None for m in inner)
        self.random: bool | None = None
        self.generators: list[Tensor] = []  # as the first call finds them
        self.rows: torch.Size | None = None
        self.autocast = torch.is_autocast_enabled(device.type)
        self.autocast_dtype = torch.get_autocast_dtype(device.type)
        self.after: tuple[list[Tensor], list[Tensor]] | None = ([], [])  # buffers and generators after the latest call

    @property
    def pullback(self) -> Any:
        """That of ``phi``, if it has one."""
        return self.phi.pullback  # pyright: ignore[reportFunctionMemberAccess]

    def __call__(self, z: Any, *terms: Any) -> Any:
        """``phi(z, *terms)``, in the dtypes of ``z``."""
        self._check_rows(z)
        if self.watch is not None:
            self.watch(z)
        copies: list[Slot] = [(place, name, buffer.clone()) for place, name, buffer in self.moving]
        with self._generators(), self._in_place([*self.slots, *copies]), self._modes():
            out = self.phi(z, *terms)
            changed = [place[name] for place, name, _ in copies]
        if self.after is not None:
            self.after = self._moved(copies, changed), self.after[1]
        return _in_dtypes_of(z, out) if self.autocast else out

    def commit(self) -> None:
        """Let the modules and the generators be as the latest call would have left them; further calls are replays."""
        if self.after is None:
            return
        (buffers, generators), self.after, self.watch = self.after, None, None
        with torch.no_grad():
            for (_, _, original), new in zip(self.moving if buffers else (), buffers, strict=True):
                original.copy_(new)
        if self.random and generators:
            _set_generators(generators, self.device)

    def _moved(self, copies: list[Slot], changed: list[Tensor]) -> list[Tensor]:
        """The buffers that this call has changed; from now on the others are not copied any more."""
        moved = [
            # Inference tensors count no version.
            id(place) in self.norms or new is not copy or copy.is_inference() or copy._version > 0
            for (place, _, copy), new in zip(copies, changed, strict=True)
        ]
        if not all(moved):
            self.slots += [slot for slot, move in zip(self.moving, moved, strict=True) if not move]
            self.moving = [slot for slot, move in zip(self.moving, moved, strict=True) if move]
        return [new for new, move in zip(changed, moved, strict=True) if move]

    @contextlib.contextmanager
    def _in_place(self, slots: list[Slot]) -> Iterator[None]:
        """Put the values of ``slots`` in their places, and back what was there."""
        before = [place.get(name) for place, name, _ in slots]
        for place, name, value in slots:
            place[name] = value
        try:
            yield
        finally:
            for (place, name, _), value in zip(slots, before, strict=True):
                place[name] = value

    def _modes(self) -> contextlib.ExitStack:
        """The modes of PyTorch in which the map runs."""
        modes = contextlib.ExitStack()
        if torch.is_autocast_enabled(self.device.type) != self.autocast:
            # A replay outside of the block in which the map was frozen, or inside another.
            modes.enter_context(torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast))
        if self.compiled and not functorch_level():
            # Compiled code cannot be traced through the watching of ``captured``, which finds parameters in the graph too.
            modes.enter_context(torch._C.DisableTorchFunction())  # pyright: ignore[reportArgumentType]
        return modes

    @contextlib.contextmanager
    def _generators(self) -> Iterator[None]:
        """Draw the numbers of the first call, and leave the generators as they were found."""
        if self.random is False:
            yield
            return
        found = random_states(self.device)
        if self.random is None:
            self.generators = found
        else:
            _set_generators(self.generators, self.device)
        try:
            yield
        finally:
            end = random_states(self.device)
            if self.random is None:
                self.random = not all(torch.equal(a, b) for a, b in zip(found, end, strict=True))
            if self.random:
                _set_generators(found, self.device)
                if self.after is not None:
                    self.after = self.after[0], end

    def _check_rows(self, z: Any) -> None:
        """Refuse fewer rows than before: the same numbers would be other masks."""
        rows = optree.tree_leaves(z)[0].shape[:1] if self.random is not False else None
        if self.random and rows != self.rows:
            raise ValueError(
                f"a map that draws random numbers was first called with {tuple(self.rows or ())} rows and now with "
                f"{tuple(rows or ())}, for which its masks would be others; set drop_rows=False"
            )
        self.rows = rows


def _in_dtypes_of(z: Any, out: Any) -> Any:
    """``out`` with each leaf in the dtype of that of ``z``; another structure is left for the solve to refuse."""
    like, (leaves, spec) = optree.tree_leaves(z), optree.tree_flatten(out)
    if len(like) != len(leaves):
        return out
    return optree.tree_unflatten(spec, [x.to(y.dtype) if isinstance(x, Tensor) else x for x, y in zip(leaves, like, strict=True)])


def _set_generators(states: list[Tensor], device: torch.device) -> None:
    """Put the generators into these states, as ``random_states`` returns them."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
