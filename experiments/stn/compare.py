"""Self-tuning networks against an untuned run, random search, TPE and implicit hypergradients, at the same CPU seconds.

    HYPEROPT_DATA=... nice python experiments/stn/compare.py [--seeds 0 1 2 3 4] [--problems ridge mlp cnn lstm] [--ways ...]

Every way has the same rows, starts at the same hyperparameters and trains by Adam, whose rate falls by a cosine. It looks
at the validation loss every few updates, and keeps the weights that were best there. The seconds of looking are a part of its
budget, and those of measuring the test loss are not. Cells that are in compare.json are not done again. See COMPARISON.md.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from compare_tables import tabulate
from images import random_values, suggested
from problems import PROBLEMS, Problem
from tables import HERE, shared
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import hyperopt
from hyperopt.bilevel.outer import OuterOptimizer
from hyperopt.stn import STN, Draw, HyperSpace, SelfTuning, SelfTuningSettings, convert

RATE = 0.01  # of Adam on the weights, but for those of SelfTuning at its default rates
TRIALS = 6  # of a search
POINTS = 12  # of a curve
Row = shared.Row


class Curve:
    """The best weights so far, by the validation loss, and their test loss at points of time.

    Args:
        problem: what is trained.
    """

    def __init__(self, problem: Problem) -> None:
        """Start the clock."""
        self.problem, self.best, self.kept, self.rows = problem, math.inf, None, []
        self.grid = [float(t) for t in np.geomspace(problem.seconds / 30, problem.seconds, POINTS)]
        self.started = time.process_time()

    @property
    def seconds(self) -> float:
        """CPU seconds so far, without those of measuring."""
        return time.process_time() - self.started

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.seconds >= self.problem.seconds

    @torch.no_grad()
    def look(self, model: STN) -> float:
        """The validation loss of a network at its hyperparameters; it is kept if it is the best so far."""
        model.eval()
        loss = self.problem.val(model)
        if loss < self.best:
            self.best, self.kept = loss, (copy.deepcopy(model), model.space.values())
        if self.seconds >= self.grid[0]:
            self.measure()
        return loss

    @torch.no_grad()
    def measure(self) -> None:
        """A point of the curve, off the clock."""
        started = time.process_time()
        seconds = started - self.started
        self.grid = [t for t in self.grid if t > seconds] or [math.inf]
        if self.kept is not None:
            model, values = self.kept
            self.rows.append({"cpu": seconds, "val/loss": self.best, **self.problem.test(model), "hyper": values})
        self.started += time.process_time() - started


def network(problem: Problem, respond: bool) -> STN:
    """The network at its start."""
    return convert(problem.module(), HyperSpace(problem.declared), respond=respond)


def self_tuning(problem: Problem, curve: Curve, mode: str, authors: bool = False) -> Row:
    """A self-tuning network, at the default rates or at those of the first paper.

    Its length in rounds, over which the rates fall, is estimated from a few rounds of another one, which are not counted.
    """

    def made(rounds: int) -> SelfTuning:
        settings = SelfTuningSettings(mode=mode, rounds=rounds)
        fixed: dict[str, OuterOptimizer] = {}
        if authors:
            falling = partial(CosineAnnealingLR, T_max=rounds)
            fixed["weights"] = OuterOptimizer(partial(Adam, lr=RATE), falling)
            fixed["values"] = OuterOptimizer(partial(Adam, lr=0.003))
        return SelfTuning(network(problem, respond=True), problem.train_loss, problem.valid_loss, settings, **fixed)

    def one_round(tuning: SelfTuning) -> None:
        tuning.round(problem.tuned_train, problem.valid)

    state = torch.get_rng_state()
    trial = made(1000)
    one_round(trial)
    started = time.process_time()
    for _ in range(5):
        one_round(trial)
    looking = time.process_time()
    with torch.no_grad():
        problem.val(trial.model.eval())
    look = (time.process_time() - looking) / problem.look
    each = (looking - started) / 5
    checks = 20 * (each / 5) / trial.settings.check_every  # a check of the response takes about 20 gradients, a round up to 5
    rounds = max(int(problem.seconds / (each + look * trial.settings.train_steps + checks)), 1)
    torch.set_rng_state(state)
    tuning = made(rounds)
    curve.started = time.process_time()
    trace = []
    while tuning.steps < rounds and not curve.over:
        one_round(tuning)
        if tuning.steps % -(-problem.look // tuning.settings.train_steps) == 0:
            curve.look(tuning.model)
            trace.append([curve.seconds, *tuning.space.values().values()])
    curve.look(tuning.model)
    return {"updates": tuning.updates, "tries": tuning.steps, "planned": rounds, "trace": trace}


def trained(problem: Problem, curve: Curve, raw: Tensor, seconds: float) -> tuple[float, int]:
    """A plain training at fixed hyperparameters for so many seconds: its best validation loss, and its updates."""
    model, updates, best, begun = network(problem, respond=False), 0, math.inf, curve.seconds
    with torch.no_grad():
        model.space.u.copy_(raw)
    optimizer = Adam(model.base_parameters(), lr=RATE)
    while (part := (curve.seconds - begun) / seconds) < 1:
        update(problem, model, optimizer, part, lambda batch, draw: problem.train_loss(model, batch, draw))
        updates += 1
        if updates % problem.look == 0:
            best = min(best, curve.look(model))
    return min(best, curve.look(model)), updates


def update(problem: Problem, model: STN, optimizer: Adam, part: float, loss: Callable[[object, Draw], Tensor]) -> None:
    """One update of the weights of a plain network, when a part of its time is over."""
    for group in optimizer.param_groups:
        group["lr"] = RATE * (1 + math.cos(math.pi * part)) / 2
    batch = problem.train()
    model.train()
    with torch.no_grad():
        draw = model.space.draw(rows_of(batch), perturb=False)
    optimizer.zero_grad()
    with model.at(draw):
        loss(batch, draw).backward()
    optimizer.step()


def rows_of(batch: object) -> int:
    """The number of rows."""
    return len(batch[0]) if isinstance(batch, tuple) else len(batch)  # type: ignore[arg-type]


def implicit(problem: Problem, curve: Curve, every: int = 10, lr: float = 0.1) -> Row:
    """The plain training with a ``Tuner`` beside it, which moves the hyperparameters that have a derivative."""
    model = network(problem, respond=False)
    space = model.space.requires_grad_(False)
    places = {name: space.names.index(name) for name in problem.smooth}
    start = space.u.clone()
    hyper = hyperopt.Hyperparameters({name: hyperopt.Real(float(start[place])) for name, place in places.items()})

    def train_loss(model: STN, batch: object, lam: dict[str, Tensor]) -> Tensor:
        m = torch.stack([lam[name] if name in places else start[k] for k, name in enumerate(space.names)])
        m = m.expand(rows_of(batch), -1)
        draw = Draw(space, m, torch.zeros_like(m), space.sigma, responds=False)
        model.train()
        with model.at(draw):
            return problem.train_loss(model, batch, draw)

    def val_loss(model: STN, batch: object, lam: dict[str, Tensor]) -> Tensor:
        model.eval()
        return problem.valid_loss(model, batch, None)

    optimizer = Adam(model.base_parameters(), lr=RATE)
    tuner = hyperopt.Tuner(
        model,
        hyper,
        train_loss=train_loss,
        val_loss=val_loss,
        optimizer=Adam(hyper.parameters(), lr=lr),
        adjoint="auto" if problem.best is not None else hyperopt.FiniteDifference(),
        trained_by=optimizer,
    )
    updates, trace = 0, []
    while not curve.over:
        part = curve.seconds / problem.seconds
        update(problem, model, optimizer, part, lambda batch, draw: problem.train_loss(model, batch, draw))
        updates += 1
        if updates >= 50 and updates % every == 0:
            tuner.step(problem.train(), problem.valid())
            with torch.no_grad():
                for name, value in hyper.read().items():
                    space.u[places[name]] = value
        if updates % problem.look == 0:
            curve.look(model)
            trace.append([curve.seconds, *space.values().values()])
    curve.look(model)
    return {"updates": updates, "tries": tuner.steps, "trace": trace}


def untuned(problem: Problem, curve: Curve) -> Row:
    """One run at the start."""
    _, updates = trained(problem, curve, HyperSpace(problem.declared).u.detach(), problem.seconds)
    return {"updates": updates, "tries": 1}


def searched(
    problem: Problem, curve: Curve, ask: Callable[[], dict[str, float]], tell: Callable[[float], None], first: bool = True
) -> Row:
    """Short runs one after another, the first at the start unless ``ask`` sees to that; the best counts."""
    total, tries = 0, []
    for k in range(TRIALS):
        values = start(problem) if first and k == 0 else ask()
        each = {key: dataclasses.replace(one, init=values[key]) for key, one in problem.declared.items()}  # type: ignore[type-var]
        loss, updates = trained(problem, curve, HyperSpace(each).u.detach(), problem.seconds / TRIALS)
        tell(loss)
        total += updates
        tries.append([loss, values])
    return {"updates": total, "tries": TRIALS, "trials": tries}


def random_search(problem: Problem, curve: Curve, seed: int) -> Row:
    """Independent draws."""
    random = np.random.RandomState(seed)
    return searched(problem, curve, lambda: random_values(problem.declared, random, problem.positive), lambda loss: None)


def tpe(problem: Problem, curve: Curve, seed: int) -> Row:
    """Optuna's TPE, with the start and two random draws before its model."""
    study, asked = shared.tpe(seed, startup=3), []
    study.enqueue_trial(start(problem))

    def ask() -> dict[str, float]:
        asked.append(study.ask())
        return suggested(problem.declared, asked[-1], problem.positive)

    return searched(problem, curve, ask, lambda loss: study.tell(asked[-1], loss) and None, first=False)


def start(problem: Problem) -> dict[str, float]:
    """The values that every way starts at."""
    return {name: each.init for name, each in problem.declared.items()}


WAYS: dict[str, Callable[[Problem, Curve, int], Row]] = {
    "untuned": lambda problem, curve, seed: untuned(problem, curve),
    "random search": random_search,
    "TPE": tpe,
    "implicit": lambda problem, curve, seed: implicit(problem, curve),
    "first STN": lambda problem, curve, seed: self_tuning(problem, curve, "classic", authors=True),
    "Delta-STN": lambda problem, curve, seed: self_tuning(problem, curve, "delta_linear"),
    "centred STN": lambda problem, curve, seed: self_tuning(problem, curve, "centred"),
}


def measured(name: str, way: str, seed: int, seconds: float | None = None) -> Row:
    """One cell of the table."""
    torch.manual_seed(seed)
    problem = PROBLEMS[name](seed)
    if seconds is not None:
        problem = dataclasses.replace(problem, seconds=seconds)
    curve = Curve(problem)
    found = WAYS[way](problem, curve, seed)
    curve.measure()
    facts = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "python": platform.python_version()}
    return {**facts, **found, "best": problem.best, "names": list(problem.declared), "curve": curve.rows}


def main() -> None:
    """Measure what is missing; write the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seconds", type=float, default=None, help="CPU seconds of each way, in place of the problem's")
    parser.add_argument("--results", type=Path, default=HERE / "compare.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.problems:
        for way in options.ways:  # what is imported and compiled at the first use is in no budget
            measured(name, way, options.seeds[0], 2.0 if way == "implicit" else 0.5)
    for seed in options.seeds:
        for name in options.problems:
            for way in options.ways:
                key = f"{name} | {way} | {seed}"
                if key not in shared.load(options.results):
                    found = measured(name, way, seed, options.seconds)
                    shared.save(options.results, key, found)
                    print(key, found["updates"], {k: v for k, v in found["curve"][-1].items() if k != "hyper"}, flush=True)
    if options.results == HERE / "compare.json":
        tabulate(shared.load(options.results))


if __name__ == "__main__":
    main()
