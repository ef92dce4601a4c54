"""Self-tuning networks on images against the same network untuned, random search and TPE, at the same number of weight updates.

    python experiments/stn/images.py [--seeds 0 1 2] [--studies mlp cnn] [--trials 5]

Every method has the same rows, first weights, batches and search space, and as many updates of the weights in all: one long
run untuned, self-tuning or replaying the schedule that self-tuning found; ``--trials`` short runs of random search and of TPE
(optuna, of the extra ``bench``). Every run keeps its best epoch by validation loss, and every search its best run. Writes
images.json after each run (what is there is not done again), images_<study>.png and the tables of IMAGES.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_runs import Row, Study
from tables import HERE, shared, write_table

from hyperopt.stn import Bounded, Discrete, Tuned

STUDIES = {"mlp": "stn_mnist_mlp", "cnn": "stn_fashion_cnn"}
METHODS = ("untuned", "random search", "TPE", "self-tuning", "schedule replayed")
POSITIVE = (1e-6, 1e-2)  # where a positive hyperparameter is searched, log-uniformly
METRICS = ("val/loss", "val/accuracy", "test/loss", "test/accuracy")


Range = tuple[float, float]


def random_values(declared: Mapping[str, Tuned], random: np.random.RandomState, positive: Range = POSITIVE) -> dict[str, float]:
    """Uniform in the space of each hyperparameter; of a positive one, its logarithm."""
    found: dict[str, float] = {}
    for name, each in declared.items():
        if isinstance(each, Discrete):
            found[name] = int(random.randint(each.low, each.high + 1))
        elif isinstance(each, Bounded):
            found[name] = float(random.uniform(each.low, each.high))
        else:
            found[name] = math.exp(random.uniform(*np.log(positive)))
    return found


def suggested(declared: Mapping[str, Tuned], trial: Any, positive: Range = POSITIVE) -> dict[str, float]:
    """The same space, as TPE suggests from it."""
    found: dict[str, float] = {}
    for name, each in declared.items():
        if isinstance(each, Discrete):
            found[name] = trial.suggest_int(name, each.low, each.high)
        else:
            low, high = (each.low, each.high) if isinstance(each, Bounded) else positive
            value = trial.suggest_float(name, low, high, log=not isinstance(each, Bounded))
            found[name] = min(max(value, low + 1e-6 * (high - low)), high - 1e-6 * (high - low))
    return found


def of_trials(runs: list[Row]) -> Row:
    """A search: its best run, and what all of them cost."""
    best = min(runs, key=lambda run: run["best"]["val/loss"])
    trials = [run["best"] for run in runs]
    cost = {name: sum(run[name] for run in runs) for name in ("updates", "seconds")}
    return {"best": best["best"], "curve": best["curve"], "trials": trials, **cost}


def trial(study: Study, values: Mapping[str, float], updates: int) -> Row:
    """One short run at fixed hyperparameters."""
    raw = study.raw(values)
    run = study.plain(lambda k: raw, updates)
    return {**run, "best": {**run["best"], "hyper": dict(values)}}


def random_search(study: Study, trials: int) -> Row:
    """Independent draws."""
    random = np.random.RandomState(study.seed)
    values = [random_values(study.task.tuned, random) for _ in range(trials)]
    return of_trials([trial(study, each, study.updates // trials) for each in values])


def tpe(study: Study, trials: int) -> Row:
    """Optuna's TPE, its first two draws random."""
    search, runs = shared.tpe(study.seed, startup=2), []
    for _ in range(trials):
        asked = search.ask()
        runs.append(trial(study, suggested(study.task.tuned, asked), study.updates // trials))
        search.tell(asked, runs[-1]["best"]["val/loss"])
    return of_trials(runs)


def measured(method: str, experiment: str, seed: int, trials: int, overrides: list[str], schedule: list[Any]) -> Row:
    """One cell of the table."""
    study = Study(experiment, seed, overrides)
    ways: dict[str, Callable[[], Row]] = {
        "untuned": lambda: study.plain(lambda k: study.start, study.updates),
        "random search": lambda: random_search(study, trials),
        "TPE": lambda: tpe(study, trials),
        "self-tuning": study.self_tuning,
        "schedule replayed": lambda: study.plain(lambda k: torch.tensor(schedule[k]), study.updates),
    }
    found = ways[method]()
    if method == "self-tuning":
        found["schedule"] = [list(u) for u in study.task.tuning.schedule().each()]
    return found


def table(runs: Mapping[str, Row], study: str, seeds: list[int]) -> list[str]:
    """Means over the seeds, and the test losses one by one."""
    lines = [
        "| | validation loss | accuracy | test loss | accuracy | test loss of each seed | weight updates | CPU seconds |",
        "|" + "---|" * 8,
    ]
    for method in METHODS:
        rows = [runs[key] for seed in seeds if (key := f"{study}/{seed}/{method}") in runs]
        if len(rows) < len(seeds):
            continue
        means = [statistics.fmean(row["best"][name] for row in rows) for name in METRICS]
        each = " ".join(f"{row['best']['test/loss']:.4f}" for row in rows)
        cost = f"{rows[0]['updates']} | {statistics.fmean(row['seconds'] for row in rows):.0f}"
        lines.append(f"| {method} | {' | '.join(f'{value:.4f}' for value in means)} | {each} | {cost} |")
    return lines


def figure(runs: Mapping[str, Row], study: str, seeds: list[int]) -> None:
    """Validation loss of each method, and the hyperparameters that self-tuning found, seed by seed."""
    from matplotlib.figure import Figure

    tuned = [runs[key] for seed in seeds if (key := f"{study}/{seed}/self-tuning") in runs]
    if not tuned:
        return
    names = list(tuned[0]["best"]["hyper"])
    columns = 3
    lines = -(-(len(names) + 1) // columns)
    drawn = Figure(figsize=(10, 2.6 * lines), layout="constrained")
    axes = list(drawn.subplots(lines, columns, squeeze=False).flat)
    for number, method in enumerate(METHODS):
        for seed in seeds:
            if (run := runs.get(f"{study}/{seed}/{method}")) is not None:
                label = method if seed == seeds[0] else None
                curve = run["curve"]
                axes[0].plot(
                    [row["update"] for row in curve], [row["val/loss"] for row in curve], f"C{number}", label=label, lw=0.9
                )
    axes[0].set_title("validation loss (searches: best run)", fontsize=10)
    axes[0].set_yscale("log")
    shared.plain_ticks(axes[0])
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    for axis, name in zip(axes[1:], names, strict=False):
        for k, run in enumerate(tuned):
            line = {"color": f"C{list(METHODS).index('self-tuning')}", "ls": ("-", "--", ":")[k % 3], "lw": 1.2}
            axis.plot([row[0] for row in run["hyper"]], [row[1][name] for row in run["hyper"]], **line)
        axis.set_title(f"{name}, self-tuning, each seed", fontsize=10)
    for axis in axes[: len(names) + 1]:
        axis.set_xlabel("weight updates", fontsize=9)
        axis.tick_params(labelsize=9)
    for axis in axes[len(names) + 1 :]:
        axis.set_axis_off()
    drawn.savefig(HERE / f"images_{study}.png", dpi=110)


def main() -> None:
    """Measure what is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--studies", nargs="*", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--results", type=Path, default=HERE / "images.json")
    parser.add_argument("overrides", nargs="*", help="of the configs, after --")
    options = parser.parse_args()
    runs: dict[str, Row] = json.loads(options.results.read_text()) if options.results.exists() else {}
    for seed in options.seeds:
        for study in options.studies:
            for method in METHODS:
                key = f"{study}/{seed}/{method}"
                if key in runs or method not in options.methods:
                    continue
                schedule = runs.get(f"{study}/{seed}/self-tuning", {}).get("schedule", [])
                found = measured(method, STUDIES[study], seed, options.trials, options.overrides, schedule)
                runs[key] = {"torch": torch.__version__, "trials_of_a_search": options.trials, **found}
                if method == "schedule replayed":  # its epochs are kept in "hyper"; update by update it is long
                    runs[f"{study}/{seed}/self-tuning"].pop("schedule")
                options.results.write_text(json.dumps(runs) + "\n")
                best = found["best"]
                print(
                    key, {name: round(best[name], 4) for name in METRICS}, f"{found['seconds']:.0f} s", best["hyper"], flush=True
                )
    if options.results == HERE / "images.json":
        for study in options.studies:
            write_table(study, table(runs, study, options.seeds), "IMAGES.md")
            figure(runs, study, options.seeds)


if __name__ == "__main__":
    main()
