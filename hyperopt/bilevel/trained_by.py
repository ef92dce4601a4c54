"""``TrainedBy``: the optimizers that train the parameters of a model, and the weight decay that they add to its loss.

What is trained must be what is differentiated. Therefore the weight decay of the training optimizer is part of the inner loss,
and a parameter that no optimizer moves is a constant. A hook that PyTorch calls before every ``Optimizer.step`` finds the
optimizers that step parameters of the model; it is removed when the optimizer of each parameter is known.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hyperopt.bilevel.inner.torch_optimizer import decay_of
from hyperopt.core.policy import note_once

log = logging.getLogger(__name__)


class TrainedBy:
    """The optimizers of a model.

    Args:
        given: the optimizers (empty: the ones that the hook sees stepping parameters of the model).

    Attributes:
        decays: weight decay of each trained parameter, by name, at the latest ``look`` (empty: nothing is known yet).
    """

    def __init__(self, given: Sequence[torch.optim.Optimizer] = ()) -> None:
        self.given = list(given)
        self.decays: dict[str, float] = {}
        self._seen: list[tuple[weakref.ref[torch.optim.Optimizer], dict[str, float | ValueError]]] = []
        self._names: dict[int, str] = {}  # names of the parameters to find, by id
        self._stepped: set[int] = set()
        self._handle: Any = None

    def watch(self, parameters: Mapping[str, Tensor]) -> None:
        """Find the optimizers of these parameters, from the next training step on."""
        self._names, self._stepped = {id(parameter): name for name, parameter in parameters.items()}, set()
        self._left = set(self._names)
        if self.given or self._handle is not None:
            return
        self._handle = register_optimizer_step_pre_hook(_hook(weakref.WeakMethod(self._note)))
        weakref.finalize(self, self._handle.remove)

    def rest(self) -> None:
        """Remove the hook if all optimizers are found; it cannot remove itself while PyTorch iterates over its hooks."""
        if self._handle is not None and not self._left:
            self._handle.remove()
            self._handle = None

    def _note(self, optimizer: torch.optim.Optimizer) -> None:
        """Record an optimizer that is about to step, if it has parameters of the model."""
        if not self._left or id(optimizer) in self._stepped:
            return
        self._stepped.add(id(optimizer))
        if found := _decays(optimizer, self._names):
            self._seen = [each for each in self._seen if each[0]() not in (None, optimizer)]
            self._seen.append((weakref.ref(optimizer), found))
            self._left -= {key for key, name in self._names.items() if name in found}

    def look(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the weight decay of each trained parameter, by name.

        Args:
            parameters: the parameters that may be trained, by name.

        Raises:
            ValueError: an optimizer changes the weights in a way that cannot be differentiated, or the given optimizers hold
                none of the parameters.
        """
        names = {id(parameter): name for name, parameter in parameters.items()}
        live = self.given or [optimizer for ref, _ in self._seen if (optimizer := ref()) is not None]
        found: dict[str, float | ValueError] = {}
        for each in [_decays(optimizer, names) for optimizer in live] or [kept for _, kept in self._seen]:
            found.update(each)
        found = {name: decay for name, decay in found.items() if name in parameters}
        if self.given and not found:
            raise ValueError(
                "trained_by holds none of the model's parameters that require grad; give the optimizer that trains the model"
            )
        if not found:  # after a resume, or before the first training step
            found = {name: decay for name, decay in self.decays.items() if name in parameters}
        for decay in found.values():
            if isinstance(decay, ValueError):
                raise decay
        if fixed := [name for name in parameters if found and name not in found]:
            note_once(
                f"{', '.join(fixed[:8])}{' ...' * (len(fixed) > 8)} require grad, but no optimizer has moved them (none with lr "
                "above 0 holds them), so they are treated as constants. If they are trained, name their optimizer: "
                "Tuner(..., trained_by=optimizer)",
                "parameters that are not trained",
            )
        self.decays = {name: float(decay) for name, decay in found.items()}  # pyright: ignore[reportArgumentType]
        return self.decays or dict.fromkeys(parameters, 0.0)


def _hook(note: weakref.WeakMethod[Callable[[torch.optim.Optimizer], None]]) -> Callable[..., None]:
    """Return a hook for the steps of all optimizers, which does not keep the owner of ``note`` alive."""

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if (found := note()) is not None:
            found(optimizer)

    return hook


def _decays(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, float | ValueError]:
    """Return the weight decay of the parameters in ``names`` that the optimizer moves, or an error if it cannot be known.

    A group with ``lr=0`` does not move beside others that do; if all are at 0, a schedule is at its start or its end.
    """
    found: dict[str, float | ValueError] = {}
    groups = optimizer.param_groups
    for group in [group for group in groups if group.get("lr") != 0] or groups:
        mine = [names[id(parameter)] for parameter in group["params"] if id(parameter) in names]
        if mine:
            try:
                decay: float | ValueError = decay_of(optimizer, group, "train_loss", "{}=0".format)
            except ValueError as error:
                decay = error
            found.update(dict.fromkeys(mine, decay))
    return found
