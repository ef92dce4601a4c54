"""Ten learned images: ``experiment=data_distillation_mnist`` on MNIST and Fashion-MNIST, three seeds each.

    python experiments/bilevel/distillation.py [--runs DIR]

Beside it, what a linear model reaches on ten real images, and on all 50,000. Writes results.json, the pictures and the table.
"""

from __future__ import annotations

import shutil

import torch
from common import HERE, Row, built, evaluated, run, runs_directory, save, seconds, spread, write_table

from hyperopt import InnerLBFGS
from hyperopt.bilevel.estimate import State
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.tasks.distillation import DataDistillationTask
from hyperopt.tasks.scores import loss_of

SEEDS = (0, 1, 2)
SETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}


def linear(dataset: str, seed: int, whole: bool) -> float:
    """Test accuracy of the same model trained on one real image a class, the first of the seed, or on all rows."""
    sizes = ["dataset.train=50000", "dataset.val=10000"]
    task = built("experiment=data_distillation_mnist", f"dataset={dataset}", *sizes, f"seed={seed}").task
    assert isinstance(task, DataDistillationTask)
    train, decay = task.splits.train, 0.0 if whole else task.decay
    first = [int((train.y == c).nonzero()[0]) for c in range(task.splits.num_classes)]
    rows = train if whole else train.take(torch.tensor(first))

    def inner(w, lam, batch):
        return loss_of(task.model(w, rows.x), rows.y) + decay / 2 * sum(leaf.square().sum() for leaf in w.values())

    InnerLBFGS(rtol=1e-3, max_steps=100).solve(BilevelProblem(inner, inner), {}, State(task.bilevel.w))
    return task.measure(task.bilevel.w)["test/accuracy"]


def main() -> None:
    """Measure, and write the results."""
    runs = runs_directory(__doc__)
    results: Row = {}
    lines = ["| dataset | ten learned images | ten real images | 50,000 real images | seconds |", "|---|---|---|---|---|"]
    for dataset, shown in SETS.items():
        found: dict[str, list[float]] = {"learned": [], "outer/loss": [], "seconds": [], "ten real": [], "all": []}
        for seed in SEEDS:
            out = runs / f"distillation-{dataset}-{seed}"
            sizes = ["dataset.train=50000", "dataset.val=10000"]
            rows = run(out, "experiment=data_distillation_mnist", f"dataset={dataset}", *sizes, f"seed={seed}")
            last = evaluated(rows)[-1]
            found["learned"].append(last["test/accuracy"])
            found["outer/loss"].append(last["outer/loss"])
            found["seconds"].append(seconds(out))
            found["ten real"].append(linear(dataset, seed, whole=False))
        found["all"].append(linear(dataset, 0, whole=True))
        results[dataset] = {name: spread(values) for name, values in found.items()}
        means = {name: row["mean"] for name, row in results[dataset].items()}
        cells = " | ".join(f"{100 * means[name]:.1f} %" for name in ("learned", "ten real", "all"))
        lines.append(f"| {shown} | {cells} | {means['seconds']:.0f} |")
        print(lines[-1], results[dataset], flush=True)
        shutil.copyfile(runs / f"distillation-{dataset}-0" / "figures" / "images.png", HERE / f"distilled_{dataset}.png")
    save("data_distillation", results)
    write_table("data_distillation", lines)


if __name__ == "__main__":
    main()
