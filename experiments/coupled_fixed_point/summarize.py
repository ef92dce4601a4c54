"""The table and the figure of a finished sweep of ``experiment=coupled_fixed_point``.

    hyperopt -m experiment=coupled_fixed_point seed=0,1,2 hydra.sweep.dir=DIR
    python experiments/coupled_fixed_point/summarize.py DIR

Writes results.json and errors.png beside this file, and prints the table of README.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
KEYS = ("outer/error_x", "outer/error_y", "test/error_x", "test/error_y")


def main(sweep: Path) -> None:
    """Read every job's rows."""
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    results = {}
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for job in jobs:
        seed = next(text for text in job["overrides"] if text.startswith("seed="))
        rows = [json.loads(line) for line in (sweep / job["directory"] / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "test/error_x" in row]
        results[seed] = {str(row["step"]): {key: row[key] for key in KEYS} for row in (rows[0], rows[-1])}
        for key, color, style in zip(KEYS, ("C0", "C1", "C0", "C1"), ("-", "-", "--", "--"), strict=True):
            label = f"{'x' if key.endswith('x') else 'y'}, {'fitted' if key.startswith('outer') else 'held out'}"
            axes.semilogy([r["step"] + 1 for r in rows], [r[key] for r in rows], style, color=color, label=label, alpha=0.7)
        cells = " | ".join(f"{results[seed][k][key]:.3f}" for k in results[seed] for key in KEYS)
        print(f"| {seed.removeprefix('seed=')} | {cells} |")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:4], labels[:4])
    axes.set(xlabel="outer steps", ylabel="distance from the targets, relative to their size")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(HERE / "errors.png", dpi=130)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python experiments/coupled_fixed_point/summarize.py DIR, the directory of the sweep")
    main(Path(sys.argv[1]))
