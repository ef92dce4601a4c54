"""One update of the weights and their response, and one of the hyperparameters and their scales; see ``hyperopt.stn.step``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.outer import Make, OuterOptimizer, Schedule
from hyperopt.bilevel.own_batches import OwnBatches
from hyperopt.bilevel.refusals import refuse_no_rows, refuse_no_scalar, refuse_other_arguments
from hyperopt.core import distributed
from hyperopt.core.checks import require_kind
from hyperopt.core.replay import Replay
from hyperopt.stn.draw import Draw
from hyperopt.stn.effects import refuse_not_finite, refuse_without_effect
from hyperopt.stn.network import STN, check_network, leading
from hyperopt.stn.rates import MeasuredGradient, optimizer_of
from hyperopt.stn.refusals import refuse_leaving, refuse_optimizer, refuse_unread, refuse_without_derivative
from hyperopt.stn.rounds import Past, SelfTuningSettings
from hyperopt.stn.warnings import TuningError, Watch

TrainLoss = Callable[[STN, Any, Draw], Tensor]
"""``train_loss(model, batch, draw)`` makes the data that ``draw.h`` needs, calls ``model(x, draw)``, adds the regulariser."""
ValidLoss = Callable[[STN, Any, Draw | None], Tensor]
"""``valid_loss(model, batch, draw)`` calls ``model(x)``; ``draw`` is None unless ``direct_grad``."""
GradientCheck = Callable[[Mapping[str, Sequence[Tensor]]], None]
SEED = 190303088
"""The default seed of the perturbations, which is unlikely to be a seed of the data."""


class Updates:
    """The parts of a self-tuning training: losses, optimizers, the generator of the noise; see ``SelfTuning``."""

    def __init__(
        self,
        model: STN,
        train_loss: TrainLoss,
        valid_loss: ValidLoss,
        settings: SelfTuningSettings | None = None,
        *,
        weights: OuterOptimizer | Make | None = None,
        values: OuterOptimizer | Make | None = None,
        scales: OuterOptimizer | Make | None = None,
        response: OuterOptimizer | Make | None = None,
        seed: int = SEED,
        rows: Callable[[Any], int] = leading,
    ) -> None:
        """Build the optimizers."""
        check_network(model, "SelfTuning")
        for loss, name in ((train_loss, "train_loss"), (valid_loss, "valid_loss")):
            refuse_other_arguments(loss, name, "model, batch, draw")
        settings = settings or SelfTuningSettings()
        require_kind("SelfTuning: ", "settings", settings, SelfTuningSettings)
        require_kind("SelfTuning: ", "seed", seed, int)
        self.model, self.space = model, model.space
        refuse_leaving(self.space)
        self.train_loss, self.valid_loss = train_loss, valid_loss
        self.settings = settings
        self.rows = rows
        self.space.centred = settings.mode != "classic"
        model.linear = settings.mode == "delta_linear"
        self._base, self._response = model.base_parameters(), model.response_parameters()
        made: dict[str, tuple[OuterOptimizer, dict[str, list[Any]]]] = {}

        def add(name: str, given: OuterOptimizer | Make | None, groups: dict[str, list[Any]]) -> None:
            made[name] = optimizer_of(name, given, settings.rounds, self.space.sigma.detach()), groups

        groups: dict[str, list[Any]] = {"weights": self._base}
        if response is None:
            groups["response"] = self._response
        else:
            add("response", response, {"response": self._response})
        add("weights", weights, groups)
        add("scales", scales, {"scales": [self.space.s]})
        add("values", values, self.groups())
        self.optimizers = {name: each.build(groups) for name, (each, groups) in made.items()}
        self._limits = {name: each.clip_norm for name, (each, _) in made.items()}
        self._schedules = {name: Schedule(made[name][0].scheduler, each) for name, each in self.optimizers.items()}
        for name, each in self.optimizers.items():
            refuse_optimizer(name, each, self._schedules[name])
        self.generator = torch.Generator(self.space.u.device).manual_seed(seed)
        self.own_values = values is None
        self.measured = MeasuredGradient(self.space.u)
        self.watch = Watch(settings)
        self.updates = 0
        self._checked = False  # whether every hyperparameter was found to have an effect
        self.history: list[Past] = []
        self.recent: deque[Any] = deque(maxlen=settings.check_steps)  # training batches for ``check_response``
        self.lent: list[Tensor] = []  # losses of ``loss`` since the last round
        self._batches = OwnBatches("train"), OwnBatches("val")

    @property
    def delta(self) -> bool:
        """Whether weights and response are updated one after the other."""
        return self.settings.mode in ("delta", "delta_linear")

    def groups(self) -> dict[str, list[Tensor]]:
        """Return the groups for an optimizer of the hyperparameters."""
        return {"values": [self.space.u]}

    def loss(self, batch: Any) -> Tensor:
        """``train_loss`` on a batch at a new draw, for a step of training in a loop of your own.

        Its derivative in weights and response is the one that ``weight_step`` takes: in the modes ``delta`` and ``delta_linear``
        that of the weights is at the hyperparameters themselves, and that of the response at the draw. The value is at the draw.
        """
        rows = self.rows(batch)
        with torch.no_grad():
            draw = self.space.draw(rows, self.generator)
            centre = self.space.draw(rows, perturb=False)
        loss, _ = self.training(batch, draw)
        if not torch.is_grad_enabled():
            return loss
        refuse_without_derivative(loss, "train_loss")
        self.updates += 1
        self.keep(batch)
        self.lent.append(loss.detach())
        if not self.delta:
            return loss
        response = [parameter for parameter in self._response if parameter.requires_grad]
        slopes = torch.autograd.grad(loss, response, materialize_grads=True)
        at_centre, _ = self.training(batch, centre)
        moved = sum(((p - p.detach()) * slope).sum() for p, slope in zip(response, slopes, strict=True))
        return at_centre + moved + (loss - at_centre).detach()

    @property
    def checks(self) -> bool:
        """Whether the response is checked at the end of this round."""
        every = self.settings.check_every
        return every > 0 and (len(self.history) + 1) % every == 0

    def keep(self, batch: Any) -> None:
        """Keep a training batch if the response is checked at the end of this round."""
        if self.checks:
            self.recent.append(batch)

    def weight_step(self, batch: Any) -> Tensor:
        """Update the weights and their response on one batch; return the loss before the update, without its graph."""
        rows = self.rows(batch)
        self.keep(batch)
        self.model.train()
        response = self.optimizers.get("response", self.optimizers["weights"])
        if self.delta:
            with torch.no_grad():
                draw = self.space.draw(rows, perturb=False)
            self._update({"weights": self.optimizers["weights"]}, self._base, batch, draw)
            both, parameters = {"response": response}, self._response
        else:
            both = {"weights": self.optimizers["weights"], "response": response}
            parameters = [*self._base, *self._response]
        with torch.no_grad():
            draw = self.space.draw(rows, self.generator)
        loss = self._update(both, parameters, batch, draw)
        self.updates += 1
        return loss

    def hyper_step(self, batch: Any, optimizer: torch.optim.Optimizer, check: GradientCheck | None = None) -> Tensor:
        """Update the hyperparameters and their scales on one batch; return the validation loss before, without its graph."""
        space, settings = self.space, self.settings
        self.model.eval()
        eps = space.noise(self.rows(batch), self.generator)
        own = self.own_values and optimizer is self.optimizers["values"]
        measured = own if settings.measured is None else settings.measured
        found: list[Tensor] = []

        def gradients(*parameters: Tensor) -> tuple[Tensor, ...]:
            loss, draw = self.validation(batch, lambda: space.at(eps))
            refuse_without_derivative(loss, "valid_loss")
            found.append(loss.detach())
            loss = loss - settings.entropy * Draw.entropy_of(space.sigma)
            with self.model.at(draw):
                return torch.autograd.grad(loss, parameters, materialize_grads=True)

        def closure() -> Any:
            space.u.grad, slope = gradients(space.u, space.s)
            if len(found) == 1:
                space.s.grad = slope
            if check is not None:
                check({"values": [space.u.grad]})
            elif not bool(space.u.grad.isfinite().all()):
                raise TuningError(
                    f"the gradient of the hyperparameters is not finite after {self.updates} weight updates (the validation "
                    f"loss is {float(found[-1]):g}), so no hyperparameter was moved; look for numbers in the data that are not "
                    "finite, or lower the learning rate of the optimizer weights, or the scale of the perturbation"
                )
            if measured:
                sigma = space.sigma.detach()
                of_loss = slope / space.s.detach().sigmoid() + settings.entropy / sigma  # sigma = softplus(s)
                space.u.grad = self.measured(space.u.grad, of_loss, sigma)
            return found[-1]

        optimizer.step(closure)
        if settings.update == "sequential":
            (space.s.grad,) = gradients(space.s)
        self.clip("scales", [space.s])
        self.optimizers["scales"].step()
        space.clamp_scales_(settings.min_scale, settings.max_scale)
        return found[0]

    def _update(
        self, optimizers: Mapping[str, torch.optim.Optimizer], parameters: Sequence[Tensor], batch: Any, draw: Draw
    ) -> Tensor:
        """Take one gradient of the training loss in ``parameters``, and one step of each optimizer."""
        loss, draw = self.training(batch, draw)
        for each in optimizers.values():
            each.zero_grad()  # an optimizer may have more parameters than those updated here
        trained = [parameter for parameter in parameters if parameter.requires_grad]  # frozen ones get no gradient
        refuse_without_derivative(loss, "train_loss")
        with self.model.at(draw):  # for a network that recomputes its activations
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        for name, each in optimizers.items():
            self.clip(name, [p for group in each.param_groups for p in group["params"]])
        for each in {id(each): each for each in optimizers.values()}.values():
            each.step()
        return loss.detach()

    def training(self, batch: Any, draw: Draw, replay: Replay | None = None) -> tuple[Tensor, Draw]:
        """Return the training loss at a draw, a mean over the ranks, and this rank's part of the draw.

        With ``replay``, the loss is evaluated by it.
        """
        seen: set[str] | None = set() if self.updates == 0 and not self._checked else None
        found = self.evaluated(batch, draw if seen is None else draw.watched(seen), replay)
        if seen is not None:
            refuse_unread(self.space, seen)
            refuse_not_finite(found[0], "train_loss")
            refuse_without_effect(self, batch)
            self._checked = True
        return found

    def evaluated(self, batch: Any, draw: Draw, replay: Replay | None = None) -> tuple[Tensor, Draw]:
        """Return what ``training`` does, without its checks before the first update."""
        mine = distributed.share_of(draw.rows)
        refuse_no_rows("train_loss", batch)
        batch, draw = own(batch, mine), draw.part(mine)

        def mean() -> Tensor:
            return _number("train_loss", self.train_loss, draw, (self.model, batch, draw), replay)

        return distributed.mean_over_ranks(mean, rows=draw.rows), draw

    def validation(self, batch: Any, drawn: Callable[[], Draw], replay: Replay | None = None) -> tuple[Tensor, Draw]:
        """Return the validation loss at a draw, and the draw, whose values the loss may see only with ``direct_grad``.

        The draw is made inside the mean over the ranks, since its rows, and their derivatives, belong to this rank alone.
        """
        direct, mine = self.settings.direct_grad, distributed.share_of(self.rows(batch))
        refuse_no_rows("valid_loss", batch)
        batch = own(batch, mine)

        def mean() -> Tensor:
            draw = drawn().part(mine)
            seen.append(draw if direct else draw.without_h())
            return _number("valid_loss", self.valid_loss, seen[-1], (self.model, batch, draw if direct else None), replay)

        seen: list[Draw] = []
        loss = distributed.mean_over_ranks(mean, rows=mine.stop - mine.start)
        return loss, seen[-1]

    @torch.no_grad()
    def validation_loss(self, batch: Any) -> Tensor:
        """Return the validation loss at a draw, without any update."""
        self.model.eval()
        draw = self.space.draw(self.rows(batch), self.generator)
        return self.validation(batch, lambda: draw)[0]

    def clip(self, name: str, parameters: Sequence[Tensor]) -> None:
        """Clip the gradients that an optimizer is about to use."""
        if (limit := self._limits.get(name)) is not None:
            torch.nn.utils.clip_grad_norm_(list(parameters), limit)


def own(batch: Any, rows: slice) -> Any:
    """Return some rows of a batch: of its tensors, and of the keys of its examples."""
    whole = distributed.ranks() == 1
    return batch if whole else optree.tree_map(lambda leaf: leaf[rows] if hasattr(leaf, "__getitem__") else leaf, batch)


def _number(name: str, loss: Callable[..., Any], draw: Draw, given: tuple[STN, Any, Any], replay: Replay | None) -> Tensor:
    """Return a user's loss, called ``name``, at a draw, which must be one number; with ``replay``, it is evaluated by it."""

    def at_draw(model: STN, *given: Any) -> Any:
        with model.at(draw):  # inside of the replay, which puts the network back as it was before
            return loss(model, *given)

    value = at_draw(*given) if replay is None else replay(at_draw, *given)
    refuse_no_scalar(value, name, given[1])
    return value
