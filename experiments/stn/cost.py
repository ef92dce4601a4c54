"""What self-tuning costs: one round over as many plain training steps of the same network, in CPU time and in memory.

    python experiments/stn/cost.py [--rounds 60]

A round is two updates of the weights and one of the hyperparameters; beside it stand two plain updates of the same network
under the same hyperparameters, that is with the same dropout, noise, cutout and decay. Both are done in turn, round by round,
and the median of each is taken. Memory is what parameters and optimizers hold and the peak of tensors beyond that. Writes
cost.json and the table of IMAGES.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import torch
from image_runs import Study
from images import STUDIES
from tables import write_table
from torch import Tensor

from hyperopt.core.memory import peak_memory
from hyperopt.stn import HyperSpace, convert

HERE = Path(__file__).resolve().parent
MODES = ("centred", "delta", "delta_linear")


def held(*owners: Any) -> float:
    """What parameters and optimizers hold, in MB."""
    tensors: list[Tensor] = []
    for each in owners:
        state = each.state_dict() if isinstance(each, torch.optim.Optimizer) else dict(each.named_parameters())
        tensors += [leaf for leaf in optree.tree_leaves(state) if isinstance(leaf, Tensor)]
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def plain_step(study: Study) -> tuple[Callable[[], None], list[Any]]:
    """One update of the plain network, and what holds memory."""
    task = study.task
    space = HyperSpace(task.tuned)
    model = convert(task.built.module, space, respond=False)
    optimizer = task.options.weights.build({"weights": model.base_parameters()})

    def step() -> None:
        batch = task.problem.train.draw()
        model.train()
        with torch.no_grad():
            draw = space.draw(len(batch[1]), perturb=False)
        optimizer.zero_grad()
        with model.at(draw):
            task.problem.train_loss(model, batch, draw).backward()
        optimizer.step()

    return step, [model, optimizer]


def timed(what: Callable[[], Any]) -> float:
    """CPU seconds."""
    started = time.process_time()
    what()
    return time.process_time() - started


def peak(what: Callable[[], Any]) -> float:
    """Peak of tensors, in MB."""
    with peak_memory("cpu") as memory:
        what()
    return memory.peak / 1e6


def measured(study: Study, rounds: int) -> dict[str, float]:
    """One round against as many plain steps."""
    task, steps = study.task, study.task.options.train_steps
    optimizer = study.outer.build(task.groups())
    step, holders = plain_step(study)

    def a_round() -> None:
        task.step(optimizer, lambda gradients: None)

    def plain() -> None:
        for _ in range(steps):
            step()

    for _ in range(5 + task.options.warmup // steps):
        a_round()
        plain()
    times = [(timed(a_round), timed(plain)) for _ in range(rounds)]
    ours, theirs = (statistics.median(each) for each in zip(*times, strict=True))
    own = held(task.model, optimizer, *task.tuning.optimizers.values())
    memory = {"round MB": own + peak(a_round), "plain MB": held(*holders) + peak(plain)}
    return {"round ms": 1e3 * ours, "plain ms": 1e3 * theirs, **memory}


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("overrides", nargs="*", help="of the configs, after --")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    lines = [
        "| network | mode | validation rows | a round, ms | plain steps, ms | ratio | a round, MB | plain, MB | ratio |",
        "|" + "---|" * 9,
    ]
    for study, experiment in STUDIES.items():
        for mode, rows in [*((mode, 100) for mode in MODES), ("centred", 500)]:
            overrides = ["stn.warmup=0", f"stn.mode={mode}", f"task.val_batch_size={rows}", *options.overrides]
            row = measured(Study(experiment, 0, overrides), options.rounds)
            found[f"{study}/{mode}/{rows}"] = row
            seconds, memory = row["round ms"] / row["plain ms"], row["round MB"] / row["plain MB"]
            lines.append(
                f"| {study} | {mode} | {rows} | {row['round ms']:.1f} | {row['plain ms']:.1f} | {seconds:.2f} "
                f"| {row['round MB']:.1f} | {row['plain MB']:.1f} | {memory:.2f} |"
            )
            print(lines[-1], flush=True)
    facts = {"torch": torch.__version__, "rounds": options.rounds, "runs": found}
    (HERE / "cost.json").write_text(json.dumps(facts, indent=1) + "\n")
    write_table("cost", lines, "IMAGES.md")


if __name__ == "__main__":
    main()
