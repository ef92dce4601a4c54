"""Data cleaning on MNIST, beside training on what is known to be clean: accuracies, F1, and the weights that were found.

5,000 training images, half of whose labels are replaced, a weight for each; 5,000 clean validation images tune the weights;
10,000 test images. Each row is a model trained from the same start by the same recipe (Adam, batches of 100, its epochs below) on
a set of images, and tested once at the end. ``--seeds`` and ``--hidden 300`` choose what is run; what is there already in
results.json is kept, and ``--figure`` only draws the histogram again. Needs MNIST under ``$HYPEROPT_DATA``:

    python experiments/cleaning/measure.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared

from hyperopt.data.splits import Rows
from hyperopt.tasks.cleaning import CleaningTask, found_clean
from hyperopt.tasks.network import perceptron

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
Row = shared.Row
EPOCHS = 20
BATCHES = ["task.batch_size=500", "task.val_batch_size=500"]
METHODS: dict[str, tuple[list[str], int]] = {  # overrides of experiment=data_cleaning_mnist, and outer steps
    "V-PBGD": (["adjoint=v_pbgd", "adjoint.step_size=0.3", "adjoint.ramp=100"], 150),
    "SOBA": (["adjoint=soba", "adjoint.step_size=0.3"], 150),
    "implicit, CG": (["adjoint=cg_rough"], 150),
    "implicit, Neumann": (["adjoint=neumann_rough"], 150),
    "unrolled": (["adjoint=unrolled"], 150),
    "SABA": (["adjoint=saba", "adjoint.step_size=0.3", "optimizer.lr=0.03", *BATCHES], 1500),
    "stocBiO": (["adjoint=stocbio", "adjoint.step_size=0.3"], 150),
    "F2SA": (["adjoint=f2sa", "adjoint.step_size=0.3", "adjoint.growth=0.1"], 150),
}
CHECKED = ("V-PBGD", "SOBA")  # whose weights are also held against models that have not seen the image
DIVISIONS = 3
TEMPERATURE = 0.2  # what the log-odds of the checked weights are multiplied by
SMOOTHING = 0.1  # of the labels, in the rows that say so
Set = tuple[Tensor, Tensor, Tensor]


def searched(seed: int, hidden: list[int], name: str, steps: int | None = None) -> tuple[CleaningTask, float]:
    """The task after the search of a method, of its number of steps or of another, and its CPU seconds."""
    given, usual = METHODS[name]
    where = ("experiment=data_cleaning_mnist", "dataset.download=false", f"seed={seed}", f"task.hidden={hidden}")
    made = shared.built(*where, *given)
    task, optimizer = made.task, made.optimizer.build(made.task.groups())
    assert isinstance(task, CleaningTask)
    start = time.process_time()
    for _ in range(usual if steps is None else steps):
        task.step(optimizer, lambda gradients: None)
    return task, time.process_time() - start


def fitted(sets: list[Set], hidden: list[int], seed: int, smoothing: float = 0.0) -> nn.Module:
    """A model trained on images, labels and weights, and on labels that are smoothed by so much."""
    generator = torch.Generator().manual_seed(seed)
    x, y, weights = (torch.cat(part) for part in zip(*sets, strict=True))
    kept = weights > 0
    x, y, weights = x[kept], y[kept], weights[kept]
    model = perceptron((x.shape[1], *hidden, 10), generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), generator=generator).split(100):
            optimizer.zero_grad()
            losses = functional.cross_entropy(model(x[rows]), y[rows], reduction="none", label_smoothing=smoothing)
            (weights[rows] * losses).mean().backward()
            optimizer.step()
    return model


@torch.no_grad()
def scored(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss, and accuracy in percent."""
    z = model(x)
    return float(functional.cross_entropy(z, y)), 100 * float((z.argmax(1) == y).double().mean())


def row(sets: list[Set], test: Rows, hidden: list[int], seed: int, smoothing: float = 0.0) -> Row:
    """One line of the table: the accuracy on the test rows, looked at once."""
    return {"test": scored(fitted(sets, hidden, seed, smoothing), test.x, test.y)[1]}


def baselines(seed: int, hidden: list[int]) -> dict[str, Row]:
    """What the methods are held against; no search."""
    task, _ = searched(seed, hidden, "V-PBGD", steps=0)
    train, val, test = (getattr(task.splits, part) for part in ("train", "val", "test"))
    true = made_labels(task)
    ones = torch.ones(len(train))
    clean = (val.x, val.y, torch.ones(len(val)))
    half = (train.x, train.y, (~task.corrupt).float())
    trust = probability(fitted([clean], hidden, seed), train)
    return {
        "clean only": row([clean], test, hidden, seed),
        "clean only, smoothed": row([clean], test, hidden, seed, SMOOTHING),
        "all, uncleaned": row([clean, (train.x, train.y, ones)], test, hidden, seed),
        "clean plus the truly clean half": row([clean, half], test, hidden, seed),
        "clean plus the truly clean half, smoothed": row([clean, half], test, hidden, seed, SMOOTHING),
        "clean plus all, with the true labels": row([clean, (train.x, true, ones)], test, hidden, seed),
        "confidence": {
            **row([clean, (train.x, train.y, trust)], test, hidden, seed),
            "tempered": row([clean, (train.x, train.y, tempered(trust))], test, hidden, seed)["test"],
            **percent(found_clean(trust, task.corrupt)),
        },
    }


def tempered(weights: Tensor) -> Tensor:
    """``sigmoid(T logit(w))``: weights in the same order, further from 0 and 1."""
    return (TEMPERATURE * torch.logit(weights, 1e-6)).sigmoid()


def percent(found: dict[str, float]) -> Row:
    """F1, precision and recall."""
    return {key.partition("/")[2]: 100 * value for key, value in found.items()}


@torch.no_grad()
def probability(model: nn.Module, rows: Rows) -> Tensor:
    """What a model thinks of the label of each image."""
    return model(rows.x).softmax(1).gather(1, rows.y[:, None])[:, 0]


def cross_fitted(weights: Tensor, clean: Set, train: Rows, hidden: list[int], seed: int) -> Tensor:
    """The probability of each label by models that have not seen it: those of the other half, by its weights; three divisions."""
    found = torch.zeros(len(train))
    for k in range(DIVISIONS):
        half = torch.randperm(len(train), generator=torch.Generator().manual_seed(k)) % 2
        for part in (0, 1):
            seen = half != part
            model = fitted([clean, (train.x[seen], train.y[seen], weights[seen])], hidden, seed + 1 + k)
            found += torch.where(seen, 0.0, probability(model, train)) / DIVISIONS
    return found


def made_labels(task: CleaningTask) -> Tensor:
    """The training labels before they were replaced: an oracle, for one row of the table."""
    assert task.dataset is not None
    return task.dataset.load(torch.float32).train.y


def method(seed: int, hidden: list[int], name: str, figure: bool) -> Row:
    """The lines of a method."""
    task, seconds = searched(seed, hidden, name)
    train, val, test = (getattr(task.splits, part) for part in ("train", "val", "test"))
    weights, clean = task.hyper.read()["weights"], (val.x, val.y, torch.ones(len(val)))
    scores = percent(found_clean(weights, task.corrupt))
    found = row([clean, (train.x, train.y, (weights > 0.5).float())], test, hidden, seed)
    weighted = row([clean, (train.x, train.y, weights)], test, hidden, seed)["test"]
    alone = row([(train.x, train.y, weights)], test, hidden, seed)["test"]
    if name in CHECKED:
        trust = weights * cross_fitted(weights, clean, train, hidden, seed)
        scores["checked"] = row([clean, (train.x, train.y, trust)], test, hidden, seed)["test"]
        soft = tempered(trust)
        scores["tempered"] = row([clean, (train.x, train.y, soft)], test, hidden, seed)["test"]
        scores["tempered, smoothed"] = row([clean, (train.x, train.y, soft)], test, hidden, seed, SMOOTHING)["test"]
        scores["checked, smoothed"] = row([clean, (train.x, train.y, trust)], test, hidden, seed, SMOOTHING)["test"]
        scores |= {f"checked {key}": value for key, value in percent(found_clean(trust, task.corrupt)).items()}
    if figure:
        draw(weights, task.corrupt, f"Weights found by {name}, seed {seed}, {model_name(hidden)}", hidden)
    more = {"weighted": weighted, "weighted training rows alone": alone, "cpu_seconds": seconds, "steps": METHODS[name][1]}
    return {**found, **scores, **more}


def model_name(hidden: list[int]) -> str:
    """What stands in titles."""
    return f"a network with {hidden[0]} hidden units" if hidden else "a linear model"


def draw(weights: Tensor, corrupt: Tensor, title: str, hidden: list[int]) -> None:
    """The weights of clean and of replaced labels."""
    plot, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axis.hist([weights[~corrupt].numpy(), weights[corrupt].numpy()], bins=40, label=["clean", "label replaced"])
    axis.set(xlabel="weight", ylabel="images", yscale="log")
    axis.set_title(title, fontsize=10)
    axis.legend(loc="upper center")
    plot.savefig(HERE / ("weights_network.png" if hidden else "weights_linear.png"), dpi=120)
    plt.close(plot)


NAMES = {  # of the lines, in their order; then the methods
    "clean only": 'nothing ("clean only")',
    "clean only, smoothed": "nothing, labels smoothed",
    "all, uncleaned": "all 5,000 others, uncleaned",
    "clean plus the truly clean half": "the truly clean half of them",
    "clean plus the truly clean half, smoothed": "the truly clean half of them, labels smoothed",
    "clean plus all, with the true labels": "all of them, with their true labels",
    "confidence": "all of them, weighted by what the model of the first line thinks of their labels",
}
COLUMNS = {  # heading, key, digits
    "weighted, %": ("weighted", 2),
    "checked, %": ("checked", 2),
    "tempered, %": ("tempered", 2),
    "checked, smoothed, %": ("checked, smoothed", 2),
    "F1, %": ("f1", 2),
    "precision": ("precision", 2),
    "recall": ("recall", 2),
    "s": ("cpu_seconds", 1),
}


def table(rows: dict[str, dict[str, Row]]) -> list[str]:
    """Means over the seeds, and each seed."""
    heading = f"| trained on the 5,000 clean and | test, % | each seed | {' | '.join(COLUMNS)} |"
    lines = [heading, "|---" * (3 + len(COLUMNS)) + "|"]
    known = list(dict.fromkeys(key for found in rows.values() for key in found))
    for name in [*(name for name in NAMES if name in known), *(name for name in METHODS if name in known)]:
        each = [found[name] for found in rows.values() if name in found]

        def mean(key: str, digits: int = 2, each: list[Row] = each) -> str:
            return f"{statistics.fmean(row[key] for row in each):.{digits}f}" if key in each[0] else ""

        shown = NAMES.get(name, f"what {name} finds, {each[0].get('steps', 0):,} steps")
        seeds = ", ".join(f"{row['test']:.2f}" for row in each)
        cells = [mean("test"), seeds, *(mean(key, digits) for key, digits in COLUMNS.values())]
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run what is asked for, and add it to results.json, cell by cell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hidden", type=int, nargs="*", default=[])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--figure", action="store_true", help="only draw the weights that V-PBGD finds on the first seed")
    given = parser.parse_args()
    if given.figure:
        task, _ = searched(given.seeds[0], given.hidden, "V-PBGD")
        title = f"Weights found by V-PBGD, seed {given.seeds[0]}, {model_name(given.hidden)}"
        draw(task.hyper.read()["weights"], task.corrupt, title, given.hidden)
        return
    model = "network" if given.hidden else "linear"
    for seed in given.seeds:
        rows = shared.load(RESULTS).get(model, {})
        found = rows.setdefault(str(seed), {})
        if "clean only" not in found:
            found |= baselines(seed, given.hidden)
            shared.save(RESULTS, model, rows)
        for name in given.methods:
            if name not in found:
                found[name] = method(seed, given.hidden, name, name == "V-PBGD" and seed == given.seeds[0])
                print(model, seed, name, found[name], flush=True)
                shared.save(RESULTS, model, rows)
    shared.write_table(HERE / "README.md", model, table(shared.load(RESULTS)[model]))


if __name__ == "__main__":
    main()
