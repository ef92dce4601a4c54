"""An ordinary network with implicit layers, trained on minibatches of images.

    min over parameters   mean_i cross_entropy(network(x_i), y_i),      inside of it   z_i = cell(z_i, layer input_i)

The hyperparameters of the outer loop are all parameters of the network; its inner problems are the equilibria of the layers.

Reference: Bai, Kolter & Koltun, NeurIPS 2019, arXiv 1909.01377; Kolter, Duvenaud & Johnson, Deep Implicit Layers, NeurIPS 2020.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from hyperopt.core import distributed
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.adjoints.unrolled import Unrolled
from hyperopt.core.checks import check_count, check_number
from hyperopt.core.places import Places
from hyperopt.core.random import drawing
from hyperopt.core.replay import Replay
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.picard import Picard
from hyperopt.core.status import Solution
from hyperopt.data.augment import Augment
from hyperopt.data.loading import Loader
from hyperopt.nn.deq import DEQ
from hyperopt.nn.factories import Methods, NetworkFactory, TanhMLP
from hyperopt.nn.stabilise import Stabilise
from hyperopt.tasks.base import SPLIT_MEASURES, Environment, GradientCheck, StepRecord
from hyperopt.tasks.figures import misclassified_figure
from hyperopt.tasks.supervised import SupervisedTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANS = {
    "running/accuracy": "outer/step_accuracy",
    "running/inner_iterations": "inner/iterations",
    "running/inner_iterations_mean": "inner/iterations_mean",
    "running/adjoint_iterations": "adjoint/iterations",
    "running/adjoint_iterations_mean": "adjoint/iterations_mean",
}
"""The means of metrics of the steps, and the metrics."""
SOLVED = ("failed", "fallbacks", "iterations", "iterations_mean")
RUNNING = ("running/loss", "running/accuracy", *(f"running/{side}_{kind}" for side in ("inner", "adjoint") for kind in SOLVED))
"""Names of the means over the steps since the last evaluation."""


class Running:
    """Means over the steps since the last evaluation, for a table that has one line an epoch.

    ``read`` may be called several times; the next ``add`` after it starts new means.
    """

    def __init__(self) -> None:
        """Start without steps."""
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._was_read = False

    def add(self, record: StepRecord) -> None:
        """Add one step."""
        if self._was_read:
            self.__init__()
        values = {"running/loss": record.loss}
        values |= {name: record.metrics[key] for name, key in MEANS.items() if key in record.metrics}
        for name, status in record.statuses.items():
            values[f"running/{name}_failed"] = float(status.failed)
            values[f"running/{name}_fallbacks"] = float(record.metrics[f"{name}/fallbacks"] > 0)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the means, or nothing before the first step."""
        self._was_read = True
        return {name: total / self._steps for name, total in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain containers."""
        return {"sums": dict(self._sums), "steps": self._steps, "was_read": self._was_read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._sums, self._steps, self._was_read = dict(state["sums"]), state["steps"], state["was_read"]


@dataclass(eq=False)
class ImplicitTask(SupervisedTask):
    """A network with implicit layers; an outer step takes one gradient on a minibatch and updates all parameters.

    Attributes:
        network: the factory of the network (None: a small MLP with a tanh layer); see ``hyperopt.nn.factories.NetworkFactory``.
        batch_size: number of fitted rows of an outer step (None: all).
        eval_batch_size: number of rows of one forward pass in an evaluation.
        augment: random changes of the images in training (None: none); see ``hyperopt.data.augment.Augment``.
        workers: number of processes that prepare batches (0: none); the results do not depend on it.
        jacobian: weight of the Jacobian penalty in the loss of a step (0: none); see ``hyperopt.nn.stabilise``.
        pretrain_steps: number of first outer steps in which a layer is ``pretrain_iterations`` unrolled evaluations of its
            cell.
        pretrain_iterations: number of evaluations of the cell in these steps, at least 1.
        model: the network, after ``setup``.
        layers: its implicit layers by name, after ``setup``.
        loader: the loader of the batches, after ``setup``.
        running: means over the steps since the last evaluation, after ``setup``.
    """

    name = "implicit"
    MEASURES: ClassVar[tuple[str, ...]] = (*SPLIT_MEASURES, *RUNNING)
    prefix = "network."

    network: NetworkFactory | None = None
    batch_size: int | None = 100
    eval_batch_size: int = 500
    augment: Augment | None = None
    workers: int = 0
    jacobian: float = 0.0
    pretrain_steps: int = 0
    pretrain_iterations: int = 8

    model: nn.Module = field(init=False, repr=False)
    layers: dict[str, DEQ] = field(init=False, repr=False)
    loader: Loader = field(init=False, repr=False)
    running: Running = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "eval_batch_size")
        check_count(self, "workers", 0)
        check_number(self, "jacobian", 0.0)
        check_count(self, "pretrain_steps", 0)
        check_count(self, "pretrain_iterations")

    def setup(self, env: Environment) -> None:
        """Load the rows and build the network, with initial values from ``env.generator`` and the order from ``env.seed``.

        Raises:
            ValueError: the network has no implicit layer or does not take these images, or there are no fitted rows, or fewer
                than ``batch_size``.
        """
        self.load(env, order=torch.device("cpu") if self.workers else None)
        with drawing(env.generator):
            network = self._build(self.splits.shape, self.splits.num_classes)
        self.model = network.to(env.device, env.dtype)
        self.layers = {name: module for name, module in self.model.named_modules() if isinstance(module, DEQ)}
        if not self.layers:
            what = f"task.network={self.network!r} built {type(network).__name__} without an implicit layer (hyperopt.nn.DEQ)"
            raise ValueError(f"{what}, so there is nothing to solve; change task.network")
        for name, module in self.model.named_modules() if distributed.ranks() > 1 else ():
            if isinstance(module, _BatchNorm):
                raise ValueError(
                    f"task.network has {name} = {module}: on {distributed.ranks()} ranks each would use the statistics of its "
                    f"own rows; use GroupNorm or LayerNorm, or one rank"
                )
        if env.compile:
            for layer in self.layers.values():
                layer.compile_map()
        self.loader = Loader(
            self.rows["outer"],
            self.splits.shape,
            self.batches,
            seed=env.seed,
            augment=self.augment,
            workers=self.workers,
            device=env.device,
        )
        self.running = Running()

    def _build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        methods = Methods(self.solver, self.adjoint, self.policy, self.fallback)
        return (self.network or TanhMLP()).build(shape, classes, methods)

    def predictor(self, shape: tuple[int, ...], classes: int, hyperparameters: Mapping[str, Tensor]) -> nn.Module:
        """Build the network, after a layer that reshapes rows to images."""
        return nn.Sequential(OrderedDict(images=nn.Unflatten(1, shape), network=self._build(shape, classes)))

    def groups(self) -> dict[str, list[Tensor]]:
        """Return the parameters grouped by the network's top-level modules; a shared one belongs to the first of them."""
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            groups.setdefault(name.partition(".")[0], []).append(parameter)
        return groups

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of flattened images."""
        return self.model(x.unflatten(1, self.splits.shape))

    def step(self, optimizer: torch.optim.Optimizer, check: GradientCheck) -> StepRecord:
        """Do one outer step; see ``Task.step``."""
        batch, images, labels = self.loader.take()
        mine = distributed.share_of(len(labels))
        images, labels = images[mine], labels[mine]
        found: list[dict[str, float]] = []

        def loss() -> Tensor:
            with Stabilise(self.model, jacobian=1) if self.jacobian else contextlib.nullcontext() as extra:
                logits = self.model(images)
            found.append({"outer/step_accuracy": (logits.detach().argmax(1) == labels).double().mean().item()})
            total = functional.cross_entropy(logits, labels)
            if extra is None:
                return total
            found[-1]["outer/jacobian"] = extra.jacobian.item()
            return total + self.jacobian * extra.jacobian

        self.model.train()
        # A line search needs one fixed function: the same dropout masks, the same signs of the penalty, the same statistics.
        once = type(optimizer).__module__.startswith("torch.optim.") and not isinstance(optimizer, torch.optim.LBFGS)
        replay = Replay(Places.of_modules([self.model]), images.device.type)

        def again() -> Tensor:
            total = replay(loss)
            replay.commit()  # has an effect only after the first call
            return total

        with self.solved_by(*self.pretraining()) if self.steps < self.pretrain_steps else contextlib.nullcontext():
            record = self.update(optimizer, check, loss if once else again, rows=len(labels))
        record.metrics |= {**found[0], **self.place(batch)}
        record = record.over_ranks()
        self.running.add(record)
        return record

    def pretraining(self) -> tuple[FixedPointSolver, Adjoint]:
        """Return solver and adjoint of the first ``pretrain_steps`` steps: a fixed number of evaluations, unrolled."""
        return Picard(0.0, 0.0, max_steps=self.pretrain_iterations), Unrolled()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracy on the three sets of rows, and means over the steps since the last evaluation.

        ``running/loss`` and ``running/accuracy`` are measured on the batches of the steps, before each update and in training
        mode. ``running/inner_iterations`` is the mean of the slowest row's iterations, ``..._iterations_mean`` that of all
        rows, and ``running/inner_failed`` and ``running/inner_fallbacks`` are fractions of the steps; the same for ``adjoint``.
        """
        with self._evaluating():
            return {**super().evaluate(), **self.running.read()}

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the network into eval mode in this block; afterwards each layer has the solution of the latest step again."""
        before = {layer: layer.solution for layer in self.layers.values()}
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for layer, solution in before.items():
                layer.solution = solution

    def outer_loss(self) -> Tensor:
        """Return the loss on the first fitted rows; ``objective`` and ``figures`` take it in eval mode."""
        rows = self.evaluated()["outer"].take(slice(self.eval_batch_size))
        return functional.cross_entropy(self.logits(rows.x), rows.y)

    def objective(self, solver: FixedPointSolver, adjoint: Adjoint) -> tuple[Tensor, Solution]:
        """Return ``outer_loss`` and the first layer's solution; see ``Task.objective``."""
        with self._evaluating():
            return super().objective(solver, adjoint)

    def figures(self) -> dict[str, Figure]:
        """Return ``residual`` (of one traced forward and backward solve) and ``misclassified``, some of those test images."""
        with self._evaluating():
            wrong = misclassified_figure(self.logits, self.rows["test"], self.splits.shape, self.eval_batch_size)
            return {**super().figures(), "misclassified": wrong}

    def parts(self) -> dict[str, Any]:
        """Return the network, the position in the data, and the running means."""
        return {**super().parts(), "running": self.running}

    def describe(self) -> dict[str, Any]:
        """Return sizes, the dataset with its checksums, the number of rows of each metric, and the implicit layers."""
        return {**super().describe(), "shape": list(self.splits.shape), "layers": list(self.layers)}
