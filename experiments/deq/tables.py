"""Write the tables of README.md anew from results.json.

python experiments/deq/tables.py
"""

from __future__ import annotations

import json
from typing import Any

from results import HERE

Row = dict[str, Any]


def step(rows: list[Row]) -> list[str]:
    """One line a method."""
    lines = [
        "| trained steps | who | evaluations | products | residual | adjoint residual | CPU s (median) | least |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["trained_steps"], row["who"], row["evaluations"], row["products"]]
        cells += [f"{row['residual']:.1e}", f"{row['adjoint_residual']:.1e}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['cpu_seconds']:.2f} | {row['least']:.2f} |")
    return lines


def adjoints(rows: list[Row]) -> list[str]:
    """One line an adjoint."""
    lines = [
        "| adjoint | cosine | relative error | vjps | CPU s forward | backward | peak MB | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], f"{row['cosine']:.4f}", f"{row['error']:.1e}", str(row["vjps"])]
        cells += [f"{row['cpu_forward']:.2f}", f"{row['cpu_backward']:.2f}", f"{row['peak_bytes'] / 1e6:.0f}", row["note"]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def budget(rows: list[Row]) -> list[str]:
    """One line an adjoint."""
    lines = [
        "| adjoint | steps | CPU s a step | mean forward iterations | test loss | test accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], str(row["steps"]), f"{row['seconds_per_step']:.2f}", f"{row['inner_iterations']:.1f}"]
        cells += [f"{row['test_loss']:.3f}", f"{row['test_accuracy']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def memory(rows: list[Row]) -> list[str]:
    """One line an adjoint, one column a number of steps."""
    counts = sorted({row["steps"] for row in rows})
    lines = [f"| MB at T = | {' | '.join(map(str, counts))} |", "|---|" + "---|" * len(counts)]
    for name in dict.fromkeys(row["adjoint"] for row in rows):
        found = {row["steps"]: row["peak_bytes"] / 1e6 for row in rows if row["adjoint"] == name}
        lines.append(f"| {name} | {' | '.join(f'{found[count]:.0f}' for count in counts)} |")
    return lines


def main() -> None:
    """Replace what stands between the marks."""
    readme, results = HERE / "README.md", json.loads((HERE / "results.json").read_text())
    text = readme.read_text()
    for name, table in (("step", step), ("adjoints", adjoints), ("budget", budget), ("memory", memory)):
        if name in results:
            before, _, rest = text.partition(f"<!-- {name} -->\n")
            after = rest.partition(f"<!-- end of {name} -->")[2]
            text = f"{before}<!-- {name} -->\n{chr(10).join(table(results[name]['rows']))}\n<!-- end of {name} -->{after}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
