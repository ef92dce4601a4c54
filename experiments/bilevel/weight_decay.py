"""A weight decay for each of 1,033,510 weights: memory and CPU seconds of an outer step against the number of inner steps.

    python experiments/bilevel/weight_decay.py [--steps 5 10 20 40 80]

``experiment=weight_decay_per_parameter_mnist`` with gradient descent as inner solver, and each way of differentiating by its one
override. Memory is the peak of tensors beyond what was there before the step; seconds are the least of two steps. Writes
results.json, weight_decay.png and the table of README.md.
"""

from __future__ import annotations

import argparse
import time

from common import HERE, Row, built, save, write_table

from hyperopt.core.memory import peak_memory

WAYS = {
    "implicit, 10 steps of CG": ["adjoint=cg", "adjoint.linear_solver.rtol=0", "adjoint.linear_solver.max_steps=10"],
    "T1-T2": ["adjoint=t1t2"],
    "unrolled": ["adjoint=unrolled"],
    "unrolled, recomputed": ["adjoint=checkpointed"],
    "truncated, last 5": ["adjoint=unrolled", "adjoint.last=5"],
}


def measure(way: list[str], steps: int) -> Row:
    """One outer step of one way."""
    inner = ["inner=gradient_descent", "inner.step_size=0.1", f"inner.max_steps={steps}"]
    made = built("experiment=weight_decay_per_parameter_mnist", *inner, *way)
    optimizer = made.optimizer.build(made.task.groups())

    def step() -> float:
        started = time.process_time()
        made.task.step(optimizer, lambda gradients: None)
        return time.process_time() - started

    step()  # the optimizer's moments come to be
    seconds = min(step(), step())
    with peak_memory("cpu") as memory:
        step()
    return {"inner steps": steps, "seconds": seconds, "peak MB": memory.peak / 1e6}


def figure(found: dict[str, list[Row]]) -> None:
    """Memory and seconds against inner steps."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.9), layout="constrained")
    drawn.suptitle("A weight decay for each of 1,033,510 weights, gradient descent inside")
    for axes, key, label in zip(
        drawn.subplots(1, 2),
        ("peak MB", "seconds"),
        ("peak memory of an outer step, MB", "CPU seconds of an outer step"),
        strict=True,
    ):
        for name, rows in found.items():
            axes.plot([row["inner steps"] for row in rows], [row[key] for row in rows], ".-", label=name)
        axes.set(xlabel="inner steps", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    drawn.axes[0].legend(fontsize=8)
    drawn.savefig(HERE / "weight_decay.png", dpi=110)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="*", default=[5, 10, 20, 40, 80])
    options = parser.parse_args()
    found: dict[str, list[Row]] = {name: [] for name in WAYS}
    for steps in options.steps:
        for name, way in WAYS.items():
            found[name].append(measure(way, steps))
            print(name, found[name][-1], flush=True)
    heads = " | ".join(f"{steps} steps: MB, s" for steps in options.steps)
    lines = [f"| | {heads} |", "|---" * (len(options.steps) + 1) + "|"]
    for name, rows in found.items():
        lines.append(f"| {name} | " + " | ".join(f"{row['peak MB']:.0f}, {row['seconds']:.2f}" for row in rows) + " |")
    save("weight_decay", found)
    write_table("weight_decay", lines)
    figure(found)


if __name__ == "__main__":
    main()
