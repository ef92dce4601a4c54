"""Draw the figures of the library's manual: how a hypergradient is made, and which package imports which.

    python experiments/architecture/draw.py

The second figure is drawn from the imports themselves (``grimp``, of the extra ``test``), with the lines of each package.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import grimp
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "hyperopt"
BLUE, GREEN, ORANGE, GREY = "#dbe7f6", "#dff0dc", "#fbe6cf", "#eeeeee"

# One line of the figure's text for each package.
SUBJECTS = {
    "app": "the command: config, run, sweep, report, export",
    "tasks": "what one outer step and one evaluation do",
    "integrations": "callbacks for Lightning and Hugging Face",
    "bilevel": "two losses -> phi; Tuner; single-loop methods",
    "stn": "self-tuning networks",
    "nn": "cells, DEQ, regularisers",
    "data": "datasets, splits, batches",
    "spaces": "hyperparameters and their units",
    "core": "fixed points and their derivatives",
}
PLACES = {  # x of the centre, y of the centre
    "app": (5.0, 6.9),
    "tasks": (5.0, 5.6),
    "stn": (5.0, 4.3),
    "integrations": (1.8, 4.3),
    "bilevel": (3.4, 3.0),
    "nn": (7.4, 3.0),
    "spaces": (3.4, 1.7),
    "data": (6.6, 1.7),
    "core": (5.0, 0.4),
}
ROUTES = {("nn", "core"): ((8.6, 2.57), (8.6, 0.4), (6.5, 0.4))}  # past the box of data


def box(ax: Axes, at: tuple[float, float], title: str, text: str, colour: str, size: tuple[float, float], font: float) -> None:
    """Draw a box with a title and a line of text, centred at a point."""
    width, height = size
    ax.add_patch(plt.Rectangle((at[0] - width / 2, at[1] - height / 2), width, height, fc=colour, ec="#555555", lw=0.8, zorder=2))
    ax.text(at[0], at[1] + 0.15, title, ha="center", va="center", fontsize=10, fontweight="bold", zorder=3)
    ax.text(at[0], at[1] - 0.19, text, ha="center", va="center", fontsize=font, zorder=3)


def arrow(ax: Axes, *points: tuple[float, float], text: str = "") -> None:
    """Draw an arrow along points, with a text in the middle of its longest stretch."""
    colour = "#444444"
    ax.plot(*zip(*points[:-1], strict=True), color=colour, lw=1.0, zorder=1)
    ax.annotate("", xy=points[-1], xytext=points[-2], arrowprops={"arrowstyle": "-|>", "lw": 1.0, "color": colour}, zorder=1)
    if text:
        stretches = itertools.pairwise(points)
        start, end = max(stretches, key=lambda ends: abs(ends[0][0] - ends[1][0]) + abs(ends[0][1] - ends[1][1]))
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        ax.text(*middle, text, fontsize=9, ha="center", va="center", bbox={"fc": "white", "ec": "none", "pad": 1.0}, zorder=3)


def canvas(width: float, height: float) -> Axes:
    """Return an empty page, in units of about a centimetre on each axis."""
    ax = plt.figure(figsize=(width, height), layout="constrained").add_subplot()
    ax.set_axis_off()
    return ax


def concepts() -> None:
    """Draw how one hypergradient is made."""
    ax, wide = canvas(9.5, 4.6), ((2.8, 0.95), 9.0)
    box(ax, (1.6, 3.6), "lam", "hyperparameters in their spaces", GREEN, *wide)
    box(ax, (1.6, 1.9), "phi", "inner map or one training step", BLUE, *wide)
    box(ax, (5.4, 1.9), "w*", "the solution of w = phi(w, lam)", BLUE, *wide)
    box(ax, (9.2, 1.9), "E(w*, lam)", "outer loss on other rows", BLUE, *wide)
    box(ax, (9.2, 0.2), "g = dE/dw", "right-hand side of the adjoint", ORANGE, *wide)
    box(ax, (5.4, 0.2), "v", "solution of (I - J^T) v = g", ORANGE, *wide)
    box(ax, (1.6, 0.2), "hypergradient", "dE/dlam + (dphi/dlam)^T v", ORANGE, *wide)
    box(ax, (6.4, 3.6), "certificate", "both residuals -> error of the hypergradient", GREY, (3.9, 0.95), 9.0)
    arrow(ax, (1.6, 3.15), (1.6, 2.35))
    arrow(ax, (3.0, 1.9), (4.0, 1.9), text="solver")
    arrow(ax, (6.8, 1.9), (7.8, 1.9))
    arrow(ax, (9.2, 1.45), (9.2, 0.65), text="backward")
    arrow(ax, (7.8, 0.2), (6.8, 0.2), text="adjoint")
    arrow(ax, (4.0, 0.2), (3.0, 0.2), text="1 vjp")
    arrow(ax, (5.4, 2.35), (5.4, 3.15), text="inner residual")
    arrow(ax, (6.5, 0.65), (6.5, 1.05), (7.3, 1.05), (7.3, 1.9), (7.3, 3.15), text="adjoint residual")
    arrow(ax, (0.2, 0.2), (-0.4, 0.2), (-0.4, 3.6), (0.2, 3.6), text="optimizer")
    ax.set_xlim(-1.0, 10.8), ax.set_ylim(-0.4, 4.2)
    plt.savefig(HERE / "concepts.png", dpi=130)
    plt.close()


def lines(package: str) -> int:
    """Return the number of lines of the Python files of a package."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (PACKAGE / package).rglob("*.py"))


def imports() -> set[tuple[str, str]]:
    """Return the pairs of packages of which the first imports from the second."""
    graph = grimp.build_graph("hyperopt", cache_dir=None)
    found = set()
    for module in graph.modules:
        for target in graph.find_modules_directly_imported_by(module):
            ends = [name.split(".")[1] if "." in name else "" for name in (module, target)]
            if ends[0] != ends[1] and all(end in PLACES for end in ends):
                found.add((ends[0], ends[1]))
    return found


def reduced(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the pairs that do not follow from a chain of others."""
    reach = set(pairs)
    for _ in PLACES:
        reach |= {(a, d) for a, b in reach for c, d in pairs if b == c}
    return {(a, c) for a, c in pairs if not any((a, b) in reach and (b, c) in reach for b in PLACES)}


def packages() -> None:
    """Draw the packages, their lines, and the imports between them that do not follow from others."""
    ax = canvas(8.0, 7.0)
    for name, at in PLACES.items():
        box(ax, at, f"{name}   {lines(name):,} lines", SUBJECTS[name], GREY if name == "app" else BLUE, (3.0, 0.85), 7.5)
    for source, target in sorted(reduced(imports())):
        (x, y), (u, v) = PLACES[source], PLACES[target]
        if v >= y:
            raise ValueError(f"{source} imports {target}, which is drawn above it; change PLACES")
        if (source, target) in ROUTES:
            arrow(ax, *ROUTES[source, target])
            continue
        share = max(-1.0, min(1.0, 0.4 * (u - x)))
        arrow(ax, (x + share, y - 0.43), (u - share, v + 0.43))
    ax.set_xlim(0.2, 9.0), ax.set_ylim(-0.1, 7.4)
    plt.savefig(HERE / "packages.png", dpi=130)
    plt.close()


if __name__ == "__main__":
    concepts()
    packages()
