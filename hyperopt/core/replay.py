"""``Replay``: an evaluation of a function that can be repeated with the random numbers and the state of the first time.

A solve calls its map many times, and finite differences, checkpoints and second derivatives evaluate a loss again. The
function may draw a dropout mask, take a batch from an iterator, or change state of its own: batch statistics, a moving
average, the vectors of a power iteration, a counter, a list. Every evaluation after the first is a replay: it sees the same
random numbers, batches and state, and its changes are undone.

    replay = Replay(Places.of(loss))
    first = replay(loss, w, lam)             notes what it drew and what it changed; the changes are put back
    again = replay(loss, moved, lam)         the same function at another point
    replay.commit()                          the state becomes what the first evaluation left

In the first evaluation a dispatch mode keeps the results of all operators that draw, and hands them back in replays. The
process-wide generator advances once; it is neither compared nor rewound, since other threads draw from it. The state is what
the function can be seen to use: modules, and what closures, objects and containers hold. Buffers are replaced by copies, so
that none is written to after a graph has saved it. For any other tensor that is changed in place, the value before is kept and
put back. So are the contents of containers, objects and arrays (``hyperopt.core.contents``) and the items of iterators
(``hyperopt.core.streams``).

No mode sees the draws of Python's and numpy's generators. They too advance once, and during a replay they have their state
from before the first evaluation. While other threads are alive, the two generators that all threads share are left alone,
unless the code can be seen to use them. What a function draws in threads that it starts itself is not seen.

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
        device_type: type of the device on which the function runs; its autocast state is kept.
        record: whether the evaluation will be repeated, so that the first call must leave no change until ``commit``. If
            false, the function changes its state itself, except the buffers, which a graph may have saved.

    Attributes:
        random: whether the function draws random numbers; None before the first call.
        wrote: whether the first call changed tensors in place, other than the buffers of modules in training mode.
    """

    def __init__(self, places: Places, device_type: str = "cpu", *, record: bool = True) -> None:
        self.record, self.wrote = record, False
        self.places = places
        self.slots: list[Slot] = []
        # The iterators; ``gave`` holds the stream that stands for each of them.
        self.streams: list[Slot] = []
        for place, key, value in places.slots() if record else ():
            (self.streams if streamed(value) else self.slots).append((place, key, value))
        self.gave: dict[int, Stream] = {}
        self.contents = Contents([*places.contents, *map(Generator, COMMON)] if record else [], draws=places.draws)
        # Buffers that a call may change; after the first call, those that it has changed.
        self.moving: list[Slot] = places.buffers()
        self.rebound: list[Slot] = []  # other places whose value a call has replaced
        self.norms = {id(m._buffers) for m in places.modules if isinstance(m, _NormBase)}  # their kernels bump no version
        self.compiled = any(m._compiled_call_impl is not None for m in places.modules)
        self.draws: Draws | None = None
        self.autocast = device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        self.left: list[Any] = []  # values of the moving buffers and of the rebound places after the latest call
        self.committed = False

    @property
    def random(self) -> bool | None:
        """Whether a call draws random numbers; None before the first call."""
        if self.draws is None:
            return None
        return self.draws.random or self.contents.random

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``, evaluated for the first time or replayed.

        Raises:
            ImpureMapError: the function changes an argument in place, or draws other numbers than the first time.
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
                end()  # restores the entries of containers, before values are put back into them
        if first:
            for place, key, source in self.streams:
                if _get(place, key) is source and self.gave[id(source)].items:
                    place[key] = Stream(source, self.gave[id(source)].items)  # the caller still gets the items that were taken
        if first and self.wrote and torch.is_grad_enabled():
            return self(function, *args)  # evaluate with copies: the first graph has saved tensors that were put back since
        return out

    def commit(self) -> None:
        """Give the state the values that the latest call has left; further calls are replays."""
        if self.committed:
            return
        self.committed, kept = True, []
        with torch.no_grad():
            for (place, key, buffer), new in zip(self.moving, self.left, strict=False):
                kept.append((place, key, buffer.clone()))  # replays start from this value
                if isinstance(new, Tensor) and new.shape == buffer.shape:
                    buffer.copy_(new)  # in place, since others may refer to the buffer
                else:
                    place[key] = new
        for (place, key, _), new in zip(self.rebound, self.left[len(kept) :], strict=True):
            place[key] = new
        for place, key, value in self.streams:
            if (stream := _get(place, key)) is not value and isinstance(stream, Stream):
                place[key] = value.rest() if isinstance(value, Stream) else value  # the iterator from which items were taken
        self.contents.commit()
        self.moving, self.left = kept, []
        if self.draws is not None:
            self.draws.commit()

    def _settle(self, copies: list[Slot], left: list[Any]) -> list[Any]:
        """Return what the first call left in the buffers that it changed; the other buffers are no longer copied."""
        moved = [
            # An inference tensor has no version counter.
            id(place) in self.norms or new is not copy or copy.is_inference() or copy._version > 0
            for (place, _, copy), new in zip(copies, left, strict=True)
        ]
        self.slots += [slot for slot, move in zip(self.moving, moved, strict=True) if not move]
        self.moving = [slot for slot, move in zip(self.moving, moved, strict=True) if move]
        return [new for new, move in zip(left, moved, strict=True) if move]

    def _placed(self) -> list[Any]:
        """Return what the first call left in known tensors that it changed in place; replays get copies of these too."""
        assert self.draws is not None
        left = []
        for place, key, value in self.slots:
            after = self.draws.release(value) if isinstance(value, Tensor) else None
            if after is not None:
                self.moving.append((place, key, value))
                left.append(after)
        return left

    def _streams(self) -> list[Slot]:
        """Return the places of the iterators, with streams that record what they give, or give the same again."""
        for *_, source in self.streams:
            known = self.gave.get(id(source))
            self.gave[id(source)] = Stream(source, [] if known is None else known.items, closed=known is not None)
        return [(place, key, self.gave[id(source)]) for place, key, source in self.streams]

    @contextlib.contextmanager
    def _in_place(self, slots: list[Slot]) -> Iterator[None]:
        """Put the values of ``slots`` in their places for a block, and restore what was there."""
        before = [_get(place, key) for place, key, _ in slots]
        for place, key, value in slots:
            place[key] = value
        try:
            yield
        finally:
            for (place, key, _), value in zip(slots, before, strict=True):
                place[key] = value

    def _modes(self) -> contextlib.ExitStack:
        """Enter and return the modes of PyTorch in which the function runs."""
        modes = contextlib.ExitStack()
        kind, enabled, dtype = self.autocast
        if torch.is_autocast_enabled(kind) != enabled:
            # This replay runs outside of the autocast block of the first call, or inside another.
            modes.enter_context(torch.autocast(kind, dtype, enabled=enabled))
        if self.compiled:
            if not functorch_level():
                # Compiled code cannot be traced under the mode of ``captured``, which finds parameters in the graph anyway.
                modes.enter_context(torch._C.DisableTorchFunction())  # pyright: ignore[reportArgumentType]
        elif torch.is_grad_enabled():
            modes.enter_context(TwiceDifferentiable())
        return modes


def _get(place: Any, key: Any) -> Any:
    """Return what is in a place, or None if it is empty."""
    try:
        return place.get(key) if isinstance(place, dict) else place[key]
    except (IndexError, KeyError, ValueError):
        return None


class FrozenMap:
    """``phi`` with the present state of the modules that it uses, so that it is a function in a solve and in every replay.

        frozen = FrozenMap(cell, [cell])
        solution = fixed_point(frozen, ...)      one mask, one set of buffers
        frozen.commit()                          as if the cell had been called once, at the solution

    Args:
        phi: the map, called ``phi(z, *terms)``.
        modules: the modules that it uses; their parameters, buffers and training flags are restored for every call.
        device: where the map runs; its autocast state is kept.
        watch: a function that is called with the state of every call until ``commit``.
    """

    def __init__(
        self,
        phi: Callable[..., Any],
        modules: Iterable[nn.Module],
        device: torch.device,
        watch: Callable[[Any], None] | None = None,
    ) -> None:
        self.phi, self.watch = phi, watch
        self.replay = Replay(Places.of_modules(modules), device.type)
        self.rows: torch.Size | None = None

    @property
    def random(self) -> bool | None:
        """Whether a call draws random numbers; None before the first call."""
        return self.replay.random

    @property
    def pullback(self) -> Any:
        """The ``pullback`` of ``phi``, if it has one."""
        return self.phi.pullback  # pyright: ignore[reportFunctionMemberAccess]

    def __call__(self, z: Any, *terms: Any) -> Any:
        """Return ``phi(z, *terms)``, in the dtypes of ``z``."""
        self._check_rows(z)
        if self.watch is not None:
            with handled():
                self.watch(z)
        out = self.replay(self.phi, z, *terms)
        return _in_dtypes_of(z, out) if self.replay.autocast[1] else out

    def commit(self) -> None:
        """Leave the modules as one call, the latest, would have left them; further calls are replays."""
        self.replay.commit()
        self.watch = None

    def _check_rows(self, z: Any) -> None:
        """Refuse another number of rows than before, for which the same random numbers would be other masks."""
        rows = optree.tree_leaves(z)[0].shape[:1] if self.random is not False else None
        if self.random and rows != self.rows:
            raise ValueError(
                f"a map that draws random numbers was first called with {tuple(self.rows or ())} rows and now with "
                f"{tuple(rows or ())}, for which its masks would be others; set drop_rows=False"
            )
        self.rows = rows


def _in_dtypes_of(z: Any, out: Any) -> Any:
    """Return ``out`` with the dtypes of ``z``. Another structure is returned as it is; the solve refuses it."""
    like, (leaves, spec) = optree.tree_leaves(z), optree.tree_flatten(out)
    if len(like) != len(leaves):
        return out
    return optree.tree_unflatten(spec, [x.to(y.dtype) if isinstance(x, Tensor) else x for x, y in zip(leaves, like, strict=True)])
