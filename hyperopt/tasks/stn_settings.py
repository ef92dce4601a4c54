"""Settings of the tasks that tune themselves: frozen, validated, and free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hyperopt.core.checks import check_choice, check_count, check_number, check_optional_count
from hyperopt.stn.network import GATES
from hyperopt.stn.rounds import SelfTuningSettings

ACTIVATIONS = ("relu", "leaky_relu", "tanh", "silu", "gelu", "softplus")


@dataclass(frozen=True)
class SelfTuningOptions(SelfTuningSettings):
    """All of the ``stn`` group: the step, the gates of the hyper-layers, and the optimizers beside the outer one.

    Attributes:
        gate: ``unit``: a gate for each output of a layer; ``scalar``: one for the layer.
        gate_std: standard deviation of the gates at first.
        weights: optimizer of the weights, and of the response if that has none of its own (None: Adam, 0.01).
        scales: optimizer of the scales (None: Adam, 0.003).
        response: optimizer of the response (None: that of the weights).
    """

    gate: str = "unit"
    gate_std: float = 0.0
    weights: Any = None
    scales: Any = None
    response: Any = None

    def __post_init__(self) -> None:
        """Check the choices and ranges."""
        super().__post_init__()
        check_choice(self, "gate", GATES)
        check_number(self, "gate_std", 0.0)


@dataclass(frozen=True)
class SelfTuningTaskSettings:
    """What every task has that tunes itself.

    Attributes:
        stn: how (None: the defaults).
    """

    stn: Any = None


@dataclass(frozen=True)
class StnQuadraticSettings(SelfTuningTaskSettings):
    """A small network learns ``y = x^2`` on inputs of a range that is tuned.

    Attributes:
        x_range: the tuned range of the training inputs.
        activation: of the hidden layers.
        width: units of a hidden layer.
        batch_size: rows of a batch of either kind.
        reach: validation inputs are uniform in ``[-reach, reach]``.
        frame_every: rounds from one frame of the animation to the next.
    """

    x_range: Any = None
    activation: str = "relu"
    width: int = 8
    batch_size: int = 100
    reach: float = 2.0
    frame_every: int = 10

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_choice(self, "activation", ACTIVATIONS)
        check_count(self, "width")
        check_count(self, "batch_size")
        check_count(self, "frame_every")
        check_number(self, "reach", 0.0, open_low=True)


@dataclass(frozen=True)
class StnRidgeSettings(SelfTuningTaskSettings):
    """A linear model with an L2 strength that is tuned, of which the best response is known.

    Attributes:
        decay: the tuned strength.
        features: of one row.
        rows: of each of the two sets.
        noise: standard deviation of the noise in the targets.
        draws: strengths in a batch.
    """

    decay: Any = None
    features: int = 20
    rows: int = 40
    noise: float = 3.0
    draws: int = 50

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_count(self, "features")
        check_count(self, "rows")
        check_count(self, "draws")
        check_number(self, "noise", 0.0)


@dataclass(frozen=True)
class StnImagesSettings(SelfTuningTaskSettings):
    """A classifier of images that tunes its regularisation.

    Attributes:
        classifier: the network (None: two dense layers of 200).
        tuned: the hyperparameters by name: ``dropout0``, ``dropout1``, ... where the network has places for them, those of
            ``hyperopt.nn.regularise.pipeline.RANGES`` that change the images, and ``weight_decay``.
        batch_size: training rows of one update of the weights.
        val_batch_size: validation rows of one update of the hyperparameters.
        eval_rows: ``outer/*`` are measured on the first so many training rows (None: on all of them).
        eval_batch_size: rows of one forward of an evaluation.
        dataset: the rows (None: digits).
    """

    classifier: Any = None
    tuned: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 100
    val_batch_size: int = 100
    eval_rows: int | None = None
    eval_batch_size: int = 1000
    dataset: Any = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_count(self, "batch_size")
        check_count(self, "val_batch_size")
        check_optional_count(self, "eval_rows")
        check_count(self, "eval_batch_size")
