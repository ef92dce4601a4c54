"""Searches: the search space, what samplers propose, pruning, several objectives, resuming, and what is shared by processes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from launcher import Launcher, snapshot
from omegaconf import DictConfig, OmegaConf
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState
from toy_task import built, config, summary

from hyperopt.app import checkpoint
from hyperopt.app.config import ConfigError
from hyperopt.app.files import write_json
from hyperopt.app.run import run
from hyperopt.app.run_directory import RunDirectory
from hyperopt.app.search.search import Search, prune_of
from hyperopt.app.search.settings import Settings
from hyperopt.app.search.space import Choice, Numbers, points, quoted, split
from hyperopt.app.search.trials import Trials

ROOT = Path(__file__).resolve().parents[2]
CFG = OmegaConf.create({"mode": "train", "trainer": {"monitor": "val/loss", "mode": "min"}})


def space(*overrides: str) -> tuple[Any, list[str]]:
    return split(OverridesParser.create().parse_overrides(list(overrides)))


def trials(sweep: Path, *overrides: str, cfg: Any = CFG, **settings: Any) -> Trials:
    """The trials of a search, as a process with this sweep's directory sees them, without a launch."""
    sweep.mkdir(parents=True, exist_ok=True)
    found = Settings(**settings)
    where, fixed = space(*overrides)
    found.check_space(where)
    return Trials(Search(found, where, fixed), cfg, sweep)


def end(sweep: Path, number: int, status: str = "completed", **metrics: float) -> None:
    """Leave what a job leaves."""
    (sweep / str(number)).mkdir(exist_ok=True)
    named = {name.replace("_", "/"): value for name, value in metrics.items()}
    write_json(sweep / str(number) / "summary.json", {"status": status, "metrics": named, "best": {"metrics": named}})


def solve(made: Trials, loss: Callable[[dict[str, str]], float]) -> list[dict[str, str]]:
    """Run a search to its end with ``loss`` for each job, and return the overrides of all jobs."""
    seen = []
    while taken := made.take():
        for number, overrides in taken.items():
            values = dict(each.split("=", 1) for each in overrides)
            seen.append(values)
            end(made.sweep, number, val_loss=loss(values))
            assert made.tell(number)
    return seen


# ---- the search space


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a=interval(0, 2.5)", Numbers("a", 0.0, 2.5)),
        ("a=tag(log, interval(1e-3, 1))", Numbers("a", 1e-3, 1.0, log=True)),
        ("a=int(interval(-5.0, 5.0))", Numbers("a", -5, 5, 1)),
        ("a=tag(log, int(interval(1, 64)))", Numbers("a", 1, 64, 1, True)),
        ("a=range(5, 50)", Numbers("a", 5, 49, 1)),
        ("a=range(10, 0, -3)", Numbers("a", 1, 10, 3)),
        ("a=range(0, 1, 0.1)", Numbers("a", 0.0, 0.9, 0.1)),
        ("a=range(3)", Numbers("a", 0, 2, 1)),
        ("a=choice(x, 'y z', 3)", Choice("a", ("x", r"y\ z", "3"))),
        ("a=null,1", Choice("a", ("null", "1"))),
        ("a=x,y,x", Choice("a", ("x", "y"))),
        ("+a=shuffle(range(3))", Choice("+a", ("0", "1", "2"))),
        ("a@b=shuffle(choice(x, y))", Choice("a@b", ("x", "y"))),
        ("a=[1,2],[3]", Choice("a", ("[1,2]", "[3]"))),
    ],
)
def test_a_search_space_is_written_in_hydra_s_words(written: str, expected: Any) -> None:
    assert space(written, "b=1") == ([expected], ["b=1"])


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("a=interval(2, 2)", "the interval from 2.0 to 2.0 is empty; change a"),
        ("a=interval(3, 2)", "the interval from 3.0 to 2.0 is reversed"),
        ("a=int(interval(0.2, 0.7))", "is empty"),
        ("a=interval(0, inf)", "must be finite"),
        ("a=tag(log, interval(0, 1))", "0.0 has no logarithm"),
        ("a=tag(log, interval(-1, 1))", "-1.0 has no logarithm"),
        ("a=tag(log, range(1, 9, 2))", r"write tag\(log, interval"),
        ("a=tag(log, choice(1, 2))", "the only tag is log, for an interval or a range"),
        ("a=tag(uniform, interval(1, 2))", "the only tag is log"),
        ("a=range(5, 5)", "the range from 5 to 5 by 1 is empty"),
        ("a=range(5, 9, -1)", "is empty"),
        ("a=range(5, 9, 0)", "a step that is not 0"),
        ("a=1", "nothing to search"),
    ],
)
def test_a_search_space_that_makes_no_sense(written: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(written)


def test_every_choice_and_both_ends_are_checked_once() -> None:
    where, _ = space("s=choice(x, y, z)", "n=range(1, 9, 2)", "r=tag(log, interval(0.1, 1))", "t=u,v")
    assert points(where) == [
        ["s=x", "n=1", "r=0.1", "t=u"],
        ["s=y", "n=7", "r=1.0", "t=v"],
        ["s=z", "n=7", "r=1.0", "t=u"],
    ]
    assert points(space("n=interval(0, 1)")[0]) == [["n=0.0"], ["n=1.0"]]


def test_the_option_has_the_keys_of_its_class_and_their_defaults() -> None:
    values: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "hydra" / "sweeper" / "optuna.yaml"))
    assert values.pop("_target_") == "hydra_plugins.hyperopt_sweeper.OptunaSweeper"
    assert values == asdict(Settings()) and [*values] == [*asdict(Settings())]


def test_a_step_leaves_no_rounding_in_a_value() -> None:
    found = Numbers("a", 0.0, 0.9, 0.1)
    assert [found.text(0.1 * k) for k in range(10)] == ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9"]
    assert Numbers("a", 0.0, 1.0).text(1e-7 / 3) == repr(1e-7 / 3) and Numbers("a", 1, 9, 2).text(3.0) == "3"


# ---- samplers


def bowl(values: dict[str, str]) -> float:
    return (float(values["lr"]) - 0.3) ** 2 + (int(values["n"]) - 4) ** 2 / 10 + (values["s"] != "good")


BOWL = ("lr=interval(0, 1)", "n=range(0, 10)", "s=choice(bad, good)")


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("sampler", ["tpe", "random", "cma_es", "nsga_ii"])
def test_a_sampler_stays_in_its_space_and_finds_the_better_half(sampler: str, tmp_path: Path) -> None:
    made = trials(tmp_path, *BOWL, "fixed=7", sampler=sampler, n_trials=40)
    seen = solve(made, bowl)
    assert len(seen) == 40 and all(0 <= float(each["lr"]) <= 1 and 0 <= int(each["n"]) <= 9 for each in seen)
    assert {each["s"] for each in seen} == {"bad", "good"} and {each["fixed"] for each in seen} == {"7"}
    best = min(seen, key=bowl)
    assert made.study.best_value == bowl(best) < 0.5 and best["s"] == "good"


@pytest.mark.parametrize("aim", [0.1, 0.8])
def test_tpe_learns_from_what_it_is_told(aim: float, tmp_path: Path) -> None:
    seen = solve(trials(tmp_path, "s=choice(bad, good)", "lr=interval(0, 1)", n_trials=40), lambda v: abs(float(v["lr"]) - aim))
    first, last = ([abs(float(each["lr"]) - aim) for each in part] for part in (seen[:10], seen[20:]))
    assert sum(last) / 20 < 0.6 * sum(first) / 10


def test_a_direction_is_heeded(tmp_path: Path) -> None:
    upwards = OmegaConf.merge(CFG, {"trainer": {"mode": "max"}})
    made = trials(tmp_path, "s=choice(bad, good)", cfg=upwards, sampler="grid")
    solve(made, lambda values: float(values["s"] == "good"))
    assert made.study.best_params == {"s": "good"}


def test_a_grid_visits_each_point_once(tmp_path: Path) -> None:
    made = trials(tmp_path, "a=range(0, 1, 0.25)", "b=x,y,z", "c=int(interval(1, 2))", sampler="grid", n_trials=99)
    seen = solve(made, lambda values: 0)
    assert len(seen) == 24 == len({tuple(each.values()) for each in seen})
    assert {each["a"] for each in seen} == {"0.0", "0.25", "0.5", "0.75"}


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("sampler", ["tpe", "random", "cma_es", "nsga_ii", "grid"])
def test_a_search_in_two_sessions_proposes_what_one_session_does(sampler: str, tmp_path: Path) -> None:
    where = BOWL if sampler != "grid" else BOWL[1:]
    whole = solve(trials(tmp_path / "one", *where, sampler=sampler, n_trials=14), lambda v: bowl({"lr": "0", **v}))
    first = solve(trials(tmp_path / "two", *where, sampler=sampler, n_trials=6), lambda v: bowl({"lr": "0", **v}))
    second = solve(trials(tmp_path / "two", *where, sampler=sampler, n_trials=14), lambda v: bowl({"lr": "0", **v}))
    assert first + second == whole and len(second) == 8
    other = solve(trials(tmp_path / "three", *where, sampler=sampler, n_trials=6, seed=1), lambda v: bowl({"lr": "0", **v}))
    assert other != first


def test_two_objectives_give_a_front(tmp_path: Path) -> None:
    made = trials(
        tmp_path,
        "a=range(0, 11)",
        sampler="nsga_ii",
        n_trials=60,
        metric=["val/loss", "cost/vjps"],
        direction=["minimize", "maximize"],
    )
    while taken := made.take():
        for number, overrides in taken.items():
            a = int(overrides[0].partition("=")[2])
            end(tmp_path, number, val_loss=abs(a - 2), cost_vjps=-abs(a - 5))
            assert made.tell(number)
    front = {each.params["a"] for each in made.study.best_trials}
    assert front and front <= {2, 3, 4, 5} and len(front) >= 3


# ---- what is told, and what is shared


def test_what_a_run_leaves_decides_what_optuna_is_told(tmp_path: Path) -> None:
    made = trials(tmp_path, "a=interval(0, 1)", n_trials=6, n_jobs=6)
    assert list(made.take()) == [0, 1, 2, 3, 4, 5]
    end(tmp_path, 0, val_loss=0.5)
    end(tmp_path, 1, "failed", val_loss=0.1)
    end(tmp_path, 2, "pruned", val_loss=0.1)
    end(tmp_path, 3, val_loss=float("nan"))
    end(tmp_path, 4, "interrupted", val_loss=0.1)
    end(tmp_path, 5, val_loss=0.1)
    assert [made.tell(number) for number in range(5)] == [True, True, True, True, False]
    made.tell(5, "RuntimeError: it was not the run's fault")
    assert [each.state.name for each in made.study.trials] == ["COMPLETE", "FAIL", "PRUNED", "FAIL", "RUNNING", "FAIL"]
    assert made.study.trials[3].user_attrs["reason"] == "val/loss is not a finite number"
    assert made.study.best_value == 0.5 and made.take() == {}


def test_a_resumed_search_continues_what_was_running(tmp_path: Path) -> None:
    made = trials(tmp_path, "a=interval(0, 1)", n_trials=5, n_jobs=3)
    first = made.take()
    end(tmp_path, 0, val_loss=1.0)
    made.tell(0)
    end(tmp_path, 1, val_loss=2.0)  # ended, but the process was killed before it told
    again = trials(tmp_path, "a=interval(0, 1)", n_trials=5, n_jobs=3)
    taken = again.take()
    assert list(taken) == [2, 3, 4] and taken[2] == first[2]
    assert [each.value for each in again.study.trials[:2]] == [1.0, 2.0]


def test_a_search_is_continued_where_it_was_moved(tmp_path: Path) -> None:
    first = trials(tmp_path / "here", "a=interval(0, 1)", n_trials=2).take()
    (tmp_path / "here").rename(tmp_path / "there")
    assert trials(tmp_path / "there", "a=interval(0, 1)", n_trials=2).take() == first


def test_half_a_line_of_a_journal_is_removed(tmp_path: Path) -> None:
    made = trials(tmp_path, "a=interval(0, 1)", n_trials=3)
    solve(made, lambda values: 1.0)
    with open(tmp_path / "search.journal", "a") as file:
        file.write('{"op_code": 5, "tri')  # the machine stopped here
    made = trials(tmp_path, "a=interval(0, 1)", n_trials=5)
    assert len(solve(made, lambda values: 2.0)) == 2
    assert [trial.value for trial in trials(tmp_path, "a=interval(0, 1)").study.trials] == [1.0, 1.0, 1.0, 2.0, 2.0]


def test_another_search_in_the_same_study_is_refused(tmp_path: Path) -> None:
    trials(tmp_path, "a=interval(0, 1)", "b=1", "trainer.max_steps=3")
    trials(tmp_path, "a=interval(0, 1)", "b=1", "trainer.max_steps=9", n_trials=99, sampler="random")
    for overrides, settings, message in [
        (("a=interval(0, 2)", "b=1"), {}, "space is"),
        (("a=interval(0, 1)", "b=2"), {}, "overrides is"),
        (("a=interval(0, 1)", "b=1"), {"direction": "maximize"}, "direction is"),
        (("a=interval(0, 1)", "b=1"), {"metric": "val/accuracy", "direction": "minimize"}, "metric is"),
    ]:
        with pytest.raises(ConfigError, match=f"of another search: {message}"):
            trials(tmp_path, *overrides, **settings)
    optuna.create_study(storage=trials(tmp_path, "a=interval(0, 1)", "b=1").storage, study_name="foreign").add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    with pytest.raises(ConfigError, match="another program made it"):
        trials(tmp_path, "a=interval(0, 1)", "b=1", study_name="foreign")


def test_two_processes_share_the_trials_of_one_study(tmp_path: Path) -> None:
    shared = {"storage": str(tmp_path / "queue"), "n_trials": 7, "n_jobs": 2, "sampler": "random"}
    one, two = (trials(tmp_path / name, "a=interval(0, 1)", **shared) for name in ("one", "two"))
    for each in (one, two):
        RunDirectory(each.sweep).acquire()  # as a launch does
    taken = [(each.sweep, number, tuple(job)) for each in (one, two, one, two, one) for number, job in each.take().items()]
    assert sorted(number for _, number, _ in taken) == list(range(7)) and len({job for *_, job in taken}) == 7
    assert {sweep.name for sweep, *_ in taken} == {"one", "two"}
    RunDirectory(one.sweep).release()  # it was killed after its first trial
    end(one.sweep, 0, val_loss=1.0)
    one.tell(0)
    again = two.take() | two.take() | two.take()
    mine = {number: job for sweep, number, job in taken if sweep == one.sweep and number}
    assert [tuple(job) for job in again.values()] == list(mine.values()) and min(again) == 7 and not two.take()
    assert [each.number for each in two.study.trials if each.user_attrs.get("given_up")] == list(mine)
    RunDirectory(two.sweep).release()


@pytest.mark.slow
def test_a_database_is_a_storage_too(tmp_path: Path) -> None:
    shared = {"storage": f"sqlite:///{tmp_path}/study.db", "n_trials": 4}
    solve(trials(tmp_path / "one", "a=interval(0, 1)", **shared), lambda values: float(values["a"]))
    made = trials(tmp_path / "two", "a=interval(0, 1)", **shared)
    assert made.take() == {} and len(made.study.trials) == 4


# ---- warm starts


def test_the_next_trials_start_from_the_best_run_so_far(tmp_path: Path) -> None:
    def left(number: int, loss: float, checkpoint: bool = True) -> None:
        end(tmp_path, number, val_loss=loss)
        (tmp_path / str(number) / "checkpoints").mkdir()
        if checkpoint:
            (tmp_path / str(number) / "checkpoints" / "best.pt").touch()

    def started(job: list[str]) -> str | None:
        return next((each.removeprefix("init_from=") for each in job if each.startswith("init_from=")), None)

    made = trials(tmp_path, "a=interval(0, 1)", n_trials=8, n_jobs=2, warm_start="best")
    losses, starts = {0: 0.5, 1: 0.3, 2: 0.1, 3: 0.4, 4: 0.3, 5: 0.9}, {}
    for _ in range(3):
        for number, job in made.take().items():
            starts[number] = started(job)
            assert ("init_partial=true" in job) == (starts[number] is not None)
            left(number, losses[number], checkpoint=number != 2)
            made.tell(number)
    best = str(tmp_path / "1")  # 2 is better, but has left no checkpoint; 4 is equal, but came later
    assert starts == {0: None, 1: None, 2: best, 3: best, 4: best, 5: best}
    interrupted = made.take()
    left(6, 0.0)
    made.tell(6)  # whatever happens in the meantime, a trial that goes on keeps its start
    again = trials(tmp_path, "a=interval(0, 1)", n_trials=8, n_jobs=2, warm_start="best").take()
    assert again == {7: interrupted[7]} and started(again[7]) == best


def test_the_best_run_is_the_one_with_the_largest_value_if_that_is_better(tmp_path: Path) -> None:
    upwards = OmegaConf.merge(CFG, {"trainer": {"mode": "max"}})
    made = trials(tmp_path, "a=interval(0, 1)", n_trials=3, n_jobs=2, warm_start="best", cfg=upwards)
    for number in made.take():
        end(tmp_path, number, val_loss=float(number))
        (tmp_path / str(number) / "checkpoints").mkdir()
        (tmp_path / str(number) / "checkpoints" / "best.pt").touch()
        made.tell(number)
    assert f"init_from={tmp_path}/1" in made.take()[2]


def test_warm_starts_and_other_starts_do_not_mix(tmp_path: Path) -> None:
    for space_of, fixed, message in [
        ("task.l2.init=interval(1, 2)", [], "task.l2.init is in the search space, but under hydra.sweeper.warm_start=best"),
        ("seed=1,2", ["ckpt_path=x"], "ckpt_path is given"),
        ("seed=1,2", ["+init_from=x"], "init_from is given"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Settings(warm_start="best").check_start(space(space_of)[0], fixed)
        Settings().check_start(space(space_of)[0], fixed)
    with pytest.raises(ConfigError, match="warm_start=best needs one metric"):
        Settings(warm_start="best", metric=["a", "b"])
    trials(tmp_path, "a=interval(0, 1)")
    with pytest.raises(ConfigError, match="of another search: warm_start is None there and best here"):
        trials(tmp_path, "a=interval(0, 1)", warm_start="best")


@pytest.mark.parametrize("path", ["multirun/2026-11-30_18-00-00_ab/3", "it's here/3", r"a\'b/3", "x=y,z/3", "3", "1e3"])
def test_a_path_is_the_same_on_the_command_line(path: str) -> None:
    assert OverridesParser.create().parse_override(f"init_from={quoted(path)}").value() == path


# ---- pruning


def test_a_pruned_run_ends_and_says_so(tmp_path: Path) -> None:
    rows: list[tuple[int, float]] = []

    def prune(steps: int, row: Any) -> bool:
        rows.append((steps, row["val/loss"]))
        return steps == 5

    with mock.patch("hyperopt.app.run.build", built):
        run(config(), tmp_path, prune)
    found = summary(tmp_path)
    assert [steps for steps, _ in rows] == [1, 3, 5] and rows[-1][1] == found["metrics"]["val/loss"]
    assert (found["status"], found["reason"], found["steps"]) == ("pruned", "hydra.sweeper.pruner", 5)
    assert (tmp_path / "checkpoints" / "last.pt").exists() and not (tmp_path / "FAILED").exists()


def test_a_run_at_its_last_step_is_complete_and_not_pruned(tmp_path: Path) -> None:
    with mock.patch("hyperopt.app.run.build", built):
        run(config(trainer={"max_steps": 3}), tmp_path, lambda steps, row: steps == 3)
    assert summary(tmp_path)["status"] == "completed"


def test_only_runs_that_are_behind_are_pruned(tmp_path: Path) -> None:
    made = trials(tmp_path, "a=range(0, 6)", sampler="grid", pruner="successive_halving")
    sweeper = {"pruner": "successive_halving", "halving": {"min_resource": 2, "reduction_factor": 2}, "_target_": ""}
    ended = {}
    while taken := made.take():
        ((number, overrides),) = taken.items()
        a = int(overrides[0].partition("=")[2])
        hydra = OmegaConf.create({"sweep": {"dir": str(tmp_path)}, "sweeper": {**sweeper, "trial": number}})
        prune = prune_of(CFG, hydra)
        assert prune is not None
        ended[a] = next((steps for steps in range(1, 9) if prune(steps, {"val/loss": a + 1 / steps})), None)
        again = prune_of(CFG, hydra)  # a resumed run repeats its last evaluation, which is not reported twice
        assert again is not None and not again(ended[a] or 8, {"val/loss": -1.0})
        end(tmp_path, number, "completed" if ended[a] is None else "pruned", val_loss=a)
        made.tell(number)
    order = [each.params["a"] for each in made.study.trials]
    assert ended[0] is None and set(ended.values()) <= {None, 2, 4, 8} and any(ended.values())
    for place, a in enumerate(order):  # a run that is better than all before is never stopped, the worst of many always is
        assert a > min(order[: place + 1]) or ended[a] is None
        assert a < max(order[: place + 1]) or place == 0 or ended[a] == 2


def test_without_a_pruner_nothing_is_asked(tmp_path: Path) -> None:
    for sweeper in ({"pruner": None, "trial": 3}, {"max_batch_size": None}, {"pruner": "successive_halving", "trial": None}):
        assert prune_of(CFG, OmegaConf.create({"sweeper": sweeper, "sweep": {"dir": str(tmp_path)}})) is None


# ---- launches


SEARCH = ["-m", "hydra/sweeper=optuna", "hydra.sweep.dir=mine"]


def objective(monkeypatch: pytest.MonkeyPatch, loss: Callable[[DictConfig], Any]) -> list[DictConfig]:
    """Let each job of ``launch`` leave ``loss(cfg)`` as its metric or metrics; return the list of the configs that ran."""
    runs: list[DictConfig] = []

    def run(cfg: DictConfig, out: Path) -> float:
        runs.append(cfg)
        OmegaConf.save(cfg, out / "config.yaml", resolve=True)
        value = loss(cfg)
        metrics = value if isinstance(value, dict) else {"val/loss": value}
        write_json(out / "summary.json", {"status": "completed", "best": {"metrics": metrics}})
        return metrics["val/loss"]

    monkeypatch.setattr(sys.modules["hyperopt.app.run"], "run", run)
    return runs


def index() -> dict[str, Any]:
    return json.loads(Path("mine/sweep.json").read_text())


def study(path: str = "mine/search.journal", name: str = "search") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(path)))


def test_a_search_from_the_command_line(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = objective(monkeypatch, lambda cfg: cfg.optimizer.lr + ("Picard" in cfg.solver._target_))
    argv = [*SEARCH, "optimizer.lr=tag(log, interval(1e-3, 1))", "solver=choice(picard, anderson)", "trainer.max_steps=3"]
    done = launch(*argv, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2")
    assert done.status == 0, done.err
    assert index()["counts"] == {"completed": 4} and [each["number"] for each in index()["jobs"]] == [0, 1, 2, 3]
    found = study()
    for trial, cfg, job in zip(found.trials, runs, index()["jobs"], strict=True):
        assert cfg.optimizer.lr == trial.params["optimizer.lr"] and cfg.trainer.max_steps == 3
        assert trial.params["solver"] == cfg.solver._target_.rpartition(".")[2].lower() and job["directory"] == str(trial.number)
        assert job["overrides"] == [f"optimizer.lr={cfg.optimizer.lr}", f"solver={trial.params['solver']}", "trainer.max_steps=3"]


@pytest.mark.slow
def test_a_search_is_continued_and_not_changed(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = objective(monkeypatch, lambda cfg: cfg.optimizer.lr)
    argv = [*SEARCH, "optimizer.lr=tag(log, interval(1e-3, 1))", "solver=choice(picard, anderson)", "trainer.max_steps=3"]
    assert launch(*argv, "hydra.sweeper.n_trials=2").status == 0
    runs.clear()
    assert launch(*argv, "hydra.sweeper.n_trials=2", "resume=auto").status == 0 and not runs
    assert launch(*argv, "hydra.sweeper.n_trials=3", "resume=auto").status == 0 and len(runs) == 1
    before = snapshot(Path("mine"))
    refused = launch(*argv, "optimizer.clip_norm=1", "hydra.sweeper.n_trials=4", "resume=auto")
    assert refused.status == 1 and "of another search: overrides is" in refused.err and snapshot(Path("mine")) == before
    refused = launch(*argv)
    assert refused.status == 1 and "continue with resume=auto" in refused.err and len(runs) == 1


@pytest.mark.slow
def test_a_failed_job_is_told_and_the_others_go_on(launch: Launcher) -> None:
    done = launch(*SEARCH, "seed=choice(1,13,2)", "hydra.sweeper.sampler=grid")
    assert done.status == 1 and index()["counts"] == {"completed": 2, "failed": 1}, done.err
    failed = next(job["number"] for job in index()["jobs"] if job["status"] == "failed")
    assert f"1 of this sweep's jobs failed: {failed}" in done.err
    trial = study().trials[failed]
    assert trial.state == TrialState.FAIL and trial.user_attrs["reason"] == "ArithmeticError: an unlucky seed"
    assert study().best_params == {"seed": "1"}


def test_values_of_which_none_go_together_are_refused(launch: Launcher) -> None:
    argv = ["optimizer=choice(sgd,adam)", "optimizer.betas=choice([0.5,0.6])", "+optimizer.momentum=0.5"]
    refused = launch(*SEARCH, "hydra.sweeper.sampler=grid", *argv)
    assert refused.status == 1 and not Path("mine").exists()


@pytest.mark.slow
def test_values_that_do_not_go_together_are_a_failed_trial(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = objective(monkeypatch, lambda cfg: float(cfg.seed))

    def legal(self: Any, batch: Any) -> None:
        if "seed=2" in batch[0]:
            raise ConfigError("these do not go together")

    monkeypatch.setattr(Sweeper, "validate_batch_is_legal", legal)
    done = launch(*SEARCH, "seed=range(1,4)", "hydra.sweeper.sampler=grid", "hydra.sweeper.n_jobs=3")
    assert done.status == 1 and sorted(cfg.seed for cfg in runs) == [1, 3]
    assert "(seed=2) cannot be composed: these do not go together" in done.err
    (failed,) = (trial for trial in study().trials if trial.state == TrialState.FAIL)
    assert failed.params == {"seed": 2} and failed.user_attrs["reason"] == "these do not go together"


@pytest.mark.slow
def test_an_interrupted_search_goes_on(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = objective(monkeypatch, lambda cfg: float(cfg.seed))
    run = sys.modules["hyperopt.app.run"].run

    def interrupted(cfg: DictConfig, out: Path) -> float:
        if len(runs) == 1:
            write_json(out / "summary.json", {"status": "interrupted", "reason": "SIGTERM"})
            raise SystemExit(143)
        return run(cfg, out)

    monkeypatch.setattr(sys.modules["hyperopt.app.run"], "run", interrupted)
    argv = [*SEARCH, "seed=range(1,9)", "hydra.sweeper.n_trials=3"]
    assert launch(*argv).status == 143
    before = study().trials
    assert [trial.state.name for trial in before] == ["COMPLETE", "RUNNING"]
    monkeypatch.setattr(sys.modules["hyperopt.app.run"], "run", run)
    done = launch(*argv, "resume=auto")
    assert done.status == 0, done.err
    found = study().trials
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 3 and found[1].params == before[1].params
    assert [cfg.seed for cfg in runs] == [trial.params["seed"] for trial in found]


@pytest.mark.slow
def test_two_objectives_from_the_command_line(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    objective(monkeypatch, lambda cfg: {"val/loss": abs(cfg.seed - 3), "cost/vjps": float(cfg.seed)})
    two = ["hydra.sweeper.sampler=nsga_ii", "hydra.sweeper.metric=[val/loss,cost/vjps]", "hydra.sweeper.n_trials=8"]
    done = launch(*SEARCH, "seed=range(1,9)", *two, "hydra.sweeper.direction=[minimize,minimize]")
    assert done.status == 0 and "* no other job is better in all of val/loss, cost/vjps" in done.out, done.err
    best = json.loads(Path("mine/best.json").read_text())
    front = {trial.number for trial in study().best_trials}
    assert {run["number"] for run in best["runs"]} == front and all(trial.params["seed"] <= 3 for trial in study().best_trials)


@pytest.mark.slow
def test_the_space_in_a_file(launch: Launcher, tmp_path: Path) -> None:
    (tmp_path / "conf" / "sweep").mkdir(parents=True)
    (tmp_path / "conf" / "sweep" / "own.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n"
        "    n_trials: 3\n    params:\n      seed: range(1, 9)\n      solver: choice(picard, anderson)\n"
    )
    path = f"hydra.searchpath=[file://{tmp_path}/conf]"
    grid = launch("sweep=own", path, "hydra.sweep.dir=mine")
    assert grid.status == 1 and "hydra.sweeper.n_trials belongs to hydra/sweeper=optuna" in grid.err and not Path("mine").exists()
    path = (path, "hydra/sweeper=optuna")
    done = launch("sweep=own", *path, "hydra.sweep.dir=mine")
    assert done.status == 0 and len(done.runs) == 3, done.err
    twice = launch("sweep=own", *path, "hydra.sweep.dir=other", "seed=3")
    assert twice.status == 1 and "seed=3 and hydra.sweeper.params.seed=range(1, 9) are both given; drop one" in twice.err
    assert not Path("other").exists()


REFUSED = [
    (["optimizer.lrr=interval(0,1)"], "optimizer.lrr"),
    (["solver=choice(picard,andersen)"], "solver has no option 'andersen'; did you mean anderson?"),
    (["solver=choice(picard,anderson,chord,newtn)"], "solver has no option 'newtn'"),
    (["optimizer.lr=interval(1, 0)"], "the interval from 1.0 to 0.0 is reversed"),
    (["optimizer.lr=interval(1, 1)"], "is empty"),
    (["optimizer.lr=interval(-2, 1)"], "optimizer.lr"),
    (["trainer.max_steps=interval(1, 5)"], "trainer.max_steps"),
    (["trainer.max_steps=range(0, 5)"], "trainer.max_steps"),
    (["seed=3"], "nothing to search"),
    (["seed=1,2", "hydra.sweeper.metric=val/los"], "metric='val/los' is not a metric that the task logs; did you mean val/loss"),
    (["seed=1,2", "hydra.sweeper.metric=test/accuracy"], "set hydra.sweeper.direction to minimize or maximize"),
    (["seed=1,2", "hydra.sweeper.direction=up"], "hydra.sweeper.direction='up' is none of minimize, maximize"),
    (["seed=1,2", "hydra.sweeper.direction=[minimize,maximize]"], "hydra.sweeper.direction has 2 entries for 1 metrics"),
    (["seed=1,2", "hydra.sweeper.sampler=tpee"], "hydra.sweeper.sampler='tpee' is not a sampler; did you mean tpe"),
    (["seed=1,2", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0 must be a whole number >= 1"),
    (["seed=1,2", "hydra.sweeper.sampler=cma_es"], "the search space has 0; choose another sampler"),
    (["optimizer.lr=interval(0.1,1)", "hydra.sweeper.sampler=grid"], "sampler=grid needs steps, but optimizer.lr is"),
    (["seed=1,2", "hydra.sweeper.pruner=median"], "hydra.sweeper.pruner='median' is neither null nor successive_halving"),
    (["seed=1,2", "+hydra.sweeper.trials=5"], "hydra.sweeper has no key 'trials'; did you mean"),
    (["seed=1,2", "hydra.sweeper.storage=no/such/place"], "cannot be reached: there is no directory no/such"),
    (["seed=1,2", "hydra.sweeper.storage=notes"], "storage=notes cannot be reached: it is not a journal of Optuna"),
    (["seed=1,2", "hydra.sweeper.storage=sqlite:///no/such.db"], "cannot be reached: there is no directory no"),
    (
        ["seed=1,2", "hydra.sweeper.storage='nonsense://me:secret@host/db'"],
        "storage=nonsense://me:***@host/db: a password does not belong",
    ),
    (
        ["seed=1,2", "hydra.sweeper.storage='nonsense://host/db?password=secret'"],
        "'hydra.sweeper.storage=${oc.env:NAME_OF_THE_VAR",
    ),
    (["seed=1,2", "hydra.sweeper.storage='nonsense://host/db'"], "storage=nonsense://host/db cannot be reached"),
    (["seed=1,2", "hydra.sweeper.warm_start=bst"], "hydra.sweeper.warm_start='bst' is neither null nor best"),
    (["seed=1,2", "hydra.sweeper.warm_start=best", "init_from=x"], "init_from is given, but under hydra.sweeper.warm_start=best"),
    (["seed=1,2", "hydra.sweep.subdir=a"], "hydra.sweep.subdir=a: the jobs of a search lie in"),
]


QUICK = [
    argv
    for argv, message in REFUSED
    if argv[0].startswith("optimizer.lrr") or "no/such" in message or "'val/los'" in message or "***" in message
]
"""Those that take one way through the checks each: of the jobs, of the storage, of the metrics, of a password."""


@pytest.mark.cases(quick=2, slow=4, among={"argv": QUICK})
@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_a_search_that_cannot_work_is_refused_in_one_line(argv: list[str], message: str, launch: Launcher) -> None:
    Path("notes").write_text("not a journal\n")
    refused = launch(*SEARCH, *argv)
    assert refused.status == 1 and not refused.runs
    assert message in refused.err and refused.err.count("\n") == 1 and refused.err.startswith("hyperopt: ")
    assert [path.name for path in Path().iterdir()] == ["notes"] and Path("notes").read_text() == "not a journal\n"


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize(("package", "argv"), [("cmaes", ["hydra.sweeper.sampler=cma_es"]), ("optuna", [])])
def test_a_missing_package_is_named(package: str, argv: list[str], launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused = launch(*SEARCH, "seed=1,2", *argv)
    assert refused.status == 1 and not Path("mine").exists()
    assert f"needs the package {package}, which is not installed; pip install 'hyperopt-bilevel[optuna]'" in refused.err


@pytest.mark.slow
def test_a_storage_from_the_environment_is_in_no_file(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE", f"sqlite:///{Path.cwd()}/secret.db")
    done = launch(*SEARCH, "seed=1,2", "hydra.sweeper.n_trials=1", "hydra.sweeper.storage=${oc.env:STORE}")
    assert done.status == 0 and Path("secret.db").is_file(), done.err
    files = [path for path in Path("mine").rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if b"secret" in path.read_bytes()]
    assert "oc.env:STORE" in Path("mine/multirun.yaml").read_text()


# ---- for real


@pytest.mark.slow
def test_a_hybrid_search_starts_each_run_from_the_best_one(command: Launcher) -> None:
    small = ["experiment=l2_logistic", "dataset.train=20", "dataset.val=20", "dataset.test=20", "dataset.features=3"]
    argv = ["sweep=hybrid", *small, "inner=choice(lbfgs, gradient_descent)", "trainer.max_steps=3", "hydra.sweep.dir=mine"]
    done = command("-m", *argv, "hydra.sweeper.n_trials=2")
    assert done.status == 0, done.err
    assert command("-m", *argv, "hydra.sweeper.n_trials=3", "resume=auto").status == 0
    values = [trial.value or 0.0 for trial in study().trials]
    assert "init_from" not in json.loads(Path("mine/0/run.json").read_text())
    for k in range(1, 3):
        best = min(range(k), key=values.__getitem__)
        facts = json.loads((Path("mine") / str(k) / "run.json").read_text())["init_from"]
        assert facts["path"] == f"mine/{best}" and facts["taken"] == ["l2"] and facts["left_out"] == {}
    learned = checkpoint.load(Path("mine") / str(best) / "checkpoints" / "best.pt")["hyperparameters"]["l2"]
    assert learned.shape == (3, 1) and not learned.allclose(learned[0])
    best_line = next(line for line in done.out.splitlines() if line.startswith("best (job"))
    assert "init_partial=true" in best_line or "(job 0)" in best_line


@pytest.mark.slow
def test_two_hundred_trials_by_two_processes(tmp_path: Path) -> None:
    shared = {"storage": str(tmp_path / "queue"), "n_trials": 200, "n_jobs": 10, "sampler": "random"}
    both = [trials(tmp_path / name, "a=interval(0, 1)", **shared) for name in ("one", "two")]
    for each in both:
        RunDirectory(each.sweep).acquire()
    numbers: list[int] = []
    while taken := [(each, number) for each in both for number in each.take()]:
        for each, number in taken:
            end(each.sweep, number, val_loss=1.0)
            assert each.tell(number)
        numbers += [number for _, number in taken]
    assert sorted(numbers) == list(range(200)) and len({trial.params["a"] for trial in both[0].study.trials}) == 200
    for each in both:
        RunDirectory(each.sweep).release()


@pytest.mark.manual
def test_the_trial_of_a_killed_worker_is_taken_up(tmp_path: Path) -> None:
    small = ["dataset.train=60", "dataset.val=30", "dataset.test=20", "task.state_size=5", "device=cpu", "threads=1"]
    shared = ["hydra/sweeper=optuna", "hydra.sweeper.storage=queue", "hydra.sweeper.n_trials=4", "trainer.progress=false"]
    argv = ["-m", *shared, *small, "optimizer.lr=tag(log, interval(1e-3, 1))", "trainer.max_steps=150"]

    def start(name: str) -> subprocess.Popen[str]:
        run = [sys.executable, "-m", "hyperopt.app.cli", *argv, f"hydra.sweep.dir={name}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with open(tmp_path / f"{name}.err", "w") as err:
            return subprocess.Popen(run, env=environment, cwd=tmp_path, stderr=err, stdout=subprocess.DEVNULL, text=True)

    def claimed() -> bool:
        return any(path.read_text().count("\n") > 5 for path in (tmp_path / "one").glob("*/metrics.jsonl"))

    one, two = start("one"), start("two")
    deadline = time.monotonic() + 300
    while not claimed():
        assert time.monotonic() < deadline and one.poll() is None
        time.sleep(0.02)
    one.send_signal(signal.SIGKILL)
    one.wait(timeout=60)
    two.wait(timeout=400)
    err = (tmp_path / "two.err").read_text()
    assert two.returncode == 0, err
    found = study(str(tmp_path / "queue")).trials
    given_up = [trial for trial in found if trial.user_attrs.get("given_up")]
    done = [trial for trial in found if trial.state == TrialState.COMPLETE]
    assert len(done) == 4 and len(given_up) == 1 and given_up[0].user_attrs["directory"] == str(tmp_path / "one")
    assert given_up[0].params in [trial.params for trial in done if trial.user_attrs["directory"] == str(tmp_path / "two")]
    assert "was killed" in err
    for trial in done:
        run = Path(trial.user_attrs["directory"]) / str(trial.number)
        assert summary(run)["status"] == "completed" and trial.value == summary(run)["best"]["metrics"]["val/loss"]


@pytest.mark.manual
def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    small = ["dataset.train=60", "dataset.val=30", "dataset.test=20", "task.state_size=5", "device=cpu", "threads=1"]
    argv = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "trainer.progress=false", "trainer.checkpoint_every=5"]
    argv += [*small, "optimizer.lr=tag(log, interval(1e-3, 1))", "trainer.max_steps=150", "hydra.sweep.dir=mine"]
    run = [sys.executable, "-m", "hyperopt.app.cli", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(run, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    lines = tmp_path / "mine" / "1" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (lines.exists() and lines.read_text().count("\n") > 10):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait(timeout=60)
    done = subprocess.run([*run, "resume=auto"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    found = study(str(tmp_path / "mine" / "search.journal")).trials
    assert [(trial.number, trial.state.name) for trial in found] == [(0, "COMPLETE"), (1, "COMPLETE"), (2, "COMPLETE")]
    facts = json.loads((tmp_path / "mine" / "1" / "run.json").read_text())
    assert len(facts["resumed"]) == 1 and len(lines.read_text().splitlines()) == 150


@pytest.mark.manual
@pytest.mark.skipif(not importlib.util.find_spec("joblib"), reason="pip install 'hyperopt-bilevel[joblib]'")
def test_a_pruned_search_by_two_workers_at_a_time(command: Launcher) -> None:
    small = ["dataset.train=60", "dataset.val=30", "dataset.test=20", "task.state_size=5", "device=cpu", "threads=1"]
    halving = ["hydra.sweeper.pruner=successive_halving", "hydra.sweeper.halving={min_resource: 1, reduction_factor: 2}"]
    both = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=6"]
    longer = ["trainer.max_steps=8", "trainer.eval_every=1", "optimizer.lr=tag(log, interval(1e-4, 1))"]
    done = command(*SEARCH, *small, *halving, *both, *longer)
    assert done.status == 0, done.err
    found = study().trials
    names = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "pruned"}
    assert [names[trial.state] for trial in found] == [job["status"] for job in index()["jobs"]]
    pruned = [trial for trial in found if trial.state == TrialState.PRUNED]
    assert pruned and f"pruned: {', '.join(str(trial.number) for trial in pruned)}" in done.out
    for trial, job in zip(found, index()["jobs"], strict=True):
        assert (
            list(trial.intermediate_values) == list(range(1, job["steps"] + (trial in pruned))) and trial.number == job["number"]
        )
    assert command("report", "mine").status == 0 and "pruned" in Path("mine/report/index.html").read_text()
