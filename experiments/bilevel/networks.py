"""Three seeds of each network of this folder, beside the same training with nothing tuned.

    python experiments/bilevel/networks.py [--runs DIR]

``experiment=weight_decay_per_parameter_mnist`` and its decays as they start; ``experiment=augmentation_mnist`` and nothing added
to an image, both on all training images and on the first 1,000 of them. Where nothing is tuned, the cheapest estimator
(``adjoint=t1t2``) stands in, and an outer learning rate too small to move a number in float32. Writes results.json and the tables
of README.md.
"""

from __future__ import annotations

from common import Row, means, runs_directory, save, study, write_table

STILL = ("adjoint=t1t2", "optimizer.lr=1e-12")
DECAY = ("experiment=weight_decay_per_parameter_mnist",)
IMAGES = ("experiment=augmentation_mnist",)
FEW = ("dataset.train=1000",)
WAYS = {
    "weight_decay_training": {
        "a decay for each weight": DECAY,
        "every decay at 1e-4": (*DECAY, *STILL),
    },
    "augmentation": {
        "50,000 images, learned augmentation": IMAGES,
        "50,000 images, none": (*IMAGES, "task.scale=1e-6", *STILL),
        "1,000 images, learned augmentation": (*IMAGES, *FEW),
        "1,000 images, none": (*IMAGES, *FEW, "task.scale=1e-6", *STILL),
    },
}


def line(name: str, found: Row) -> str:
    """A row of a table."""
    mean = means(found)
    steps = ", ".join(str(step + 1) for step in found["best step"]["values"])
    scores = " | ".join(
        f"{mean[f'{part}/loss']:.4f} | {100 * mean[f'{part}/accuracy']:.2f} %" for part in ("outer", "val", "test")
    )
    return f"| {name} | {steps} | {scores} | {mean['seconds']:.0f} |"


def main() -> None:
    """Measure, and write the results."""
    runs = runs_directory(__doc__)
    for table, ways in WAYS.items():
        found = {name: study(runs / f"{table}-{i}", *overrides) for i, (name, overrides) in enumerate(ways.items())}
        lines = ["| | best step of each seed | fitted: loss | | selected on: loss | | test: loss | | seconds |", "|---" * 9 + "|"]
        lines += [line(name, row) for name, row in found.items()]
        print("\n".join(lines))
        save(table, found)
        write_table(table, lines)


if __name__ == "__main__":
    main()
