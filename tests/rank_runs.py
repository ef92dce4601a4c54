"""Six outer steps of several tasks on one or several ranks, by the loop that the command line runs: see ``test_ranks.py``.

python rank_runs.py RANK WORLD STORE FOLDER CASE ...
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from composing import composed

from hyperopt.app.resolvers import register
from hyperopt.app.run import run
from hyperopt.core import distributed
from hyperopt.data.synthetic import Synthetic
from hyperopt.tasks.equilibrium import EquilibriumTask

register()
COMMON = ["device=cpu", "precision=float64", "trainer.progress=false", "trainer.max_steps=6", "trainer.checkpoint_every=3"]
ROWS = ["dataset.train=80", "dataset.val=40", "dataset.test=30"]
EXACT = ["solver.rtol=1e-14", "solver.max_steps=400", "adjoint=gmres", "adjoint.linear_solver.rtol=1e-14"]
TRAINED = ["task=weight_decay", "task.hidden=[6]", "task.batch_size=30", "task.val_batch_size=25", "inner.max_steps=8", *ROWS]
TUNED = ["experiment=stn_mnist_mlp", "dataset=digits", "task.classifier.dense=[8]", "~task.tuned.dropout1", "stn.warmup=4"]
TUNED += ["task.batch_size=20", "task.val_batch_size=15", "stn.check_every=2", *ROWS]
CASES = {
    "equilibrium": ["task.state_size=10", *ROWS, *EXACT],
    "trained, implicit": [*TRAINED, "adjoint=cg", "adjoint.linear_solver.rtol=1e-13", "task.decay.init=0.3"],
    "tuned, images": [*TUNED, "stn.mode=centred"],
    "batches": ["task.state_size=10", "task.batch_size=30", "task.warm_start=true", "task.l2.A=0.01", *ROWS, *EXACT],
    "coupled": ["task=coupled", "task.rows=15", *EXACT],
    "implicit": ["task=implicit", "task.network.width=8", "task.batch_size=30", *ROWS, *EXACT],
    "trained, unrolled": [*TRAINED, "adjoint=unrolled"],
    "tuned, images, linear": [*TUNED, "stn.mode=delta_linear", "stn.update=sequential"],
    "tuned, quadratic": [
        "experiment=stn_quadratic",
        "task.batch_size=25",
        "stn.mode=classic",
        "stn.warmup=4",
        "stn.check_every=2",
    ],
    "tuned, ridge": ["experiment=stn_ridge", "task.rows=7", "stn.mode=delta", "stn.warmup=4", "stn.check_every=2"],
}


SYNTHETIC = ["dataset=synthetic", "dataset.features=4", *ROWS]
WRONG = {
    "nan, equilibrium": ["task.state_size=10", "dataset.targets=classes", *SYNTHETIC],
    "nan, trained": [*TRAINED, "dataset=synthetic", "dataset.features=4", "dataset.targets=classes", "adjoint=unrolled"],
    "slow": ["task.state_size=10", "trainer.max_steps=3", *ROWS],
}


def run_cases(folder: Path, names: Iterable[str]) -> None:
    """Run cases, each in a directory of its own."""
    for name in names:
        (folder / name).mkdir(parents=True)
        run(composed(*COMMON, *CASES[name]), folder / name)


def run_wrong(folder: Path) -> None:
    """Two tasks with a NaN among the rows of the last rank, and one with a slow last rank: what each rank says goes to a file."""
    load, step = Synthetic.load, EquilibriumTask.step

    def with_nan(self: Synthetic, *args: Any) -> Any:
        splits = load(self, *args)
        splits.train.x[-1, 0] = float("nan")
        return splits

    def slowly(self: EquilibriumTask, *args: Any) -> Any:
        time.sleep(0.3 * distributed.rank())
        return step(self, *args)

    said = {}
    for name in WRONG:
        cfg = composed(*COMMON, *WRONG[name])
        (folder / name).mkdir(parents=True)
        try:
            with mock.patch.object(Synthetic, "load", with_nan), mock.patch.object(EquilibriumTask, "step", slowly):
                run(cfg, folder / name)
            said[name] = ""
        except (ArithmeticError, RuntimeError) as error:
            said[name] = str(error)
    (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
    run_cases(Path(sys.argv[4]) / str(rank), sys.argv[5:])
    if world == 2:
        run_wrong(Path(sys.argv[4]) / str(rank))
    dist.destroy_process_group()
