"""Parts from a user's own package, chosen on the command line like those that come with the project."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composing import composed
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from launcher import Launcher
from omegaconf import OmegaConf

from hyperopt.app.building import Built, build
from hyperopt.app.config import ConfigError
from hyperopt.app.errors import explain
from hyperopt.app.resolvers import register
from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.linear.dense import Dense
from hyperopt.core.solvers.picard import Picard
from hyperopt.data import DataError
from hyperopt.nn.cells import CellError
from hyperopt.tasks.base import Environment
from hyperopt.tasks.equilibrium import EquilibriumTask

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


@pytest.mark.slow
def test_a_cell_and_a_dataset_from_ones_own_package(tmp_path: Path, command: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "elsewhere" / "theirs"  # another name than that of the manual's package, which is imported below
    for group, text in {
        "task/cell": "_target_: theirs.parts.CosineCell\ngain: 0.3\n",
        "dataset": "_target_: theirs.parts.Blobs\nseed: ${seed}\n",
    }.items():
        folder = package / "configs" / group
        folder.mkdir(parents=True)
        (folder / "mine.yaml").write_text(text)
    (package / "parts.py").write_text(PARTS)
    for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    argv = [
        "task/cell=mine",
        "dataset=mine",
        "+dataset.count=40",
        "allow_targets=[theirs]",
        "hydra.searchpath=[pkg://theirs.configs]",
    ]
    argv += ["task.state_size=5", "optimizer.lr=0.1", "trainer.max_steps=30", "trainer.progress=false", "hydra.run.dir=out"]
    done = command(*argv)
    assert done.status == 0, done.err
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test/accuracy"] > 0.9
    facts = json.loads((tmp_path / "out" / "run.json").read_text())["task"]
    assert facts["dataset"] == "blobs" and facts["rows"]["outer"]["count"] == 40


MANUAL = (ROOT / "configs" / "README.md").read_text(encoding="utf-8").partition("## Parts of your own\n")[2].partition("\n## ")[0]
BLOCKS = dict(re.findall(r"^```(?:py|yaml)\n# (\S+)\n(.*?)^```$", MANUAL, re.DOTALL | re.MULTILINE))
COMMANDS = [line for line in re.findall(r"^```bash\n(.*?)^```$", MANUAL, re.DOTALL | re.MULTILINE)[0].splitlines() if line]
ALIAS = re.findall(r"^alias mine='(.*)'$", "\n".join(COMMANDS), re.MULTILINE)[0].split()
LACKING = """
from __future__ import annotations
from typing import TYPE_CHECKING
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from mine.cells import Sine
from mine.tasks import Kepler
from hyperopt.tasks.base import Task

class Wordless(nn.Module): "Has no forward."
class Unary(nn.Module):
    def forward(self, z): return z
class Short(Sine):
    def __init__(self, features, state_size): super().__init__(features, state_size, 0.5)
    def forward(self, z, x): return super().forward(z, x)[:, :3]
class Fixed(Sine):
    def __init__(self, features): super().__init__(features, 7, 0.5)
class Knows(Fixed):
    state_size = 7
class Lazy(nn.Module):
    def __init__(self, state_size, gain: Unknown = 0.5):
        super().__init__()
        self.gain, self.inner, self.input = gain, nn.Linear(state_size, state_size), nn.LazyLinear(state_size)
    def forward(self, z, x): return torch.sin(self.gain * self.inner(z)) + self.input(x)
class Endless(Dataset):
    def __getitem__(self, i): return torch.zeros(2), 0
class Blank(Dataset):
    def __len__(self): return 5
class Named(Blank):
    def __getitem__(self, i): return {"x": torch.zeros(2), "y": 0}
class Ragged(Blank):
    def __getitem__(self, i): return torch.zeros(2 + i // 3), 0
class Plain: "Is no dataset, no task and no cell."
class Half(Task):
    def setup(self, env): "Does nothing."
    def groups(self): return {}
    def step(self, optimizer, check): "Does nothing."
def arrays(rows=20, classes=2): return torch.randn(rows, 2).numpy(), torch.arange(rows) % classes
def numbers(): return TensorDataset(torch.zeros(9, 2), torch.zeros(9))
def nothing(): "Returns nothing."
def needs(path): return arrays()
if TYPE_CHECKING:
    from somewhere import Unknown
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a package of the manual's blocks, as they are, and with some that lack something."""
    where = tmp_path_factory.mktemp("work")
    for name, text in BLOCKS.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text)
    (where / "mine" / "lacking.py").write_text(LACKING)
    for folder in ("mine", "mine/configs"):
        (where / folder / "__init__.py").touch()
    return where


def hyperopt(where: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run the manual's alias with further words, whatever line of the manual they come from."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([".", str(ROOT)])}
    full = [sys.executable, "-m", "hyperopt.app.cli", *ALIAS[1:], *argv, "trainer.progress=false", "trainer.max_steps=25"]
    return subprocess.run(full, cwd=where, env=env, capture_output=True, text=True)


DATASET, CELL, TASK = "dataset", "task.cell", "task"
BEFORE = [  # found when the config is checked
    (CELL, "Wordless", "task.cell: mine.lacking.Wordless has no method forward(z, x)"),
    (CELL, "Unary", "task.cell: mine.lacking.Unary has forward(self, z), which cannot be called as forward(z, x): "),
    (CELL, "Plain", "task.cell: mine.lacking.Plain is neither a torch.nn.Module nor a hyperopt.nn.cells.CellFactory"),
    (CELL, "needs", "task.cell: mine.lacking.needs cannot be made with no arguments alone: missing a required argument: 'path'"),
    (DATASET, "Endless", "dataset: mine.lacking.Endless has no __len__: a dataset needs a length, and an item (x, y)"),
    (DATASET, "Blank", "dataset: mine.lacking.Blank has no __getitem__: a dataset needs a length, and an item (x, y)"),
    (DATASET, "Plain", "dataset: mine.lacking.Plain is not a torch.utils.data.Dataset, and has no method load(dtype, device)"),
    (DATASET, "needs", "dataset: mine.lacking.needs cannot be called: missing a required argument: 'path'"),
    (DATASET, "arrays, val: -1", "dataset.val=-1 must be a whole number >= 0; change dataset.val"),
    (
        DATASET,
        "arrays, row: 1",
        "dataset.row: dataset has no key 'row'; did you mean rows? choices: classes, order, rows, seed, test",
    ),
    (TASK, "Half", "task: Can't instantiate abstract class Half with"),
    (
        TASK,
        "Plain",
        "task._target_='mine.lacking.Plain' makes mine.lacking.Plain, which is not a hyperopt.tasks.base.Task; derive it",
    ),
    (TASK, "nothing", "task._target_='mine.lacking.nothing' makes NoneType, which is not a hyperopt.tasks.base.Task; derive it"),
]
LATER = [  # found once the rows are there
    (
        CELL,
        "Short",
        "mine.lacking.Short: forward(z, x) on z of shape (2, 5) and x of shape (2, 64) returned a tensor of shape (2, 3)",
    ),
    (CELL, "Fixed", "mine.lacking.Fixed: forward(z, x) on z of shape (2, 5) and x of shape (2, 64) failed: "),
    (CELL, "nothing", "mine.lacking.nothing made NoneType, which is not a torch.nn.Module"),
    (DATASET, "Named", "mine.lacking.Named: item 0 is a dict, not a pair (x, y); return x and y from __getitem__"),
    (DATASET, "Ragged", "mine.lacking.Ragged: x of item 3 has shape (3,), but that of item 0 has (2,); make them alike"),
    (
        DATASET,
        "nothing",
        "mine.lacking.nothing returned NoneType, which is neither a torch.utils.data.Dataset nor a pair (x, y) of arrays",
    ),
    (
        DATASET,
        "numbers",
        "dataset=mine.lacking.numbers has numbers to predict, and this task classifies; give a dataset of classes",
    ),
    (
        DATASET,
        "arrays, train: 30",
        "mine.lacking.arrays has 20 rows: train=30 must be a whole number from 1 to 20, the rows that",
    ),
    (DATASET, "arrays, val: 15, test: 5", "mine.lacking.arrays has 20 rows, of which val=15 and test=5 leave none to train on"),
]


def environment(seed: int = 0) -> Environment:
    return Environment(torch.device("cpu"), torch.float64, seed, False, torch.Generator().manual_seed(seed))


def built(key: str, target: str) -> Built:
    """The default job on the digits with a part of the package instead of its own."""
    cfg = composed("task.state_size=5", "allow_targets=[mine]", "precision=float64")
    part = OmegaConf.create(f"{{_target_: mine.lacking.{target}}}")
    OmegaConf.update(cfg, key, part, merge=False, force_add=True)
    return build(cfg)


@pytest.fixture
def composing(mine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(mine))
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield


@pytest.mark.usefixtures("composing")
@pytest.mark.parametrize(("key", "target", "message"), BEFORE)
def test_what_a_part_lacks_is_said_in_one_line_before_anything_starts(key: str, target: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(key, target)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("composing")
@pytest.mark.parametrize(("key", "target", "message"), LATER)
def test_what_only_shows_with_the_rows_is_said_in_one_line_then(key: str, target: str, message: str) -> None:
    with pytest.raises((DataError, CellError)) as caught:
        built(key, target).task.setup(environment())
    assert str(caught.value).startswith(message) and explain(caught.value) == str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("composing")
def test_a_module_that_knows_its_states_size_decides_it() -> None:
    task: Any = built(CELL, "Knows").task
    task.setup(environment())
    assert task.model.cell.state_size == 7 and task.describe()["state_size"] == 7 and task.model.classifier.in_features == 7


@pytest.mark.usefixtures("composing")
def test_a_lazy_module_gets_its_sizes_and_its_start_from_the_seed_of_the_run() -> None:
    """Its annotations name a type that is only there for a type checker, too."""
    starts = []
    for _ in range(2):
        torch.rand(1)
        task: Any = built(CELL, "Lazy, gain: 0.25").task
        task.setup(environment())
        assert task.model.cell.phi.gain == 0.25 and task.model.cell.phi.input.weight.shape == (5, 64)
        starts.append(torch.cat([each.detach().flatten() for each in task.model.cell.parameters()]))
    assert torch.equal(*starts)


@pytest.mark.usefixtures("composing")
def test_a_pair_of_arrays_of_a_function_gets_its_sizes_and_the_seed_of_the_run() -> None:
    drawn = []
    for seed in (0, 1):
        task: Any = built(DATASET, "arrays, rows: 40, train: 10, classes: 3").task
        task.setup(environment(seed))
        assert [len(rows) for rows in task.rows.values()] == [10, 8, 22] and task.splits.num_classes == 3
        drawn.append(task.rows["outer"].index.tolist())
    assert drawn[0] == np.random.RandomState(0).permutation(40)[:10].tolist() != drawn[1]


@pytest.mark.usefixtures("composing")
def test_checking_a_config_calls_no_function_of_a_dataset() -> None:
    built(DATASET, "nothing")  # which would be refused


@pytest.mark.usefixtures("composing")
def test_the_hypergradient_of_an_own_cell_agrees_with_finite_differences() -> None:
    """By hand, in every parameter of the cell that has an effect, and not by what ``mode=check`` says."""
    from mine.cells import Sine  # pyright: ignore[reportMissingImports]
    from mine.data import Blobs  # pyright: ignore[reportMissingImports]

    task = EquilibriumTask(state_size=3, cell=functools.partial(Sine, gain=0.5), dataset=Blobs(40))  # pyright: ignore
    task.setup(environment())
    exact = Picard(1e-13, 0.0, 500)
    loss, _ = task.objective(exact, Implicit(Dense()))
    parameters = list(task.model.cell.parameters())
    assert {name for name in task.groups()} == {"cell", "classifier"} and len(parameters) == 3
    for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        way = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(way, alpha=step)
                values.append(task.objective(exact, Implicit(Dense()))[0].item())
                parameter.sub_(way, alpha=step)
        found = (slope * way).sum().item()
        assert abs(found) > 1e-4 and abs((values[0] - values[1]) / 2e-5 - found) < 1e-6 * max(1.0, abs(found))


@pytest.mark.usefixtures("composing")
def test_a_cell_starts_from_the_seed_of_the_run_and_a_module_is_copied() -> None:
    from mine.cells import Sine  # pyright: ignore[reportMissingImports]

    made = Sine(64, 5, 0.5)
    before = made.A.detach().clone()
    starts = []
    for cell, seed in ((functools.partial(Sine, gain=0.5), 0), (functools.partial(Sine, gain=0.5), 0), (made, 0), (made, 1)):
        torch.rand(1)
        task = EquilibriumTask(state_size=5, cell=cell)  # pyright: ignore
        task.setup(environment(seed))
        starts.append(next(task.model.cell.parameters()).detach().clone())
        with torch.no_grad():
            next(task.model.cell.parameters()).zero_()
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[2], starts[3]) and torch.equal(made.A, before)
    assert torch.equal(starts[2], before.double())


def test_each_block_is_short() -> None:
    for name, text in BLOCKS.items():
        assert len([line for line in text.splitlines() if line]) <= (15 if name.endswith(".py") else 5), name
    assert {Path(name).suffix for name in BLOCKS} == {".py", ".yaml"} and len(BLOCKS) == 6


@pytest.mark.cases(slow=1)
@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("mine ")])
def test_the_commands_of_the_manual_run(mine: Path, tmp_path: Path, line: str) -> None:
    """The hypergradient of the cell, and of the task, agrees with a finite difference; training gets somewhere."""
    done = hyperopt(mine, *line.split()[1:], f"hydra.run.dir={tmp_path / 'out'}")
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    if "mode=check" in line:
        found = json.loads((tmp_path / "out" / "check.json").read_text())
        errors = {row["name"]: row["error"] for row in found["against"]}
        assert found["passed"] and found["norm"] > 1e-3 and "finite differences" in str(errors) and max(errors.values()) < 1e-4
        return
    first, *_, last = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert last["val/loss"] < 0.7 * first["val/loss"]
    if "dataset=blobs" in line:
        facts = json.loads((tmp_path / "out" / "run.json").read_text())["task"]
        assert facts["dataset"] == "mine.data.Blobs" and facts["state_size"] == 5 and last["val/accuracy"] > 0.9
        assert [facts["rows"][name]["count"] for name in ("outer", "val", "test")] == [100, 60, 140]
