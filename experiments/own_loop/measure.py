"""Hyperparameters of a convolutional network by five ways, at the same CPU seconds.

    pip install -e ".[bench]"
    python experiments/own_loop/measure.py [--seeds 0 1 2 3 4] [--ways defaults TPE ...] [--budget 30]

Every way has the same images, starts at the same hyperparameters, looks at the validation loss every ``LOOK`` steps of training,
and keeps the weights that were best there: the seconds of that are a part of its budget. The test loss of the weights that are
kept is measured at points of time, and is not counted. Cells that are in results.json are not done again. Needs Fashion-MNIST
under ``$HYPEROPT_DATA``.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from problem import DEFAULTS, LAYERS, Rows, Sizes, Values, hyperparameters, images, network, train_loss, val_loss
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared

import hyperopt

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent

BUDGET = 30.0  # CPU seconds
LOOK = 20  # steps between two looks at the validation loss
STEPS = 2000  # most steps of a training at fixed hyperparameters
PATIENCE = 300  # steps without a better validation loss after which it is stopped
POINTS = 9  # of a curve
RANGES = {"decay": (1e-5, 1e-1), "smoothing": (1e-3, 0.5), "shift": (0.05, 3.0), "noise": (3e-3, 1.0)}  # of a search, logarithmic
Ask = Callable[[], dict[str, Tensor]]
Tell = Callable[[float], None]


class Curve(shared.Clock):
    """The best weights so far, by the validation loss, and their test loss at points of time.

    Args:
        rows: images of val and test.
        budget: CPU seconds.
        points: how many points of time, evenly in the logarithm.
    """

    def __init__(self, rows: Rows, budget: float, points: int = POINTS) -> None:
        """Start the clocks."""
        super().__init__(budget)
        self.val, self.test = rows.val.tensors, rows.test.tensors
        self.grid = [float(t) for t in np.geomspace(budget / 30, budget, points)]
        self.best, self.model, self.rows = math.inf, None, []
        self.wall = time.perf_counter()

    @torch.no_grad()
    def see(self, model: nn.Module) -> float:
        """The validation loss of a model, which is kept if it is the best so far."""
        loss = float(val_loss(model, self.val, {}))
        if loss < self.best:
            self.best, self.model = loss, copy.deepcopy(model)
        if self.over or self.seconds >= self.grid[0]:
            self.measure()
        return loss

    @torch.no_grad()
    def measure(self) -> None:
        """A point of the curve, off the clocks."""
        cpu, wall = time.process_time(), time.perf_counter()
        seconds = cpu - self.begun
        self.grid = [t for t in self.grid if t > seconds] or [math.inf]
        if self.model is not None:
            scores, y = self.model(self.test[0]), self.test[1]
            accuracy = float((scores.argmax(1) == y).double().mean())
            found = {"val/loss": self.best, "test/loss": float(cross_entropy(scores, y)), "test/accuracy": accuracy}
            self.rows.append({"cpu": seconds, "wall": wall - self.wall, **found})
        self.begun += time.process_time() - cpu
        self.wall += time.perf_counter() - wall


def trained(sizes: Sizes, rows: Rows, lam: Values, curve: Curve) -> tuple[float, int]:
    """The training of the user's at fixed hyperparameters, stopped early; its best validation loss, and its steps."""
    model, loader = network(sizes), DataLoader(rows.train, sizes.batch, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=sizes.lr, momentum=0.9)
    best, since = math.inf, 0
    for step, batch in enumerate(endless(loader), 1):
        optimizer.zero_grad()
        train_loss(model, batch, lam).backward()
        optimizer.step()
        if step % LOOK == 0:
            loss = curve.see(model)
            best, since = (loss, step) if loss < best else (best, since)
        if step >= STEPS or step - since >= PATIENCE or curve.over:
            return best, step
    raise AssertionError


@dataclass(frozen=True)
class Beside:
    """How a ``Tuner`` is used beside the loop.

    Attributes:
        adjoint: of the tuner.
        every: steps of training between two steps of the tuner.
        lr: of Adam on the hyperparameters.
        val_batch: images of ``val_loss`` in a step of the tuner.
    """

    adjoint: Any
    every: int
    lr: float
    val_batch: int = 200


def tuned(sizes: Sizes, rows: Rows, curve: Curve, beside: Beside) -> shared.Row:
    """The same training with a ``Tuner`` beside it."""
    model, loader = network(sizes), DataLoader(rows.train, sizes.batch, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=sizes.lr, momentum=0.9)
    hyper = hyperparameters()
    moves = torch.optim.Adam(hyper.parameters(), lr=beside.lr)
    tuner = hyperopt.Tuner(model, hyper, train_loss=train_loss, val_loss=val_loss, optimizer=moves, adjoint=beside.adjoint)
    val_loader = DataLoader(rows.val, beside.val_batch, shuffle=True)
    step, cost, trace = 0, 0, []
    for batch in endless(loader):
        optimizer.zero_grad()
        tuner.loss(batch).backward()
        optimizer.step()
        step += 1
        if step >= sizes.first and step % beside.every == 0:
            record = tuner.step(loader, val_loader)
            cost += record.gradients
            trace.append([curve.seconds, *flat(hyper.read())])
        if step % LOOK == 0:
            curve.see(model)
        if curve.over:
            return {"steps": step, "tries": tuner.steps, "gradients": cost, "found": flat(hyper.read()), "trace": trace}
    raise AssertionError


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def flat(lam: Values) -> list[float]:
    """All hyperparameters, in their own units."""
    return torch.cat([lam[name].reshape(-1) for name in DEFAULTS]).tolist()


def values(numbers: dict[str, float]) -> dict[str, Tensor]:
    """Hyperparameters from the numbers of a search."""
    decay = torch.tensor([numbers[f"decay{k}"] for k in range(LAYERS)])
    return {"decay": decay, **{name: torch.tensor(numbers[name]) for name in DEFAULTS if name != "decay"}}


def ranges() -> dict[str, tuple[float, float]]:
    """Of every number of a search."""
    return {f"decay{k}": RANGES["decay"] for k in range(LAYERS)} | {n: r for n, r in RANGES.items() if n != "decay"}


def defaults(seed: int) -> tuple[Ask, Tell]:
    """The defaults, again and again: from other weights, in another order."""
    return lambda: hyperparameters().read(), lambda loss: None


def random_search(seed: int) -> tuple[Ask, Tell]:
    """The defaults, and then draws that are uniform in the logarithm."""
    random, first = np.random.RandomState(seed), [hyperparameters().read()]

    def ask() -> dict[str, Tensor]:
        return (
            first.pop()
            if first
            else values({k: math.exp(random.uniform(math.log(low), math.log(high))) for k, (low, high) in ranges().items()})
        )

    return ask, lambda loss: None


def tpe(seed: int) -> tuple[Ask, Tell]:
    """Optuna's TPE, of whose trials the first has the defaults and the next three are random."""
    study, asked = shared.tpe(seed, startup=4), []
    study.enqueue_trial({name: DEFAULTS[name.rstrip("0123456789")] for name in ranges()})

    def ask() -> dict[str, Tensor]:
        asked.append(study.ask())
        return values({k: asked[-1].suggest_float(k, *r, log=True) for k, r in ranges().items()})

    return ask, lambda loss: study.tell(asked[-1], loss) and None


def searched(sizes: Sizes, rows: Rows, curve: Curve, ask: Ask, tell: Tell) -> shared.Row:
    """Trainings, one after another, of which the best counts."""
    tries, total, best = 0, 0, (math.inf, [])
    while not curve.over:
        lam = ask()
        loss, made = trained(sizes, rows, lam, curve)
        tries, total = tries + 1, total + made
        best = min(best, (loss, flat(lam)))
        tell(loss)
    return {"steps": total, "tries": tries, "found": best[1]}


def measured(way: str, seed: int, budget: float, sizes: Sizes) -> shared.Row:
    """One cell of the table."""
    torch.manual_seed(seed)
    rows = images(sizes, seed)
    curve = Curve(rows, budget)
    if way in TUNERS:
        found = tuned(sizes, rows, curve, TUNERS[way])
    else:
        found = searched(sizes, rows, curve, *SEARCHES[way](seed))
    curve.measure()
    return {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, **found, "curve": curve.rows}


WAYS = {  # and their colours
    "defaults": "C7",
    "random search": "C2",
    "TPE": "C3",
    "Tuner": "C0",
    "Tuner, finite differences": "C1",
}
SEARCHES = {"defaults": defaults, "random search": random_search, "TPE": tpe}
TUNERS = {
    "Tuner": Beside("auto", every=20, lr=0.2),
    "Tuner, finite differences": Beside(hyperopt.FiniteDifference(), every=10, lr=0.1),
}
SHOWN = {"val/loss": "validation loss", "test/loss": "test loss", "test/accuracy": "test accuracy"}
SHARES = (0.1, 0.3, 1.0)  # of the budget


def at(cell: shared.Row, share: float, key: str) -> float:
    """What the weights that had been kept by then gave: the last point no later than this share of the budget."""
    last = cell["curve"][-1]["cpu"]
    return [row for i, row in enumerate(cell["curve"]) if i == 0 or row["cpu"] <= share * last * 1.02][-1][key]


def told(each: list[float], digits: int = 4) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(each) if len(each) > 1 else 0.0
    return f"{statistics.fmean(each):.{digits}f} ± {deviation:.{digits}f}"


def tabulate(results: shared.Row, page: Path) -> None:
    """The tables of the page."""
    lines = [
        "| way | seeds | validation loss | test loss | test accuracy | test loss at 10 %, 30 % | steps | trials or outer steps |"
    ]
    lines.append("|---" * 8 + "|")
    found = ["| way | decay of each layer | smoothing | shift, pixels | noise |", "|---" * 5 + "|"]
    for way in WAYS:
        cells = [cell for key, cell in results.items() if key.startswith(f"{way} | ")]
        if not cells:
            continue
        last = [told([at(cell, 1.0, key) for cell in cells]) for key in SHOWN]
        early = ", ".join(f"{statistics.fmean(at(cell, share, 'test/loss') for cell in cells):.4f}" for share in SHARES[:-1])
        made = [f"{statistics.fmean(cell[key] for cell in cells):.0f}" for key in ("steps", "tries")]
        lines.append(f"| {way} | {len(cells)} | {' | '.join([*last, early, *made])} |")
        middle = np.median([cell["found"] for cell in cells], 0)
        shown = [" ".join(f"{x:.1e}" for x in middle[:LAYERS]), *(f"{x:.3g}" for x in middle[LAYERS:])]
        found.append(f"| {way} | {' | '.join(shown)} |")
    shared.write_table(page, "losses", lines)
    shared.write_table(page, "found", found)


def draw(results: shared.Row, path: Path) -> None:
    """Losses of the weights that are kept, over CPU seconds: means of the seeds, and their standard deviations."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    shares = np.geomspace(1 / 30, 1, 40)
    for way, colour in WAYS.items():
        cells = [cell for key, cell in results.items() if key.startswith(f"{way} | ")]
        if not cells:
            continue
        seconds = shares * statistics.fmean(cell["curve"][-1]["cpu"] for cell in cells)
        for axis, key in zip(axes, ("val/loss", "test/loss"), strict=True):
            values = np.array([[at(cell, share, key) for share in shares] for cell in cells])
            mean, deviation = values.mean(0), values.std(0)
            axis.step(seconds, mean, where="post", color=colour, label=way, lw=1.6)
            axis.fill_between(seconds, mean - deviation, mean + deviation, step="post", color=colour, alpha=0.12, lw=0)
            axis.set(xlabel="CPU seconds of one thread", ylabel=SHOWN[key], xscale="log", ylim=(0.45, 0.75))
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Measure what is missing; write the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--ways", nargs="*", default=[*SEARCHES, *TUNERS], choices=[*SEARCHES, *TUNERS])
    parser.add_argument("--budget", type=float, default=BUDGET, help="CPU seconds of each way")
    parser.add_argument("--small", action="store_true", help="few images and channels, to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json, README.md and curves.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(200, 200, 500, 2, 8, 50, first=20) if options.small else Sizes()
    path = options.out / "results.json"
    for seed in options.seeds:
        for way in options.ways:
            key = f"{way} | {seed}"
            if key not in shared.load(path):
                found = measured(way, seed, options.budget, sizes)
                shared.save(path, key, found)
                print(key, found["steps"], found["tries"], {k: round(v, 4) for k, v in found["curve"][-1].items()}, flush=True)
    results = shared.load(path)
    tabulate(results, options.out / "README.md")
    draw(results, options.out / "curves.png")


if __name__ == "__main__":
    main()
