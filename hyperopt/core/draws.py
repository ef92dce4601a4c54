"""``Draws``: the random numbers of one evaluation, kept for its replays, and the tensors that it changed in place.

A dispatch mode sees every operator of PyTorch, below autograd. Those that draw carry ``torch.Tag.nondeterministic_seeded``.
The result of an operator that only draws is handed back as it is. Of an operator that also computes with its input, the mask
or noise is kept and handed back.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import optree
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hyperopt.core.captured import unwrapped
from hyperopt.core.policy import ImpureMapError
from hyperopt.core.precision import half_eps

# Operators whose result is a sample and nothing else, by the names of their packets without a trailing underscore.
SAMPLES = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like normal normal_functional uniform bernoulli multinomial "
    "poisson binomial exponential geometric cauchy log_normal random _standard_gamma _sample_dirichlet".split()
)
# Samples that are differentiable in their parameters. With other parameters, a replay would need another sample.
REPARAMETRISED = frozenset(("_standard_gamma", "_sample_dirichlet"))
# Operators that draw only if this argument is above 0: its position and its name.
RATES = {
    "_scaled_dot_product_flash_attention_for_cpu": (3, "dropout_p"),
    "_scaled_dot_product_flash_attention": (3, "dropout_p"),
    "_scaled_dot_product_efficient_attention": (5, "dropout_p"),
    "_scaled_dot_product_cudnn_attention": (5, "dropout_p"),
    "_fused_sdp_choice": (4, "dropout_p"),
    "_cudnn_rnn": (11, "dropout"),
    "miopen_rnn": (11, "dropout"),
    "native_dropout": (1, "p"),
}
# Operators that draw only if this flag is set.
TRAINING = {"native_dropout": (2, "train"), "rrelu_with_noise": (4, "training")}
# Operators that change the running statistics, but only if ``training`` is set; most of their schemas do not say so.
STATISTICS = frozenset(("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"))

_local = threading.local()


@dataclass(frozen=True)
class _Kind:
    """What an operator does.

    Attributes:
        name: name of its packet.
        draws: whether it draws random numbers.
        writes: positions and names of the arguments that it changes.
        fresh: whether it returns new tensors.
        composite: whether it draws by calling other operators.
    """

    name: str
    draws: bool
    writes: tuple[tuple[int, str], ...]
    fresh: bool
    composite: bool


@functools.cache
def _kind(func: Any) -> _Kind:
    schema = func._schema
    name = schema.name.split("::")[-1].rstrip("_")
    writes = [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if name in STATISTICS:
        writes = [(3, "running_mean"), (4, "running_var")]
    fresh = all(r.alias_info is None for r in schema.returns)
    draws = torch.Tag.nondeterministic_seeded in func.tags
    composite = draws and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return _Kind(name, draws, tuple(writes), fresh, composite)


def _argument(args: Sequence[Any], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)


def _draws(kind: _Kind, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the call draws: a fused operator does not if its rate is 0 or it is not training."""
    if not kind.draws:
        return False
    if kind.name in TRAINING and not _argument(args, kwargs, *TRAINING[kind.name]):
        return False
    return kind.name not in RATES or float(_argument(args, kwargs, *RATES[kind.name]) or 0.0) > 0


def _writes(kind: _Kind, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that the call changes: a normalisation in evaluation mode only reads its statistics."""
    if kind.name in STATISTICS and not _argument(args, kwargs, 5, "training"):
        return
    for place, name in kind.writes:
        yield from _tensors(_argument(args, kwargs, place, name))


def _storage(tensor: Tensor) -> int | None:
    """Return a key of the memory of a tensor; None for a tensor without such a memory."""
    tensor = unwrapped(tensor)
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for entry in value for t in _tensors(entry)] if isinstance(value, list | tuple) else []


class Watching(TorchDispatchMode):
    """Watches what a function draws and changes, and notes which tensors it makes and their precision.

    Args:
        own: tensors that the function may change without a note.
        constants: tensors that it must not change.

    Attributes:
        eps: the largest ``half_eps`` of the tensors that the function has made, 0 if none is in half precision.
    """

    def __init__(self, own: Iterable[Tensor] = (), constants: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.generators: list[torch.Generator] = []  # those in a freshly seeded state when the function first drew from them
        self.made: set[int | None] = {None, *(_storage(t) for t in own)}
        self.constants = {_storage(t) for t in constants}
        self.eps = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what an operator does and call it, or hand back what it gave the first time."""
        kind, kwargs = _kind(func), kwargs or {}
        if kind.composite:  # inference mode does not decompose it by itself
            with self:
                return func.decompose(*args, **kwargs)
        for tensor in _writes(kind, args, kwargs):
            key = _storage(tensor)
            if key in self.made:
                continue
            if key in self.constants:
                self.refuse(tensor, func)
            self.write(tensor)
        out = self.draw(func, kind, args, kwargs) if _draws(kind, args, kwargs) else func(*args, **kwargs)
        if kind.fresh:
            for tensor in _tensors(out):
                self.made.add(_storage(tensor))
                self.eps = max(self.eps, half_eps(tensor.dtype))
        return out

    def seeded(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether a call draws from a generator of its own that was freshly seeded; to be asked before the call."""
        own = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)), None)
        if own is None:
            return False
        if not any(own is known for known in self.generators):
            new = torch.Generator(own.device).manual_seed(own.initial_seed())
            if not torch.equal(own.get_state(), new.get_state()):
                return False
            self.generators.append(own)
        return True

    def refuse(self, tensor: Tensor, func: Any) -> NoReturn:
        """Refuse to change a tensor that must not change."""
        raise ImpureMapError(
            f"the function changes one of its arguments, of shape {tuple(tensor.shape)}, in place ({func}): return new tensors "
            "instead (a module with inplace=True does this too)"
        )

    def write(self, tensor: Tensor) -> None:
        """Note that a tensor from outside is about to be changed."""

    def draw(self, func: Any, kind: _Kind, args: Any, kwargs: Any) -> Any:
        """Call an operator that draws."""
        return func(*args, **kwargs)


class Draws:
    """What one evaluation has drawn, and what it changed in place."""

    def __init__(self) -> None:
        self.results: list[_Drawn] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # tensors from outside, in the order in which they were changed
        self.after: list[tuple[Tensor, Tensor]] | None = []  # None after ``commit``

    @property
    def random(self) -> bool:
        """Whether anything was drawn that another evaluation would draw differently."""
        return not all(drawn.seeded for drawn in self.results)

    @property
    def wrote(self) -> bool:
        """Whether tensors from outside were changed in place."""
        return bool(self.before)

    @contextlib.contextmanager
    def recorded(self, first: bool, own: Iterable[Tensor], args: Any) -> Iterator[None]:
        """Run an evaluation in this block.

        Args:
            first: whether it is the first.
            own: tensors that it may change.
            args: its arguments, a tree whose tensors it must not change.
        """
        if not first and not self.results and not self.before:
            yield
            return
        constants = [leaf for leaf in optree.tree_leaves(args) if isinstance(leaf, Tensor)]
        now = _copies(self.before)
        _put(self.before)
        mode = _Record(self, own, constants) if first else _Repeat(self, own, constants)
        try:
            with mode, handled():
                yield
            mode.finish()
        finally:
            if self.after is not None:
                self.after = _copies(self.before)
            _put(self.before if first else now)

    def release(self, tensor: Tensor) -> Tensor | None:
        """Stop tracking a tensor; return the value that the evaluation left in it, or None if it was not changed."""
        for i, (changed, _) in enumerate(self.before):
            if changed.shape == tensor.shape and changed.data_ptr() == tensor.data_ptr() and tensor.numel():
                del self.before[i]
                return self.after.pop(i)[1] if self.after is not None else None
        return None

    def commit(self) -> None:
        """Give the tensors that were changed the values that the evaluation left in them."""
        after, self.after = self.after, None
        _put(after or [])


def _copies(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(tensor, tensor.clone()) for tensor, _ in pairs]


def _put(values: list[tuple[Tensor, Tensor]]) -> None:
    if not values:
        return
    with torch.no_grad():
        for tensor, value in reversed(values):
            tensor.copy_(value)


@dataclass(frozen=True)
class _Drawn:
    """What one operator has drawn.

    Attributes:
        kind: the operator's kind.
        given: its arguments without generators, with shapes and dtypes instead of tensors.
        result: the sample.
        parameters: tensors in which the sample is differentiable.
        seeded: whether the function seeds the generator itself, so that it draws the same whenever it is called.
    """

    kind: _Kind
    given: tuple[Any, ...]
    result: Tensor
    parameters: tuple[Tensor, ...]
    seeded: bool = False

    def repeated(self, kind: _Kind, args: Sequence[Any]) -> bool:
        """Whether this is the same call; ``vmap`` turns ``x.bernoulli_(p)`` into ``bernoulli(x, p)`` and the reverse."""
        if kind == self.kind:
            return self.given == _given(args)
        like = args[0] if args else None
        return kind.name == self.kind.name and isinstance(like, Tensor) and like.shape == self.result.shape


def _given(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(
        (a.shape, a.dtype) if isinstance(a, Tensor) else tuple(a) if isinstance(a, list) else a
        for a in args
        if not isinstance(a, torch.Generator)
    )


class _Record(Watching):
    """The first evaluation."""

    def __init__(self, draws: Draws, own: Iterable[Tensor], constants: Iterable[Tensor]) -> None:
        super().__init__(own, constants)
        self.draws = draws
        self.written: set[Any] = set()

    def write(self, tensor: Tensor) -> None:
        key = _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
        if key not in self.written:
            self.written.add(key)
            self.draws.before.append((tensor, tensor.clone()))

    def draw(self, func: Any, kind: _Kind, args: Any, kwargs: Any) -> Any:
        if kind.name not in SAMPLES and kind.name not in TRAINING:
            raise ImpureMapError(
                f"{func} draws random numbers that cannot be handed back when the function is evaluated again; build it from "
                "simpler layers (for an LSTM with dropout, one layer after the other), or set its dropout to 0"
            )
        seeded = self.seeded(args, kwargs)
        out = func(*args, **kwargs)
        kept = out[1] if kind.name == "native_dropout" else args[1] if kind.name == "rrelu_with_noise" else out
        parameters = tuple(t.clone() for t in _tensors(args)) if kind.name in REPARAMETRISED else ()
        self.draws.results.append(_Drawn(kind, _given(args), kept.clone(), parameters, seeded))
        return out

    def finish(self) -> None:
        """Do nothing: a first evaluation needs no check at its end."""


class _Repeat(Watching):
    """A replay."""

    def __init__(self, draws: Draws, own: Iterable[Tensor], constants: Iterable[Tensor]) -> None:
        super().__init__([*own, *(t for t, _ in draws.before)], constants)
        self.left = iter(draws.results)

    def draw(self, func: Any, kind: _Kind, args: Any, kwargs: Any) -> Any:
        drawn = next(self.left, None)
        if drawn is None or not drawn.repeated(kind, args):
            then = "nothing more" if drawn is None else f"{drawn.kind.name}{drawn.given}"
            self.differs(f"{kind.name}{_given(args)} instead of {then}")
        if any(not torch.equal(a, b) for a, b in zip(drawn.parameters, _tensors(args), strict=False)):
            raise ImpureMapError(
                f"the parameters of {func} depend on what is differentiated: its samples cannot be handed back for others. Draw "
                "them before, or write them as a function of standard random numbers"
            )
        if kind.name == "native_dropout":
            rate = float(_argument(args, kwargs, 1, "p"))
            return args[0] * drawn.result * (0.0 if rate >= 1 else 1 / (1 - rate)), drawn.result.clone()
        if kind.name == "rrelu_with_noise":
            return args[0] * args[1].copy_(drawn.result)
        return args[0].copy_(drawn.result) if kind.writes else drawn.result.clone()

    def finish(self) -> None:
        """Check that as much was drawn as the first time."""
        if next(self.left, None) is not None:
            self.differs("fewer than then")

    def differs(self, what: str) -> NoReturn:
        raise ImpureMapError(
            f"a second evaluation of the function drew other random numbers than the first ({what}): what it draws must depend "
            "neither on how often it is called nor on the values that are differentiated"
        )


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Mark draws in this block as allowed in a solve: a replay repeats them, or they do not belong to the map."""
    depth = getattr(_local, "depth", 0)
    _local.depth = depth + 1
    try:
        yield
    finally:
        _local.depth = depth


class Unreplayed(Watching):
    """Notes whether a map draws random numbers, or changes tensors in place, without a replay that repeats this.

    Args:
        state: the tensors of the state that is given to the map.
        args: the tensors of its arguments.

    Attributes:
        random: whether it drew.
        written: captured tensors that it changed.
    """

    def __init__(self, state: Iterable[Tensor] = (), args: Iterable[Tensor] = ()) -> None:
        state = list(state)
        super().__init__((), [*state, *args])
        self.state = {_storage(t) for t in state}
        self.random = False
        self.written: list[Tensor] = []

    def refuse(self, tensor: Tensor, func: Any) -> NoReturn:
        """Refuse to change what the map was given."""
        what = "the state" if _storage(tensor) in self.state else "an argument"
        raise ValueError(f"the map changed {what} that it was given, in place; return a new tensor (inplace=False in a module)")

    def write(self, tensor: Tensor) -> None:
        """Note a change of a tensor that the map captures."""
        if not getattr(_local, "depth", 0):
            self.written.append(tensor)

    def draw(self, func: Any, kind: _Kind, args: Any, kwargs: Any) -> Any:
        """Note a draw."""
        self.random = self.random or not (getattr(_local, "depth", 0) or self.seeded(args, kwargs))
        return func(*args, **kwargs)
