"""``init_from``: hyperparameters from another run, a checkpoint or an export, by name and shape, in the user's units."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_task import Toy, config, go, rows, summary

import hyperopt
from hyperopt.app import checkpoint
from hyperopt.app.checkpoint import CheckpointError
from hyperopt.app.export.file import write
from hyperopt.app.run_directory import RunDirectory
from hyperopt.app.starting import Start, begin, read
from hyperopt.tasks.base import Environment
from hyperopt.tasks.coupled import CoupledTask
from hyperopt.tasks.equilibrium import EquilibriumTask
from hyperopt.tasks.linear import L2Task
from hyperopt.tasks.network import WeightDecayTask
from hyperopt.tasks.stn_quadratic import StnQuadraticTask

ROWS: Any = (torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2)


def ready(task: Any, seed: int = 0) -> Any:
    task.setup(Environment(torch.device("cpu"), torch.float64, seed, False, torch.Generator().manual_seed(seed)))
    return task


def start(values: dict[str, torch.Tensor], partial: bool = False, exact: bool = True) -> Start:
    return Start(Path("there"), Path("there/best.pt"), 3, values, exact, partial)


def card(**more: Any) -> dict[str, Any]:
    whole = {"name": "n", "task": "l2", "checkpoint": "best", "precision": "float32", "config": "", "step": 4, "classes": 2}
    return {
        **whole,
        "input": {"shape": [3], "scaling": None},
        **{key: {} for key in ("dataset", "metrics", "certificate")},
        **more,
    }


# ---- runs


def test_a_run_starts_from_the_best_step_of_another(tmp_path: Path) -> None:
    first, second = Toy(), Toy()
    go(config(), tmp_path / "first", first)
    best = checkpoint.load(tmp_path / "first" / "checkpoints" / "best.pt")
    seen: list[torch.Tensor] = []
    second.hook = lambda step, task: seen.append(task.a.detach().clone()) if step == 0 else None
    go(config(init_from=str(tmp_path / "first")), tmp_path / "second", second)
    assert torch.equal(seen[0], best["hyperparameters"]["a"]) and not torch.equal(seen[0], torch.zeros(3, dtype=torch.float64))
    assert second.calls and rows(tmp_path / "second")[0]["step"] == 0  # neither steps nor the optimizer's state are taken
    facts = json.loads((tmp_path / "second" / "run.json").read_text())["init_from"]
    assert facts["taken"] == ["a", "b.0", "b.1"] and facts["left_out"] == {} and facts["path"] == str(tmp_path / "first")
    assert facts["step"] == summary(tmp_path / "first")["best"]["step"] == best["state"]["step"] - 1
    assert f"init_from: {tmp_path}/first" in (tmp_path / "second" / "config.yaml").read_text()


@pytest.mark.slow
def test_a_resume_needs_the_same_start_and_does_not_read_it_again(tmp_path: Path) -> None:
    go(config(), tmp_path / "first")
    cfg: Any = {"init_from": str(tmp_path / "first")}
    go(config(**cfg, trainer={"max_steps": 20}), tmp_path / "whole")
    go(config(**cfg, trainer={"max_steps": 8}), tmp_path / "short")
    for other in (None, str(tmp_path / "whole")):
        with pytest.raises(CheckpointError, match="of another experiment: init_from is"):
            go(config(init_from=other, resume="auto"), tmp_path / "short")
    (tmp_path / "first").rename(tmp_path / "gone")
    go(config(**cfg, resume="auto", trainer={"max_steps": 20}), tmp_path / "short")
    assert rows(tmp_path / "short") == rows(tmp_path / "whole")
    assert json.loads((tmp_path / "short" / "run.json").read_text())["init_from"]["step"] is not None


@pytest.mark.slow
def test_other_files_are_starts_too(tmp_path: Path) -> None:
    go(config(), tmp_path)
    cfg, here = config(), RunDirectory(tmp_path / "new")
    want = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["hyperparameters"]
    cfg.init_from = str(tmp_path / "checkpoints" / "last.pt")
    found = read(cfg, here)
    assert found is not None and found.step == 11 and torch.equal(found.values["a"], want["a"])
    (tmp_path / "checkpoints" / "best.pt").unlink()  # a run without a finite value has only the last one
    cfg.init_from = str(tmp_path)
    found = read(cfg, here)
    assert found is not None and found.file == tmp_path / "checkpoints" / "last.pt"
    pytest.importorskip("safetensors")
    for form in ("pt", "safetensors"):
        path = tmp_path / f"model.{form}"
        tensors = {"model.w": torch.ones(2), "hyperparameters.l2": torch.full((3,), 0.5)}
        write(path, tensors, card(hyperparameters={}, versions={}))
        cfg.init_from = str(path)
        found = read(cfg, here)
        assert found is not None and found.exact and found.step == 4 and [*found.values] == ["l2"]


def test_files_that_are_no_start(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("nothing")
    (tmp_path / "pickle").write_bytes(b"\x80\x04.")
    old = {"state": {"step": 1}}
    checkpoint.save(tmp_path / "old.pt", old)
    checkpoint.save(tmp_path / "odd.pt", {**old, "hyperparameters": {"a": 1}})
    for name, message in [
        ("missing", "is neither a directory nor a file; set init_from to"),
        ("empty", "has no checkpoints/best.pt or last.pt; set init_from to"),
        ("text", "damaged; set init_from to another"),
        ("pickle", "was not loaded; set init_from to"),
        ("old.pt", "before checkpoints held values of hyperparameters; write them by hyperopt export"),
        ("odd.pt", "hyperparameters are not tensors by name"),
    ]:
        with pytest.raises(CheckpointError, match=message) as refused:
            read(config(init_from=str(tmp_path / name)), RunDirectory(tmp_path / "new"))
        assert "\n" not in str(refused.value)
    with pytest.raises(CheckpointError, match="both say where the hyperparameters start; drop one"):
        read(config(init_from="a", ckpt_path="b"), RunDirectory(tmp_path / "new"))


# ---- what fits


def test_what_does_not_fit_is_named_and_refused_or_left_out() -> None:
    given = {"a": torch.full((3,), 2.0), "b.0": torch.full((2,), 3.0), "c": torch.ones(1)}
    task = ready(Toy())
    before = {name: value.clone() for name, value in task.values().items()}
    with pytest.raises(CheckpointError) as refused:
        begin(task, start(given))
    for part in ("b.0 has shape (2,) there and (1,) here", "b.1 is not there", "c is not a hyperparameter here", "init_partial"):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value) and all(torch.equal(value, before[name]) for name, value in task.values().items())
    facts = begin(task, start(given, partial=True))
    assert facts is not None and facts["taken"] == ["a"] and [*facts["left_out"]] == ["b.0", "b.1", "c"]
    assert task.values()["a"].tolist() == [2.0] * 3 and torch.equal(task.values()["b.0"], before["b.0"])
    begin(task, start({**before, "c": torch.ones(1)}, exact=False))  # an export's model has buffers beside its parameters
    with pytest.raises(CheckpointError, match="a has an entry that is not finite"):
        begin(task, start({**before, "a": torch.tensor([1.0, float("nan"), 0.0])}))


def test_values_are_in_the_users_units() -> None:
    soft = ready(L2Task(dataset=ROWS, l2=hyperopt.Positive(0.3, per="element", map="softplus")))
    square = ready(L2Task(dataset=ROWS, l2=hyperopt.Positive(1.0, per="element", map="exp")))
    bounded = ready(L2Task(dataset=ROWS, l2=hyperopt.Bounded(low=0.0, high=0.25, per="element")))
    soft.set_values({"l2": torch.tensor([[0.1], [2.0], [1e-6]])})
    begin(square, start(soft.values()))
    torch.testing.assert_close(square.hyper.read()["l2"], soft.hyper.read()["l2"], rtol=1e-12, atol=0)
    assert not torch.allclose(square.groups()["l2"][0], soft.groups()["l2"][0])  # the raw variables differ
    raw = bounded.groups()["l2"][0].detach().clone()
    with pytest.raises(CheckpointError, match=r"l2=2.0 is not inside \(0, 0.25\)"):
        begin(bounded, start(soft.values()))
    facts = begin(bounded, start(soft.values(), partial=True))
    assert facts is not None and facts["taken"] == [] and "l2=2.0 is not inside" in facts["left_out"]["l2"]
    assert torch.equal(bounded.groups()["l2"][0], raw)


def test_a_network_of_another_width_keeps_the_decays_that_fit() -> None:
    wide, narrow = (
        ready(WeightDecayTask(dataset=ROWS, hidden=(h,), decay=hyperopt.Positive(0.1, per="element"))) for h in (7, 5)
    )
    wide.set_values({name: torch.full_like(value, 0.7) for name, value in wide.values().items()})
    facts = begin(narrow, start(wide.values(), partial=True))
    assert facts is not None and facts["taken"] == ["decay.2.bias"] and len(facts["left_out"]) == 3
    assert "decay.0.weight has shape (7, 3) there and (5, 3) here" in facts["left_out"]["decay.0.weight"]
    assert float(narrow.values()["decay.2.bias"].mean()) == pytest.approx(0.7)
    assert float(narrow.values()["decay.0.bias"].mean()) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EquilibriumTask(dataset=ROWS, state_size=4),
        lambda: CoupledTask(),
        lambda: StnQuadraticTask(),
        lambda: WeightDecayTask(dataset=ROWS, hidden=(3,), decay=hyperopt.Positive(0.1, per="tensor")),
    ],
    ids=["equilibrium", "coupled", "stn", "weight_decay"],
)
def test_a_task_gives_values_that_another_takes(make: Any) -> None:
    one, two = ready(make(), 0), ready(make(), 1)
    one.set_values({name: 0.9 * value for name, value in one.values().items()})
    begin(two, start({name: value.clone() for name, value in one.values().items()}))
    assert one.values().keys() == two.values().keys()
    for name, value in one.values().items():
        torch.testing.assert_close(two.values()[name], value, rtol=1e-9, atol=1e-12)
    weights, learned = one.learned().weights, one.learned().hyperparameters
    assert learned.keys() == one.values().keys() if learned else weights.keys() >= one.values().keys()
    moved = [tensor for group in two.groups().values() for tensor in group]
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in moved)
