"""Three seeds of ``experiment=bias_regularization`` and of ``experiment=augmentation_mnist``, the latter with and without.

    python experiments/bilevel/small.py [--runs DIR]

Without augmentation is the same training with nothing added to an image (``task.scale=1e-6``), by the cheapest estimator, since
its hyperparameters change nothing. Writes results.json and the tables of README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import REPOSITORY, Row, evaluated, run, save, seconds, spread, write_table

SEEDS = (0, 1, 2)
SHOWN = ("val/loss", "val/accuracy", "test/loss", "test/accuracy")


def study(runs: Path, name: str, *overrides: str) -> Row:
    """The last rows of three runs."""
    last, first, spent = [], [], []
    for seed in SEEDS:
        out = runs / f"{name}-{seed}"
        rows = run(out, *overrides, f"seed={seed}")
        first.append(rows[0]["outer/step_loss"])
        last.append(evaluated(rows)[-1])
        spent.append(seconds(out))
    found = {key: spread([row[key] for row in last]) for key in SHOWN if key in last[0]}
    return {"first outer loss": spread(first), **found, "seconds": spread(spent), "steps": last[0]["step"] + 1}


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "outputs" / "bilevel")
    runs = parser.parse_args().runs.resolve()
    bias = study(runs, "bias", "experiment=bias_regularization")
    lines = ["| | first outer loss | last | test loss | seconds |", "|---|---|---|---|---|"]
    means = {key: row["mean"] for key, row in bias.items() if isinstance(row, dict)}
    cells = f"{means['first outer loss']:.3f} | {means['val/loss']:.5f} | {means['test/loss']:.5f} | {means['seconds']:.0f}"
    lines.append(f"| `experiment=bias_regularization` | {cells} |")
    print("\n".join(lines))
    save("bias_regularization", bias)
    write_table("bias_regularization", lines)
    plain = ["task.scale=1e-6", "adjoint=t1t2"]
    both = {
        "learned augmentation": study(runs, "augmentation", "experiment=augmentation_mnist"),
        "none": study(runs, "plain", "experiment=augmentation_mnist", *plain),
    }
    lines = ["| augmentation | validation loss | validation | test loss | test | seconds |", "|---|---|---|---|---|---|"]
    for name, found in both.items():
        loss, accuracy = ([found[f"{part}/{kind}"]["mean"] for part in ("val", "test")] for kind in ("loss", "accuracy"))
        cells = f"{loss[0]:.4f} | {100 * accuracy[0]:.2f} % | {loss[1]:.4f} | {100 * accuracy[1]:.2f} %"
        lines.append(f"| {name} | {cells} | {found['seconds']['mean']:.0f} |")
    print("\n".join(lines))
    save("augmentation", both)
    write_table("augmentation", lines)


if __name__ == "__main__":
    main()
