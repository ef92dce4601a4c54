"""The typed schema of every config: group options, and the top level of ``configs/train.yaml``.

A settings class is the one source of a method's keys, types, defaults and ranges. ``register`` turns each into a schema node
``schema/<group>/<name>``, which ``configs/<group>/<name>.yaml`` names first in its defaults list, so that composing refuses a
wrong key or type. Free of torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from hyperopt.app.resolvers import config_root, register_resolvers
from hyperopt.bilevel import outer_settings as train
from hyperopt.bilevel import settings as bilevel
from hyperopt.bilevel import single_loop_settings as stochastic
from hyperopt.core.adjoints import settings as core
from hyperopt.core.linear import settings as linear
from hyperopt.core.solvers import settings as solvers
from hyperopt.data import settings as data
from hyperopt.nn import settings as cells
from hyperopt.spaces import settings as spaces
from hyperopt.stn import classifier_settings as classifiers
from hyperopt.stn import settings as stn
from hyperopt.tasks import quadratic_settings as quadratic
from hyperopt.tasks import settings as tasks
from hyperopt.tasks import stn_settings as stn_tasks


def _targeted(settings: type, target: str, **nested: type) -> type:
    """Return ``settings`` with a ``_target_``, and with the fields of ``nested`` typed by the classes given for them."""
    extra: list[tuple[str, Any, Any]] = [("_target_", str, target)]
    extra += [(name, kind, field(default_factory=kind)) for name, kind in nested.items()]
    made = dataclasses.make_dataclass(settings.__name__, extra, bases=(settings,), frozen=True, repr=False, eq=False)
    # Importable, so that what a launcher sends to other processes names the class. A copy would come back in place of the class
    # itself, with a copy of dataclasses.MISSING, which is then no longer that.
    made.__module__, made.__qualname__ = __name__, f"_{settings.__name__}_{len(globals())}"
    globals()[made.__qualname__] = made
    return made


IMPLICIT = "hyperopt.core.adjoints.implicit.Implicit"
LINEAR_SOLVERS = {
    "neumann": _targeted(linear.NeumannSettings, "hyperopt.core.linear.neumann.Neumann"),
    "anderson": _targeted(linear.LinearAndersonSettings, "hyperopt.core.linear.anderson.LinearAnderson"),
    "gmres": _targeted(linear.GMRESSettings, "hyperopt.core.linear.gmres.GMRES"),
    "bicgstab": _targeted(linear.BiCGStabSettings, "hyperopt.core.linear.bicgstab.BiCGStab"),
    "cg": _targeted(linear.CGSettings, "hyperopt.core.linear.cg.CG"),
    "minres": _targeted(linear.MINRESSettings, "hyperopt.core.linear.minres.MINRES"),
    "normal_cg": _targeted(linear.NormalCGSettings, "hyperopt.core.linear.normal_cg.NormalCG"),
    "nystrom": _targeted(linear.NystromSettings, "hyperopt.core.linear.nystrom.Nystrom"),
    "dense": _targeted(linear.DenseSettings, "hyperopt.core.linear.dense.Dense"),
}
"""The linear solvers; each makes an option ``adjoint=<name>``, the implicit adjoint with it."""

SPACES = {
    "real": _targeted(spaces.RealSettings, "hyperopt.spaces.space.Real"),
    "positive": _targeted(spaces.PositiveSettings, "hyperopt.spaces.space.Positive"),
    "bounded": _targeted(spaces.BoundedSettings, "hyperopt.spaces.space.Bounded"),
    "simplex": _targeted(spaces.SimplexSettings, "hyperopt.spaces.space.Simplex"),
    "spectral_ball": _targeted(spaces.SpectralBallSettings, "hyperopt.spaces.space.SpectralBall"),
}
"""The spaces of hyperparameters; those of numbers are options of ``task/space``, for the settings of a task that are spaces."""

POWER = _targeted(bilevel.PowerSettings, "hyperopt.bilevel.settings.PowerSettings")
PRODUCTS = _targeted(bilevel.ProductSettings, "hyperopt.bilevel.settings.ProductSettings", power=POWER)

SCHEMA: dict[str, type] = {
    "task/equilibrium": _targeted(tasks.EquilibriumSettings, "hyperopt.tasks.equilibrium.EquilibriumTask"),
    "task/implicit": _targeted(tasks.ImplicitTaskSettings, "hyperopt.tasks.implicit.ImplicitTask"),
    "task/l2": _targeted(tasks.L2Settings, "hyperopt.tasks.linear.L2Task", products=PRODUCTS),
    "task/bias_regularization": _targeted(
        tasks.BiasRegularizationSettings, "hyperopt.tasks.linear.BiasRegularizationTask", products=PRODUCTS
    ),
    "task/quadratic": _targeted(quadratic.QuadraticSettings, "hyperopt.tasks.quadratic.QuadraticTask", products=PRODUCTS),
    "task/data_distillation": _targeted(
        tasks.DataDistillationSettings, "hyperopt.tasks.distillation.DataDistillationTask", products=PRODUCTS
    ),
    "task/weight_decay": _targeted(tasks.WeightDecaySettings, "hyperopt.tasks.network.WeightDecayTask", products=PRODUCTS),
    "task/data_cleaning": _targeted(tasks.CleaningSettings, "hyperopt.tasks.cleaning.CleaningTask", products=PRODUCTS),
    "task/augmentation": _targeted(tasks.AugmentationSettings, "hyperopt.tasks.network.AugmentationTask", products=PRODUCTS),
    **{f"task/space/{name}": SPACES[name] for name in ("real", "positive", "bounded")},
    "task/stn_quadratic": _targeted(stn_tasks.StnQuadraticSettings, "hyperopt.tasks.stn_quadratic.StnQuadraticTask"),
    "task/stn_ridge": _targeted(stn_tasks.StnRidgeSettings, "hyperopt.tasks.stn_ridge.StnRidgeTask"),
    "task/stn_images": _targeted(stn_tasks.StnImagesSettings, "hyperopt.tasks.stn_images.StnImagesTask"),
    "task/classifier/layers": _targeted(classifiers.ClassifierSettings, "hyperopt.stn.classifiers.Classifier"),
    "task/tuned/bounded": _targeted(stn.TunedBoundedSettings, "hyperopt.stn.declare.Bounded"),
    "task/tuned/positive": _targeted(stn.TunedPositiveSettings, "hyperopt.stn.declare.Positive"),
    "task/tuned/discrete": _targeted(stn.TunedDiscreteSettings, "hyperopt.stn.declare.Discrete"),
    "task/coupled": _targeted(tasks.CoupledSettings, "hyperopt.tasks.coupled.CoupledTask"),
    "task/cell/projected": _targeted(cells.ProjectedCellSettings, "hyperopt.nn.cells.ProjectedCell"),
    "task/cell/householder": _targeted(cells.HouseholderCellSettings, "hyperopt.nn.cells.HouseholderCell"),
    "task/network/tanh_mlp": _targeted(cells.TanhMLPSettings, "hyperopt.nn.factories.TanhMLP"),
    "task/network/deq_resnet": _targeted(cells.DEQResNetSettings, "hyperopt.nn.factories.DEQResNet"),
    "task/network/mdeq": _targeted(cells.MDEQSettings, "hyperopt.nn.factories.MDEQ"),
    "task/augment/crop_flip": _targeted(data.AugmentSettings, "hyperopt.data.augment.Augment"),
    "dataset/digits": _targeted(data.DigitsSettings, "hyperopt.data.digits.Digits"),
    "dataset/diabetes": _targeted(data.DiabetesSettings, "hyperopt.data.diabetes.Diabetes"),
    "dataset/synthetic": _targeted(data.SyntheticSettings, "hyperopt.data.synthetic.Synthetic"),
    "dataset/mnist": _targeted(data.MNISTSettings, "hyperopt.data.mnist.MNIST"),
    "dataset/fashion_mnist": _targeted(data.FashionMNISTSettings, "hyperopt.data.mnist.FashionMNIST"),
    "dataset/libsvm": _targeted(data.LibsvmSettings, "hyperopt.data.libsvm.Libsvm"),
    "dataset/newsgroups": _targeted(data.NewsgroupsSettings, "hyperopt.data.newsgroups.Newsgroups"),
    "dataset/cifar10": _targeted(data.CIFAR10Settings, "hyperopt.data.cifar.CIFAR10"),
    "solver/picard": _targeted(solvers.PicardSettings, "hyperopt.core.solvers.picard.Picard"),
    "solver/anderson": _targeted(solvers.AndersonSettings, "hyperopt.core.solvers.anderson.Anderson"),
    "solver/rre": _targeted(solvers.RRESettings, "hyperopt.core.solvers.rre.RRE"),
    "solver/broyden": _targeted(solvers.BroydenSettings, "hyperopt.core.solvers.broyden.Broyden"),
    "solver/newton": _targeted(solvers.NewtonSettings, "hyperopt.core.newton.newton.Newton"),
    "solver/chord": _targeted(solvers.ChordSettings, "hyperopt.core.newton.chord.Chord"),
    "solver/newton_krylov": _targeted(
        solvers.NewtonKrylovSettings, "hyperopt.core.newton.newton_krylov.NewtonKrylov", linear_solver=LINEAR_SOLVERS["gmres"]
    ),
    **{
        f"adjoint/{name}": _targeted(core.ImplicitSettings, IMPLICIT, linear_solver=node) for name, node in LINEAR_SOLVERS.items()
    },
    "adjoint/shine": _targeted(core.ShineSettings, "hyperopt.core.adjoints.shine.Shine"),
    "adjoint/unrolled": _targeted(core.UnrolledSettings, "hyperopt.core.adjoints.unrolled.Unrolled"),
    "adjoint/one_step": _targeted(core.OneStepSettings, "hyperopt.core.adjoints.onestep.OneStep"),
    "adjoint/phantom": _targeted(core.PhantomSettings, "hyperopt.core.adjoints.phantom.Phantom"),
    "adjoint/checkpointed": _targeted(core.CheckpointedSettings, "hyperopt.core.adjoints.checkpointed.Checkpointed"),
    "adjoint/auto": _targeted(bilevel.AutoSettings, "hyperopt.bilevel.auto.Auto"),
    "adjoint/t1t2": _targeted(bilevel.T1T2Settings, "hyperopt.bilevel.t1t2.T1T2"),
    "adjoint/finite_difference": _targeted(
        bilevel.FiniteDifferenceSettings, "hyperopt.bilevel.finite_difference.FiniteDifference"
    ),
    "adjoint/soba": _targeted(stochastic.SOBASettings, "hyperopt.bilevel.soba.SOBA"),
    "adjoint/saba": _targeted(stochastic.SABASettings, "hyperopt.bilevel.saba.SABA"),
    "adjoint/stocbio": _targeted(stochastic.StocBiOSettings, "hyperopt.bilevel.stocbio.StocBiO"),
    "adjoint/f2sa": _targeted(stochastic.F2SASettings, "hyperopt.bilevel.f2sa.F2SA"),
    "adjoint/v_pbgd": _targeted(stochastic.VPBGDSettings, "hyperopt.bilevel.v_pbgd.VPBGD"),
    "inner/gradient_descent": _targeted(
        bilevel.GradientDescentSettings, "hyperopt.bilevel.inner.gradient_descent.GradientDescent"
    ),
    "inner/heavy_ball": _targeted(bilevel.HeavyBallSettings, "hyperopt.bilevel.inner.heavy_ball.HeavyBall"),
    "inner/adam": _targeted(bilevel.InnerAdamSettings, "hyperopt.bilevel.inner.adam.InnerAdam"),
    "inner/torch_optimizer": _targeted(bilevel.TorchOptimizerSettings, "hyperopt.bilevel.inner.torch_optimizer.TorchOptimizer"),
    "inner/lbfgs": _targeted(bilevel.LBFGSSettings, "hyperopt.bilevel.inner.lbfgs.InnerLBFGS"),
    "stn/default": _targeted(stn_tasks.SelfTuningOptions, "hyperopt.tasks.stn_settings.SelfTuningOptions"),
    "optimizer/sgd": _targeted(train.SGDSettings, "hyperopt.bilevel.outer.SGD"),
    "optimizer/momentum": _targeted(train.MomentumSettings, "hyperopt.bilevel.outer.Momentum"),
    "optimizer/adam": _targeted(train.AdamSettings, "hyperopt.bilevel.outer.Adam"),
    "optimizer/adamw": _targeted(train.AdamWSettings, "hyperopt.bilevel.outer.AdamW"),
    "optimizer/lbfgs": _targeted(train.LBFGSSettings, "hyperopt.bilevel.outer.LBFGS"),
    "trainer/default": _targeted(train.TrainerSettings, "hyperopt.bilevel.outer_settings.TrainerSettings"),
}
"""Every option of every group: its keys, types and defaults. One line here and one YAML file make a new method selectable."""


def _keys() -> dict[str, str]:
    """The option of each solver, adjoint and inner solver by the name of its class; of a linear solver, the adjoint with it."""
    found = {"float64": "precision=float64"}
    for option, node in SCHEMA.items():
        group, _, name = option.partition("/")
        if group in ("solver", "adjoint", "inner"):
            linear = node._target_ == IMPLICIT
            kind = LINEAR_SOLVERS[name] if linear else node
            place = "adjoint.linear_solver" if linear else group
            found[kind._target_.rpartition(".")[2]] = f"{group}={name} (its arguments are keys of {place})"
    return found


KEYS = _keys()
"""How the command line chooses what the library's messages name; see ``hyperopt.app.errors.explain``."""

_NESTED = (*LINEAR_SOLVERS.values(), *SPACES.values(), PRODUCTS, POWER)
SETTINGS = {node._target_: node.__mro__[1] for node in (*SCHEMA.values(), *_NESTED)}
"""The settings class behind each target: it checks the values without importing the method itself, which needs torch."""


def _groups() -> dict[str, frozenset[str]]:
    """The targets of each group: what may be named where a part of this kind belongs."""
    found: dict[str, set[str]] = {
        "linear_solver": {node._target_ for node in LINEAR_SOLVERS.values()},
        "task/space": {node._target_ for node in SPACES.values()},
        "products": {PRODUCTS._target_},
        "products/power": {POWER._target_},
    }
    for path, node in SCHEMA.items():
        found.setdefault(path.rpartition("/")[0], set()).add(node._target_)
    return {group: frozenset(targets) for group, targets in found.items()}


GROUPS = _groups()
"""The one list of what a config may name, by the kind of place: a node's ``_target_`` is one of its place's group, or refused."""

SEVERAL = ("fallback", "tuned")
"""Fields that hold a list or a mapping of parts; every other place holds one part, or none."""

_SOLVED = {"solver": "solver", "adjoint": "adjoint", "fallback": "solver"}
_TRAINED = {"inner": "inner", "adjoint": "adjoint", "products": "products", "dataset": "dataset"}

_PLACES: dict[type, dict[str, str]] = {
    tasks.SupervisedSettings: {**_SOLVED, "dataset": "dataset"},
    tasks.EquilibriumSettings: {"cell": "task/cell"},
    tasks.ImplicitTaskSettings: {"network": "task/network", "augment": "task/augment"},
    tasks.CoupledSettings: _SOLVED,
    tasks.BilevelTaskSettings: _TRAINED,
    tasks.L2Settings: {"l2": "task/space"},
    tasks.BiasRegularizationSettings: {"centre": "task/space"},
    tasks.DataDistillationSettings: {"images": "task/space"},
    tasks.WeightDecaySettings: {"decay": "task/space"},
    tasks.CleaningSettings: {"weights": "task/space"},
    quadratic.QuadraticSettings: {"lam": "task/space"},
    stn_tasks.SelfTuningTaskSettings: {"stn": "stn"},
    stn_tasks.StnQuadraticSettings: {"x_range": "task/tuned"},
    stn_tasks.StnRidgeSettings: {"decay": "task/tuned"},
    stn_tasks.StnImagesSettings: {"classifier": "task/classifier", "tuned": "task/tuned", "dataset": "dataset"},
    stn_tasks.SelfTuningOptions: {"weights": "optimizer", "scales": "optimizer", "response": "optimizer"},
    core.ImplicitSettings: {"linear_solver": "linear_solver", "fallback": "linear_solver"},
    core.ShineSettings: {"linear_solver": "linear_solver"},
    solvers.NewtonKrylovSettings: {"linear_solver": "linear_solver"},
    bilevel.ProductSettings: {"power": "products/power"},
}


def places(settings: type) -> dict[str, str]:
    """Return which fields of a settings class hold parts, each with the group of ``GROUPS`` that these are of."""
    return {name: group for kind in reversed(settings.__mro__) for name, group in _PLACES.get(kind, {}).items()}


@dataclass(frozen=True)
class PathsConfig:
    """Directories, relative to the working directory: datasets, single runs, and sweeps."""

    data: str = MISSING
    output: str = MISSING
    multirun: str = MISSING


@dataclass(frozen=True)
class TrainConfig:
    """The top level of ``configs/train.yaml``.

    name: the experiment's name, the first directory under ``paths.output``: one plain component of a path.
    seed: seeds initialisation, splits and data order, 0 to 2**32 - 1.
    device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
    precision: ``float32`` or ``float64``.
    compile: compile the map with ``torch.compile``.
    mode: ``train``, ``evaluate`` a checkpoint without training, or ``check`` the hypergradient.
    ckpt_path: the checkpoint to continue from or to evaluate.
    resume: ``auto`` continues the run in ``hydra.run.dir`` if there is one.
    accept_lost_rows: whether a run goes on though rows are missing from its ``metrics.jsonl``, or were changed.
    threads: CPU threads of one operation, at most as many as there are cores (None: torch's choice).
    allow_targets: top-level packages beside ``hyperopt`` that a ``_target_`` may name; counts on the command line only.
    """

    name: str = "train"
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    compile: bool = False
    mode: str = "train"
    ckpt_path: str | None = None
    resume: str = "never"
    accept_lost_rows: bool = False
    threads: int | None = None
    allow_targets: list[str] = field(default_factory=list)
    task: Any = MISSING
    dataset: Any = MISSING
    solver: Any = MISSING
    adjoint: Any = MISSING
    inner: Any = MISSING
    stn: Any = MISSING
    optimizer: Any = MISSING
    trainer: Any = MISSING
    paths: PathsConfig = field(default_factory=PathsConfig)


_PLACES[TrainConfig] = {name: name for name in ("task", "dataset", "solver", "adjoint", "inner", "stn", "optimizer", "trainer")}


class _Schema(ConfigNode):
    """A node of Hydra's store that is made when it is first asked for: most launches compose few of them."""

    def __init__(self, kind: type, **where: Any) -> None:
        """Remember the class that the node is made of."""
        self.kind = kind
        super().__init__(node=None, package=None, provider="hyperopt", **where)  # pyright: ignore[reportArgumentType]
        del self.node

    def __getattr__(self, name: str) -> Any:
        """Make the node, and keep it."""
        if name != "node":
            raise AttributeError(name)
        self.node = OmegaConf.structured(self.kind)
        OmegaConf.set_readonly(self.node, None)  # a frozen dataclass makes a read-only node, which no override could change
        return _writable(self.node)


def register() -> None:
    """Put the schema and the resolvers where Hydra finds them; safe to call again."""
    register_resolvers(config_root())
    store = ConfigStore.instance()
    for path, kind in {**SCHEMA, "train": TrainConfig}.items():
        group, _, name = f"schema/{path}".rpartition("/")
        folder = store.repo
        for part in group.split("/"):
            folder = folder.setdefault(part, {})
        folder[f"{name}.yaml"] = _Schema(kind, name=f"{name}.yaml", group=group)


def _writable(node: DictConfig) -> DictConfig:
    """Lift the read-only flag of every nested node of ``node`` too."""
    for key in node:
        if isinstance(child := node._get_node(key), DictConfig):
            OmegaConf.set_readonly(child, None)
            _writable(child)
    return node
