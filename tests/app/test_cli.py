"""The command line: what a mistake prints, where results go, what a used directory meets, and that none of it needs torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launcher import Launcher, snapshot

from hyperopt import __version__
from hyperopt.app.preflight import Preflight

ROOT = Path(__file__).resolve().parents[2]


MISTAKES = [
    ("solvr=anderson", ["solvr: there is no such group or key", "did you mean solver?", "optimizer"]),
    ("solver=andersen", ["solver has no option 'andersen'", "did you mean anderson?", "choices: anderson, broyden, "]),
    ("experiment=equilibrium_mnst", ["did you mean equilibrium_mnist", "equilibrium_mnist_projected"]),
    ("dataset=cifar", ["dataset has no option 'cifar'", "digits, fashion_mnist, libsvm, mnist"]),
    ("optimizer.lrr=1", ["optimizer has no key 'lrr'", "did you mean lr?", "momentum, nesterov"]),
    ("optimizer/scheduler=cosin", ["optimizer/scheduler has no option 'cosin'", "did you mean cosine?"]),
    ("adjoint.linear_solver.max_step=3", ["adjoint.linear_solver has no key 'max_step'", "did you mean max_steps?"]),
    ("trainer.max_steps=abc", ["trainer.max_steps='abc' must be a whole number >= 1; change trainer.max_steps"]),
    ("compile=maybe", ["compile='maybe' must be true or false; change compile"]),
    ("+foo=1", ["foo: there is no such group or key", "choices: accept_lost_rows, adjoint"]),
    ("paths.dta=x", ["did you mean data?"]),
    ("hydra.rn.dir=x", ["hydra has no key 'rn'", "did you mean run?"]),
    ("solver", ["'solver' is not a subcommand", "check, report, export, tensorboard; values are key=value"]),
    ("optimizer.lr=fast", ["optimizer.lr='fast' is not a float or int; change optimizer.lr"]),
    ("adjoint=soba", ["adjoint=soba is not an Adjoint", "choices: anderson, ", "change adjoint"]),
    ("adjoint=t1t2", ["adjoint=T1T2 is for trained inner problems", "change adjoint"]),
    ("adjoint=shine", ["adjoint=Shine needs a solver with an inverse estimate", "Picard keeps none", "change adjoint"]),
    ("trainer.monitor=val/acc", ["trainer.monitor='val/acc' is not a metric of the task; did you mean val/accuracy"]),
    ("seed=[", ["cannot read 'seed=['"]),
    ("task=null", ["Config group override"]),
    ("solver.max_steps=0", ["solver.max_steps=0 must be a whole number >= 1; change solver.max_steps"]),
    ("solver._target_=os.system", ["solver._target_='os.system' is outside hyperopt", "allow_targets=[os]"]),
    ("device=cuda:99", ["device='cuda:99'"]),
    ("resume=auto", ["resume=auto has no run to look for", "set hydra.run.dir"]),
    ("hydra.run.dir=a_file", ["hydra.run.dir='a_file' is not a directory"]),
    ("-m solver=picard,andersen", ["solver has no option 'andersen'", "did you mean anderson?"]),
    ("-m seed=1,-1", ["seed=-1 is not a whole number in [0"]),
    ("-m resume=auto seed=1,2", ["set hydra.sweep.dir"]),
]


@pytest.mark.cases(quick=8, slow=10)
@pytest.mark.parametrize(("argv", "expected"), MISTAKES, ids=[argv for argv, _ in MISTAKES])
def test_a_mistake_is_told_in_a_few_lines_before_anything_happens(launch: Launcher, argv: str, expected: list[str]) -> None:
    Path("a_file").write_text("mine")
    done = launch(*argv.split())
    assert done.status == 1 and not done.runs
    for words in expected:
        assert words in done.err
    assert done.err.startswith("hyperopt: ") and "Traceback" not in done.err and len(done.err.splitlines()) <= 5
    assert all(line.startswith("hyperopt: loading PyTorch for ") for line in done.out.splitlines())
    assert done.out.count("\n") <= 1 and [path.name for path in Path().iterdir()] == ["a_file"]


def test_the_whole_traceback_on_request(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done = launch("solver.max_steps=0")
    assert done.status == 1 and "Traceback" in done.err and done.err.splitlines()[-1].startswith("hyperopt: solver.max_steps=0")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_an_error_of_the_program_keeps_its_traceback(launch: Launcher) -> None:
    done = launch("seed=13")
    assert done.status == 1 and "Traceback" in done.err and "ArithmeticError: an unlucky seed" in done.err
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_run_gets_its_config_and_a_directory_of_its_own(launch: Launcher) -> None:
    done = launch("seed=3", "solver=anderson")
    assert done.status == 0, done.err
    [(cfg, out)] = done.runs
    assert cfg.seed == 3 and cfg.solver._target_ == "hyperopt.core.solvers.anderson.Anderson" and "hydra" not in cfg
    assert out.parent == Path("outputs/train").resolve() and out.is_dir()
    assert sorted(path.name for path in (out / ".hydra").iterdir()) == ["config.yaml", "hydra.yaml", "overrides.yaml"]
    assert (out / "hyperopt.log").is_file()


@pytest.mark.slow
def test_launches_in_the_same_second_have_directories_of_their_own(launch: Launcher) -> None:
    outs = [launch().runs[0][1] for _ in range(3)]
    assert len(set(outs)) == 3 and all(out.is_dir() for out in outs)


FAKE = (
    "import sys, types; m = types.ModuleType('hyperopt.app.run'); m.run = lambda cfg, out: (out / 'done').write_text('') * 1.0;"
    "sys.modules['hyperopt.app.run'] = m; from hyperopt.app.cli import main; main()"
)


@pytest.mark.manual
def test_three_processes_at_once(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", FAKE], cwd=tmp_path, env=env) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    assert len(list(tmp_path.glob("outputs/train/*/done"))) == 3


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("mode", ["run", "sweep"])
def test_a_used_directory_is_refused_untouched_and_resumed_on_request(launch: Launcher, mode: str) -> None:
    sweep = ["-m"] if mode == "sweep" else []
    argv = [*sweep, f"hydra.{mode}.dir=mine"]
    assert launch(*argv, "seed=1").status == 0
    before = snapshot(Path("mine"))
    assert any(name.endswith("overrides.yaml") for name in before)

    refused = launch(*argv, "seed=2")
    assert refused.status == 1 and not refused.runs
    assert f"hydra.{mode}.dir='mine' is not empty" in refused.err and "resume=auto" in refused.err
    assert snapshot(Path("mine")) == before

    resumed = launch(*argv, "seed=1", "resume=auto")
    assert resumed.status == 0 and len(resumed.runs) == (mode == "run")  # a job of a sweep that is done is not run again


@pytest.mark.slow
def test_an_empty_directory_and_a_checkpoint_are_welcome(launch: Launcher) -> None:
    Path("mine").mkdir()
    assert launch("hydra.run.dir=mine").status == 0
    Path("last.pt").write_text("a checkpoint")
    assert launch("hydra.run.dir=other", "mode=evaluate", "ckpt_path=last.pt").status == 0
    before = snapshot(Path("mine"))
    for mode in ("train", "evaluate"):  # a checkpoint from elsewhere gives no right to a used directory
        refused = launch("hydra.run.dir=mine", f"mode={mode}", "ckpt_path=last.pt")
        assert refused.status == 1 and "hydra.run.dir='mine' is not empty" in refused.err and not refused.runs
    assert snapshot(Path("mine")) == before


@pytest.mark.slow
def test_another_experiment_is_refused_before_anything_is_written(launch: Launcher) -> None:
    assert launch("hydra.run.dir=mine", "solver=anderson", "adjoint=unrolled").status == 0
    before = snapshot(Path("mine"))
    refused = launch("hydra.run.dir=mine", "resume=auto", "solver=anderson", "adjoint=unrolled", "optimizer.lr=0.25", "seed=2")
    assert refused.status == 1 and not refused.runs
    assert "mine holds another experiment" in refused.err and "set hydra.run.dir to a new directory" in refused.err
    assert "optimizer.lr is 0.5 there and 0.25 here; seed is 0 there and 2 here;" in refused.err
    assert snapshot(Path("mine")) == before
    moved = ("trainer.max_steps=500", "paths.data=elsewhere", "threads=2", "device=cpu", "compile=true")
    assert launch("hydra.run.dir=mine", "resume=auto", "solver=anderson", "adjoint=unrolled", *moved).status == 0


@pytest.mark.slow
def test_a_directory_in_use_is_refused_untouched(launch: Launcher) -> None:
    hold = "import sys, pathlib; from hyperopt.app.run_directory import RunDirectory as R; R(pathlib.Path('mine')).acquire()"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{hold}; print('held'); sys.stdout.flush(); sys.stdin.read()"]
    other = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    for argv in (["hydra.run.dir=mine"], ["hydra.run.dir=mine", "resume=auto"], ["-m", "hydra.sweep.dir=mine", "seed=1,2"]):
        refused = launch(*argv)
        assert refused.status == 1 and not refused.runs and f"in use by process {other.pid}" in refused.err
        assert "hydra.sweep.dir" in refused.err if argv[0] == "-m" else "hydra.run.dir" in refused.err
        assert [path.name for path in Path("mine").iterdir()] == [".lock"]
    other.communicate("")
    assert launch("hydra.run.dir=mine").status == 0


def test_a_sweep_runs_every_job_in_its_own_directory_and_returns_their_metrics(
    launch: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics: list[float] = []
    spy = lambda self, config, job_return, **_: metrics.append(job_return.return_value)  # noqa: E731
    monkeypatch.setattr(Preflight, "on_job_end", spy)
    done = launch("-m", "solver=picard,anderson", "seed=1,2", "debug=default")
    assert done.status == 0, done.err
    assert [(cfg.solver._target_.rpartition(".")[2], cfg.seed) for cfg, _ in done.runs] == [
        ("Picard", 1),
        ("Picard", 2),
        ("Anderson", 1),
        ("Anderson", 2),
    ]
    [sweep] = Path("multirun").iterdir()
    assert [out for _, out in done.runs] == [sweep.resolve() / str(number) for number in range(4)]
    assert metrics == [1.0, 2.0, 1.0, 2.0]


def test_a_failed_job_is_shown_at_once_does_not_stop_the_others_and_fails_the_sweep(launch: Launcher) -> None:
    done = launch("-m", "seed=1,13,2")
    assert done.status == 1
    assert [cfg.seed for cfg, _ in done.runs] == [1, 13, 2]
    assert "hyperopt: job 1 (seed=13) failed: ArithmeticError('an unlucky seed')" in done.err
    assert done.err.splitlines()[-1] == "hyperopt: 1 of this sweep's jobs failed: 1"


def test_allow_targets_counts_on_the_command_line_only(launch: Launcher) -> None:
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/theirs.yaml").write_text("# @package _global_\nallow_targets: [os]\nsolver:\n  _target_: os.system\n")
    done = launch("--config-dir", "conf", "experiment=theirs")
    assert done.status == 1 and "allow_targets=['os'] counts on the command line only" in done.err and not done.runs


def test_help_lists_groups_examples_and_where_results_go(launch: Launcher) -> None:
    done = launch("--help")
    assert done.status == 0
    for words in ("newton_krylov, picard", "equilibrium_mnist", "hyperopt -m ", "Results:", "tensorboard --logdir", "lbfgs"):
        assert words in done.out
    assert sum(line.startswith("  hyperopt") for line in done.out.splitlines()) == 7
    assert "schema" not in done.out and "${" not in done.out


@pytest.mark.manual
def test_every_command_of_the_help_text_composes(launch: Launcher) -> None:
    for line in launch("--help").out.splitlines():
        if line.startswith("  hyperopt"):
            argv = line.split("   ")[0].split()[1:]
            assert launch(*argv).status == 0, line


def test_version(launch: Launcher) -> None:
    assert launch("--version").out == f"hyperopt-bilevel {__version__}\n"


def test_tab_completion_offers_options_and_no_schema_nodes(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "hyperopt solver=")
    monkeypatch.setenv("COMP_POINT", "16")
    solvers = sorted(path.stem for path in (ROOT / "configs" / "solver").glob("*.yaml"))
    assert "anderson" in solvers
    assert launch("-sc", "query=bash").out.split() == [f"solver={name}" for name in solvers]


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("argv", ["--help", "--version", "--cfg job", "--cfg job adjoint=anderson", "sed=1", "seed=-1"])
def test_torch_is_not_imported_before_a_job_starts(argv: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom hyperopt.app.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "asked = {'--help', '--version'} & set(sys.argv)\n"
        "assert 'torch' not in sys.modules and ('hydra' in sys.modules) != bool(asked)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *argv.split()], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_first_line_says_what_is_loaded_before_hydra_and_torch_are_imported(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "class Told:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('hydra', 'torch'): print('importing', name, flush=True)\n"
        "        if name == 'torch': os._exit(0)\n"
        "sys.meta_path.insert(0, Told())\n"
        "from hyperopt.app.cli import main; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = ["optimizer=adam", "hydra.run.dir=mine", "seed=1"]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    loading = "hyperopt: loading PyTorch for optimizer=adam seed=1"
    assert done.stdout.splitlines() == [loading, "importing hydra", "importing torch"]


@pytest.mark.parametrize(
    ("argv", "told"), [((), "the main job"), (("seed=1\x1b[2J",), "seed=1\\x1b[2J"), (("--cfg", "job"), None)]
)
def test_the_first_line_is_printable_and_only_for_a_launch(launch: Launcher, argv: tuple[str, ...], told: str | None) -> None:
    done = launch(*argv)
    found = [line for line in done.out.splitlines() if "loading" in line]
    assert found == ([] if told is None else [f"hyperopt: loading PyTorch for {told}"])


def test_the_module_is_the_command(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "hyperopt.app.cli", "sede=1"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1 and "did you mean seed?" in done.stderr


TASK = '''
import torch
from hyperopt.tasks.base import StepRecord, Task

class Quadratic(Task):
    """min |lam - goal|^2, with no inner problem."""

    name = "quadratic"

    def __init__(self, goal):
        self.goal = goal

    def setup(self, env):
        self.lam = torch.zeros(2, dtype=env.dtype, device=env.device, requires_grad=True)

    def groups(self):
        return {"lam": [self.lam]}

    def loss(self):
        return (self.lam - self.goal).square().sum()

    def step(self, optimizer, check):
        def closure():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            check(self.gradients())
            return loss
        return StepRecord(loss=float(optimizer.step(closure)))

    def evaluate(self):
        loss = float(self.loss().detach())
        return {"outer/loss": loss, "val/loss": loss}

    def state_dict(self):
        return {"lam": self.lam.detach().clone()}

    def load_state_dict(self, state):
        self.lam.data.copy_(state["lam"])
'''


@pytest.mark.manual
def test_a_task_from_ones_own_package(tmp_path: Path) -> None:
    package = tmp_path / "elsewhere" / "mine"
    (package / "configs" / "task").mkdir(parents=True)
    for folder in (package, package / "configs", package / "configs" / "task"):
        (folder / "__init__.py").touch()
    (package / "tasks.py").write_text(TASK)
    (package / "configs" / "task" / "parabola.yaml").write_text("_target_: mine.tasks.Quadratic\ngoal: 3.0\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(package.parent)])}
    argv = ["task=parabola", "task.goal=2", "hydra.searchpath=[pkg://mine.configs]", "optimizer=sgd", "debug=default"]

    def command(*more: str) -> subprocess.CompletedProcess[str]:
        full = [sys.executable, "-m", "hyperopt.app.cli", "hydra.run.dir=out", *argv, *more]
        return subprocess.run(full, cwd=tmp_path, env=env, capture_output=True, text=True)

    refused = command()
    assert refused.returncode == 1 and "add 'allow_targets=[mine]' to the command line" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = command("allow_targets=[mine]")
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 1 and last["val/loss"] == 0.0  # lr 0.5 on |lam - goal|^2 lands on the goal in one step


@pytest.mark.manual  # the same with jobs that only leave files: test_a_sweep_runs_every_job_in_its_own_directory
def test_a_sweep_of_two_by_two_for_real(command: Launcher, tmp_path: Path) -> None:
    argv = ["-m", "solver=picard,anderson", "optimizer=sgd,adam", "debug=default", "device=cpu", "hydra.sweep.dir=sweep"]
    done = command(*argv, "dataset.train=50", "dataset.val=20", "dataset.test=20", "task.state_size=10")
    assert done.status == 0, done.err
    for number in range(4):
        out = tmp_path / "sweep" / str(number)
        assert json.loads((out / "summary.json").read_text())["status"] == "completed"
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_flags_and_overrides_come_in_any_order(launch: Launcher) -> None:
    done = launch("solver=anderson", "-m", "seed=0,1", "trainer.max_steps=3")
    assert done.status == 0, done.err
    assert [(cfg.seed, cfg.trainer.max_steps) for cfg, _ in done.runs] == [(0, 3), (1, 3)]
    assert "name: train" in launch("seed=1", "--cfg", "job", "solver=rre").out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["chek"], "'chek' is not a subcommand; did you mean check? subcommands: check, report, export, tensorboard; values are"),
        (["export", "nowhere"], "hyperopt export: nowhere holds no run: it has no config.yaml"),
        (["report", "nowhere"], "hyperopt report: there is no directory nowhere"),
    ],
)
def test_a_subcommand_refuses_in_one_line(launch: Launcher, argv: list[str], said: str) -> None:
    done = launch(*argv)
    assert done.status == 1 and said in done.err and len(done.err.splitlines()) == 1 and not done.out


@pytest.mark.parametrize("name", ["check", "report", "export"])
def test_a_subcommand_has_its_own_help(launch: Launcher, name: str) -> None:
    done = launch(name, "--help")
    assert done.status == 0 and done.out.startswith(f"usage: hyperopt {name}")


def test_an_evaluation_takes_everything_from_the_run(launch: Launcher) -> None:
    made = launch("solver=anderson", "task.state_size=7", "seed=5", "device=cpu", "threads=1", "hydra.run.dir=one")
    assert made.status == 0, made.err
    (Path("one/checkpoints")).mkdir()
    Path("one/checkpoints/best.pt").write_bytes(b"")
    done = launch("mode=evaluate", "ckpt_path=one/checkpoints/best.pt", "hydra.run.dir=two", "seed=6")
    assert done.status == 0, done.err
    [(cfg, out)] = done.runs
    assert (cfg.solver._target_.rpartition(".")[2], cfg.task.state_size, cfg.seed) == ("Anderson", 7, 6)
    assert cfg.threads is None and out.name == "two"  # what says how a launch is made is not taken over


def test_an_evaluation_of_a_run_from_elsewhere_allows_and_resolves_nothing(launch: Launcher) -> None:
    Path("one/.hydra").mkdir(parents=True)
    Path("one/checkpoints").mkdir()
    Path("one/checkpoints/best.pt").write_bytes(b"")
    evil = ["allow_targets=[os]", "name=${oc.env:HOME}", "hydra.callbacks={a: {_target_: os.system}}", "seed=4"]
    Path("one/.hydra/overrides.yaml").write_text("".join(f"- {each}\n" for each in map(json.dumps, evil)))
    [(cfg, _)] = launch("mode=evaluate", "ckpt_path=one/checkpoints/best.pt").runs
    assert (list(cfg.allow_targets), cfg.name, cfg.seed) == ([], "train", 4)
    Path("one/.hydra/overrides.yaml").write_text("- task._target_=os.system\n")
    done = launch("mode=evaluate", "ckpt_path=one/checkpoints/best.pt")
    assert done.status == 1 and "task._target_='os.system' is outside hyperopt" in done.err and not done.runs


def test_a_run_that_fails_says_what_happened_and_where_its_traceback_is(command: Launcher) -> None:
    done = command("optimizer.lr=1e308", "debug=default", "trainer.max_steps=5", "device=cpu", "hydra.run.dir=mine")
    said = done.err.splitlines()[-2:]
    assert done.status == 1 and "Traceback" not in done.err
    assert said[0].startswith("hyperopt: ") and said[1] == f"hyperopt: the traceback is in {Path('mine').resolve() / 'FAILED'}"
    assert "Traceback" in Path("mine/FAILED").read_text()
