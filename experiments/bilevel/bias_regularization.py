"""Three seeds of ``experiment=bias_regularization``.

    python experiments/bilevel/bias_regularization.py [--runs DIR]

Writes results.json and the table of README.md.
"""

from __future__ import annotations

from common import means, runs_directory, save, study, write_table


def main() -> None:
    """Measure, and write the results."""
    found = study(runs_directory(__doc__) / "bias", "experiment=bias_regularization")
    mean = means(found)
    lines = ["| | first outer loss | last | test loss | seconds |", "|---|---|---|---|---|"]
    cells = f"{mean['first outer loss']:.3f} | {mean['val/loss']:.5f} | {mean['test/loss']:.5f} | {mean['seconds']:.0f}"
    lines.append(f"| `experiment=bias_regularization` | {cells} |")
    print("\n".join(lines))
    save("bias_regularization", found)
    write_table("bias_regularization", lines)


if __name__ == "__main__":
    main()
