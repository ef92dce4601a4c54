"""What ``adjoint="auto"`` rests on: candidates for the adjoint of a trained network, against exact derivatives and by use.

    python experiments/adjoint_choice/measure.py                        # all, about half an hour on one thread
    python experiments/adjoint_choice/measure.py --parts derivatives search --networks tanh relu
    python experiments/adjoint_choice/measure.py --parts page           # the tables and the figure from results.json

Writes results.json, choice.png and the tables of README.md beside this file.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from networks import NAMES, Case, case
from torch import Tensor
from torch.nn import functional

import hyperopt
from hyperopt import CG, MINRES, Auto, Dense, Implicit, InnerAdam, Neumann, OneStep, ProductSettings, TorchOptimizer

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import shared  # noqa: E402

RESULTS = HERE / "results.json"
SEARCHED = ("CG", "MINRES", "Neumann, 20", "Gauss-Newton, CG", "Gauss-Newton, Neumann, 20", "one step", "auto")
SAMPLED = ("CG, 20 steps", "MINRES", "Neumann, 20", "Neumann, 100", "auto")  # on minibatches
TRAINED = (50, 500, 2000)  # steps of Adam, at 1e-2
SEEDS = (0, 1, 2)
OUTER = 30
SEED_OF_DRAWS = 7  # of dropout, in trainings that are compared
Way = tuple[Any, ProductSettings]


def implicit(solver: Any, **products: Any) -> Way:
    """An implicit adjoint whose result is used however it ended."""
    return Implicit(solver, policy="ignore"), ProductSettings(**products)


CANDIDATES: dict[str, Way] = {
    "CG": implicit(CG()),
    "CG, 20 steps": implicit(CG(rtol=0.0, max_steps=20)),
    "MINRES": implicit(MINRES()),
    "dense": implicit(Dense()),
    "Neumann, 20": implicit(Neumann(rtol=0.0, max_steps=20), warm=False),
    "Neumann, 100": implicit(Neumann(rtol=0.0, max_steps=100), warm=False),
    "Gauss-Newton, CG": implicit(CG(), curvature="gauss_newton"),
    "Gauss-Newton, Neumann, 20": implicit(Neumann(rtol=0.0, max_steps=20), warm=False, curvature="gauss_newton"),
    "one step": (OneStep(), ProductSettings()),
    "auto": (Auto(), ProductSettings()),
}


def against(found: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, Any]:
    """Cosine and relative error for each hyperparameter."""
    rows = {}
    for key, x in want.items():
        y = found[key]
        cosine = float(functional.cosine_similarity(x.flatten(), y.flatten(), dim=0))
        rows[key] = {"cosine": cosine, "error": float((x - y).norm() / x.norm()), "ratio": float(y.norm() / x.norm())}
    return rows


def derivatives(name: str) -> dict[str, Any]:
    """Every candidate at weights trained for some time, against the two exact derivatives there."""
    found = {}
    for steps in TRAINED:
        made = case(name, 0)
        inner = InnerAdam(lr=1e-2, max_steps=steps)
        torch.manual_seed(SEED_OF_DRAWS)
        training = hyperopt.hypergradient(made.problem, made.model.w, made.lam, inner=inner, adjoint=hyperopt.Checkpointed())
        exact = at(made, training.w, CANDIDATES["dense"], steps)
        rows = {"checked": checked(made, inner, training.grad), "candidates": {}}
        for label, way in CANDIDATES.items():
            estimate = at(made, training.w, way, steps)
            rows["candidates"][label] = {
                "training": against(estimate.grad, training.grad),
                "stationary": against(estimate.grad, exact.grad),
                "products": estimate.cost.hessian_products,
                "status": estimate.adjoint.status.name if estimate.adjoint else "",
                "choice": str(estimate.choice) if estimate.choice else "",
            }
        found[str(steps)] = rows
        print(name, steps, rows["candidates"]["auto"]["choice"], flush=True)
    return found


def at(made: Case, w: Any, way: Way, steps: int) -> hyperopt.Estimate:
    """The hypergradient at given weights; ``auto`` is told of so many steps, by a training whose rate is next to 0."""
    adjoint, products = way
    still = TorchOptimizer(optimizer="SGD", lr=1e-300, max_steps=steps) if isinstance(adjoint, Auto) else None
    copy = {key: leaf.detach().clone() for key, leaf in w.items()}
    return hyperopt.Bilevel(made.problem, copy, inner=still, adjoint=adjoint, products=products).step(made.lam)


def checked(made: Case, inner: InnerAdam, grad: dict[str, Tensor], h: float = 1e-6) -> float:
    """Relative difference between the derivative of training along a direction and its central difference."""
    generator = torch.Generator().manual_seed(1)
    moves = {key: torch.randn(x.shape, generator=generator, dtype=x.dtype) for key, x in made.lam.items()}
    ends = []
    for sign in (1, -1):
        lam = {key: x + sign * h * moves[key] for key, x in made.lam.items()}
        torch.manual_seed(SEED_OF_DRAWS)
        ends.append(hyperopt.hypergradient(made.problem, made.model.w, lam, inner=inner, adjoint=OneStep()).loss)
    want = (ends[0] - ends[1]) / (2 * h)
    return abs(sum(float((grad[key] * moves[key]).sum()) for key in moves) - want) / abs(want)


def search(name: str, way: Way | None, seed: int) -> dict[str, Any]:
    """30 outer steps of Adam, each after 50 steps of training; None: the hyperparameters stay what they are.

    A hypergradient that is not finite moves nothing, and is counted.
    """
    made = case(name, seed)
    lam = {key: x.clone().requires_grad_() for key, x in made.lam.items()}
    optimizer = torch.optim.Adam([{"params": [lam["decay"]], "lr": 0.1}, {"params": [lam["weights"]], "lr": 0.05}])
    adjoint, products = way or CANDIDATES["one step"]
    inner = TorchOptimizer(lr=1e-2, max_steps=50)
    bilevel = hyperopt.Bilevel(made.problem, made.model.w, inner=inner, adjoint=adjoint, products=products)
    losses, refused, spent, choices = [], 0, 0, {}
    for _ in range(OUTER):
        optimizer.zero_grad()
        estimate = bilevel.step(lam)
        losses.append(estimate.loss)
        spent += estimate.cost.hessian_products
        if estimate.choice:
            choices[estimate.choice.name] = choices.get(estimate.choice.name, 0) + 1
        if not all(bool(x.isfinite().all()) for x in estimate.grad.values()):
            refused += 1
        elif way is not None:
            estimate.backward(lam)
            optimizer.step()
            with torch.no_grad():
                lam["weights"].clamp_(0.0, 2.0)
    return {"losses": losses, "refused": refused, "products": spent / OUTER, "choices": choices}


CLEANING = {
    "CG, 20 steps": ["adjoint=cg_rough"],
    "CG": ["adjoint=cg", "adjoint.policy=ignore"],
    "MINRES": ["adjoint=minres", "adjoint.policy=ignore"],
    "Neumann, 20": ["adjoint=neumann_rough"],
    "auto": ["adjoint=auto"],
}


def cleaning(given: list[str], seed: int) -> dict[str, float]:
    """Data cleaning on digits, half of whose labels are wrong, by a linear model without decay: 100 outer steps."""
    made = shared.built(
        "task=data_cleaning", "dataset=digits", f"seed={seed}", "optimizer=adam", "optimizer.lr=0.1", "inner.step_size=0.3",
        "inner.max_steps=20", *given,
    )  # fmt: skip
    task, optimizer = made.task, made.optimizer.build(made.task.groups())
    try:
        for _ in range(100):
            task.step(optimizer, lambda gradients: None)
    except Exception as error:
        return {"f1": float("nan"), "test": float("nan"), "failed": str(error)[:80]}  # pyright: ignore[reportReturnType]
    splits, chosen = task.splits, task.hyper.read()["weights"] > 0.5  # pyright: ignore[reportAttributeAccessIssue]
    x, y = torch.cat([splits.train.x[chosen], splits.val.x]), torch.cat([splits.train.y[chosen], splits.val.y])
    model = torch.nn.Linear(x.shape[1], splits.num_classes)
    trainer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(500):
        trainer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        trainer.step()
    right = float((model(splits.test.x).argmax(1) == splits.test.y).double().mean())
    return {"f1": 100 * task.evaluate()["clean/f1"], "test": 100 * right}


def minibatches(label: str, size: int) -> dict[str, Any]:
    """40 outer steps of ``task=quadratic`` whose hyperparameters stay what they are: hypergradients against the exact one.

    ``bias`` is the relative error of their mean, ``error`` the root of their mean squared relative error; most of the latter is
    the noise of the outer batches.
    """
    task: Any = shared.built("task=quadratic", f"task.batch_size={size}").task
    lam = {key: value.detach() for key, value in task.hyper.values().items()}
    want = task.curvature @ (lam["lam"].double() - task.best)
    adjoint, products = CANDIDATES[label]
    bilevel = hyperopt.Bilevel(task.built.problem, task.built.w, inner=task._inner, adjoint=adjoint, products=products)
    estimates = [bilevel.step(lam) for _ in range(40)]
    grads = torch.stack([estimate.grad["lam"].double() for estimate in estimates])
    refused = int((~grads.isfinite().all(1)).sum())
    grads = grads[grads.isfinite().all(1)]
    missed = (grads - want).norm(dim=1) / want.norm()
    return {
        "bias": float((grads.mean(0) - want).norm() / want.norm()) if len(grads) else float("nan"),
        "error": float(missed.square().mean().sqrt()),
        "cosine": float(functional.cosine_similarity(grads, want[None]).mean()),
        "refused": refused,
        "products": statistics.fmean(estimate.cost.hessian_products for estimate in estimates),
        "choices": sorted({estimate.choice.name for estimate in estimates if estimate.choice}),
    }


def number(x: float) -> str:
    """Two digits, or that there is none."""
    return "no number" if x != x else f"{x:.2f}" if abs(x) < 100 else f"{x:.0f}"


def page(results: dict[str, Any]) -> None:
    """Write the tables and the figure."""
    lines = ["| network, steps | " + " | ".join(CANDIDATES) + " |", "|---" * (len(CANDIDATES) + 1) + "|"]
    for name in NAMES:
        for steps, rows in results.get("derivatives", {}).get(name, {}).items():
            cells = []
            for label in CANDIDATES:
                row = rows["candidates"][label]["training"]
                cells.append(", ".join(f"{number(row[key]['cosine'])} ({number(row[key]['ratio'])})" for key in row))
            lines.append(f"| {name}, {steps} | " + " | ".join(cells) + " |")
    shared.write_table(HERE / "README.md", "derivatives", lines)
    lines = ["| network, steps | " + " | ".join(CANDIDATES) + " |", "|---" * (len(CANDIDATES) + 1) + "|"]
    for name in NAMES:
        for steps, rows in results.get("derivatives", {}).get(name, {}).items():
            cells = []
            for label in CANDIDATES:
                row = rows["candidates"][label]
                parts = (row["stationary"][key] for key in row["stationary"])
                cells.append(", ".join(f"{number(part['cosine'])} ({number(part['error'])})" for part in parts))
            lines.append(f"| {name}, {steps} | " + " | ".join(cells) + " |")
    shared.write_table(HERE / "README.md", "stationary", lines)
    labels = [*SEARCHED, "no search"]
    lines = ["| network | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for name, found in results.get("search", {}).items():
        cells = []
        for label in labels:
            runs = found[label]
            refused = sum(run["refused"] for run in runs)
            cells.append(number(statistics.fmean(run["losses"][-1] for run in runs)) + (f" [{refused}]" if refused else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    spent = [statistics.fmean(run["products"] for found in results["search"].values() for run in found[x]) for x in SEARCHED]
    lines.append("| products a step | " + " | ".join(f"{x:.0f}" for x in spent) + " | |")
    shared.write_table(HERE / "README.md", "search", lines)
    lines = ["| adjoint | F1, % | test, % |", "|---|---|---|"]
    for part, suffix in (("cleaning", ""), ("cleaning by batches", ", batches of 64")):
        for label, runs in results.get(part, {}).items():
            means = [statistics.fmean(run[key] for run in runs) for key in ("f1", "test")]
            lines.append(f"| {label}{suffix} | " + " | ".join(map(number, means)) + " |")
    shared.write_table(HERE / "README.md", "cleaning", lines)
    lines = ["| rows of a batch | adjoint | bias | error | cosine | products | no number |", "|---" * 7 + "|"]
    for size, found in results.get("minibatches", {}).items():
        for label, row in found.items():
            cells = [number(row[key]) for key in ("bias", "error", "cosine")]
            lines.append(f"| {size} | {label} | " + " | ".join(cells) + f" | {row['products']:.0f} | {row['refused']} |")
    shared.write_table(HERE / "README.md", "minibatches", lines)
    draw(results["search"], labels)


def draw(searches: dict[str, Any], labels: list[str]) -> None:
    """Write choice.png: the mean outer loss of every search against the outer step."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axis, (name, found) in zip(figure.subplots(2, 3).flat, searches.items(), strict=False):
        for label in labels:
            curves = torch.tensor([run["losses"] for run in found[label]])
            style = {"color": "black", "linewidth": 2.5} if label == "auto" else {"linewidth": 1.2}
            if label == "no search":  # CG often moves nothing, and has the same curve
                style = {"color": "0.6", "linewidth": 4, "zorder": 0}
            axis.plot(curves.mean(0), label=label, **style)
        axis.set(title=name, xlabel="outer step", ylabel="outer loss", yscale="log")
        shared.plain_ticks(axis)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(HERE / "choice.png", dpi=110)


def main() -> None:
    """Measure what was asked for, and keep the rest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=["derivatives", "search", "minibatches", "cleaning", "page"])
    parser.add_argument("--networks", nargs="*", default=list(NAMES), choices=NAMES)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for name in args.networks:
        if "derivatives" in args.parts:
            known = shared.load(RESULTS).get("derivatives", {})
            found = derivatives(name)
            shared.save(RESULTS, "derivatives", {**shared.load(RESULTS).get("derivatives", known), name: found})
        if "search" in args.parts:
            found = {label: [search(name, CANDIDATES[label], seed) for seed in SEEDS] for label in SEARCHED}
            found["no search"] = [search(name, None, seed) for seed in SEEDS]
            shared.save(RESULTS, "search", {**shared.load(RESULTS).get("search", {}), name: found})
            ends = {label: round(statistics.fmean(run["losses"][-1] for run in runs), 3) for label, runs in found.items()}
            print(name, ends, flush=True)
    if "minibatches" in args.parts:
        found = {str(size): {label: minibatches(label, size) for label in SAMPLED} for size in (64, 512)}
        shared.save(RESULTS, "minibatches", found)
        print(found, flush=True)
    if "cleaning" in args.parts:
        found = {label: [cleaning(given, seed) for seed in SEEDS] for label, given in CLEANING.items()}
        shared.save(RESULTS, "cleaning", found)
        batches = {
            label: [cleaning([*CLEANING[label], "task.batch_size=64"], seed) for seed in SEEDS]
            for label in ("Neumann, 20", "auto")
        }
        shared.save(RESULTS, "cleaning by batches", batches)
        print(found, flush=True)
    shared.save(RESULTS, "machine", {"torch": torch.__version__, "python": platform.python_version(), "threads": 1})
    if "page" in args.parts:
        page(shared.load(RESULTS))


if __name__ == "__main__":
    main()
