# %% [markdown]
# # A sweep and its report
#
# Experiments can also be started from the command line. Every setting is a value in a config file, every value can be
# changed on the command line, and a *sweep* runs all combinations of several values. Each run has a directory of its
# own with its config, its numbers and its checkpoints. A report compares the runs.
#
# This tutorial starts a sweep of six small runs, reads what they left, and makes the report. In a terminal you would
# type the commands that are printed; here Python starts them.

# %%
"""A tutorial: a sweep over learning rates and seeds from the command line, its files, and its report."""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib import pyplot

folder = Path(tempfile.mkdtemp(prefix="hyperopt_tutorial_"))


def command(line):
    """Run a `hyperopt` command in the folder of this tutorial; return what it prints."""
    print(f"$ hyperopt {line}")
    words = [sys.executable, "-m", "hyperopt.app.cli", *shlex.split(line)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


# %% [markdown]
# ## The sweep
#
# `experiment=l2_ridge` is ridge regression on the diabetes data with a penalty for each feature, tuned by
# hypergradients. `-m` makes it a sweep: values with commas are combined, here three learning rates of the outer
# optimizer and two seeds. Everything else is as the experiment says, except that it makes fewer steps.

# %%
sweep = "-m experiment=l2_ridge optimizer.lr=0.01,0.1,0.5 seed=0,1 trainer.max_steps=15"
print(command(f"{sweep} hydra.sweep.dir=multirun/rates trainer.progress=false device=cpu threads=1"))

# %% [markdown]
# The table above has one line for each job, the best first. The directory of the sweep holds a directory for each job,
# and `best.json`, which has the settings of the best jobs. `metrics.jsonl` has one line of numbers for each step.

# %%
directory = folder / "multirun" / "rates"
runs = []
for summary in sorted(directory.glob("*/summary.json")):
    values = json.loads(summary.read_text())
    lines = [json.loads(line) for line in (summary.parent / "metrics.jsonl").read_text().splitlines()]
    settings = (summary.parent / ".hydra" / "overrides.yaml").read_text().split("\n- ")
    rate = next(each for each in settings if each.startswith("optimizer.lr=")).partition("=")[2]
    runs.append({"rate": rate, "best": values["best"]["metrics"]["val/loss"], "lines": lines})
assert len(runs) == 6

best = json.loads((directory / "best.json").read_text())["runs"][0]
print("the best job:", best)
assert best["values"]["val/loss"] == min(run["best"] for run in runs)

# %%
figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
for rate, color in (("0.01", "C0"), ("0.1", "C1"), ("0.5", "C2")):
    for number, run in enumerate(run for run in runs if run["rate"] == rate):
        points = [(line["step"], line["outer/loss"]) for line in run["lines"] if "outer/loss" in line]
        axes.plot(*zip(*points, strict=True), color, label=f"learning rate {rate}" if number == 0 else None)
axes.set(xlabel="outer step", ylabel="outer loss")
axes.legend()
figure.savefig("sweep_and_report.png", dpi=80)

# %% [markdown]
# ## The report
#
# `hyperopt report` writes one page of HTML that needs no network. Runs that differ only in their seed are one line, with
# mean and standard deviation. It also has curves with bands, and the error of the hypergradient against its cost.

# %%
print(command("report multirun/rates"))
page = directory / "report" / "index.html"
print(f"open {page} in a browser")
assert page.stat().st_size > 1000 and "0.5" in page.read_text(encoding="utf-8")

# %% [markdown]
# ## What to try next
#
# - Give the same command again with `resume=auto`. Jobs that are complete are not run again.
# - Search instead of trying all values: `hydra/sweeper=optuna` with `optimizer.lr=interval(0.001,1)`.
# - Run jobs side by side with `hydra/launcher=joblib`, or on a cluster with `hydra/launcher=submitit_slurm`.
# - `tensorboard --logdir multirun` shows the same numbers while the jobs are running.
# - `hyperopt export DIR` writes what the best run has learned as one file.
