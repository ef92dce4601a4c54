"""Tables and pictures of the meta-learning studies, from the directories of their runs.

    python experiments/maml/summarize.py maml=outputs/maml meta_sgd=outputs/meta_sgd imaml=outputs/imaml omniglot=outputs/omniglot

``results.json`` gets what each run says of itself (its metrics at every evaluation, seconds, settings); a run that is not named
is kept as it is there. The tables stand in README.md between their marks.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import matplotlib
import yaml

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results.json", HERE / "README.md"
METHODS = {"maml": "MAML", "meta_sgd": "Meta-SGD", "imaml": "iMAML"}
STEPS, SHOTS = (0, 1, 5, 10), (5, 10)
ADAPTED = 32  # inner steps of iMAML in training, which its run measures too
EARLY = 1001  # outer steps at which the first rows of a longer run are shown


def read(run: Path) -> shared.Row:
    """What a run has measured at its evaluations."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = yaml.safe_load((run / "config.yaml").read_text())
    kept = [
        {name: value for name, value in row.items() if name == "step" or name.startswith(("outer/", "val/", "test/"))}
        for row in rows
        if "test/loss" in row
    ]
    seconds = json.loads((run / "summary.json").read_text())["seconds"]
    return {"seed": config["seed"], "seconds": seconds, "steps": len(rows), "inner": config["inner"], "evaluations": kept}


def sinusoid(results: shared.Row) -> list[str]:
    """Mean squared errors of new curves by shots and inner steps; ``test/loss`` is that after the steps of training."""
    heads = [f"{k} points, {n} step{'s' * (n > 1)}" for k in SHOTS for n in STEPS if n]
    lines = [f"| | outer steps | {' | '.join(heads)} | 10 points, as trained | s |"]
    lines.append("|---|---|" + "---|" * (len(SHOTS) * (len(STEPS) - 1) + 2))
    for name, label in METHODS.items():
        rows = results[name]["evaluations"] if name in results else []
        early = [row for row in rows if row["step"] + 1 == EARLY]
        for row in (*early, *rows[-1:]):
            errors = [row[f"test/loss_{k}_shots_{n}_steps"] for k in SHOTS for n in STEPS if n]
            cells = ["diverged" if error is None else f"{error:.3f}" for error in (*errors, row["test/loss"])]
            seconds = f"{results[name]['seconds']:.0f}" if row is rows[-1] else ""
            lines.append(f"| {label} | {row['step'] + 1:,} | {' | '.join(cells)} | {seconds} |")
    return lines


def omniglot(results: shared.Row) -> list[str]:
    """Accuracy in percent on new characters by outer steps, after 1 and 3 inner steps."""
    lines = ["| outer steps | val, 1 inner step, % | test, 0 steps, % | 1 step, % | 3 steps, % |", "|---|---|---|---|---|"]
    for row in results["omniglot"]["evaluations"] if "omniglot" in results else ():
        cells = [row["val/accuracy"], *(row[f"test/accuracy_1_shots_{n}_steps"] for n in (0, 1, 3))]
        lines.append(f"| {row['step'] + 1:,} | {' | '.join(f'{100 * value:.1f}' for value in cells)} |")
    return lines


def draw(results: shared.Row) -> None:
    """The error of new curves over inner steps, and as it was learned."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for name, label in METHODS.items():
        if name in results:
            last = results[name]["evaluations"][-1]
            for shots, style in zip(SHOTS, ("--", "-"), strict=True):
                found = {n: last.get(f"test/loss_{shots}_shots_{n}_steps") for n in (*STEPS, ADAPTED)}
                values = {
                    n: error for n, error in found.items() if error is not None
                }  # the others were not measured, or diverged
                left.plot(list(values), list(values.values()), style, marker="o", label=f"{label}, {shots} points")
            rows = results[name]["evaluations"]
            right.plot([row["step"] + 1 for row in rows], [row["val/loss"] for row in rows], label=label)
    left.set(xlabel="inner steps", ylabel="mean squared error, test curves", yscale="log")
    right.set(xlabel="outer steps", ylabel="val/loss", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    figure.savefig(HERE / "sinusoid.png", dpi=110)


def main() -> None:
    """Read the runs that are named, and write tables and pictures of all."""
    results = shared.load(RESULTS)
    for word in sys.argv[1:]:
        name, _, run = word.partition("=")
        results = shared.save(RESULTS, name, read(Path(run)))
        if name == "maml":
            shutil.copy(Path(run, "figures", "curves.png"), HERE / "curves.png")
    draw(results)
    shared.write_table(PAGE, "sinusoid", sinusoid(results))
    shared.write_table(PAGE, "omniglot", omniglot(results))


if __name__ == "__main__":
    main()
