"""Meta-Weight-Net on MNIST: noisy labels and long tails, beside uniform weights and beside the clean images alone.

10,000 training images (fewer where a tail is cut), 1,000 clean validation images that tune the learned network, 10,000 test
images, looked at once, after the last step. Every row is the same network from the same start, trained by the same number of the
same gradient steps on batches of 100. ``results.json`` keeps what is there already. Needs MNIST under ``$HYPEROPT_DATA``:

    python experiments/weight_net/measure.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from torch.nn import functional

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared

from hyperopt.bilevel.batches import Minibatches
from hyperopt.data.splits import Rows
from hyperopt.tasks.linear import joined
from hyperopt.tasks.weight_net import WeightNetTask

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results.json", HERE / "README.md"
STEPS, STEP_SIZE, BATCH = 2500, 0.5, 100
PROBLEMS = {
    "40 % of the labels replaced": ["task.corrupted=0.4"],
    "long tail, 100 to 1": ["task.corrupted=0", "task.imbalance=100"],
}
ROWS = ("clean images alone", "uniform weights", "uniform weights, clean images added", "learned weights")
GRID = [i / 10 for i in range(101)]  # losses at which the curve is kept


def trained(task: WeightNetTask, w: dict[str, Tensor], rows: Rows, seed: int) -> float:
    """Test accuracy in percent of the network trained on rows with one weight for all."""
    batches = Minibatches((rows.x, rows.y), min(BATCH, len(rows)), seed)
    for _ in range(STEPS):
        x, y = batches.draw()
        w = {name: leaf.detach().requires_grad_() for name, leaf in w.items()}
        slopes = torch.autograd.grad(functional.cross_entropy(task.model(w, x), y), list(w.values()))
        w = {name: leaf - STEP_SIZE * g for (name, leaf), g in zip(w.items(), slopes, strict=True)}
    return accuracy(task, w)


@torch.no_grad()
def accuracy(task: WeightNetTask, w: dict[str, Tensor]) -> float:
    """In percent, on the test rows."""
    test = task.splits.test
    return 100 * float((task.model(w, test.x).argmax(1) == test.y).double().mean())


def measured(problem: str, seed: int) -> shared.Row:
    """One seed of one problem."""
    where = ("experiment=weight_net_mnist", "dataset.download=false", f"seed={seed}", f"inner.step_size={STEP_SIZE}")
    made = shared.built(*where, *PROBLEMS[problem])
    task = made.task
    assert isinstance(task, WeightNetTask)
    start = {name: leaf.clone() for name, leaf in task.model.w.items()}
    optimizer = made.optimizer.build(task.groups())
    begin = time.process_time()
    for _ in range(STEPS):
        task.step(optimizer, lambda gradients: None)
    seconds = time.process_time() - begin
    found: shared.Row = {"training rows": len(task.splits.train), "cpu_seconds": seconds}
    found["learned weights"] = accuracy(task, task.bilevel.w)
    measures = task.evaluate()
    found |= {name: measures[name] for name in ("weight/right_labels", "weight/replaced_labels") if name in measures}
    found["curve"] = task.weights(torch.tensor(GRID)).tolist()
    losses = task.training_losses(task.bilevel.w)
    for kind, of in (("right", losses[~task.corrupt]), ("replaced", losses[task.corrupt])):
        found[f"{kind} losses"] = torch.histogram(of.clamp(max=GRID[-1]), 50, range=(0.0, GRID[-1])).hist.tolist()
    train, val = task.splits.train, task.splits.val
    found["clean images alone"] = trained(task, start, val, seed)
    found["uniform weights"] = trained(task, start, train, seed)
    found["uniform weights, clean images added"] = trained(task, start, joined(train, val), seed)
    return found


def draw(results: shared.Row) -> None:
    """The learned curves of all seeds, over the losses behind them."""
    figure, axes = plt.subplots(1, len(PROBLEMS), figsize=(9, 3.2), layout="constrained")
    for axis, problem in zip(axes, PROBLEMS, strict=True):
        bars = axis.twinx()
        first = next(iter(results[problem].values()))
        for kind in ("right", "replaced"):
            if sum(first[f"{kind} losses"]):
                places = [GRID[-1] * (i + 0.5) / 50 for i in range(50)]
                bars.bar(places, first[f"{kind} losses"], width=GRID[-1] / 50, alpha=0.35, label=f"{kind} labels")
        bars.set(yscale="log", ylabel="training rows")
        bars.legend(fontsize=7)
        for seed, found in results[problem].items():
            axis.plot(GRID, found["curve"], label=f"seed {seed}")
        axis.set(title=problem, xlabel="loss of a training row", ylabel="its weight", ylim=(0, 1))
        axis.set_zorder(1)
        axis.patch.set_visible(False)
        axis.legend(fontsize=7, loc="center right")
    figure.savefig(HERE / "curves.png", dpi=110)


def tabulate(results: shared.Row) -> None:
    """The table of the page."""
    lines = [f"| trained on | {' | '.join(f'{problem}, %' for problem in PROBLEMS)} |", "|---|" + "---|" * len(PROBLEMS)]
    for row in ROWS:
        cells = []
        for problem in PROBLEMS:
            each = [found[row] for found in results[problem].values()]
            cells.append(f"{sum(each) / len(each):.2f} ({', '.join(f'{value:.2f}' for value in each)})")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    cells = []
    for problem in PROBLEMS:
        kinds = [
            name for name in ("weight/right_labels", "weight/replaced_labels") if name in next(iter(results[problem].values()))
        ]
        means = [sum(found[name] for found in results[problem].values()) / len(results[problem]) for name in kinds]
        cells.append(", ".join(f"{mean:.3f}" for mean in means))
    lines.append(f"| mean weight of right labels, of replaced ones | {' | '.join(cells)} |")
    cells = [f"{sum(f['cpu_seconds'] for f in results[p].values()) / len(results[p]):.0f}" for p in PROBLEMS]
    lines.append(f"| CPU seconds of the search | {' | '.join(cells)} |")
    shared.write_table(PAGE, "accuracies", lines)


def main() -> None:
    """Measure what is not there yet, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for seed in parser.parse_args().seeds:
        for problem in PROBLEMS:
            results = shared.load(RESULTS)
            if str(seed) not in results.get(problem, {}):
                results = shared.save(RESULTS, problem, {**results.get(problem, {}), str(seed): measured(problem, seed)})
                found = results[problem][str(seed)]
                print(problem, seed, {row: round(found[row], 2) for row in ROWS}, f"{found['cpu_seconds']:.0f} s", flush=True)
    results = shared.load(RESULTS)
    draw(results)
    tabulate(results)


if __name__ == "__main__":
    main()
