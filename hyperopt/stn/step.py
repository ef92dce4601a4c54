"""The step of a self-tuning network: in turn, weights learn to respond, and hyperparameters are updated on validation data.

    warm-up    w, r <- step on  L_train(w(lam'), lam')                                      lam' = lam + sigma eps
    a round    train_steps times the same
               valid_steps times  lam, sigma <- step on  L_valid(w(lam')) - tau sum log(sigma sqrt(2 pi e))

``w(lam')`` is affine in what it responds to in the given mode; the derivative of the validation loss passes only through this.

On several ranks each draws the whole batch and its noise, and takes its share of both; both losses are means over the ranks.

References: MacKay et al., Self-tuning networks, ICLR 2019, arXiv 1903.03088, algorithm 1; Bae & Grosse, Delta-STN, NeurIPS 2020,
arXiv 2010.13514, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.outer import Make, OuterOptimizer, Schedule, as_outer_optimizer
from hyperopt.core import distributed
from hyperopt.core.state import check_entries, check_tensors
from hyperopt.stn.draw import Draw
from hyperopt.stn.network import STN, check_network, leading
from hyperopt.stn.rounds import Past, Round, SelfTuningSettings
from hyperopt.stn.schedule import TunedSchedule
from hyperopt.stn.warnings import Watch

TrainLoss = Callable[[STN, Any, Draw], Tensor]
"""``train_loss(model, batch, draw)`` makes the data that ``draw.h`` needs, calls ``model(x, draw)``, adds the regulariser."""
ValidLoss = Callable[[STN, Any, Draw | None], Tensor]
"""``valid_loss(model, batch, draw)`` calls ``model(x)``; ``draw`` is None unless ``direct_grad``."""
Guard = Callable[[Mapping[str, Sequence[Tensor]]], None]
SEED = 190303088
"""The default seed of the perturbations, which is unlikely to be a seed of the data."""


class SelfTuning:
    """Training of a self-tuning network.

    Args:
        model: the network, from ``convert``.
        train_loss: see ``TrainLoss``.
        valid_loss: see ``ValidLoss``.
        settings: mode and numbers (None: the defaults).
        weights: optimizer of the weights, and of the response unless that has its own (None: Adam, 0.01).
        values: optimizer of the hyperparameters (None: Adam, 0.003); ``round`` may get another one.
        scales: optimizer of the scales (None: Adam, 0.003).
        response: optimizer of the response parameters (None: that of the weights).
        seed: seed of the perturbations. It must differ from the seed of the data, or rows and perturbations are dependent.
        rows: a function that returns the number of rows of a batch.

    Attributes:
        updates: number of updates of the weights so far.
        history: the past rounds.

    Raises:
        ValueError: an optimizer or a schedule cannot work here.

    Example:
        >>> import torch
        >>> from hyperopt.stn import HyperSpace, Positive, SelfTuning, convert
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> y = x.sum(1, keepdim=True)
        >>> stn = convert(torch.nn.Linear(3, 1), HyperSpace({"decay": Positive(0.1)}))
        >>> def train_loss(model, batch, draw):
        ...     fit = (model(batch[0], draw) - batch[1]).square().mean()
        ...     return fit + (draw.h["decay"] * model.squared_norm(draw)).mean()
        >>> tuning = SelfTuning(stn, train_loss, lambda model, batch, draw: (model(batch[0]) - batch[1]).square().mean())
        >>> for _ in range(50):
        ...     found = tuning.round(lambda: (x[:20], y[:20]), lambda: (x[20:], y[20:]))
        >>> stn.space.values()["decay"] < 0.1
        True
    """

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
        self.model, self.space = model, model.space
        self.train_loss, self.valid_loss = train_loss, valid_loss
        self.settings = settings = settings or SelfTuningSettings()
        self.rows = rows
        self.space.centred = settings.mode != "classic"
        model.linear = settings.mode == "delta_linear"
        self._base, self._response = model.base_parameters(), model.response_parameters()
        made: dict[str, tuple[OuterOptimizer, dict[str, list[Any]]]] = {}
        groups: dict[str, list[Any]] = {"weights": self._base}
        if response is None:
            groups["response"] = self._response
        else:
            made["response"] = as_outer_optimizer(response, 0.01), {"response": self._response}
        made["weights"] = as_outer_optimizer(weights, 0.01), groups
        made["scales"] = as_outer_optimizer(scales, 0.003), {"scales": [self.space.s]}
        made["values"] = as_outer_optimizer(values, 0.003), self.groups()
        self.optimizers = {name: each.build(groups) for name, (each, groups) in made.items()}
        self._clip = {name: each.clip_norm for name, (each, _) in made.items()}
        self._schedules = {name: Schedule(made[name][0].scheduler, each) for name, each in self.optimizers.items()}
        for name, each in self.optimizers.items():
            _check_optimizer(name, each, self._schedules[name])
        self.generator = torch.Generator(self.space.u.device).manual_seed(seed)
        self.watch = Watch(settings)
        self.updates = 0
        self.history: list[Past] = []

    def groups(self) -> dict[str, list[Tensor]]:
        """Return the groups for an optimizer of the hyperparameters."""
        return {"values": [self.space.u]}

    def round(
        self,
        train: Callable[[], Any],
        valid: Callable[[], Any],
        optimizer: torch.optim.Optimizer | None = None,
        guard: Guard | None = None,
    ) -> Round:
        """Do one round, or the same number of updates in the warm-up.

        Args:
            train: a function that returns the next training batch.
            valid: a function that returns the next validation batch.
            optimizer: an optimizer of ``groups()`` (None: that of ``values``).
            guard: gets ``{"values": [u.grad]}`` before every step of the hyperparameters, and may change it in place.

        Raises:
            TuningError: a loss, a hyperparameter or a scale is not finite.
            ValueError: the first training loss has not read a hyperparameter.
        """
        settings = self.settings
        left = settings.warmup - self.updates
        steps = min(settings.train_steps, left) if left > 0 else settings.train_steps
        before = self.space.u.detach().clone()
        train_losses = [self.weight_step(train()) for _ in range(steps)]
        if left > 0:
            valid_losses = [self._validation_loss(valid())]
            if guard is not None:
                guard({"values": []})
        else:
            own = optimizer or self.optimizers["values"]
            valid_losses = [self.hyper_step(valid(), own, guard) for _ in range(settings.valid_steps)]
        for name, schedule in self._schedules.items():
            if name != "values" or optimizer is None:
                schedule.after_step()
        return self._record(left > 0, before, train_losses, valid_losses)

    def weight_step(self, batch: Any) -> Tensor:
        """Update the weights and their response on one batch; return the loss before the update, without its graph."""
        rows = self.rows(batch)
        self.model.train()
        response = self.optimizers.get("response", self.optimizers["weights"])
        if self.settings.mode in ("delta", "delta_linear"):
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

    def hyper_step(self, batch: Any, optimizer: torch.optim.Optimizer, guard: Guard | None = None) -> Tensor:
        """Update the hyperparameters and their scales on one batch; return the validation loss before, without its graph."""
        space, settings = self.space, self.settings
        self.model.eval()
        eps = space.noise(self.rows(batch), self.generator)
        found: list[Tensor] = []

        def gradients(*parameters: Tensor) -> tuple[Tensor, ...]:
            loss, draw = self._validation(batch, lambda: space.at(eps))
            found.append(loss.detach())
            loss = loss - settings.entropy * Draw.entropy_of(space.sigma)
            with self.model.at(draw):
                return torch.autograd.grad(loss, parameters, materialize_grads=True)

        def closure() -> Any:
            if settings.update == "joint":
                space.u.grad, slope = gradients(space.u, space.s)
                if len(found) == 1:
                    space.s.grad = slope
            else:
                (space.u.grad,) = gradients(space.u)
            if guard is not None:
                guard({"values": [space.u.grad]})
            return found[-1]

        optimizer.step(closure)
        if settings.update == "sequential":
            (space.s.grad,) = gradients(space.s)
        self._clipped("scales", [space.s])
        self.optimizers["scales"].step()
        space.clamp_scales_(settings.min_scale, settings.max_scale)
        return found[0]

    def schedule(self) -> TunedSchedule:
        """Return the hyperparameters of every update of the weights so far."""
        return TunedSchedule.of(self.space, [(past.steps, past.u) for past in self.history])

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state: network, hyperparameters, optimizers, schedules, noise, history."""
        return {
            "model": self.model.state_dict(),
            "optimizers": {name: each.state_dict() for name, each in self.optimizers.items()},
            "schedules": {name: each.state_dict() for name, each in self._schedules.items()},
            "generator": self.generator.get_state(),
            "watch": self.watch.state_dict(),
            "updates": self.updates,
            "history": [list(past) for past in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, in place.

        Raises:
            ValueError: an entry is missing, unknown, or of another shape or dtype; nothing was changed.
        """
        own = self.model.state_dict()
        check_entries(state, ("model", "optimizers", "schedules", "generator", "watch", "updates", "history"), "SelfTuning")
        check_entries(state["model"], own, "SelfTuning's model")
        check_tensors(state["model"], own, "SelfTuning's model")
        for name in ("optimizers", "schedules"):
            check_entries(state[name], self.optimizers, f"SelfTuning's {name}")
        self.model.load_state_dict(state["model"])
        for name, each in self.optimizers.items():
            each.load_state_dict(state["optimizers"][name])
            self._schedules[name].load_state_dict(state["schedules"][name])
        self.generator.set_state(state["generator"])
        self.watch.load_state_dict(state["watch"])
        self.updates = state["updates"]
        self.history = [Past(*row) for row in state["history"]]

    def _update(
        self, optimizers: Mapping[str, torch.optim.Optimizer], parameters: Sequence[Tensor], batch: Any, draw: Draw
    ) -> Tensor:
        """Take one gradient of the training loss in ``parameters``, and one step of each optimizer."""
        seen: set[str] | None = set() if self.updates == 0 else None
        draw = draw if seen is None else draw.watched(seen)
        mine = distributed.share_of(draw.rows)
        batch, draw = own(batch, mine), draw.part(mine)

        def mean() -> Tensor:
            with self.model.at(draw):
                return self.train_loss(self.model, batch, draw)

        loss = distributed.mean_over_ranks(mean, rows=draw.rows)
        if seen is not None:
            self._check_used(seen)
        for each in optimizers.values():
            each.zero_grad()  # an optimizer may have more parameters than those updated here
        trained = [parameter for parameter in parameters if parameter.requires_grad]  # frozen ones get no gradient
        with self.model.at(draw):  # for a network that recomputes its activations
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        for name, each in optimizers.items():
            self._clipped(name, [p for group in each.param_groups for p in group["params"]])
        for each in {id(each): each for each in optimizers.values()}.values():
            each.step()
        return loss.detach()

    def _validation(self, batch: Any, drawn: Callable[[], Draw]) -> tuple[Tensor, Draw]:
        """Return the validation loss at a draw, and the draw, whose values the loss may see only with ``direct_grad``.

        The draw is made inside the mean over the ranks, since its rows, and their derivatives, belong to this rank alone.
        """
        direct, mine = self.settings.direct_grad, distributed.share_of(self.rows(batch))
        batch = own(batch, mine)

        def mean() -> Tensor:
            draw = drawn().part(mine)
            seen.append(draw if direct else draw.without_h())
            with self.model.at(seen[-1]):
                return self.valid_loss(self.model, batch, draw if direct else None)

        seen: list[Draw] = []
        loss = distributed.mean_over_ranks(mean, rows=mine.stop - mine.start)
        return loss, seen[-1]

    @torch.no_grad()
    def _validation_loss(self, batch: Any) -> Tensor:
        """Return the validation loss at a draw, without any update."""
        self.model.eval()
        draw = self.space.draw(self.rows(batch), self.generator)
        return self._validation(batch, lambda: draw)[0]

    def _clipped(self, name: str, parameters: Sequence[Tensor]) -> None:
        """Clip the gradients that an optimizer is about to use."""
        if (limit := self._clip.get(name)) is not None:
            torch.nn.utils.clip_grad_norm_(list(parameters), limit)

    def _check_used(self, seen: set[str]) -> None:
        """Refuse a hyperparameter that the training loss has not read, before any update."""
        unused = [name for name in self.space.names if name not in seen]
        if unused:
            raise ValueError(
                f"the training loss never reads {', '.join(unused)}: use draw.h[{unused[0]!r}] in train_loss (or "
                f"hyperopt.stn.Dropout({unused[0]!r}) in the network), or do not declare it"
            )

    def _record(self, warming: bool, before: Tensor, train_losses: list[Tensor], valid_losses: list[Tensor]) -> Round:
        """Read all numbers of a round in one transfer, check them, and add the round to the history."""
        space, count = self.space, len(self.space.names)
        parts = [before, space.u.detach(), space.s.detach(), space.sigma.detach()]
        losses = [loss.reshape(1).to(space.u) for loss in (*train_losses, *valid_losses)]
        numbers = torch.cat([*parts, *losses]).tolist()
        was, u, s, sigma = (numbers[i * count : (i + 1) * count] for i in range(4))
        train, valid = numbers[4 * count :][: len(train_losses)], numbers[4 * count + len(train_losses) :]
        named = {kind: dict(zip(space.names, each, strict=True)) for kind, each in (("u", u), ("s", s), ("sigma", sigma))}
        self.watch.finite(self.updates, named["u"], named["s"], {"training": train, "validation": valid})
        self.watch.saturated(space, named["u"], named["sigma"])
        found = Round(warming, sum(train) / len(train), valid[-1])
        if not warming:
            self.watch.collapse(found.train_loss, found.valid_loss)
        self.history.append(Past(len(train), found.train_loss, found.valid_loss, was, sigma))
        metrics: dict[str, float] = {f"hyper/{name}": value for name, value in space.values().items()}
        for name, (low, high) in space.band().items():
            metrics |= {f"hyper/{name}/low": low, f"hyper/{name}/high": high}
        metrics |= {f"stn/scale/{name}": value for name, value in named["sigma"].items()}
        metrics["stn/entropy"] = float(Draw.entropy_of(torch.tensor(sigma, dtype=torch.float64)))
        metrics |= {"stn/train_loss": found.train_loss, "stn/valid_loss": found.valid_loss, "stn/updates": float(self.updates)}
        found.metrics = metrics
        return found


def own(batch: Any, rows: slice) -> Any:
    """Return some rows of a batch: of its tensors, and of the keys of its examples."""
    whole = distributed.ranks() == 1
    return batch if whole else optree.tree_map(lambda leaf: leaf[rows] if hasattr(leaf, "__getitem__") else leaf, batch)


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
    """Refuse an optimizer that evaluates one loss many times, and a schedule that needs evaluations."""
    if isinstance(optimizer, torch.optim.LBFGS) and name != "values":
        raise ValueError(f"the optimizer of the {name} is LBFGS, which needs one function, and batches differ; use adam or sgd")
    if schedule.by_evaluation:
        raise ValueError(f"the schedule of the {name} goes by evaluations (ReduceLROnPlateau); use one that counts steps")
