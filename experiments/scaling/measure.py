"""Weak and strong scaling of an outer step over the ranks of one machine, and the share of it that is communication.

    python experiments/scaling/measure.py [--pairs 5]

strong    the same rows in all, shared by 1 or by 2 ranks
weak      as many rows on each rank, on 1 or on 2 ranks

Each pair is one run on 1 rank and one on 2, one after the other, one thread a rank (gloo). Of each, a step: seconds of CPU and of
the wall clock, of the slower rank; messages (all-reduces), their bytes, and the seconds a rank spent in them, waiting included.
Medians over the pairs go to ``results.json`` beside this file, with the load of the machine when they were taken.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
COMMON = ["device=cpu", "dataset=mnist", "dataset.val=100", "dataset.test=10", "trainer.progress=false"]
FIXED = ["solver.rtol=0", "solver.max_steps=20", "adjoint.linear_solver.rtol=0", "adjoint.linear_solver.max_steps=20"]
PROBLEMS = {
    # 784 -> 200 -> 10, T = K = 20: two messages a step, forward and backward, of 200,000 numbers and of one.
    "equilibrium": ["task.state_size=200", *FIXED],
    # A perceptron 784 -> 100 -> 10 with a decay a weight, 10 inner steps unrolled: messages at every inner step, both ways.
    "trained": ["task=weight_decay", "task.hidden=[100]", "inner.max_steps=10", "adjoint=unrolled", "task.batch_size=null"],
}
WARM, STEPS = 2, 5


def work(name: str, rows: int, rank: int, world: int, store: str) -> dict[str, float]:
    """Take some outer steps as one of the ranks."""
    import torch
    import torch.distributed as dist
    from hydra import compose, initialize_config_dir

    from hyperopt.app.building import build
    from hyperopt.app.resolvers import register
    from hyperopt.core import distributed
    from hyperopt.tasks.base import Environment

    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    sent = {"messages": 0, "bytes": 0, "seconds in messages": 0.0}
    plain = dist.all_reduce

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        before = time.perf_counter()
        done = plain(tensor, *args, **kwargs)
        sent["seconds in messages"] += time.perf_counter() - before
        sent["messages"] += 1
        sent["bytes"] += tensor.nbytes
        return done

    distributed.dist.all_reduce = counted
    register()
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=[*PROBLEMS[name], *COMMON, f"dataset.train={rows}"])
    built = build(cfg)
    generator = torch.Generator().manual_seed(0)
    built.task.setup(Environment(torch.device("cpu"), torch.float32, 0, False, generator, built.trainer))
    optimizer = built.optimizer.build(built.task.groups())
    for step in range(WARM + STEPS):
        if step == WARM:
            sent.update({"messages": 0, "bytes": 0, "seconds in messages": 0.0})
            cpu, wall = time.process_time(), time.perf_counter()
        built.task.step(optimizer, lambda groups: None)
    found = {"cpu seconds": time.process_time() - cpu, "wall seconds": time.perf_counter() - wall, **sent}
    if world > 1:
        dist.destroy_process_group()
    return {key: value / STEPS for key, value in found.items()}


def run(name: str, rows: int, world: int) -> dict[str, float]:
    """Run on ``world`` ranks; of every number that of the rank where it is largest."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--work", name, str(rows)]
        ranks = [
            subprocess.Popen([*command, str(rank), str(world), f"{folder}/store"], env=env, stdout=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        said = [process.communicate()[0] for process in ranks]
    found = [json.loads(text.splitlines()[-1]) for text in said]
    return {key: max(each[key] for each in found) for key in found[0]}


def measure(pairs: int, rows: int, out: Path) -> None:
    """Measure all pairs, and write what there is after each."""
    import torch

    kept: dict[str, Any] = {}
    loads = []
    for pair in range(pairs):
        for name in PROBLEMS:
            for kind, one, two in (("strong", rows, rows), ("weak", rows // 2, rows)):
                loads.append(os.getloadavg()[0])
                single, double = run(name, one, 1), run(name, two, 2)
                kept.setdefault(f"{name}, {kind}", []).append((single, double))
                print(pair, name, kind, json.dumps([single, double]), flush=True)
        results: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "load": {"least": min(loads), "median": statistics.median(loads), "most": max(loads)},
            "pairs": pair + 1,
            "rows": rows,
        }
        for case, found in kept.items():
            table = {
                f"{world} rank{'s' * (world > 1)}": {
                    key: statistics.median(each[world - 1][key] for each in found) for key in found[0][0]
                }
                for world in (1, 2)
            }
            ratio = {k: statistics.median(each[0][k] / each[1][k] for each in found) for k in ("cpu seconds", "wall seconds")}
            results[case] = {**table, "1 rank / 2 ranks": ratio}
        out.write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    """Measure, or be a rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        name, rows, rank, world, store = options.work
        print(json.dumps(work(name, int(rows), int(rank), int(world), store)))
    else:
        measure(options.pairs, options.rows, HERE / "results.json")


if __name__ == "__main__":
    main()
