"""``Replay``: an evaluation of a function that can be made again, with the random numbers and the state of its first time.

A solve calls its map many times, and finite differences, checkpoints and second derivatives evaluate a loss again. The function
may draw a dropout mask, may take a batch from an iterator, and may change a state of its own: batch statistics, a moving
average, the vectors of a power iteration, a counter, a list. Every evaluation after the first is a replay: it sees the same
random numbers, batches and state, and leaves no trace.

    replay = Replay(Places.of(loss))
    first = replay(loss, w, lam)             draws, and notes what it drew and what it changed, which is put back
    again = replay(loss, moved, lam)         the same function at another point
    replay.commit()                          the state becomes what the first evaluation left

How: in the first evaluation a dispatch mode keeps the results of all operators that draw, and hands them back in replays. The
process-wide generator moves on once and is neither compared nor rewound, since other threads draw from it. The state is what the
function can be seen to use: modules, and what closures, objects and containers hold. Buffers are replaced by copies, so that none
that a graph has saved is written to. Of any other tensor that is changed in place the value before is kept and put back, and so
is what containers, objects and arrays hold (``hyperopt.core.contents``), and what iterators gave (``hyperopt.core.streams``).

No mode sees what the generators of Python and of numpy give. They too move on once; for as long as a replay takes, they get the
state from before the first evaluation. Where other threads are alive, the two that all threads share are left alone, unless the
code can be seen to use them. What a function draws in threads that it starts itself is not seen.

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
from hyperopt.core.contents import COMMON, Contents, Generator
from hyperopt.core.draws import Draws, handled
from hyperopt.core.graph_modes import TwiceDifferentiable
from hyperopt.core.places import Places
from hyperopt.core.streams import Stream, streamed

Slot = tuple[Any, Any, Any]  # a container, a key, and the value that belongs there


class Replay:
    """One evaluation of a function, and its replays.

    Args:
        places: the state that the function uses.
        device_type: where it runs: its autocast state is kept.
        record: whether it will be made again, and the first call is to leave no trace until ``commit``. If not, the state is left
            to the function, but for the buffers, which a graph may have saved.

    Attributes:
        random: whether it draws random numbers; None before the first call.
        wrote: whether the first call changed tensors in place, other than the buffers of modules in training mode.
    """

    def __init__(self, places: Places, device_type: str = "cpu", *, record: bool = True) -> None:
        """Take note of the state."""
        self.record, self.wrote = record, False
        self.places = places
        self.slots: list[Slot] = []
        # Iterators, what each gave the first time, and, in ``gave``, the same for its places.
        self.streams: list[Slot] = []
        for place, key, value in places.slots() if record else ():
            (self.streams if streamed(value) else self.slots).append((place, key, value))
        self.gave: dict[int, Stream] = {}
        self.contents = Contents([*places.contents, *map(Generator, COMMON)] if record else [], draws=places.draws)
        # Buffers that a call may change; after the first call, those that it did.
        self.moving: list[Slot] = places.buffers()
        self.rebound: list[Slot] = []  # other places in which a call has put something else
        self.norms = {id(m._buffers) for m in places.modules if isinstance(m, _NormBase)}  # their kernels count no version
        self.compiled = any(m._compiled_call_impl is not None for m in places.modules)
        self.draws: Draws | None = None
        self.autocast = device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        self.left: list[Any] = []  # of the moving buffers and of the rebound places, after the latest call
        self.committed = False

    @property
    def random(self) -> bool | None:
        """Whether a call draws random numbers; None before the first."""
        if self.draws is None:
            return None
        return self.draws.random or self.contents.random

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``, the first time or again.

        Raises:
            ImpureMapError: it changes an argument in place, or draws other numbers than the first time.
        """
        copies: list[Slot] = [(place, key, buffer.clone()) for place, key, buffer in self.moving]
        first, draws = self.draws is None, self.draws or Draws()
        originals = {id(copy): buffer for (*_, copy), (*_, buffer) in zip(copies, self.moving, strict=True)}
        with (
            self.contents.evaluation(first, originals) as end,
            self._in_place([*self.slots, *self._streams(), *copies]),
            self._modes(),
        ):
            try:
                with draws.recorded(first, [copy for *_, copy in copies], args) if self.record else contextlib.nullcontext():
                    out = function(*args)
                left = [_get(place, key) for place, key, _ in copies]
                if first:
                    self.draws, self.wrote = draws, draws.wrote
                    self.rebound = [slot for slot in self.slots if _get(*slot[:2]) is not slot[2]]
                    self.rebound += [slot for slot in self.streams if _get(*slot[:2]) is not self.gave.get(id(slot[2]))]
                    left = self._settle(copies, left) + self._placed()
                if not self.committed:
                    self.left = [*left, *(_get(*slot[:2]) for slot in self.rebound)]
            finally:
                end()  # a container must have its entries before a value can be put back there
        if first:
            for place, key, source in self.streams:
                if _get(place, key) is source and self.gave[id(source)].items:
                    place[key] = Stream(source, self.gave[id(source)].items)  # as if nothing had been taken
        if first and self.wrote and torch.is_grad_enabled():
            return self(function, *args)  # with copies: what this graph has saved was put back since
        return out

    def commit(self) -> None:
        """Let the state be as the latest call has left it; further calls are replays."""
        if self.committed:
            return
        self.committed, kept = True, []
        with torch.no_grad():
            for (place, key, buffer), new in zip(self.moving, self.left, strict=False):
                kept.append((place, key, buffer.clone()))  # for the replays
                if isinstance(new, Tensor) and new.shape == buffer.shape:
                    buffer.copy_(new)  # others may hold it
                else:
                    place[key] = new
        for (place, key, _), new in zip(self.rebound, self.left[len(kept) :], strict=True):
            place[key] = new
        for place, key, value in self.streams:
            if (stream := _get(place, key)) is not value and isinstance(stream, Stream):
                place[key] = value.rest() if isinstance(value, Stream) else value  # from which it was taken
        self.contents.commit()
        self.moving, self.left = kept, []
        if self.draws is not None:
            self.draws.commit()

    def _settle(self, copies: list[Slot], left: list[Any]) -> list[Any]:
        """What the first call left of the buffers that it changed; the others are not copied any more."""
        moved = [
            # Inference tensors count no version.
            id(place) in self.norms or new is not copy or copy.is_inference() or copy._version > 0
            for (place, _, copy), new in zip(copies, left, strict=True)
        ]
        self.slots += [slot for slot, move in zip(self.moving, moved, strict=True) if not move]
        self.moving = [slot for slot, move in zip(self.moving, moved, strict=True) if move]
        return [new for new, move in zip(left, moved, strict=True) if move]

    def _placed(self) -> list[Any]:
        """What is left of tensors that the first call changed in place in a known place; they become copies too."""
        assert self.draws is not None
        left = []
        for place, key, value in self.slots:
            after = self.draws.release(value) if isinstance(value, Tensor) else None
            if after is not None:
                self.moving.append((place, key, value))
                left.append(after)
        return left

    def _streams(self) -> list[Slot]:
        """The places of the iterators, with what remembers them, or gives the same again."""
        for *_, source in self.streams:
            known = self.gave.get(id(source))
            self.gave[id(source)] = Stream(source, [] if known is None else known.items, closed=known is not None)
        return [(place, key, self.gave[id(source)]) for place, key, source in self.streams]

    @contextlib.contextmanager
    def _in_place(self, slots: list[Slot]) -> Iterator[None]:
        """Put the values of ``slots`` in their places, and back what was there."""
        before = [_get(place, key) for place, key, _ in slots]
        for place, key, value in slots:
            place[key] = value
        try:
            yield
        finally:
            for (place, key, _), value in zip(slots, before, strict=True):
                place[key] = value

    def _modes(self) -> contextlib.ExitStack:
        """The modes of PyTorch in which the function runs."""
        modes = contextlib.ExitStack()
        kind, enabled, dtype = self.autocast
        if torch.is_autocast_enabled(kind) != enabled:
            # A replay outside of the block of the first call, or inside another.
            modes.enter_context(torch.autocast(kind, dtype, enabled=enabled))
        if self.compiled:
            if not functorch_level():
                # Compiled code cannot be traced through the watching of ``captured``, which finds parameters in the graph too.
                modes.enter_context(torch._C.DisableTorchFunction())  # pyright: ignore[reportArgumentType]
        elif torch.is_grad_enabled():
            modes.enter_context(TwiceDifferentiable())
        return modes


def _get(place: Any, key: Any) -> Any:
    """What is in a place; None where there is nothing."""
    try:
        return place.get(key) if isinstance(place, dict) else place[key]
    except (IndexError, KeyError, ValueError):
        return None


class FrozenMap:
    """``phi`` with the modules that it uses as they are now: a function, in a solve and in every replay of it.

        frozen = FrozenMap(cell, [cell])
        solution = fixed_point(frozen, ...)      one mask, one set of buffers
        frozen.commit()                          as if the cell had been called once, at the solution

    Args:
        phi: the map, called ``phi(z, *terms)``.
        modules: what it uses; their parameters, buffers and training flags are put back for every call.
        device: where the map runs: its autocast state is kept.
        watch: told the state of every call until ``commit``.
    """

    def __init__(
        self,
        phi: Callable[..., Any],
        modules: Iterable[nn.Module],
        device: torch.device,
        watch: Callable[[Any], None] | None = None,
    ) -> None:
        """Take note of everything."""
        self.phi, self.watch = phi, watch
        self.replay = Replay(Places.of_modules(modules), device.type)
        self.rows: torch.Size | None = None

    @property
    def random(self) -> bool | None:
        """Whether a call draws random numbers; None before the first."""
        return self.replay.random

    @property
    def pullback(self) -> Any:
        """That of ``phi``, if it has one."""
        return self.phi.pullback  # pyright: ignore[reportFunctionMemberAccess]

    def __call__(self, z: Any, *terms: Any) -> Any:
        """``phi(z, *terms)``, in the dtypes of ``z``."""
        self._check_rows(z)
        if self.watch is not None:
            with handled():
                self.watch(z)
        out = self.replay(self.phi, z, *terms)
        return _in_dtypes_of(z, out) if self.replay.autocast[1] else out

    def commit(self) -> None:
        """Let the modules be as the latest call would have left them; further calls are replays."""
        self.replay.commit()
        self.watch = None

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
