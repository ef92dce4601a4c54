"""``Hyperparameters``: the variables that the outer optimizer moves, and their values in the user's units.

    raw --(the space's map, or none)--> value          values() is differentiable; call project_() after every step

It is a ``torch.nn.Module`` whose parameters are the raw variables. A parameter has the name of its hyperparameter and, for a
tree, the path to the leaf: ``decay``, or ``decay.0.weight`` for ``{"decay": {"0.weight": ...}}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Integral
from types import MappingProxyType
from typing import Any

import optree
import torch
from torch import Tensor, nn

from hyperopt.core.state import check_entries, check_tensors
from hyperopt.spaces.space import Space, shape_of


class Hyperparameters(nn.Module):
    """Named hyperparameters, each in its space.

    Args:
        spaces: the space of each name.
        shapes: by name a shape, a tensor of that shape, or a tree of tensors (the parameters of a model), each leaf of which
            gets its own hyperparameters. A name that is left out has the shape of its initial value, such as a single number.
        dtype: dtype of the raw variables.
        device: device of the raw variables.
        key: what messages call the argument ``spaces``.

    Attributes:
        spaces: the space of each name.

    Raises:
        TypeError: an entry of ``spaces`` is not a space.
        ValueError: an initial value is outside of its space, a shape has no space, or two names are the same.

    Example:
        >>> import hyperopt
        >>> hyper = hyperopt.Hyperparameters({"decay": hyperopt.Positive(0.01), "mix": hyperopt.Bounded(low=0, high=2)})
        >>> hyper
        Hyperparameters(
          decay = 0.01 in (0, inf)
          mix = 1 in (0, 2)
        )
        >>> [name for name, parameter in hyper.named_parameters()]
        ['decay', 'mix']
    """

    def __init__(
        self,
        spaces: Mapping[str, Space],
        shapes: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        key: str = "space",
    ) -> None:
        """Start at the initial values."""
        super().__init__()
        shapes = shapes or {}
        unknown = [name for name in shapes if name not in spaces]
        if unknown or not spaces:
            what = f"a shape is given for {unknown[0]!r}, which has no space" if unknown else "there are no hyperparameters"
            raise ValueError(f"{key}: {what}; the spaces are {', '.join(spaces) or 'none'}")
        dtype = dtype or torch.get_default_dtype()
        self.spaces = dict(spaces)
        self._paths: dict[str, Any] = {}
        for name, space in self.spaces.items():
            if not isinstance(space, Space):
                raise TypeError(f"{key}.{name} is a {type(space).__name__}; give a space, such as hyperopt.Positive(0.1)")
            ways, leaves, spec = optree.tree_flatten_with_path(_shaped(shapes[name] if name in shapes else shape_of(space.init)))
            paths = [".".join(map(str, (name, *way))) for way in ways]
            self._paths[name] = optree.tree_unflatten(spec, paths)
            for path, leaf in zip(paths, leaves, strict=True):
                self._place(path, nn.Parameter(space.raw(leaf.shape, dtype, device, f"{key}.{name}")), key)

    def _place(self, path: str, parameter: nn.Parameter, key: str) -> None:
        """Register a parameter, without ``setattr`` since its name may be that of a method."""
        *way, last = path.split(".")
        owner: nn.Module = self
        for part in way:
            inside = owner._modules.setdefault(part, nn.Module())
            assert inside is not None
            if part in owner._parameters:
                raise ValueError(f"{key}: two hyperparameters overlap at {path!r}; rename one of them")
            owner = inside
        if last in owner._parameters or last in owner._modules:
            raise ValueError(f"{key}: two hyperparameters overlap at {path!r}; rename one of them")
        owner._parameters[last] = parameter

    @property
    def raw(self) -> Mapping[str, Any]:
        """The variables that the optimizer moves: for each name a tree of parameters, to be changed in place."""
        own = dict(self.named_parameters(remove_duplicate=False))
        return MappingProxyType({name: optree.tree_map(own.__getitem__, paths) for name, paths in self._paths.items()})

    def values(self) -> dict[str, Any]:
        """Return the values of the hyperparameters, differentiable in ``raw``."""
        return {name: optree.tree_map(self.spaces[name].value, tree) for name, tree in self.raw.items()}

    def forward(self) -> dict[str, Any]:
        """Return ``values()``."""
        return self.values()

    @torch.no_grad()
    def read(self) -> dict[str, Any]:
        """Return the values without a graph."""
        return {name: optree.tree_map(torch.Tensor.detach, tree) for name, tree in self.values().items()}

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Set hyperparameters to values in the user's units; those that are not named stay.

        Args:
            values: values by the names of ``named_parameters``, of the shapes that ``values()`` has.

        Raises:
            ValueError: there is no such hyperparameter, it has another shape, or the value is outside of its space; the message
                names it, and nothing was changed.
        """
        raw: dict[str, Tensor] = {}
        own = dict(self.named_parameters(remove_duplicate=False))
        for name, value in values.items():
            if name not in own:
                raise ValueError(f"there is no hyperparameter {name!r} here; the hyperparameters are {', '.join(own)}")
            space = self.spaces[next(key for key, paths in self._paths.items() if name in optree.tree_leaves(paths))]
            shape = space.value(own[name]).shape
            if value.shape != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, but here it has {tuple(shape)}")
            raw[name] = space.inverse(value.detach().double(), own[name].dtype, own[name].device, name)
        for name, value in raw.items():
            own[name].copy_(value)

    def groups(self) -> dict[str, list[Tensor]]:
        """Return the raw tensors by name, as groups for an outer optimizer."""
        return {name: list(optree.tree_leaves(tree)) for name, tree in self.raw.items()}

    @torch.no_grad()
    def project_(self) -> None:
        """Project the hyperparameters with ``by="projection"`` back onto their spaces; call after every outer step."""
        for name, group in self.groups().items():
            space = self.spaces[name]
            if space.by == "projection":
                for leaf in group:
                    leaf.copy_(space.project(leaf))

    def metrics(self) -> dict[str, float]:
        """Return ``hyper/<name>`` of a single number, else the mean, least and largest value of the hyperparameter."""
        found: dict[str, float] = {}
        for name, tree in self.read().items():
            flat = _flat(tree)
            if flat.numel() == 1:
                found[f"hyper/{name}"] = float(flat)
            elif flat.numel():
                for kind, value in (("mean", flat.mean()), ("min", flat.min()), ("max", flat.max())):
                    found[f"hyper/{name}/{kind}"] = float(value)
        return found

    def __repr__(self) -> str:
        """Return each name with its value, or the range of its values."""
        return "\n".join(["Hyperparameters(", *(f"  {line}" for line in self._lines()), ")"])

    def _lines(self) -> Iterator[str]:
        for name, tree in self.read().items():
            flat, shapes = _flat(tree), [tuple(leaf.shape) for leaf in optree.tree_leaves(tree)]
            sizes = f"shape {shapes[0]}" if len(shapes) == 1 else f"{len(shapes)} tensors"
            if not flat.numel():
                told = f"no values ({sizes})"
            elif flat.numel() == 1:
                told = f"{float(flat):.6g}"
            else:
                told = f"{float(flat.min()):.6g} to {float(flat.max()):.6g}, mean {float(flat.mean()):.6g} ({sizes})"
            yield f"{name} = {told} in {self.spaces[name].bounds}"

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what ``state_dict`` returned, in place: all of it, or nothing.

        Args:
            state_dict: the raw variables by name, or a list of tensors for each hyperparameter, as in older checkpoints.
            strict: whether to refuse a state with other names.
            assign: see ``torch.nn.Module.load_state_dict``.

        Raises:
            TypeError: an entry is not a tensor.
            ValueError: an entry is missing, unknown, or of another shape or dtype; nothing was changed.
        """
        state = self._converted(state_dict)
        if strict:
            check_entries(state, self.state_dict(), "Hyperparameters")
        return super().load_state_dict(state, strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Check all entries first, even as part of another module: torch would load (n,) into () and copy as it goes."""
        mine = {name.removeprefix(prefix): kept for name, kept in state_dict.items() if name.startswith(prefix)}
        check_tensors(mine, self.state_dict(), "Hyperparameters")
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _converted(self, state: Any) -> Any:
        """Return the state with one entry for each leaf, also if it has a list of leaves for each hyperparameter."""
        if not isinstance(state, Mapping) or not any(isinstance(kept, list | tuple) for kept in state.values()):
            return state
        found: dict[str, Any] = {}
        for name, kept in state.items():
            paths = optree.tree_leaves(self._paths.get(name, name))
            leaves = kept if isinstance(kept, list | tuple) else [kept]
            if len(leaves) != len(paths):
                raise ValueError(
                    f"the state for Hyperparameters: the entry {name!r} has {len(leaves)} tensors, but here it has {len(paths)}; "
                    "nothing was loaded. Give the state of a problem of the same shapes"
                )
            found.update(zip(paths, leaves, strict=True))
        return found


def _flat(tree: Any) -> Tensor:
    """Return all entries of a tree in one vector."""
    leaves = [leaf.reshape(-1) for leaf in optree.tree_leaves(tree)]
    return torch.cat(leaves) if leaves else torch.empty(0)


def _shaped(given: Any) -> Any:
    """Return a shape as a tensor of that shape without memory, and a tree of tensors as it is."""
    if isinstance(given, Integral):
        given = (given,)
    sizes = isinstance(given, tuple | list) and all(isinstance(size, Integral) for size in given)
    return torch.empty(tuple(map(int, given)), device="meta") if sizes else given
