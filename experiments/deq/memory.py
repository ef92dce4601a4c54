"""Peak memory of one training step against the number of solver steps: implicit is flat, unrolled is linear.

    python experiments/deq/memory.py

The DEQ of ``experiment=deq_cifar10`` on 8 images, exactly T Picard steps forward and, where there is an adjoint system, exactly T
Anderson products backward. Bytes of tensors alive at once, beyond the parameters, the images and what was there before.
Writes ``memory`` into results.json, and memory.png.
"""

from __future__ import annotations

from typing import Any

import torch
from models import images, network
from results import HERE, write
from torch.nn import functional

from hyperopt import Checkpointed, Implicit, LinearAnderson, OneStep, Picard, Unrolled
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.memory import peak_memory

IMAGES, COUNTS = 8, (2, 5, 10, 20, 40)


def adjoints(steps: int) -> dict[str, Adjoint]:
    """What is compared, for T steps."""
    return {
        "implicit, Anderson": Implicit(LinearAnderson(0.0, 0.0, steps), policy="ignore"),
        "one-step": OneStep(),
        "unrolled": Unrolled(),
        "unrolled, checkpointed": Checkpointed(),
    }


def main() -> None:
    """Measure, draw, and write the results."""
    torch.set_num_threads(1)
    rows = images(IMAGES)
    x, y = rows.x.view(-1, 3, 32, 32), rows.y
    table = []
    for steps in COUNTS:
        for name, adjoint in adjoints(steps).items():
            model = network()
            layer: Any = model.get_submodule("deq")
            layer.solver, layer.adjoint = Picard(0.0, 0.0, steps), adjoint
            with peak_memory(torch.device("cpu")) as memory:
                functional.cross_entropy(model(x), y).backward()
            table.append({"steps": steps, "adjoint": name, "peak_bytes": memory.peak, "images": IMAGES})
            print(table[-1], flush=True)
    write("memory", table)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in adjoints(1):
        points = [(row["steps"], row["peak_bytes"] / 1e6) for row in table if row["adjoint"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="solver steps", ylabel=f"peak memory of a step on {IMAGES} images, MB", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "memory.png", dpi=110)


if __name__ == "__main__":
    main()
