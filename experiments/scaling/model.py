"""Tables of ``results.json``, and the model of a step on more ranks that is fitted to it.

python experiments/scaling/model.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LATENCY, BANDWIDTH = 50e-6, 1.25e9  # seconds a hop and bytes a second of a 10-gigabit network: assumed, not measured
RANKS = (1, 2, 4, 8, 16, 64)


def fit(results: dict[str, Any], name: str) -> dict[str, float]:
    """Fit ``t(p, n) = fixed + row n / p + (p > 1) (messages' own CPU)`` to the CPU seconds of 1 and 2 ranks; n rows in all."""
    strong, weak, rows = results[f"{name}, strong"], results[f"{name}, weak"], results["rows"]
    whole, half = strong["1 rank"]["cpu seconds"], weak["1 rank"]["cpu seconds"]
    row = (whole - half) / (rows / 2)
    two = (strong["2 ranks"]["cpu seconds"] + weak["2 ranks"]["cpu seconds"]) / 2  # the same rows a rank in both
    fixed = max(half - row * rows / 2, 0.0)
    sent = strong["2 ranks"]
    return {"fixed": fixed, "row": row, "handling": two - half, "messages": sent["messages"], "bytes": sent["bytes"]}


def seconds(found: dict[str, float], rows: int, ranks: int) -> float:
    """Seconds of a step on ``ranks`` machines: the fit, and a ring's time for the messages."""
    if ranks == 1:
        return found["fixed"] + found["row"] * rows
    wire = found["messages"] * 2 * LATENCY * math.ceil(math.log2(ranks)) + 2 * (ranks - 1) / ranks * found["bytes"] / BANDWIDTH
    return found["fixed"] + found["row"] * rows / ranks + found["handling"] + wire


def main() -> None:
    """Print the tables."""
    results = json.loads((HERE / "results.json").read_text())
    load = {key: round(value, 1) for key, value in results["load"].items()}
    print(f"{results['date']}, torch {results['torch']}, {results['pairs']} pair(s), load {load}\n")
    print(
        "| case | CPU s, 1 rank | CPU s a rank, 2 ranks | ratio | wall s, 1 and 2 | messages | MB | share of wall in messages |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for case, found in results.items():
        if isinstance(found, dict) and "1 rank" in found:
            one, two, ratio = found["1 rank"], found["2 ranks"], found["1 rank / 2 ranks"]
            share = two["seconds in messages"] / two["wall seconds"]
            cpu = f"{one['cpu seconds']:.3f} | {two['cpu seconds']:.3f} | {ratio['cpu seconds']:.2f}"
            wall = f"{one['wall seconds']:.2f}, {two['wall seconds']:.2f}"
            print(f"| {case} | {cpu} | {wall} | {two['messages']:.0f} | {two['bytes'] / 1e6:.1f} | {share:.0%} |")
    for name in ("equilibrium", "trained"):
        found = fit(results, name)
        print(f"\n{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in found.items()) + "\n")
        print("| rows | " + " | ".join(f"{ranks} ranks" for ranks in RANKS) + " |\n|---" + "|---" * len(RANKS) + "|")
        for rows in (results["rows"], 60_000):
            times = [seconds(found, rows, ranks) for ranks in RANKS]
            print(f"| {rows:,} | " + " | ".join(f"{time:.3f} s ({times[0] / time:.1f} x)" for time in times) + " |")


if __name__ == "__main__":
    main()
