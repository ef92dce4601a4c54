"""Twenty seeds of ``experiment=stn_quadratic_scheduled`` for every way to run it: results_quadratic.json, the tables and figures.

    python experiments/stn/quadratic.py [--only NAME ...] [--cli] [--figures]

The defaults were chosen on seeds 100 to 109; what is measured here are seeds 0 to 19. All networks of a row are trained together,
see ``stacked.py``; ``--cli`` runs the default through the command line as well, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from stacked import CLOSE, Found, Plan, study
from tables import HERE, REPOSITORY, save, write_table

SEEDS = list(range(20))
SCHEDULE = Plan(warmup=5, train_steps=2, valid_steps=2, lr=0.01, values_lr=0.003, values_gamma=None, update="sequential")
NOTEBOOK = replace(
    SCHEDULE,
    mode="classic",
    activation="relu",
    width=4,
    gate="scalar",
    rounds=10_000,
    betas=(0.9, 0.999),
    clip=None,
)
SLOW = Plan(warmup=300, lr=0.005, values_lr=0.015, values_gamma=None)
BY_COMMAND_LINE = {0.1: (120, 4), 0.5: (80, 20), 5.0: (250, 4), 9.0: (500, 4)}  # rounds and seeds of each start
STARTS = tuple(BY_COMMAND_LINE)
PLANS: dict[str, Plan] = {
    **{f"default, from {start:g}": Plan(start=start) for start in STARTS},
    "control: the range fixed at 0.5": Plan(frozen=True),
    "not centred (classic)": Plan(mode="classic"),
    "mode=delta": Plan(mode="delta"),
    "mode=delta_linear": Plan(mode="delta_linear"),
    "ReLU": Plan(activation="relu"),
    "leaky ReLU": Plan(activation="leaky_relu"),
    "tanh": Plan(activation="tanh"),
    "one scalar gate a layer": Plan(gate="scalar"),
    "value first, then scale": Plan(update="sequential"),
    "schedule of the notebook (5; 2 to 2; 0.003)": replace(SCHEDULE, rounds=5000),
    "rate of the range a quarter less, from 9": Plan(values_lr=0.14, start=9.0),
    "rate of the range a quarter more, from 9": Plan(values_lr=0.23, start=9.0),
    "300 updates first, rate of the range 0.015 all along, from 9": replace(SLOW, start=9.0),
    "the same and width 8, from 0.5": replace(SLOW, width=8),
    "the same and width 8, from 9": replace(SLOW, width=8, start=9.0),
    "not stopped, 1,000 rounds, from 0.5": Plan(stop=False),
    "not stopped, 1,000 rounds, from 9": Plan(stop=False, start=9.0),
    "notebook": NOTEBOOK,
    "notebook, centred": replace(NOTEBOOK, mode="centred"),
}


def row(found: Found) -> dict[str, Any]:
    """The numbers of one table row."""
    hits = [hit for hit in found.hit if hit is not None]
    ranges = [value for value in found.at_hit if value is not None]
    return {
        "reached": len(hits),
        "of": len(found.hit),
        "median": statistics.median(hit if hit is not None else float("inf") for hit in found.hit),
        "most": max(hits, default=None),
        "range": [min(ranges), max(ranges)] if ranges else None,
        "inside": sum(1.7 <= value <= 3.2 for value in ranges),
        "best": statistics.median(found.best),
        "hits": found.hit,
        "ranges": found.at_hit,
        "last ranges": found.range,
        "last": found.last,
    }


def table(results: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    lines = [f"| | largest error < {CLOSE} | rounds, median (most) | range then | within 1.7 to 3.2 |", "|---|---|---|---|---|"]
    for name in PLANS:
        if name not in results:
            continue
        found = results[name]
        reached = found["reached"]
        whole = found["median"] != float("inf")
        rounds = f"{found['median']:.0f} ({found['most']})" if whole else "never" if not reached else f"- ({found['most']})"
        width = "{:.2f} to {:.2f}".format(*found["range"]) if reached else f"(last {min(found['last ranges']):.2f} to "
        width = width if reached else f"{width}{max(found['last ranges']):.2f})"
        lines.append(f"| {name} | {reached} of {found['of']} | {rounds} | {width} | {found['inside']} of {found['of']} |")
    return lines


def by_command_line(start: float, rounds: int, seeds: int, runs: Path) -> dict[str, Any]:
    """The default, seed by seed, as a user runs it."""
    hits, ranges = [], []
    for seed in range(seeds):
        out = runs / f"quadratic-{start:g}-{seed}"
        if not (out / "summary.json").exists():
            overrides = [
                "experiment=stn_quadratic_scheduled",
                f"task.x_range.init={start}",
                f"seed={seed}",
                f"trainer.max_steps={rounds}",
                f"hydra.run.dir={out}",
                "trainer.progress=false",
                "threads=1",
            ]
            command = [sys.executable, "-m", "hyperopt.app.cli", *overrides]
            subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        after = [line for line in lines if line["stn/warming"] == 0]
        hit = next((k for k, line in enumerate(after, 1) if line["val/distance"] < CLOSE), None)
        hits.append(hit)
        ranges.append(None if hit is None else after[hit - 1]["hyper/x_range"])
        print("command line, from", start, "seed", seed, hits[-1], ranges[-1], flush=True)
    return {"hits": hits, "ranges": ranges}


def trajectories() -> None:
    """Range, scale, losses and distance from several starts in one picture."""
    from matplotlib.figure import Figure

    trace: list[Any] = []
    each = 4
    starts = [start for start in STARTS for _ in range(each)]
    study([seed % each for seed in range(len(starts))], Plan(rounds=300, stop=False), trace, starts)
    titles = ("range", "scale, in R", "training loss", "validation loss", "largest error on [-2, 2]")
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for part, title in enumerate(titles):
        curves = torch.tensor([step[part] for step in trace])
        for k in range(len(starts)):
            label = f"from {starts[k]:g}" if k % each == 0 else None
            axes[part].plot(curves[:, k], color=f"C{k // each}", linewidth=0.8, label=label)
        axes[part].set_title(title, fontsize=10)
        axes[part].set_xlabel("round")
        if title != "scale, in R":
            axes[part].set_yscale("log")
    axes[0].axhspan(1.7, 3.2, color="k", alpha=0.08, linewidth=0)
    axes[4].axhline(CLOSE, color="k", linewidth=0.8, linestyle=":")
    axes[5].set_axis_off()
    axes[5].legend(*axes[0].get_legend_handles_labels(), loc="center")
    figure.savefig(HERE / "figures" / "quadratic_trajectories.png", dpi=110)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PLANS), help="rows to measure")
    parser.add_argument("--cli", action="store_true", help="also the default by the command line")
    parser.add_argument("--figures", action="store_true", help="also the figure")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "outputs" / "stn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (HERE / "figures").mkdir(exist_ok=True)
    results: dict[str, Any] = {}
    for name in args.only:
        started = time.process_time()
        found = row(study(SEEDS, PLANS[name]))
        found |= {"seconds": time.process_time() - started, "plan": asdict(PLANS[name])}
        results = save("results_quadratic.json", name, found)
        print(name, {key: found[key] for key in ("reached", "median", "most", "range", "inside", "seconds")}, flush=True)
        write_table("quadratic", table(results))
    if args.cli:
        for start, (rounds, seeds) in BY_COMMAND_LINE.items():
            found = by_command_line(start, rounds, seeds, args.runs.resolve())
            save("results_quadratic.json", f"command line, from {start:g}", found)
    if args.figures:
        trajectories()


if __name__ == "__main__":
    main()
