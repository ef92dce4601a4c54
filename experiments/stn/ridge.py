"""``experiment=stn_ridge`` against its closed forms: results_ridge.json and the table of README.md.

    python experiments/stn/ridge.py

The strength stands still (a warm-up without end) while weights and response are trained, by Adam with a cosine schedule; then the
learned ``w``, ``d w / d lam`` and hypergradient are compared with the exact ones. Six random problems, seeds 0 to 5.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from tables import save, write_table
from torch.optim.lr_scheduler import CosineAnnealingLR

from hyperopt.bilevel.outer import OuterOptimizer
from hyperopt.stn import Positive
from hyperopt.stn.rounds import MODES
from hyperopt.tasks.base import Environment
from hyperopt.tasks.stn import SelfTuningOptions
from hyperopt.tasks.stn_ridge import StnRidgeTask

UPDATES, SEEDS = 1500, range(6)


def measure(mode: str, scale: float, seed: int) -> dict[str, float]:
    """Train at a strength of 0.3, and compare."""
    weights = OuterOptimizer(partial(torch.optim.Adam, lr=0.03), partial(CosineAnnealingLR, T_max=UPDATES))
    options = SelfTuningOptions(mode=mode, warmup=UPDATES, train_steps=1, weights=weights)
    task = StnRidgeTask(stn=options, decay=Positive(0.3, scale=scale), features=8, rows=40, noise=2.0)
    generator = torch.Generator().manual_seed(seed)
    task.setup(Environment(torch.device("cpu"), torch.float64, seed, False, generator))
    for _ in range(UPDATES):
        task.tuning.round(task.built.train.draw, task.built.valid.draw)
    return {name[6:]: value for name, value in task.evaluate().items() if name.startswith("ridge/")}


def main() -> None:
    """Measure, and write the results."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    lines = ["| scale | mode | weights off by | response off by | hypergradient: learned / exact |", "|---|---|---|---|---|"]
    for scale in (0.05, 0.5):
        for mode in MODES:
            started = time.process_time()
            found = [measure(mode, scale, seed) for seed in SEEDS]
            mean = {name: statistics.fmean(each[name] for each in found) for name in found[0]}
            ratios = [each["hypergradient_ratio"] for each in found]
            result: dict[str, Any] = {"seeds": found, "seconds": time.process_time() - started}
            save("results_ridge.json", f"{mode}, {scale}", result)
            cells = f"{100 * mean['weights_error']:.2g} % | {100 * mean['jacobian_error']:.2g} %"
            lines.append(f"| {scale} | {mode} | {cells} | {min(ratios):.3f} to {max(ratios):.3f} |")
            print(lines[-1], flush=True)
    write_table("ridge", lines)


if __name__ == "__main__":
    main()
