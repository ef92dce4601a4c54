"""Self-tuning networks as tasks; a subclass gives a network, its hyperparameters, two losses and batches.

One outer step is one round: some updates of the weights on training batches, then some of the hyperparameters on validation
batches; the warm-up has only the first part. The outer optimizer moves the hyperparameters in R. The optimizers of the weights,
scales and response belong to the task (``stn.weights``, ``stn.scales``, ``stn.response``), and their states are part of its
state.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from hyperopt.bilevel.batches import BatchSource
from hyperopt.bilevel.outer import OuterOptimizer
from hyperopt.core import distributed
from hyperopt.core.checks import check_choice, check_number
from hyperopt.core.random import drawing
from hyperopt.data.splits import scaled_by
from hyperopt.stn.declare import Discrete, Tuned
from hyperopt.stn.draw import Draw
from hyperopt.stn.dropout import Dropout, TunedRate
from hyperopt.stn.network import GATES, STN, convert
from hyperopt.stn.rounds import SelfTuningSettings
from hyperopt.stn.row_dropout import RowDropout
from hyperopt.stn.schedule import TunedSchedule
from hyperopt.stn.space import HyperSpace
from hyperopt.stn.step import SelfTuning
from hyperopt.tasks.base import Environment, FixedSettings, GradientCheck, StepRecord, Task
from hyperopt.tasks.exports import LearnedModel
from hyperopt.tasks.stn_figures import trajectory_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SelfTuningSetup:
    """What a subclass builds.

    Attributes:
        module: the plain network; ``build`` draws its weights from the run's seed.
        declared: the hyperparameters by name.
        train: batches of ``train_loss``.
        valid: batches of ``valid_loss``.
        skip: names of modules whose weights do not respond to the hyperparameters.
    """

    module: nn.Module
    declared: Mapping[str, Tuned]
    train: BatchSource
    valid: BatchSource
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class SelfTuningOptions(SelfTuningSettings):
    """The settings of the ``stn`` group: the step, the gates of the hyper-layers, and the task's own optimizers.

    Attributes:
        gate: ``unit``: a gate for each output of a layer; ``scalar``: one for the layer.
        gate_std: standard deviation of the initial gates, at least 0.
        weights: optimizer of the weights (None: see ``hyperopt.stn.rates``).
        scales: optimizer of the scales (None: see ``hyperopt.stn.rates``).
        response: optimizer of the response (None: that of the weights).
    """

    gate: str = "unit"
    gate_std: float = 0.0
    weights: OuterOptimizer | None = None
    scales: OuterOptimizer | None = None
    response: OuterOptimizer | None = None

    def __post_init__(self) -> None:
        """Check the choices and ranges."""
        super().__post_init__()
        check_choice(self, "gate", GATES)
        check_number(self, "gate_std", 0.0)


@dataclass(eq=False)
class SelfTuningTask(FixedSettings, Task):
    """A self-tuning network as a task.

    Attributes:
        stn: the settings of self-tuning (None: the defaults).
        built: what the subclass has built, after ``setup``.
        model: the self-tuning network, after ``setup``.
        tuning: the object that makes its rounds, after ``setup``.
    """

    stn: SelfTuningOptions | None = None

    built: SelfTuningSetup = field(init=False, repr=False)
    model: STN = field(init=False, repr=False)
    tuning: SelfTuning = field(init=False, repr=False)

    @abstractmethod
    def build(self, env: Environment) -> SelfTuningSetup:
        """Return network, hyperparameters and batches; PyTorch's generator is seeded for the network's initial values."""

    @abstractmethod
    def train_loss(self, model: STN, batch: Any, draw: Draw) -> Tensor:
        """Return the training loss at a draw; see ``hyperopt.stn.step.TrainLoss``."""

    @abstractmethod
    def valid_loss(self, model: STN, batch: Any, draw: Draw | None) -> Tensor:
        """Return the validation loss; see ``hyperopt.stn.step.ValidLoss``."""

    @abstractmethod
    def measure(self, model: STN) -> dict[str, float]:
        """Return metrics at the present hyperparameters, including ``val/loss``; called in eval mode, without gradients."""

    @property
    def options(self) -> SelfTuningOptions:
        """The settings of self-tuning."""
        return self.stn or SelfTuningOptions()

    def setup(self, env: Environment) -> None:
        """Build everything.

        Raises:
            ValueError: a hyperparameter, a layer or an optimizer does not fit; on several ranks also a layer that uses
                statistics of the batch, or draws random numbers that do not depend on the row. The message names it.
        """
        options = self.options
        with drawing(env.generator):
            self.built = built = self.build(env)
            space = HyperSpace(built.declared, dtype=env.dtype, device=env.device, key="task")
            module = built.module.to(env.device, env.dtype)
            self.model = convert(module, space, gate=options.gate, std=options.gate_std, skip=built.skip)
        check_layers(self.model.module)
        self.tuning = SelfTuning(
            self.model,
            self.train_loss,
            self.valid_loss,
            options,
            weights=options.weights,
            scales=options.scales,
            response=options.response,
            seed=int(torch.randint(2**31, (), generator=env.generator)),
        )

    def plain(self, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, Mapping[str, Tuned]]:
        """Return the network before its conversion, and the hyperparameters, without data; ``predictor`` needs them."""
        raise NotImplementedError(
            f"task={self.name} does not implement plain(), so it cannot be exported; see SelfTuningTask.plain"
        )

    def learned(self) -> LearnedModel:
        """Return the plain network at the present hyperparameters, and these."""
        return LearnedModel(self.model.collapse().state_dict(), self.values(), self.shape, 0, scaled_by())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return (1,)

    def predictor(self, shape: tuple[int, ...], classes: int, hyperparameters: Mapping[str, Tensor]) -> nn.Module:
        """Build the plain network, with the learned dropout rates."""
        module, declared = self.plain(shape, classes)
        plain = convert(module, HyperSpace(declared), respond=False).collapse()
        for place, each in module.named_modules():
            if isinstance(each, Dropout):
                rate = plain.get_submodule(place)
                assert isinstance(rate, _DropoutNd)
                rate.p = float(hyperparameters[each.name])
        return plain

    def groups(self) -> dict[str, list[Tensor]]:
        """Return the hyperparameters in R as one vector."""
        return self.tuning.groups()

    def values(self) -> dict[str, Tensor]:
        """Return the hyperparameters by name, in the user's units."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.model.space.values().items()}

    @torch.no_grad()
    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Set hyperparameters to values in the user's units; see ``Task.set_values``."""
        space = self.model.space
        raw = {}
        for name, value in values.items():
            each = space.declared[name]
            init = int(value) if isinstance(each, Discrete) else float(value)
            raw[name] = replace(each, init=init).raw(space.u.dtype, space.u.device, name)  # pyright: ignore[reportArgumentType]
        for name, value in raw.items():
            space.u[space.names.index(name)] = value

    def step(self, optimizer: torch.optim.Optimizer, check: GradientCheck) -> StepRecord:
        """Do one round; see ``Task.step``."""
        found = self.tuning.round(self.built.train.draw, self.built.valid.draw, optimizer, check)
        return StepRecord(found.valid_loss, {**found.metrics, "stn/warming": float(found.warming)})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure at the present hyperparameters in eval mode; ``stn/response_norm`` is the norm of ``d w / d lam``."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            return {**self.measure(self.model), "stn/response_norm": self.model.response_norm()}
        finally:
            for module, mode in modes:
                module.training = mode

    def hyperparameter_values(self) -> dict[str, Tensor]:
        """Return nothing: each hyperparameter is a single number, and its curve ``hyper/<name>`` is in its own units."""
        return {}

    def figures(self) -> dict[str, Figure | bytes]:
        """Return ``trajectory``: each hyperparameter with its band and scale, and both losses, over the rounds."""
        return {"trajectory": trajectory_figure(self.tuning)}

    def state_dict(self) -> dict[str, Any]:
        """Return network, hyperparameters, optimizers, noise, history and the positions in the data."""
        sources = {"train": self.built.train.state_dict(), "valid": self.built.valid.state_dict()}
        return {"tuning": self.tuning.state_dict(), **sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, in place."""
        self.tuning.load_state_dict(state["tuning"])
        self.built.train.load_state_dict(state["train"])
        self.built.valid.load_state_dict(state["valid"])

    def describe(self) -> dict[str, Any]:
        """Return names and sizes."""
        return {
            "name": self.name,
            "hyperparameters": list(self.model.space.names),
            "weights": sum(parameter.numel() for parameter in self.model.base_parameters()),
            "response": sum(parameter.numel() for parameter in self.model.response_parameters()),
        }


def check_layers(module: nn.Module) -> None:
    """Refuse, on several ranks, a layer whose output for a row depends on the other rows of the rank.

    Raises:
        ValueError: the message names the layer.
    """
    for name, each in module.named_modules() if distributed.ranks() > 1 else ():
        if isinstance(each, _BatchNorm):
            what = "would use the statistics of its own rows; use GroupNorm or LayerNorm"
        elif isinstance(each, _DropoutNd | TunedRate) and not isinstance(each, RowDropout):
            what = "would drop by position in the batch, not by example; use hyperopt.stn.row_dropout.RowDropout"
        else:
            continue
        raise ValueError(f"the network has {name} = {each}: on {distributed.ranks()} ranks each {what}, or one rank")


def schedule_of(checkpoint: Path, space: HyperSpace) -> TunedSchedule:
    """Return the schedule of hyperparameters of a run, from one of its checkpoints; see ``hyperopt.stn.schedule``.

    Args:
        checkpoint: ``checkpoints/last.pt`` or ``best.pt`` of the run.
        space: the hyperparameters of the task, for their units.
    """
    history = torch.load(checkpoint, map_location="cpu", weights_only=True)["task"]["tuning"]["history"]
    return TunedSchedule.of(space, [(row[0], row[3]) for row in history])
