"""Data cleaning on MNIST, beside training on what is known to be clean: accuracies, F1, and the weights that were found.

5,000 training images, half of whose labels are replaced, a weight for each; 5,000 clean validation images tune the weights;
10,000 test images. Each row is a model trained from the same start by the same recipe (Adam, batches of 100, its epochs below) on
a set of images, and tested once at the end. ``--seeds`` and ``--hidden 300`` choose what is run; what is there already in
results.json is kept. Needs MNIST under ``$HYPEROPT_DATA``:

    python experiments/cleaning/measure.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor
from torch.nn import functional

from hyperopt.config import Built, build
from hyperopt.repro import seed_everything
from hyperopt.schema import register
from hyperopt.tasks.base import Environment
from hyperopt.tasks.cleaning import CleaningTask, found_clean
from hyperopt.tasks.network import perceptron

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
EPOCHS = 20
METHODS = {  # overrides of experiment=data_cleaning_mnist, and outer steps
    "V-PBGD": (["adjoint=v_pbgd", "adjoint.step_size=0.3", "adjoint.ramp=100"], 150),
    "SOBA": (["adjoint=soba", "adjoint.step_size=0.3"], 150),
}


def built(seed: int, hidden: list[int], *overrides: str) -> Built:
    """The task of a seed, set up as ``hyperopt`` would."""
    register()
    GlobalHydra.instance().clear()
    given = [f"seed={seed}", f"task.hidden={hidden}", f"paths.data={os.environ['HYPEROPT_DATA']}", "dataset.download=false"]
    with initialize_config_dir(str(HERE.parents[1] / "configs"), version_base="1.3"):
        cfg = compose("train", ["experiment=data_cleaning_mnist", *given, *overrides])
    found = build(cfg)
    found.task.setup(Environment(torch.device("cpu"), torch.float32, seed, False, seed_everything(seed)))
    return found


def trained(sets: list[tuple[Tensor, Tensor, Tensor]], test: tuple[Tensor, Tensor], hidden: list[int], seed: int) -> float:
    """Test accuracy, in percent, of a model trained on images, labels and weights."""
    generator = torch.Generator().manual_seed(seed)
    x, y, weights = (torch.cat(part) for part in zip(*sets, strict=True))
    kept = weights > 0
    x, y, weights = x[kept], y[kept], weights[kept]
    model = perceptron((x.shape[1], *hidden, 10), generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), generator=generator).split(100):
            optimizer.zero_grad()
            (weights[rows] * functional.cross_entropy(model(x[rows]), y[rows], reduction="none")).mean().backward()
            optimizer.step()
    with torch.no_grad():
        return 100 * float((model(test[0]).argmax(1) == test[1]).double().mean())


def measured(seed: int, hidden: list[int], methods: list[str], figure: bool) -> dict[str, Any]:
    """All rows of a seed."""
    found: dict[str, Any] = {}
    for name in methods:
        overrides, steps = METHODS[name]
        made, start = built(seed, hidden, *overrides), time.process_time()
        task = made.task
        assert isinstance(task, CleaningTask)
        train, val, test = (getattr(task.splits, part) for part in ("train", "val", "test"))
        ones = torch.ones(len(val))
        clean, held_out = (val.x, val.y, ones), (test.x, test.y)
        if not found:
            every, right = torch.ones(len(train)), (~task.corrupt).float()
            for row, sets in {
                "clean only": [clean],
                "all, uncleaned": [clean, (train.x, train.y, every)],
                "clean plus the truly clean half": [clean, (train.x, train.y, right)],
            }.items():
                found[row] = {"test": trained(sets, held_out, hidden, seed)}
                print(seed, hidden, row, found[row], flush=True)
            start = time.process_time()
        optimizer = torch.optim.Adam([leaf for group in task.groups().values() for leaf in group], lr=0.1)
        for _ in range(steps):
            task.step(optimizer, lambda gradients: None)
        seconds, weights = time.process_time() - start, task.hyper.read()["weights"]
        scores = {key.partition("/")[2]: 100 * value for key, value in found_clean(weights, task.corrupt).items()}
        kept = trained([clean, (train.x, train.y, (weights > 0.5).float())], held_out, hidden, seed)
        found[name] = {"test": kept, **scores, "steps": steps, "cpu_seconds": seconds}
        found[name]["weighted training rows alone"] = 100 * task.evaluate()["test/accuracy"]
        print(seed, hidden, name, found[name], flush=True)
        if figure and name == "V-PBGD":
            plot, axis = plt.subplots(figsize=(6, 3.5))
            parts = [weights[~task.corrupt].numpy(), weights[task.corrupt].numpy()]
            axis.hist(parts, bins=40, label=["clean", "label replaced"])
            axis.set(xlabel="weight", ylabel="images", title=f"Weights found by {name}, hidden={hidden}, seed {seed}")
            axis.legend()
            plot.tight_layout()
            plot.savefig(HERE / ("weights_network.png" if hidden else "weights_linear.png"), dpi=120)
    return found


def main() -> None:
    """Run what is asked for, and add it to results.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hidden", type=int, nargs="*", default=[])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for seed in given.seeds:
        rows = results.setdefault("network" if given.hidden else "linear", {})
        if str(seed) not in rows:
            rows[str(seed)] = measured(seed, given.hidden, given.methods, seed == given.seeds[0])
            path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
