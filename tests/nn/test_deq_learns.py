"""The DEQ of ``experiment=deq_cifar10`` learns: one epoch of 5,000 real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from composing import composed

from hyperopt.app.run import run

OVERRIDES = [
    "experiment=deq_cifar10",
    "dataset.train=5000",
    "dataset.test=500",
    "task.eval_rows=500",
    "trainer.max_steps=50",
    "trainer.eval_every=50",
    "trainer.progress=false",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hyperopt.core.policy.SolveWarning")
def test_one_epoch_of_5000_images(tmp_path: Path, real_root: Any) -> None:
    root = real_root("cifar-10-batches-py", "cifar-10-batches-bin")
    run(composed(*OVERRIDES, f"paths.data={root}", "dataset.download=false", "device=cpu"), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    print({name: value for name, value in last.items() if name.startswith(("outer", "test", "running"))})
    assert last["test/accuracy"] > 0.25 and last["test/loss"] < first["test/loss"] - 0.2
    assert last["outer/accuracy"] > 0.25
