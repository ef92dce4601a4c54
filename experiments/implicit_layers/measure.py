"""Run the tanh-layer study on MNIST, or collect what its sweeps have left so far, and write table, figures and results.json.

    python experiments/implicit_layers/measure.py [--runs DIR] [--collect]

It runs the three ``hyperopt -m`` commands below (printed); a job that is done is not run again, a stopped one goes on.
``--collect`` runs nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SEEDS = (0, 1, 2)
COMMON = ["experiment=tanh_mnist", "seed=0,1,2", "threads=1", "trainer.progress=false"]
SWEEPS = {
    "tanh_mnist": [*COMMON, "solver=picard,newton,anderson", "adjoint=neumann_dense"],
    "tanh_mnist_unrolled": [*COMMON, "solver=picard", "adjoint=unrolled"],
    "tanh_mnist_newton_unrolled": [*COMMON, "solver=newton", "adjoint=unrolled", "optimizer.clip_norm=2"],
}
NAMES = {"neumann_dense": "implicit", "unrolled": "unrolled"}
GOALS = {"picard unrolled": 3.1, "picard implicit": 3.1, "newton implicit": 3.1, "newton unrolled": 3.4}  # per cent of test error
Row = dict[str, Any]


def variant(overrides: list[str]) -> tuple[str, int]:
    """Return the variant and the seed of a job."""
    values = dict(each.split("=", 1) for each in overrides)
    return f"{values['solver']} {NAMES[values['adjoint']]}", int(values["seed"])


def jobs(runs: Path) -> dict[tuple[str, int], Path]:
    """Return the directories of all jobs that are done, in every sweep under ``runs``."""
    found = {}
    for index in sorted(runs.glob("*/sweep.json")):
        for job in json.loads(index.read_text())["jobs"]:
            if job["status"] == "completed":
                found[variant(job["overrides"])] = index.parent / job["directory"]
    return found


def epochs(directory: Path) -> list[Row]:
    """Return the rows of the steps that were evaluated, without the first, which is after one update."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "test/accuracy" in row][1:]


def error(row: Row, split: str) -> float:
    """Return the error in per cent."""
    return 100 - 100 * row[f"{split}/accuracy"]


def of_variant(directories: dict[int, Path]) -> Row:
    """Return what the table shows of one variant."""
    by_seed = {seed: epochs(path) for seed, path in directories.items()}
    last = [rows[-1] for rows in by_seed.values()]
    shown = ["inner_iterations", "inner_iterations_mean", "adjoint_iterations", "adjoint_iterations_mean"]
    shown += ["inner_failed", "inner_fallbacks", "adjoint_fallbacks"]
    evaluations = [row["cost/evaluations"] / (row["step"] + 1) for row in last]
    return {
        "seeds": list(directories),
        "test_error": [round(error(row, "test"), 4) for row in last],
        "running_error": [round(error(row, "running"), 4) for row in last],
        "evaluations_per_step": evaluations,
        "vjps_per_step": [row["cost/vjps"] / (row["step"] + 1) for row in last],
        "seconds": [json.loads((path / "summary.json").read_text())["seconds"] for path in directories.values()],
        "epochs": {
            seed: [
                {
                    "step": row["step"],
                    "test_error": error(row, "test"),
                    "outer_error": error(row, "outer"),
                    "running_error": error(row, "running"),
                    "test_loss": row["test/loss"],
                    "running_loss": row["running/loss"],
                    **{name: row[f"running/{name}"] for name in shown if f"running/{name}" in row},
                }
                for row in rows
            ]
            for seed, rows in by_seed.items()
        },
    }


def mean(values: list[float], form: str = ".2f") -> str:
    """Return the mean, formatted."""
    return format(statistics.fmean(values), form)


def table(results: dict[str, Row]) -> str:
    """Return the README's table."""
    lines = [
        "| variant | seeds | test error, % | mean | goal | training error, % | inner iterations | adjoint iterations "
        "| fell back, % | evaluations a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        errors = ", ".join(f"{e:.2f}" for e in row["test_error"])
        every = [epoch for rows in row["epochs"].values() for epoch in rows]
        adjoint = [epoch["adjoint_iterations"] for epoch in every if "adjoint_iterations" in epoch]
        fell = [100 * epoch["inner_fallbacks"] for epoch in every]
        fell_back = f"{mean(fell, '.1f')} / " + (mean([100 * e["adjoint_fallbacks"] for e in every], ".0f") if adjoint else "-")
        goal = f"{GOALS[name]:.1f}" if name in GOALS else ""
        cells = [name, str(len(row["seeds"])), errors, mean(row["test_error"]), goal, mean(row["running_error"])]
        cells += [mean([epoch["inner_iterations"] for epoch in every], ".1f"), mean(adjoint, ".1f") if adjoint else "-"]
        cells += [fell_back, mean(row["evaluations_per_step"], ".1f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_epochs(results: dict[str, Row]) -> None:
    """Write epochs.png: iterations, test error and training loss against the epoch, means over the seeds."""
    from matplotlib.figure import Figure

    sys.path.append(str(HERE.parent))
    import shared

    figure = Figure(figsize=(10, 4), layout="constrained")
    quantities = [("inner_iterations", "iterations of the slowest row"), ("test_error", "test error, %")]
    quantities += [("running_loss", "training loss")]
    for axes, (key, label) in zip(figure.subplots(1, 3), quantities, strict=True):
        for name, row in results.items():
            values = [statistics.fmean(e) for e in zip(*([x[key] for x in rows] for rows in row["epochs"].values()), strict=True)]
            axes.semilogy(range(1, len(values) + 1), values, marker=".", label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3, which="both")
        shared.plain_ticks(axes)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(results))
    figure.savefig(HERE / "epochs.png", dpi=110)


def draw_residuals(checkpoint: Path) -> Row:
    """Write residual.png: every solver and every adjoint at one trained network, on 500 test images; return their counts."""
    import os

    import torch
    from matplotlib.figure import Figure
    from torch.nn import functional

    from hyperopt import GMRES, Anderson, Broyden, Implicit, LinearAnderson, Neumann, Newton, Picard
    from hyperopt.data.files import default_root
    from hyperopt.data.mnist import MNIST
    from hyperopt.nn.networks import tanh_network

    root = os.environ.get("HYPEROPT_DATA", str(REPOSITORY / default_root()))
    rows = MNIST(train=60000, val=0, root=root).load().test.take(slice(500))
    model = tanh_network(policy="ignore")
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["task"]["model"])
    layer: Any = model.get_submodule("deq")
    radius = float(torch.linalg.eigvals(layer.weight.detach()).abs().max())
    figure = Figure(figsize=(10, 4), layout="constrained")
    forward, backward = figure.subplots(1, 2, sharey=True)
    solvers = {"Picard": Picard(1e-6, max_steps=300), "Anderson": Anderson(1e-6, max_steps=300)}
    solvers |= {"Broyden": Broyden(1e-6, max_steps=300), "Newton": Newton(1e-6)}
    adjoints = {"Neumann": Neumann(1e-6, max_steps=300), "Anderson": LinearAnderson(1e-6, max_steps=300)}
    adjoints |= {"GMRES": GMRES(1e-6, max_steps=300, window=100)}
    counts: Row = {"spectral_radius_of_W": radius}
    tries = [(forward, "forward", name, solver, Implicit(policy="ignore")) for name, solver in solvers.items()]
    tries += [(backward, "backward", name, Newton(1e-6), Implicit(a, policy="ignore")) for name, a in adjoints.items()]
    for axes, way, name, solver, adjoint in tries:
        layer.solver, layer.adjoint = solver, adjoint
        handle = layer.register_forward_pre_hook(lambda m, a, k: (a, {**k, "trace": True}), with_kwargs=True)
        functional.cross_entropy(model(rows.x.view(-1, 1, 28, 28)), rows.y).backward()
        handle.remove()
        stats = layer.solution.forward if way == "forward" else layer.solution.adjoint
        counts[f"{way} {name}"] = {"iterations": int(stats.iterations.max()), "status": stats.status.name}
        axes.semilogy(range(1, len(stats.trace) + 1), stats.trace.numpy(), label=name)
    for axes, title in ((forward, "forward"), (backward, "backward")):
        axes.set(xlabel="iteration", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    forward.set_ylabel("largest relative residual of 500 images")
    figure.savefig(HERE / "residual.png", dpi=110)
    return counts


def main() -> None:
    """Run or collect, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "multirun" / "implicit_layers")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    options = parser.parse_args()
    runs = options.runs.resolve()
    for name, overrides in SWEEPS.items():
        command = ["-m", *overrides, f"hydra.sweep.dir={runs / name}", "resume=auto"]
        if not options.collect:
            print("hyperopt", *command, flush=True)
            subprocess.run(
                [sys.executable, "-m", "hyperopt.app.cli", *command], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL
            )
    done = jobs(runs)
    order = [*GOALS, "anderson implicit"]
    variants = {name: {seed: done[name, seed] for seed in SEEDS if (name, seed) in done} for name in order}
    results = {name: of_variant(found) for name, found in variants.items() if found}
    facts: Row = {"date": time.strftime("%Y-%m-%d"), "jobs_done": len(done), "jobs": 15}
    shown = variants["newton implicit"].get(0) or next(iter(done.values()))
    facts["run"] = json.loads((shown / "run.json").read_text())["versions"]
    residuals = draw_residuals(shown / "checkpoints" / "last.pt")
    shutil.copy(shown / "figures" / "misclassified.png", HERE / "misclassified.png")
    draw_epochs(results)
    (HERE / "results.json").write_text(json.dumps({**facts, "residuals": residuals, "variants": results}, indent=1) + "\n")
    shown_table = table(results)
    readme = HERE / "README.md"
    if readme.exists():
        before, _, rest = readme.read_text().partition("<!-- table -->")
        after = rest.partition("<!-- end of table -->")[2]
        readme.write_text(f"{before}<!-- table -->\n{shown_table}\n<!-- end of table -->{after}")
    print(shown_table)


if __name__ == "__main__":
    main()
