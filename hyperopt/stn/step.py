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

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt.bilevel.own_batches import numbers_of_batches, taken
from hyperopt.core.policy import note_once
from hyperopt.core.state import check_entries, check_tensors
from hyperopt.stn.draw import Draw
from hyperopt.stn.effects import refuse_valid_loss
from hyperopt.stn.refusals import refuse_same_data
from hyperopt.stn.response_check import ResponseCheck, advice, check_response
from hyperopt.stn.rounds import Past, Round
from hyperopt.stn.schedule import TunedSchedule
from hyperopt.stn.updates import GradientCheck as GradientCheck
from hyperopt.stn.updates import TrainLoss as TrainLoss
from hyperopt.stn.updates import Updates
from hyperopt.stn.updates import ValidLoss as ValidLoss


class SelfTuning(Updates):
    """Training of a self-tuning network, by the interface of ``hyperopt.Tuner``: ``loss``, ``step``, ``state_dict``.

    Args:
        model: the network, from ``convert``.
        train_loss: see ``TrainLoss``.
        valid_loss: see ``ValidLoss``.
        settings: mode and numbers (None: the defaults).
        weights: optimizer of the weights, and of the response unless that has its own (None: see ``hyperopt.stn.rates``).
        values: optimizer of the hyperparameters (None: see ``hyperopt.stn.rates``); ``round`` may get another one.
        scales: optimizer of the scales (None: Adam, 0.003).
        response: optimizer of the response parameters (None: that of the weights).
        seed: seed of the perturbations. It must differ from the seed of the data, or rows and perturbations are dependent.
        rows: a function that returns the number of rows of a batch.

    Attributes:
        updates: number of updates of the weights so far.
        history: the past rounds.

    Raises:
        ValueError: an optimizer or a schedule cannot work here.

    Reference: MacKay et al., ICLR 2019, arXiv 1903.03088; Bae & Grosse, NeurIPS 2020, arXiv 2010.13514.

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

    def round(
        self,
        train: Callable[[], Any],
        valid: Callable[[], Any],
        optimizer: torch.optim.Optimizer | None = None,
        check: GradientCheck | None = None,
    ) -> Round:
        """Do one round, or the same number of updates in the warm-up.

        Args:
            train: a function that returns the next training batch.
            valid: a function that returns the next validation batch.
            optimizer: an optimizer of ``groups()`` (None: that of ``values``).
            check: gets ``{"values": [u.grad]}`` before every step of the hyperparameters, and may change it in place.

        Raises:
            TuningError: a loss, a hyperparameter or a scale is not finite.
            ValueError: the first training loss has not read a hyperparameter, or the validation loss does not depend on the
                weights.
        """
        settings = self.settings
        steps = min(settings.train_steps, self._left) if self._left > 0 else settings.train_steps
        return self._round((train() for _ in range(steps)), (valid() for _ in range(settings.valid_steps)), optimizer, check)

    def step(self, train: Any, val: Any, *, batches: int | tuple[int, int] | None = None) -> Round:
        """Do one round on data as ``hyperopt.Tuner.step`` takes them; the network's modes (training, evaluation) stay.

        If your loop has trained on ``loss`` since the last round, this is the round's training: ``train`` is not read, and only
        the hyperparameters and their scales are updated.

        Args:
            train: data of ``train_loss``: one batch (a tensor, tuple, mapping, or a list with tensors in it), a list of batches,
                an iterator, a ``DataLoader``, which goes on from step to step, a dataset, or a source such as ``Minibatches``.
            val: data of ``valid_loss``, likewise.
            batches: how many batches of each, or of ``train`` and of ``val``, with one update for each (default: ``train_steps``
                and ``valid_steps`` of what batches are drawn from, or on one batch, and all of a list).

        Raises:
            TypeError, ValueError: data that do not fit, or the same for both; named before anything is moved.
            TuningError: as ``round``.
        """
        settings, used = self.settings, slice(1 if self.lent else 0, 2)
        if not self.history:
            refuse_same_data(train, val)
        steps = min(settings.train_steps, self._left) if self._left > 0 else settings.train_steps
        counts, drawn = numbers_of_batches(batches)[used], (steps, settings.valid_steps)[used]
        modes = [(module, module.training) for module in self.model.modules()]
        with taken(self._batches[used], (train, val)[used], counts, drawn) as found:
            try:
                return self._round(found[0] if not self.lent else (), found[-1])
            finally:
                for module, mode in modes:
                    module.training = mode

    @property
    def steps(self) -> int:
        """The number of rounds so far."""
        return len(self.history)

    def __repr__(self) -> str:
        """The hyperparameters in their own units, the mode and the number of rounds."""
        values = ", ".join(f"{name}={value:.4g}" for name, value in self.space.values().items())
        return f"SelfTuning({type(self.model).__name__}, {values}, mode={self.settings.mode!r}, steps={self.steps})"

    @property
    def _left(self) -> int:
        """The updates of the weights that the warm-up has left, those of this round included."""
        return self.settings.warmup - self.updates + len(self.lent)

    def _round(
        self,
        train: Iterable[Any],
        valid: Iterable[Any],
        optimizer: torch.optim.Optimizer | None = None,
        check: GradientCheck | None = None,
    ) -> Round:
        """Do one round on these batches; without ``train`` for a loop that has trained itself."""
        warming = self._left > 0
        if not self.history:
            train, valid = list(train), [next(iter(valid))] if warming else list(valid)
            refuse_valid_loss(self, valid[0])
        before = self.space.u.detach().clone()
        train_losses = [*self.lent, *map(self.weight_step, train)]
        if warming:
            valid_losses = [self.validation_loss(next(iter(valid)))]
            if check is not None:
                check({"values": []})
        else:
            own = optimizer or self.optimizers["values"]
            valid_losses = [self.hyper_step(batch, own, check) for batch in valid]
        self.lent = []
        checked = check_response(self, list(self.recent), self.settings.check_steps) if self.recent else None
        self.recent.clear()
        for name, schedule in self._schedules.items():
            if name != "values" or optimizer is None:
                schedule.after_step()
        return self._record(warming, before, train_losses, valid_losses, checked)

    def schedule(self) -> TunedSchedule:
        """Return the hyperparameters of every update of the weights so far."""
        return TunedSchedule.of(self.space, [(past.steps, past.u) for past in self.history])

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state: network, hyperparameters, optimizers, schedules, noise, history, places in the data."""
        return {
            "model": self.model.state_dict(),
            "optimizers": {name: each.state_dict() for name, each in self.optimizers.items()},
            "schedules": {name: each.state_dict() for name, each in self._schedules.items()},
            "generator": self.generator.get_state(),
            "watch": self.watch.state_dict(),
            "updates": self.updates,
            "history": [list(past) for past in self.history],
            "lent": list(self.lent),
            "measured": self.measured.state_dict(),
            **{mine.name: mine.state_dict() for mine in self._batches},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, in place.

        Raises:
            ValueError: an entry is missing, unknown, or of another shape or dtype; nothing was changed.
        """
        own = self.model.state_dict()
        entries = ("model", "optimizers", "schedules", "generator", "watch", "updates", "history")
        check_entries(
            state, entries, "SelfTuning", optional=("lent", "measured", "train", "val")
        )  # older states do not have these
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
        self.lent = list(state.get("lent", ()))
        if "measured" in state:
            self.measured.load_state_dict(state["measured"])
        for mine in self._batches:
            mine.load_state_dict(state.get(mine.name))

    def _record(
        self,
        warming: bool,
        before: Tensor,
        train_losses: list[Tensor],
        valid_losses: list[Tensor],
        checked: ResponseCheck | None,
    ) -> Round:
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
        train_loss, valid_loss = sum(train) / len(train), valid[-1]
        if not warming:
            self.watch.collapse(train_loss, valid_loss)
        self.history.append(Past(len(train), train_loss, valid_loss, was, sigma))
        metrics: dict[str, float] = {f"hyper/{name}": value for name, value in space.values().items()}
        for name, (low, high) in space.band().items():
            metrics |= {f"hyper/{name}/low": low, f"hyper/{name}/high": high}
        metrics |= {f"stn/scale/{name}": value for name, value in named["sigma"].items()}
        metrics["stn/entropy"] = float(Draw.entropy_of(torch.tensor(sigma, dtype=torch.float64)))
        metrics |= {"stn/train_loss": train_loss, "stn/valid_loss": valid_loss, "stn/updates": float(self.updates)}
        gradients = len(train) * (1 + self.delta)
        if not warming:
            gradients += len(valid) * (1 + (self.settings.update == "sequential"))
        if checked is not None:
            gradients += checked.gradients
            metrics["stn/response_error"] = checked.error
            self._advise(checked, u, sigma)
        return Round(warming, train_loss, valid_loss, metrics, len(self.history), gradients)

    def _advise(self, checked: ResponseCheck, u: list[float], sigma: list[float]) -> None:
        """Say once a run which rate to change if the response is bad."""
        every, past = self.settings.check_every, self.history
        moved = max(abs(a - b) / scale for a, b, scale in zip(u, past[-every].u, sigma, strict=True))
        now, then = (math.fsum(each.train_loss for each in part) for part in (past[-every:], past[-2 * every : -every]))
        learning = now / then if len(past) >= 2 * every and then > 0 else 1.0

        def rate(name: str) -> float:
            groups = self.optimizers.get(name, self.optimizers["weights"]).param_groups
            return next((group["lr"] for group in groups if group.get("name") == name), groups[0]["lr"])

        if (text := advice(checked, self.watch.response(checked.error), moved, learning, rate)) is not None:
            note_once(f"{text} (said once a run)", "response")
