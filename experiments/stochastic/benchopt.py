"""The problems of benchopt's bilevel suite, every method on them: suboptimality against time and against the rows that were seen.

    python experiments/stochastic/benchopt.py [--problems quadratic ijcnn1 mnist_odd_even] [--seeds 0 1 2] [--data DIR]

``quadratic`` is ``experiment=benchopt_quadratic``. The logistic problem is ``experiment=benchopt_ijcnn1``: on ijcnn1 itself where
``--data`` (default ``$HYPEROPT_DATA``) has ijcnn1 and ijcnn1.t of the LIBSVM collection, and, under its own name, on MNIST's odd
and even digits in the same format (means of 4 x 4 pixels, standardised; 30,000 images each to train on and to fit to), which this
script makes there. Time is CPU seconds of the outer steps; measuring is not counted. A product with a Hessian or with the mixed
derivative counts as two gradients of its rows, as in ../black_box. Results are in benchopt.json, cell by cell.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.datasets import dump_svmlight_file

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared

from hyperopt import InnerLBFGS, SolveError
from hyperopt.bilevel.outer import Schedule
from hyperopt.data.mnist import MNIST
from hyperopt.tasks.base import HypergradientError
from hyperopt.tasks.bilevel import BilevelTask

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "benchopt.json"
Row = shared.Row
SECONDS = {"quadratic": 8.0, "ijcnn1": 30.0, "mnist_odd_even": 8.0}  # of the outer steps of a run
LOOKS = 16  # at the suboptimality in a run
WHOLE = ("task.batch_size=null", "task.val_batch_size=null")
DESCENT = ("inner=gradient_descent", "inner.max_steps=10")
FALLING = ("optimizer/scheduler=power", "optimizer.scheduler.decay=0.5")
SOLVED = {  # methods that solve the inner problem in each outer step, on all rows
    "implicit, CG": ("adjoint=cg",),
    "implicit, Neumann": ("adjoint=neumann",),
    "implicit, Nystrom": ("adjoint=nystrom", "adjoint.linear_solver.rho=1"),
    "finite difference": ("adjoint=finite_difference",),
    "T1-T2": ("adjoint=t1t2",),
    "one-step": ("adjoint=one_step",),
    "unrolled": ("adjoint=unrolled",),
}
DESCENDING = ("T1-T2", "one-step", "unrolled")  # along the steps of gradient descent; the others take any inner solver
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "quadratic": {
        "SABA *": ("adjoint=saba",),
        "stocBiO *": ("adjoint=stocbio",),
        "F2SA *": ("adjoint=f2sa",),
        "SOBA": ("adjoint=soba", "adjoint.decay=0.5", "adjoint.horizon=100", *FALLING, "optimizer.scheduler.horizon=100"),
        "V-PBGD": ("adjoint=v_pbgd", "adjoint.ramp=500"),
        **{
            f"{name}, all rows": (*adjoint, "inner.step_size=0.5", *DESCENT, *WHOLE, "optimizer.lr=1")
            for name, adjoint in SOLVED.items()
        },
    },
    "logistic": {
        "SABA *": ("adjoint=saba_ijcnn1",),
        "stocBiO *": ("adjoint=stocbio_ijcnn1",),
        "SOBA *": ("adjoint=soba_ijcnn1", "optimizer.lr=3.125", *FALLING),
        "F2SA": ("adjoint=f2sa", "optimizer.lr=0.1"),
        "V-PBGD": ("adjoint=v_pbgd", "adjoint.ramp=500", "optimizer.lr=0.1"),
        **{
            f"{name}, all rows": (
                *adjoint,
                *(DESCENT if name in DESCENDING else ()),
                *WHOLE,
                "optimizer.lr=10",
            )
            for name, adjoint in SOLVED.items()
        },
    },
}
COLOURS = {method.rstrip(" *"): f"C{k % 7}" for k, method in enumerate(METHODS["quadratic"])}


def overrides(problem: str, method: str, seed: int, data: Path) -> tuple[str, ...]:
    """Of a cell."""
    kind = "quadratic" if problem == "quadratic" else "logistic"
    given = ("device=cpu", f"seed={seed}", *METHODS[kind][method])
    if kind == "quadratic":
        return ("experiment=benchopt_quadratic", *given)
    return ("experiment=benchopt_ijcnn1", f"dataset.file={problem}", f"dataset.root={data}", "task.l2.init=0.5", *given)


def value(task: BilevelTask) -> float:
    """``h(lam)``: in closed form, or of the model trained on all rows to a tight tolerance."""
    if task.built.whole is not None:
        object.__setattr__(task, "inner", InnerLBFGS(rtol=1e-9, max_steps=300))
    return task.evaluate()["outer/loss"]


def measured(problem: str, method: str, seed: int, data: Path) -> Row:
    """The curve of a cell: seconds, rows seen, steps and ``h``."""
    made = shared.built(*overrides(problem, method, seed, data))
    task, optimizer = made.task, made.optimizer.build(made.task.groups())
    assert isinstance(task, BilevelTask)
    schedule = Schedule(made.optimizer.scheduler, optimizer)
    sizes = [len(source.tensors[1]) for source in (task.built.problem.inner_batches, task.built.problem.outer_batches)]
    batches = [min(size, given or size) for size, given in zip(sizes, (task.batch_size, task.val_batch_size), strict=True)]
    inner, spent, rows, steps, stopped = task.inner, 0.0, 0.0, 0, ""
    looks = [0.0, *np.geomspace(SECONDS[problem] / 200, SECONDS[problem], LOOKS)]
    curve: list[list[float]] = []
    while looks:
        if spent >= looks[0]:
            looks = [look for look in looks if look > spent]
            curve.append([spent, rows, steps, value(task)])
            object.__setattr__(task, "inner", inner)
            continue
        start = time.process_time()
        try:
            found = task.step(optimizer, lambda gradients: None).metrics
        except (SolveError, HypergradientError) as error:
            stopped = str(error)
            break
        schedule.after_step()
        spent += time.process_time() - start
        products = found["cost/hessian_products"], found["cost/mixed_products"]
        together = max(products) if method.startswith("unrolled") else sum(products)
        rows += batches[0] * (found["cost/inner_gradients"] + 2 * together) + batches[1] * found["cost/outer_gradients"]
        steps += 1
    least = getattr(task, "least_value", None)
    return {"curve": curve, "rows": sizes, "stopped": stopped, "least": least}


def minimum(problem: str, seed: int, data: Path) -> float:
    """The least ``h`` of the logistic problem that implicit gradients and L-BFGS find, both to tight tolerances."""
    made = shared.built(
        *overrides(problem, "implicit, CG, all rows", seed, data), "optimizer=lbfgs", "optimizer.max_iter=5", "inner.rtol=1e-9"
    )
    task, optimizer = made.task, made.optimizer.build(made.task.groups())
    assert isinstance(task, BilevelTask)
    best = value(task)
    for _ in range(20):
        try:
            task.step(optimizer, lambda gradients: None)
        except (
            SolveError,
            HypergradientError,
        ):  # a strength that no number stands for any more: the best so far is the least known
            break
        best = min(best, task.evaluate()["outer/loss"])
    return best


def make_odd_even(data: Path) -> None:
    """Write ``mnist_odd_even`` and ``mnist_odd_even.t``, unless they are there."""
    splits = MNIST(train=30_000, val=30_000, root=os.environ["HYPEROPT_DATA"], download=False).load(torch.float64)
    pooled = [torch.nn.functional.avg_pool2d(part.x.reshape(-1, 1, 28, 28), 4).flatten(1) for part in (splits.train, splits.val)]
    mean, deviation = pooled[0].mean(0), pooled[0].std(0)
    kept = deviation > 0
    for name, x, part in zip(("mnist_odd_even", "mnist_odd_even.t"), pooled, (splits.train, splits.val), strict=True):
        scaled = ((x - mean) / deviation)[:, kept].numpy()
        dump_svmlight_file(scaled, part.y.numpy() % 2, str(data / name), zero_based=False)


def report(results: Row) -> None:
    """The figure and the table."""
    problems = [name for name in SECONDS if any(key.startswith(f"{name} |") for key in results)]
    figure, axes = plt.subplots(len(problems), 2, figsize=(10, 4 * len(problems) + 1), squeeze=False, layout="constrained")
    lines = ["| problem | method | suboptimality after 0.8 s | after 8 s | each seed | steps | passes over the rows |"]
    lines.append("|---" * 7 + "|")
    for row, problem in zip(axes, problems, strict=True):
        kind = "quadratic" if problem == "quadratic" else "logistic"
        for method in METHODS[kind]:
            cells = {key.split(" | ")[2]: found for key, found in results.items() if key.startswith(f"{problem} | {method} |")}
            if not cells:
                continue
            gaps = {seed: [max(h - least_of(results, problem, seed), 1e-16) for *_, h in c["curve"]] for seed, c in cells.items()}
            for j, (seed, cell) in enumerate(cells.items()):
                seconds, rows, _, _ = np.array(cell["curve"]).T
                for axis, x in zip(row, (seconds, rows / cell["rows"][0]), strict=True):
                    name = method.rstrip(" *")
                    shown = {"color": COLOURS[name], "ls": "--" if "all rows" in name else "-", "label": None if j else name}
                    axis.plot(x[1:], gaps[seed][1:], **shown, lw=0.6 if j else 1.8)
            tenth = [early(cell["curve"], gaps[seed], SECONDS[problem] / 10) for seed, cell in cells.items()]
            ends = [gap[-1] for gap in gaps.values()]
            steps = np.mean([cell["curve"][-1][2] for cell in cells.values()])
            passes = np.mean([cell["curve"][-1][1] / cell["rows"][0] for cell in cells.values()])
            stopped = sum(bool(cell["stopped"]) for cell in cells.values())
            note = f" (diverged on {stopped} of {len(cells)})" if stopped else ""
            each = ", ".join(f"{gap:.1e}" for gap in ends)
            means = f"{np.mean(tenth):.1e} | {np.mean(ends):.1e}"
            lines.append(f"| {problem} | {method}{note} | {means} | {each} | {steps:,.0f} | {passes:,.1f} |")
        for axis, label in zip(row, ("CPU seconds", "passes over the training rows"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel=label, ylabel="h(lam) - min h", title=problem)
        if kind == "logistic":
            for axis in row:
                shared.plain_ticks(axis)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(HERE / "benchopt.png", dpi=110)
    shared.write_table(HERE / "README.md", "benchopt", lines)


def early(curve: list[list[float]], gaps: list[float], seconds: float) -> float:
    """The suboptimality at the first look after so many seconds."""
    return next((gap for point, gap in zip(curve, gaps, strict=True) if point[0] >= seconds), gaps[-1])


def least_of(results: Row, problem: str, seed: str) -> float:
    """``min h``, or the least that any run has found."""
    found = [cell for key, cell in results.items() if key.startswith(f"{problem} |") and key.endswith(f"| {seed}")]
    known = results.get(f"{problem} | minimum", {}).get("least")
    exact = next((cell["least"] for cell in found if cell["least"] is not None), None)
    if exact is not None:
        return exact
    return min([h for cell in found for *_, h in cell["curve"]] + ([] if known is None else [known]))


def main() -> None:
    """Measure what is missing; draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="*", default=["quadratic", "mnist_odd_even"], choices=SECONDS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HYPEROPT_DATA", "data")))
    options = parser.parse_args()
    for problem in options.problems:
        if problem == "mnist_odd_even" and not (options.data / f"{problem}.t").exists():
            make_odd_even(options.data)
        if problem != "quadratic" and f"{problem} | minimum" not in shared.load(RESULTS):
            shared.save(RESULTS, f"{problem} | minimum", {"least": minimum(problem, 0, options.data)})
        for seed in options.seeds:
            for method in METHODS["quadratic" if problem == "quadratic" else "logistic"]:
                key = f"{problem} | {method} | {seed}"
                if key in shared.load(RESULTS):
                    continue
                found = measured(problem, method, seed, options.data)
                print(key, found["stopped"][:80], [f"{x:.4g}" for x in found["curve"][-1]], flush=True)
                shared.save(RESULTS, key, {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, **found})
    report(shared.load(RESULTS))


if __name__ == "__main__":
    main()
