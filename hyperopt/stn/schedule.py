"""The schedule of hyperparameters that a run has found, saved, and replayed on a plain network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt.bilevel.outer import Make, OuterOptimizer
from hyperopt.core.text import described
from hyperopt.data.reading import UnreadableError, read_json
from hyperopt.stn.draw import Draw
from hyperopt.stn.network import STN, convert, leading
from hyperopt.stn.rates import optimizer_of
from hyperopt.stn.space import HyperSpace


@dataclass(frozen=True)
class TunedSchedule:
    """The hyperparameters of each update of the weights.

    Attributes:
        names: names of the hyperparameters.
        steps: number of updates of the weights in each round.
        raw: the hyperparameters of each round, in R.
        values: their values, for readers of the file.

    Example:
        >>> from hyperopt import stn
        >>> space = stn.HyperSpace({"decay": stn.Positive(1.0)})
        >>> schedule = stn.TunedSchedule.of(space, [(2, [0.0]), (1, [1.0])])  # updates of the weights, variables in R
        >>> schedule.updates, schedule.each()
        (3, [(0.0,), (0.0,), (1.0,)])
    """

    names: tuple[str, ...]
    steps: tuple[int, ...]
    raw: tuple[tuple[float, ...], ...]
    values: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, space: HyperSpace, history: Sequence[tuple[int, Sequence[float]]]) -> TunedSchedule:
        """Make a schedule from ``(updates, values in R)`` of each round."""
        raw = tuple(tuple(map(float, u)) for _, u in history)
        columns = []
        for i, name in enumerate(space.names):
            m = torch.tensor([u[i] for u in raw], dtype=torch.float64)
            columns.append(space.declared[name].value(m).tolist())
        return cls(space.names, tuple(steps for steps, _ in history), raw, tuple(zip(*columns, strict=True)))

    def __repr__(self) -> str:
        """Return the names and the first rounds."""
        return described(self, names=self.names, steps=self.steps, raw=self.raw, values=self.values)

    @property
    def updates(self) -> int:
        """The total number of updates of the weights."""
        return sum(self.steps)

    def each(self) -> list[tuple[float, ...]]:
        """Return the hyperparameters in R of every single update of the weights."""
        return [u for steps, u in zip(self.steps, self.raw, strict=True) for _ in range(steps)]

    def save(self, path: Path) -> None:
        """Write the schedule as JSON, as a whole or not at all."""
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps({name: getattr(self, name) for name in ("names", "steps", "raw", "values")}), encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> TunedSchedule:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            UnreadableError: the file is not a schedule.
        """
        found = read_json(path)
        try:
            names, steps = tuple(found["names"]), tuple(found["steps"])
            raw, values = (tuple(tuple(map(float, row)) for row in found[name]) for name in ("raw", "values"))
            texts = all(isinstance(name, str) for name in names)
            counts = all(isinstance(count, int) and 0 <= count < 2**31 for count in steps)
            if (
                not texts
                or not counts
                or {len(row) for row in (*raw, *values)} - {len(names)}
                or not len(steps) == len(raw) == len(values)
            ):
                raise ValueError("of other lengths")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UnreadableError(f"{path} is not a schedule of hyperparameters") from error
        return cls(names, steps, raw, values)


def replay(
    schedule: TunedSchedule,
    module: nn.Module,
    space: HyperSpace,
    train_loss: Callable[[STN, Any, Draw], Tensor],
    train: Callable[[], Any],
    weights: OuterOptimizer | Make | None = None,
    rows: Callable[[Any], int] = leading,
) -> STN:
    """Train a plain network under the schedule of a self-tuning one: the same loss, no response, no perturbation.

    Args:
        schedule: the schedule that was found.
        module: the plain network, with ``hyperopt.stn.Dropout`` where dropout was tuned; it is copied.
        space: the hyperparameters, with the same names.
        train_loss: training loss of the self-tuning network.
        train: a function that returns the next batch.
        weights: the optimizer (None: that of a ``SelfTuning`` of unknown length, see ``hyperopt.stn.rates``).
        rows: a function that returns the number of rows of a batch.

    Returns:
        The trained network, without a response, at the last hyperparameters of the schedule; ``collapse`` makes it plain.

    Raises:
        ValueError: the space has other names than the schedule.

    Reference: Bae & Grosse, NeurIPS 2020, arXiv 2010.13514.

    Example:
        >>> import torch
        >>> from hyperopt import stn
        >>> space = stn.HyperSpace({"decay": stn.Positive(1.0)})
        >>> schedule = stn.TunedSchedule.of(space, [(20, [0.0]), (20, [1.0])])
        >>> def train_loss(net, batch, draw):
        ...     return (net(batch, draw) - 1).square().mean() + (draw.h["decay"] * net.squared_norm(draw)).mean()
        >>> trained = stn.replay(schedule, torch.nn.Linear(2, 1), space, train_loss, lambda: torch.ones(4, 2))
        >>> round(trained.space.values()["decay"], 2)  # the last of the schedule, e
        2.72
    """
    if space.names != schedule.names:
        raise ValueError(
            f"the schedule is of {', '.join(schedule.names)}, the space of {', '.join(space.names)}; declare the same"
        )
    model = convert(module, space, respond=False)
    optimizer = optimizer_of("weights", weights, None, space.sigma.detach()).build({"weights": model.base_parameters()})
    model.train()
    for u in schedule.each():
        batch = train()
        with torch.no_grad():
            space.u.copy_(torch.tensor(u, dtype=torch.float64))
            draw = space.draw(rows(batch), perturb=False)
        optimizer.zero_grad()
        with model.at(draw):
            train_loss(model, batch, draw).backward()
        optimizer.step()
    return model
