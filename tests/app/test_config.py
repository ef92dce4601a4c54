"""The schema, the checks and the one ``instantiate`` call: every config composes, every mistake has its message."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import CONFIGS, composed
from hydra.utils import get_class
from omegaconf import OmegaConf

from hyperopt.app.building import TORCHS, build
from hyperopt.app.config import ConfigError, plain_config
from hyperopt.app.errors import near
from hyperopt.app.options import hints, kinds, options, own, registered, targets
from hyperopt.app.resolvers import config_path
from hyperopt.core.text import with_article

FILES = sorted(path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*/*.yaml"))
OPTIONS = [f"{path.parent}={path.name}" for path in FILES if path.parts[0] not in ("hydra", "experiment")]
PLACES = {"task/space": "task.l2", "task/tuned": "task.decay"}  # of a group whose place is the task's own name for it
OWNER = {
    "task/classifier": ["task=stn_images"],
    "task/space": ["task=l2"],
    "task/tuned": ["task=stn_ridge"],
    "task/network": ["task=implicit"],
    "task/augment": ["task=implicit"],
}  # where an option is of another than the default task
TRAINED = ("f2sa", "saba", "soba", "stocbio", "v_pbgd")  # adjoints that train the weights themselves: for trained problems alone
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


def test_a_checkout_reads_its_own_configs() -> None:
    assert Path(config_path()) == CONFIGS


# The quick run builds the options of the other groups in ``test_every_option_is_right.py``.
@pytest.mark.cases(quick=4, among={"option": [option for option in OPTIONS if option.startswith(("dataset", "stn"))]})
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_passes_the_checks(option: str) -> None:
    group, _, name = option.partition("=")
    place = PLACES.get(group, group.replace("/", "."))
    trained = name.startswith((*TRAINED, "t1t2", "finite_difference")) if group == "adjoint" else option == "dataset=diabetes"
    owner = ["task=l2"] if trained else ["solver=broyden"] if name == "shine" else OWNER.get(group, [])
    cfg = composed(*owner, f"{group}@{place}={name}" if group in PLACES else option)
    build(cfg)
    if f"{group}/{name}" in own():
        assert OmegaConf.select(cfg, f"{place}._target_") == targets(group)[name][0]


# In the quick run, tests/test_readme.py composes those that a command of the manuals names.
@pytest.mark.cases(quick=0, slow=15)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_passes_the_checks(name: str) -> None:
    cfg = composed(f"experiment={name}")
    build(cfg)
    assert cfg.name == name
    build(composed(f"experiment={name}", "debug=default"))


@pytest.mark.parametrize("value", ["1", "0.5", "rate"])
def test_a_rate_is_a_number_or_a_name(value: str) -> None:
    cfg = composed("inner=heavy_ball", f"inner.step_size={value}", "inner.momentum=0")
    build(cfg)
    assert str(cfg.inner.step_size) == value


@pytest.mark.parametrize("value", ["0", "-1", "true", "null"])
def test_a_rate_out_of_range(value: str) -> None:
    with pytest.raises(ConfigError, match=r"inner\.step_size=.*; change inner\.step_size"):
        build(composed(f"inner.step_size={value}"))


def test_the_default_job() -> None:
    cfg = composed()
    assert (cfg.trainer.max_steps, cfg.optimizer.lr, cfg.optimizer.momentum) == (200, 0.5, 0.9)
    assert cfg.task.solver == cfg.solver and cfg.task.dataset == cfg.dataset and cfg.task.adjoint == cfg.adjoint


def test_debug_comes_last_and_is_tiny() -> None:
    cfg = composed("debug=default", "experiment=equilibrium_mnist")
    assert (cfg.trainer.max_steps, cfg.trainer.eval_every, cfg.trainer.progress) == (2, 1, False)


def shown(option: str) -> dict[str, Any]:
    """The values of an option's own file."""
    return OmegaConf.to_container(OmegaConf.create(options()[option]))  # pyright: ignore[reportReturnType]


REPLACED = tuple(f"solver/newton_krylov.linear_solver.{name}" for name in ("rtol", "atol", "relative_to"))
"""Arguments that the solver sets itself, so that a value of a user would do nothing."""


def differing(values: dict[str, Any], where: str, own: bool = True) -> list[str]:
    """Keys that a file has and its class does not or the other way round, and values that are not the defaults of the class.

    The values of a part inside of another one are chosen by that one.
    """
    found: list[str] = []
    known = hints(values["_target_"]) or {}
    defaults = {name: each.default for name, each in inspect.signature(get_class(values["_target_"])).parameters.items()}
    found += [f"{where}.{name}" for name in known if name not in values and f"{where}.{name}" not in REPLACED]
    for name, value in values.items():
        if name == "_target_":
            continue
        if name not in known:
            found.append(f"{where}.{name}")
        elif isinstance(value, dict) and "_target_" in value:
            found += differing(value, f"{where}.{name}", own=False)
        elif not own or isinstance(value, dict) or (isinstance(value, str) and "${" in value):
            continue
        elif (tuple(value) if isinstance(value, list) else value) != defaults[name] and value != []:
            found.append(f"{where}.{name}={value} ({defaults[name]})")
    return found


@pytest.mark.parametrize("option", own())
def test_an_option_shows_the_keys_and_the_defaults_of_its_class(option: str) -> None:
    values = shown(option)
    if issubclass(get_class(values["_target_"]), TORCHS):
        return  # its defaults are torch's, and ours are for hyperparameters
    named = [str(name) for entry in values.pop("defaults", []) if isinstance(entry, dict) for name in entry]
    groups = {name.rpartition("@")[2].partition(".")[0] for name in named if not name.startswith("override ")}
    assert [each for each in differing(values, option) if each.removeprefix(f"{option}.") not in groups] == []


@pytest.mark.parametrize("option", own())
def test_every_key_of_an_option_has_at_most_one_line_of_comment(option: str) -> None:
    lines = options()[option].splitlines()
    assert not any(line.startswith("  ") and line.strip().startswith("#") for line in lines), "a comment stands beside its key"


def test_every_part_has_a_kind() -> None:
    """So that a part of another kind is refused: only values that may be anything are of any type."""
    loose = {
        f"{target}.{name}" for target in registered() for name, hint in (hints(target) or {}).items() if object in kinds(hint)
    }
    assert {each.rpartition(".")[2] for each in loose} <= set(PLAIN)


PLAIN = ("init", "step_size", "momentum", "lr", "options")  # numbers, or names of hyperparameters, and no parts


def test_build_makes_what_the_config_says_and_leaves_it_alone() -> None:
    methods = ["solver=anderson", "solver.window=3", "optimizer=adam", "optimizer.clip_norm=2"]
    cfg = composed(*methods, "trainer.max_steps=7")
    before = OmegaConf.to_yaml(cfg)
    built = build(cfg)
    assert built.trainer.max_steps == 7
    task, make = vars(built.task), built.optimizer.make
    assert isinstance(make, functools.partial) and make.func is torch.optim.Adam and make.keywords["betas"] == (0.9, 0.999)
    assert built.optimizer.clip_norm == 2 and built.optimizer.scheduler is None
    assert type(task["solver"]).__name__ == "Anderson" and task["solver"].window == 3
    assert OmegaConf.to_yaml(cfg) == before


BAD = [
    (["solver.max_steps=0"], "solver.max_steps=0 must be a whole number >= 1; change solver.max_steps"),
    (["adjoint.linear_solver.max_steps=0"], "adjoint.linear_solver.max_steps=0 must be a whole number >= 1"),
    (["adjoint=anderson", "adjoint.linear_solver.window=0"], "adjoint.linear_solver.window=0"),
    (["adjoint.policy=shrug"], "adjoint.policy='shrug' is not one of raise, warn, fallback, ignore; change adjoint.policy"),
    (["adjoint=unrolled", "adjoint.last=0"], "adjoint.last=0"),
    (["solver.rtol=-1"], "solver.rtol=-1 is not in [0.0, inf); change solver.rtol"),
    (["solver=broyden", "solver.memory=0"], "solver.memory=0 must be a whole number >= 1; change solver.memory"),
    (["solver=chord", "solver.refresh=2"], "solver.refresh=2 is not in (0.0, 1.0]; change solver.refresh"),
    (["solver=newton", "solver.max_gib=0"], "solver.max_gib=0"),
    (["solver=newton_krylov", "solver.linear_solver.max_steps=0"], "solver.linear_solver.max_steps=0"),
    (["adjoint=shine", "adjoint.ratio=0"], "adjoint.ratio=0 is not in (0.0, inf); change adjoint.ratio"),
    (["task.policy=shrug"], "task.policy='shrug' is not one of raise, warn, fallback, ignore; change task.policy"),
    (["solver.damping=0"], "solver.damping=0 is not in (0.0, 1.0]"),
    (["optimizer.lr=0"], "optimizer.lr=0"),
    (["optimizer.lr=fast"], "optimizer.lr='fast' is not a float or int; change optimizer.lr"),
    (["optimizer.momentum=-1"], "optimizer.momentum=-1 is refused: Invalid momentum value: -1; change optimizer.momentum"),
    (["optimizer.nesterov=3"], "optimizer.nesterov=3 is not a bool; change optimizer.nesterov"),
    (["optimizer.momentum=0", "optimizer.nesterov=true"], "Nesterov momentum requires a momentum"),
    (["optimizer=adam", "optimizer.betas=[0.9]"], "optimizer.betas="),
    (["optimizer=lbfgs", "optimizer.line_search_fn=3"], "optimizer.line_search_fn=3"),
    (["optimizer._target_=torch.optim.Foo"], "optimizer._target_='torch.optim.Foo' cannot be imported"),
    (["optimizer._target_=torch.optim.lr_scheduler.StepLR"], "is not an OuterOptimizer"),
    (["solver._target_=torch.optim.Adam"], "is not a FixedPointSolver; choices: hyperopt.core.newton.chord.Chord"),
    (["+optimizer.alpha=0.5"], "optimizer.alpha: torch.optim.SGD takes no 'alpha'; choices: dampening"),
    (["optimizer.clip_norm=-1"], "optimizer.clip_norm=-1"),
    (["optimizer=adam", "optimizer.betas=[0.9,1.5]"], "optimizer.betas="),
    (["optimizer.lr=???"], "no value for optimizer.lr; set optimizer.lr"),
    (
        ["optimizer/scheduler=step", "optimizer.scheduler.step_size=???"],
        "no value for optimizer.scheduler.step_size; set optimizer.scheduler.step_size",
    ),
    (["optimizer/scheduler=step", "optimizer.scheduler.step_size=0"], "optimizer.scheduler.step_size=0 is refused"),
    (["optimizer/scheduler=power", "optimizer.scheduler.decay=2"], "optimizer.scheduler.decay=2 is not in (0, 1]"),
    (["optimizer/scheduler=plateau", "optimizer.scheduler.factor=1"], "optimizer.scheduler.factor=1 is refused"),
    (["optimizer/scheduler=exponential", "optimizer.scheduler.gamma=half"], "optimizer.scheduler.gamma='half' is not a float"),
    (["trainer.max_steps=-3"], "trainer.max_steps=-3"),
    (["trainer.max_seconds=0"], "trainer.max_seconds=0"),
    (["trainer.mode=best"], "trainer.mode='best' is not one of min, max"),
    (["task.state_size=0"], "task.state_size=0"),
    (["task.batch_size=0"], "task.batch_size=0 must be a whole number >= 1; change task.batch_size"),
    (["task=implicit", "task.workers=-1"], "task.workers=-1 must be a whole number >= 0; change task.workers"),
    (["task=implicit", "task.eval_batch_size=0"], "task.eval_batch_size=0"),
    (["task=implicit", "task.network.width=0"], "task.network.width=0 must be a whole number >= 1; change task.network.width"),
    (
        ["task=implicit", "task/network=deq_resnet", "task.network.norm=batch"],
        "task.network.norm='batch' is not one of None, weight",
    ),
    (["task=implicit", "task/augment=crop_flip", "task.augment.flip=2"], "flip=2"),
    (["task.last_batch=pad"], "task.last_batch='pad' is not one of keep, drop; change task.last_batch"),
    (
        ["dataset.train=1500"],
        "dataset.train=1500 and val=400 need 1900 different rows; there are 1797; lower dataset.train or dataset.val",
    ),
    (
        ["dataset.train=0"],
        "dataset.train=0 must be a whole number from 1 to 1797, the rows that there are to train on; change dataset.train",
    ),
    (["dataset=synthetic", "dataset.noise=-inf"], "dataset.noise=-inf is not in (-inf, inf); change dataset.noise"),
    (["dataset=libsvm", "dataset.file=''"], "dataset.file='' does not name a file or directory; change dataset.file"),
    (
        ["task=implicit", "task/augment=crop_flip", "task.augment.fill=nan"],
        "task.augment.fill=nan is not in (-inf, inf); change task.augment.fill",
    ),
    (["dataset=mnist", "dataset.train=40000", "dataset.val=30000"], "60000"),
    (["dataset.order=sideways"], "dataset.order='sideways' is not one of"),
    (["seed=-1"], "seed=-1 is not a whole number in [0, 4294967295]; change seed"),
    (["device=tpu"], "device='tpu' is not one of auto, cpu, cuda, cuda:N; change device"),
    (["device=cuda:"], "device='cuda:'"),
    (["precision=float16"], "precision='float16' is not one of float32, float64; change precision"),
    (["mode=dream"], "mode='dream' is not one of train, evaluate, check; change mode"),
    (["resume=yes_please"], "resume='yes_please' is not one of never, auto; change resume"),
    (["threads=0"], "threads=0 must be a whole number >= 1"),
    (["ckpt_path=nowhere.pt"], "ckpt_path='nowhere.pt' is not a file; change ckpt_path"),
    (["mode=evaluate"], "mode=evaluate needs a checkpoint, but ckpt_path=null; set ckpt_path"),
    (["+sede=1"], "sede: there is no such group or key; did you mean seed?"),
    (["+solver.rtoll=1"], "solver.rtoll: solver has no key 'rtoll'; did you mean rtol"),
    (["~solver"], "no value for solver"),
]


@pytest.mark.cases(quick=16)
@pytest.mark.parametrize(("overrides", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_bad_value_is_named_with_the_key_to_change(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(composed(*overrides))
    assert message in str(caught.value)


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("task", ["equilibrium", "implicit", "data_distillation", "data_cleaning", "stn_images"])
def test_numbers_to_predict_are_refused_where_a_task_classifies(task: str) -> None:
    """By the name that the command line gives the dataset, and with the choices that there are."""
    with pytest.raises(ConfigError) as caught:
        build(composed(f"task={task}", "dataset=diabetes"))
    said = str(caught.value)
    assert said.startswith("dataset=diabetes has numbers to predict, and this task classifies; ") and "\n" not in said
    others = ", ".join(sorted(targets("dataset").keys() - {"diabetes"}))
    assert said.endswith(f"; choices: {others}; change dataset")
    with pytest.raises(ConfigError, match=r"^dataset=synthetic has numbers to predict, .*; change dataset$"):
        build(composed(f"task={task}", "dataset=synthetic", "dataset.targets=numbers"))


PICARD, CG, ONE_STEP = (f"hyperopt.core.{name}" for name in ("solvers.picard.Picard", "linear.cg.CG", "adjoints.onestep.OneStep"))
PRODUCTS, POWER = "hyperopt.bilevel.implicit.ProductSettings", "hyperopt.bilevel.step_map.PowerSettings"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"adjoint.linear_solver._target_={PICARD}"], f"adjoint.linear_solver._target_='{PICARD}' is not a LinearSolver; "),
        ([f"adjoint.linear_solver._target_={ONE_STEP}"], f"adjoint.linear_solver._target_='{ONE_STEP}' is not a LinearSolver; "),
        (["adjoint=shine", f"adjoint.linear_solver={{_target_: {PICARD}}}"], f"'{PICARD}' is not a LinearSolver; "),
        (["solver=newton_krylov", f"solver.linear_solver._target_={PICARD}"], f"'{PICARD}' is not a LinearSolver; "),
        ([f"adjoint.fallback=[{{_target_: {PICARD}}}]"], f"adjoint.fallback.0._target_='{PICARD}' is not a LinearSolver; "),
        ([f"adjoint.fallback=[{{_target_: {CG}}},{{_target_: {ONE_STEP}}}]"], "adjoint.fallback.1._target_="),
        (["adjoint.fallback=[cg]"], "adjoint.fallback.0='cg' does not name a LinearSolver: it has no _target_"),
        ([f"solver._target_={CG}"], f"solver._target_='{CG}' is not a FixedPointSolver; "),
        ([f"solver._target_={ONE_STEP}"], f"solver._target_='{ONE_STEP}' is not a FixedPointSolver; "),
        ([f"adjoint._target_={PICARD}"], f"adjoint._target_='{PICARD}' is not an Adjoint or Estimator; "),
        ([f"inner._target_={PICARD}"], f"inner._target_='{PICARD}' is not an InnerSolver; "),
        (["task=l2", f"task.products._target_={POWER}"], f"task.products._target_='{POWER}' is not a ProductSettings; "),
        (
            ["task=l2", f"task.products.power._target_={PRODUCTS}"],
            f"task.products.power._target_='{PRODUCTS}' is not a PowerSettings",
        ),
    ],
)
def test_a_part_of_another_kind_is_refused(overrides: list[str], message: str) -> None:
    """Inside of a list too, whose entries have the type that the class says."""
    with pytest.raises(ConfigError) as caught:
        build(composed(*overrides))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("task", "os.system"),
        ("task.cell", "builtins.eval"),
        ("dataset", "torch.load"),
        ("solver", "hyperoptic.Picard"),
        ("adjoint.linear_solver", "system"),
        ("optimizer", ""),
        ("trainer", "os.system"),
    ],
)
def test_a_target_outside_the_project_is_refused(key: str, target: str) -> None:
    with pytest.raises(ConfigError, match="is outside hyperopt"):
        build(composed(f"{key}._target_='{target}'"))


KINDS = [
    (["task.cell._target_=hyperopt.nn.factories.TanhMLP"], "task.cell", "CellFactory", "nn.cells.ProjectedCell"),
    (["task=implicit", "task.network._target_=hyperopt.nn.cells.ProjectedCell"], "task.network", "NetworkFactory", "MDEQ"),
    (
        ["task=implicit", "task/augment=crop_flip", "task.augment._target_=hyperopt.data.digits.Digits"],
        "task.augment",
        "Augment",
        "",
    ),
    (["task=l2", "task.l2._target_=hyperopt.stn.declare.Positive"], "task.l2", "Space", "hyperopt.spaces.space.Positive"),
    (["task=weight_decay", "task.decay._target_=hyperopt.stn.declare.Bounded"], "task.decay", "Space", "spaces.space.Bounded"),
    (["task=stn_ridge", "task.decay._target_=hyperopt.spaces.space.Positive"], "task.decay", "Tuned", "stn.declare.Positive"),
    (
        ["task=stn_images", "task.tuned.dropout0._target_=hyperopt.spaces.space.Bounded"],
        "task.tuned.dropout0",
        "Tuned",
        "Bounded",
    ),
    (["task=stn_images", "task.classifier._target_=hyperopt.nn.factories.MDEQ"], "task.classifier", "Classifier", ""),
    (["stn.weights._target_=hyperopt.core.solvers.picard.Picard"], "stn.weights", "OuterOptimizer", "torch.optim.Adam"),
    (["stn._target_=hyperopt.stn.declare.Positive"], "stn", "SelfTuningOptions", "hyperopt.tasks.stn.SelfTuningOptions"),
    (["dataset._target_=hyperopt.nn.cells.ProjectedCell"], "dataset", "Dataset", "hyperopt.data.digits.Digits"),
    (["dataset._target_=hyperopt.tasks.linear.L2Task"], "dataset", "Dataset", "hyperopt.data.mnist.MNIST"),
    (["dataset._target_=hyperopt.tasks.implicit.ImplicitTask"], "dataset", "Dataset", "hyperopt.data.synthetic.Synthetic"),
    (["task=l2", "inner._target_=hyperopt.core.solvers.picard.Picard"], "inner", "InnerSolver", "GradientDescent"),
    (["+task.fallback=[{_target_: hyperopt.core.linear.cg.CG}]"], "task.fallback.0", "FixedPointSolver", "solvers.anderson"),
    (
        ["task=coupled", "+task.fallback=[{_target_: hyperopt.core.linear.cg.CG}]"],
        "task.fallback.0",
        "FixedPointSolver",
        "anderson",
    ),
]


@pytest.mark.cases(quick=2, slow=8)
@pytest.mark.parametrize("task", ["equilibrium", "implicit", "coupled"])
@pytest.mark.parametrize("name", TRAINED)
def test_an_adjoint_that_the_task_cannot_have_is_refused_by_its_option(task: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^adjoint={name} is not an Adjoint, and .*choices: anderson, .*; change adjoint$"):
        build(composed(f"task={task}", f"adjoint={name}"))


@pytest.mark.cases(quick=6)
@pytest.mark.parametrize(("overrides", "key", "kind", "choice"), KINDS, ids=lambda value: str(value)[:60])
def test_a_part_of_another_place_is_refused(overrides: list[str], key: str, kind: str, choice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(composed(*(each.removeprefix("+") for each in overrides)))
    said = str(caught.value)
    assert said.startswith(f"{key}._target_='hyperopt.") and f" is not {with_article(kind)}; " in said
    assert choice in said.partition("choices: ")[2] and "\n" not in said


@pytest.mark.parametrize("given", ["task.cell={max_norm: 0.5}", "dataset={root: here}", "adjoint.linear_solver={rtol: 1e-3}"])
def test_a_mapping_that_names_no_part_is_refused(given: str) -> None:
    key = given.partition("=")[0]
    cfg = composed()
    OmegaConf.update(cfg, key, OmegaConf.create(given.partition("=")[2]), merge=False, force_add=True)
    with pytest.raises(
        ConfigError, match=rf"^{key} does not name .*: it has no _target_; choose an option, or set {key}._target_$"
    ):
        build(cfg)


PLAIN_VALUES = [
    ("task=l2", "task.l2", 0.1),
    ("task=equilibrium", "task.cell", "householder"),
    ("task=equilibrium", "dataset", "digits"),
    ("task=stn_ridge", "task.decay", 3),
    ("task=stn_images", "task.tuned.dropout0", 0.1),
    ("task=stn_images", "stn", "centred"),
    ("task=l2", "inner", True),
]


@pytest.mark.parametrize(("task", "key", "value"), PLAIN_VALUES)
def test_a_plain_value_in_place_of_a_part_is_refused(task: str, key: str, value: Any) -> None:
    cfg = composed(task)
    OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(ConfigError, match=rf"^{key}=.* does not name an? \w+: it has no _target_; change {key}$"):
        build(cfg)


def test_a_target_hidden_in_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"adjoint\.fallback\.0\._target_='os\.system' is outside hyperopt"):
        build(composed("adjoint.fallback=[{_target_: os.system}]"))


def test_a_target_of_an_allowed_package_passes_and_no_other() -> None:
    with pytest.raises(ConfigError, match="cannot be imported"):
        build(composed("task._target_=mine.Task", "allow_targets=[mine]"))
    with pytest.raises(ConfigError, match=r"allow_targets=\[mine\]"):
        build(composed("task._target_=mine.Task", "allow_targets=[min]"))


def test_a_target_that_only_passes_through_the_project_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'hyperopt\.app\.config\.copy\.deepcopy' is not the class of an option; choices: "):
        build(composed("solver._target_=hyperopt.app.config.copy.deepcopy"))


def test_a_target_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"task\._target_='no_such_package\.Task' cannot be imported"):
        build(composed("task._target_=no_such_package.Task", "allow_targets=[no_such_package]"))


def test_near_misses() -> None:
    assert near("andersen", ["picard", "anderson"]) == "did you mean anderson? choices: anderson, picard"
    assert near("andersen", ["anderson", *map(str, range(50))]) == "did you mean anderson?"
    assert near("x", map(str, range(50))).startswith("choices: 0, 1, ")
    assert near("xyz", ["picard", "anderson"]) == "choices: anderson, picard"
    assert near("xyz", []) == "choices: none"


def test_a_file_written_before_classes_moved_names_them_still() -> None:
    old = {"solver": {"_target_": "hyperopt.solvers.picard.Picard"}, "parts": [{"_target_": "hyperopt.linsolve.gmres.GMRES"}]}
    cfg = plain_config(old, "config.yaml")
    assert cfg.solver._target_ == "hyperopt.core.solvers.picard.Picard"
    assert cfg.parts[0]._target_ == "hyperopt.core.linear.gmres.GMRES"
    assert old["solver"]["_target_"] == "hyperopt.solvers.picard.Picard"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hyperopt.bilevel.settings.ProductSettings", "hyperopt.bilevel.implicit.ProductSettings"),
        ("hyperopt.bilevel.settings.PowerSettings", "hyperopt.bilevel.step_map.PowerSettings"),
        ("hyperopt.solvers.newton_krylov.NewtonKrylov", "hyperopt.core.newton.newton_krylov.NewtonKrylov"),
        ("hyperopt.core.solvers.newton.Newton", "hyperopt.core.newton.newton.Newton"),
        ("hyperopt.spaces.Positive", "hyperopt.spaces.space.Positive"),
        ("hyperopt.spaces.space.Positive", "hyperopt.spaces.space.Positive"),
        ("hyperopt.optim.Adam", "torch.optim.Adam"),
        ("hyperopt.optim.Momentum", "torch.optim.SGD"),
        ("hyperopt.bilevel.settings_of_mine.Part", "hyperopt.bilevel.settings_of_mine.Part"),
    ],
)
def test_where_a_class_lies_now(old: str, new: str) -> None:
    """A class is found by the name of its module or by its own, and never by the beginning of another name."""
    assert plain_config({"part": {"_target_": old}}, "config.yaml").part._target_ == new


def test_an_older_file_of_a_self_tuning_run_builds() -> None:
    cfg = composed("task=stn_ridge", "stn.warmup=7")
    old = OmegaConf.to_container(cfg, resolve=True)
    for place in (old, old["task"]):  # pyright: ignore
        place["stn"]["_target_"] = "hyperopt.tasks.stn_settings.SelfTuningOptions"  # pyright: ignore
    task: Any = build(plain_config(old, "config.yaml")).task  # pyright: ignore
    assert type(task.stn).__name__ == "SelfTuningOptions" and task.stn.warmup == 7
