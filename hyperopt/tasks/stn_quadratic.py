"""The study of the hypertraining notebook: how wide must the range of training inputs be to learn ``y = x^2`` on [-2, 2]?

    training      x = r_i * U(-1, 1),  r_i the perturbed range of the row, without a gradient             mean (f(x) - x^2)^2
    validation    x = U(-2, 2)                                                                            the same

Only the data depend on the range: a narrow range makes training easy and validation impossible, a wide one wastes the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hyperopt.core.checks import check_choice, check_count, check_number
from hyperopt.stn.declare import Bounded, Tuned
from hyperopt.stn.draw import Draw
from hyperopt.stn.network import STN
from hyperopt.tasks.base import Environment, GradientCheck, StepRecord
from hyperopt.tasks.stn import SelfTuningSetup, SelfTuningTask
from hyperopt.tasks.stn_figures import fit_animation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACTIVATION: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}
POINTS = 100  # number of points of the grid for metrics


class Uniform:
    """Batches of uniform numbers in ``[-1, 1]``.

    Args:
        rows: number of rows of a batch.
        generator: the source of random numbers.
        like: a tensor with the dtype and device of the numbers.
    """

    def __init__(self, rows: int, generator: torch.Generator, like: Tensor) -> None:
        """Keep the generator."""
        self.rows, self.generator, self.like = rows, generator, like

    def draw(self) -> Tensor:
        """Return the next batch. shape: (rows, 1)."""
        drawn = torch.rand(self.rows, 1, generator=self.generator, dtype=torch.float64)
        return (2 * drawn - 1).to(self.like)

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.generator.set_state(state["generator"])


@dataclass(eq=False)
class StnQuadraticTask(SelfTuningTask):
    """A small network that learns ``y = x^2`` on inputs from a tuned range.

    Attributes:
        x_range: the tuned range of the training inputs (None: bounded by 0.01 and 10, from 0.5).
        activation: activation of the hidden layers.
        width: number of units of a hidden layer.
        batch_size: number of rows of a training or validation batch.
        reach: validation inputs are uniform in ``[-reach, reach]``; above 0.
        frame_every: number of rounds between two frames of the animation.
        grid: points of ``[-reach, reach]``, after ``setup``. shape: (100, 1)
        frames: for each frame of the animation the round, the range, and the learned function on the grid.
    """

    name = "stn_quadratic"
    MEASURES: ClassVar[tuple[str, ...]] = ("outer/loss", "train/loss", "val/loss", "val/distance", "stn/response_norm")

    x_range: Tuned | None = None
    activation: str = "relu"
    width: int = 8
    batch_size: int = 100
    reach: float = 2.0
    frame_every: int = 10

    grid: Tensor = field(init=False, repr=False)
    frames: list[list[float]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_choice(self, "activation", tuple(ACTIVATION))
        check_count(self, "width")
        check_count(self, "batch_size")
        check_count(self, "frame_every")
        check_number(self, "reach", 0.0, open_low=True)

    def build(self, env: Environment) -> SelfTuningSetup:
        """Build the network, and batches with generators of their own."""
        like = torch.zeros((), dtype=env.dtype, device=env.device)
        network, declared = self.plain(self.shape, 0)
        self.frames = []
        self.grid = torch.linspace(-self.reach, self.reach, POINTS).to(like)[:, None]

        def batches() -> Uniform:
            seed = int(torch.randint(2**31, (), generator=env.generator))
            return Uniform(self.batch_size, torch.Generator().manual_seed(seed), like)

        return SelfTuningSetup(network, declared, batches(), batches())

    def plain(self, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, Mapping[str, Tuned]]:
        """Return the network, with hidden layers of ``width`` units, and the range."""
        width = self.width
        layers: list[nn.Module] = [nn.Linear(shape[0], width)]
        for _ in range(3):
            layers += [nn.Linear(width, width), ACTIVATION[self.activation]()]
        return nn.Sequential(*layers, nn.Linear(width, 1)), {"x_range": self.x_range or Bounded(0.5, 0.01, 10.0, scale=0.5)}

    def train_loss(self, model: STN, batch: Tensor, draw: Draw) -> Tensor:
        """Return the squared error on inputs from each row's own range."""
        x = batch * draw.h["x_range"].detach()[:, None]
        return (model(x, draw) - x.square()).square().mean()

    def valid_loss(self, model: STN, batch: Tensor, draw: Draw | None) -> Tensor:
        """Return the squared error on ``[-reach, reach]``."""
        x = self.reach * batch
        return (model(x) - x.square()).square().mean()

    def step(self, optimizer: torch.optim.Optimizer, check: GradientCheck) -> StepRecord:
        """Do one round, and keep a frame of the animation every ``frame_every`` rounds."""
        record = super().step(optimizer, check)
        if len(self.tuning.history) % self.frame_every == 0:
            with torch.no_grad():
                learned = self.model.eval()(self.grid)[:, 0].tolist()
            self.frames.append([len(self.tuning.history), self.model.space.values()["x_range"], *learned])
        return record

    def measure(self, model: STN) -> dict[str, float]:
        """Return the losses, and ``val/distance``, the largest error.

        ``val/*`` is measured on a grid of 100 points of ``[-reach, reach]``, ``train/loss`` on a grid of the tuned range.
        """
        error = model(self.grid) - self.grid.square()
        narrow = self.grid * (model.space.values()["x_range"] / self.reach)
        loss = error.square().mean().item()
        return {
            "outer/loss": loss,
            "val/loss": loss,
            "val/distance": error.abs().max().item(),
            "train/loss": (model(narrow) - narrow.square()).square().mean().item(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every self-tuning task, and the frames of the animation."""
        return {**super().state_dict(), "frames": [list(frame) for frame in self.frames]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, in place."""
        super().load_state_dict(state)
        self.frames = [list(frame) for frame in state["frames"]]

    def figures(self) -> dict[str, Figure | bytes]:
        """Return ``trajectory``, and ``fit``, an animation of the learned function and ``x^2``."""
        return {**super().figures(), **({"fit": fit_animation(self.grid[:, 0].cpu(), self.frames)} if self.frames else {})}
