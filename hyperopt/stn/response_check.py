r"""How well the response predicts the weights: ``stn/response_error``, by a few steps of real training that are taken back.

From the present weights w and hyperparameters u, and for a move d of one scale up or down in each of them, four times the same
steps of the weights' optimizer are made on the same batches, without perturbations:

    w at u + d  ->  w + y                 w + R d at u + d  ->  w + R d + z
    w at u - d  ->  w + y'                w - R d at u - d  ->  w - R d + z'

To second order ``y - y' = 2 K J d`` and ``z - z' = 2 K (J - R) d`` with the true response ``J = dw*/du`` and the learned R, where
K is the part of the way to the minimum that the steps go. So the error is that of R, in the directions that training moves most:

    stn/response_error = |z - z'| / |y - y'| = |K (J - R) d| / |K J d|

It is 0 for the true response, 1 for none at all, and 2 for the opposite one. It costs four gradients for each step.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hyperopt.core.places import Places
from hyperopt.core.policy import ImpureMapError, note_once
from hyperopt.core.replay import Replay
from hyperopt.stn.draw import Draw

if TYPE_CHECKING:
    from hyperopt.stn.network import STN
    from hyperopt.stn.updates import Updates

BAD = 0.7
"""Above this error the record's message says which rate to change."""


@dataclass(frozen=True)
class ResponseCheck:
    """What a check has found.

    Attributes:
        error: ``stn/response_error``.
        share: the part of the true response that the learned one has, ``<K R d, K J d> / |K J d|^2``.
        gradients: what it cost, in gradient evaluations.
    """

    error: float
    share: float
    gradients: int

    @property
    def noise(self) -> float:
        """The part of the learned response that is orthogonal to the true one, relative to this."""
        return math.sqrt(max(self.error**2 - (1 - self.share) ** 2, 0.0))


def check_response(tuning: Updates, batches: Sequence[Any], steps: int) -> ResponseCheck | None:
    """Check the response at the present state, which stays as it is: weights, optimizers, buffers, gradients and generators.

    Args:
        tuning: the training.
        batches: training batches, used in turn.
        steps: of each of the four trainings.

    Returns:
        None if the optimizer of the weights has not made a step yet, or if the loss cannot be evaluated twice alike.
    """
    model, space, optimizer = tuning.model, tuning.space, tuning.optimizers["weights"]
    weights = [parameter for parameter in model.base_parameters() if parameter.requires_grad]
    if not any(parameter in optimizer.state for parameter in weights) and not isinstance(optimizer, torch.optim.SGD):
        return None  # the first steps of Adam are signs
    rows = [tuning.rows(batch) for batch in batches]
    coin = torch.Generator().manual_seed(tuning.updates)
    signs = (2 * torch.randint(2, (len(space.names),), generator=coin) - 1).to(space.u)
    u, move = space.u.detach(), signs * space.sigma.detach()

    def trained(at: Tensor, response_at: Tensor) -> Tensor:
        """Return the change of the weights in the steps at ``at``, from the weights that respond to ``response_at``."""
        delta = response_at - u if space.centred else response_at
        model.respond_(delta)
        start = _flat(weights)
        trial = copy.deepcopy(optimizer, {id(p): p for group in optimizer.param_groups for p in group["params"]})
        for k, replay in enumerate(replays):
            m = at.expand(rows[k % len(rows)], -1)
            draw = Draw(space, m, torch.zeros_like(m), space.sigma.detach(), responds=False)
            loss, _ = tuning.training(batches[k % len(batches)], draw, replay)
            trial.zero_grad()
            for parameter, slope in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                parameter.grad = slope
            tuning.clip("weights", weights)
            trial.step()
        return _flat(weights) - start

    found = []
    with in_mode(model, training=True):  # before the replays are made, which put the modes back as they are then
        replays = [Replay(Places.of(tuning.train_loss, (model,)), u.device.type) for _ in range(steps)]
        try:
            for at, response_at in ((u + move, u), (u - move, u), (u + move, u + move), (u - move, u - move)):
                with _kept(tuning):
                    found.append(trained(at, response_at))
        except ImpureMapError as error:
            note_once(f"the response cannot be checked: {error}; set check_every=0 (said once a run)", "response check")
            return None
        finally:
            for replay in reversed(replays):
                replay.contents.rewind()
    y, z = found[0] - found[1], found[2] - found[3]
    size = float(y.norm())
    if not size > 0:
        return None
    return ResponseCheck(float(z.norm()) / size, float((y - z) @ y) / size**2, len(found) * steps)


@contextlib.contextmanager
def in_mode(model: STN, training: bool) -> Iterator[None]:
    """Put the modules into training or evaluation mode for a block, and back at its end."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _kept(tuning: Updates) -> Iterator[None]:
    """Put the parameters, their gradients and the generators of torch back at the end of a block."""
    before = [(p, p.detach().clone(), p.grad) for p in tuning.model.parameters()]
    try:
        with same_numbers(tuning.space.u.device):
            yield
    finally:
        with torch.no_grad():
            for parameter, value, slope in before:
                parameter.copy_(value)
                parameter.grad = slope


@contextlib.contextmanager
def same_numbers(device: torch.device) -> Iterator[None]:
    """Put the generators of torch back at the end of a block, those that its functions are handed too."""
    generators = _Generators()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            with generators:
                yield
        finally:
            for generator, state in generators.before.values():
                generator.set_state(state)


class _Generators(TorchFunctionMode):
    """Notes the state of each generator that is handed to a function of torch.

    Attributes:
        before: generators by identity, each with its state before its first use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[torch.Generator, Tensor]] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in (*args, *(kwargs or {}).values()):
            if isinstance(each, torch.Generator) and id(each) not in self.before:
                self.before[id(each)] = each, each.get_state()
        return func(*args, **(kwargs or {}))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """The values of all tensors as one vector, in float64."""
    return torch.cat([each.detach().double().flatten() for each in tensors])


def advice(found: ResponseCheck, before: float | None, moved: float, learning: float, rate: Callable[[str], float]) -> str | None:
    """Return which of the three rates to change and to where, if the response is bad for the second time in a row.

    Args:
        found: the check.
        before: the error of the check before.
        moved: by how many scales the farthest hyperparameter has moved since then.
        learning: the training loss since then, relative to that of as many rounds before.
        rate: returns the present rate of ``values``, ``weights`` or ``response``.
    """
    if before is None or not min(found.error, before) > BAD:
        return None
    if moved > 1:
        name, factor, why = "values", 1 / moved, f"a hyperparameter has moved by {moved:.2g} scales since the last check"
    elif learning < 0.5:
        name, factor, why = "weights", 2.0, f"the training loss has fallen to {learning:.2g} of what it was at the last check"
    elif abs(found.error - before) < 0.1 * before or found.share < min(0.5, 1 - found.noise):
        name, factor, why = "response", min(1 / max(found.share, 0.1), 10.0), "the response learns too slowly"
    else:
        name, factor, why = "response", BAD / (2 * found.error), "the response fluctuates"
    way, now = "raise" if factor > 1 else "lower", rate(name)
    return (
        f"the response is off by {found.error:.2g} of the true one (stn/response_error), and the hypergradient with it: {why}; "
        f"{way} the rate of the optimizer {name} from {now:.2g} to {now * factor:.2g}"
    )
