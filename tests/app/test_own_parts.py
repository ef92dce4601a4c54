"""A cell and a dataset from a user's own package, chosen on the command line like those that come with the project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = '''
from dataclasses import dataclass

import torch
from torch import nn

from hyperopt.data.splits import Rows, Splits
from hyperopt.nn.cells import CellFactory
from hyperopt.nn.equilibrium import Cell


class Cosine(Cell):
    """w -> gain cos(w) + B x"""

    row_args = (0,)

    def __init__(self, features, state_size, gain, generator):
        super().__init__()
        self.state_size, self.gain = state_size, gain
        self.B = nn.Parameter(torch.randn(features, state_size, generator=generator))

    def phi(self, w, u):
        return self.gain * torch.cos(w) + u

    def terms(self, x):
        return (x @ self.B,)


@dataclass(frozen=True)
class CosineCell(CellFactory):
    gain: float = 0.5

    def build(self, features, state_size, generator=None):
        return Cosine(features, state_size, self.gain, generator)


@dataclass(frozen=True)
class Blobs:
    """Two clouds of points."""

    count: int = 30
    seed: int = 0

    def load(self, dtype=torch.float32, device="cpu"):
        generator = torch.Generator().manual_seed(self.seed)
        y = torch.arange(3 * self.count) % 2
        x = torch.randn(3 * self.count, 2, generator=generator) + 4.0 * y[:, None]
        rows = [Rows(x[i::3].to(device, dtype), y[i::3].to(device), torch.arange(3 * self.count)[i::3]) for i in range(3)]
        return Splits(*rows, num_classes=2, shape=(2,), name="blobs", checksums={})
'''


def test_a_cell_and_a_dataset_from_ones_own_package(tmp_path: Path) -> None:
    package = tmp_path / "elsewhere" / "mine"
    for group, text in {
        "task/cell": "_target_: mine.parts.CosineCell\ngain: 0.3\n",
        "dataset": "_target_: mine.parts.Blobs\nseed: ${seed}\n",
    }.items():
        folder = package / "configs" / group
        folder.mkdir(parents=True)
        (folder / "mine.yaml").write_text(text)
    (package / "parts.py").write_text(PARTS)
    for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (folder / "__init__.py").touch()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(package.parent)])}
    argv = [
        "task/cell=mine",
        "dataset=mine",
        "+dataset.count=40",
        "allow_targets=[mine]",
        "hydra.searchpath=[pkg://mine.configs]",
    ]
    argv += ["task.state_size=5", "optimizer.lr=0.1", "trainer.max_steps=30", "trainer.progress=false", "hydra.run.dir=out"]
    done = subprocess.run(
        [sys.executable, "-m", "hyperopt.app.cli", *argv], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test/accuracy"] > 0.9
    facts = json.loads((tmp_path / "out" / "run.json").read_text())["task"]
    assert facts["dataset"] == "blobs" and facts["rows"]["outer"]["count"] == 40
