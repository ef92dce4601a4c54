"""Settings of the tasks: frozen, validated, and free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hyperopt.bilevel.implicit import ProductSettings
from hyperopt.core.checks import (
    POLICIES,
    check_choice,
    check_count,
    check_counts,
    check_flag,
    check_number,
    check_open_unit,
    check_optional,
    check_optional_count,
    plain,
)

SPLITS = ("train", "val")
LAST_BATCH = ("keep", "drop")
TOLERANCES = ("fixed", "gradient")
WARM_DTYPES = (None, "float32", "bfloat16")


@dataclass(frozen=True)
class SupervisedSettings:
    """What every task has that fits a classifier through an equilibrium on rows of a dataset.

    Attributes:
        fitted: the split of the dataset behind ``outer/*``: ``train`` or ``val``; the other one is behind ``val/*``.
        batch_size: fitted rows of one outer step, drawn in epochs without replacement (None: all of them, always).
        last_batch: what becomes of the rows that are left when ``batch_size`` does not divide the fitted rows: ``keep`` makes a
            shorter batch of them, ``drop`` leaves them out of this epoch.
        eval_rows: ``outer/*`` are measured on the first so many fitted rows (None: on all of them); with
            ``dataset.order=shuffled`` these are drawn at random, once.
        solver: how the states are found (None: Picard).
        adjoint: how the hypergradient is found (None: implicit, by the Neumann series).
        policy: what to do when the solver fails: ``raise``, ``warn`` (1st, 10th, 100th, ... time), ``fallback`` or ``ignore``.
        fallback: solvers tried in turn under ``policy=fallback`` (none: Anderson, Broyden, Newton-Krylov).
        dataset: the rows (None: digits).
    """

    fitted: str = "train"
    batch_size: int | None = None
    last_batch: str = "keep"
    eval_rows: int | None = None
    solver: Any = None
    adjoint: Any = None
    policy: str = "warn"
    fallback: Any = field(default_factory=tuple)
    dataset: Any = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_choice(self, "fitted", SPLITS)
        check_optional_count(self, "batch_size")
        check_optional_count(self, "eval_rows")
        check_choice(self, "last_batch", LAST_BATCH)
        check_choice(self, "policy", POLICIES)


@dataclass(frozen=True)
class EquilibriumSettings(SupervisedSettings):
    """The equilibrium model ``w_i = tanh(w_i A + B x_i + c)`` with a linear classifier on ``w_i``, fitted by hypergradients.

    Attributes:
        state_size: entries of one state ``w_i``.
        cell: the inner map with its own settings (None: a free, projected A); see ``hyperopt.nn.cells.CellFactory``.
        classifier_scale: standard deviation of the normal initial weights of the classifier, whose bias starts at zero (None:
            ``torch.nn.Linear``'s own initial values for both).
        warm_start: start each inner solve on the fitted rows, and its adjoint solve, from the row's own solutions when it was
            seen last. Keeps two states of memory for every fitted row.
        warm_dtype: floating type of what is kept (None: that of the run); ``bfloat16`` halves the memory of float32.
        tolerance: ``fixed``: ``solver.rtol`` in every step. ``gradient``: that is for a hypergradient as large as it ever was;
            where it is smaller, so is the tolerance, in proportion; see ``hyperopt.tasks.tolerance``.
        certificate_every: outer steps from one certificate (``hypergrad/error_estimate``) to the next.
        l2: ``{group: strength}``; ``strength / 2 * |group|^2`` is added to the outer loss of a step, not to ``outer/loss``.
    """

    state_size: int = 100
    cell: Any = None
    classifier_scale: float | None = None
    warm_start: bool = False
    warm_dtype: str | None = None
    tolerance: str = "fixed"
    certificate_every: int = 10
    l2: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "state_size")
        check_optional(self, "classifier_scale", 0.0)
        check_flag(self, "warm_start")
        check_choice(self, "warm_dtype", WARM_DTYPES)
        check_choice(self, "tolerance", TOLERANCES)
        check_count(self, "certificate_every")
        if not isinstance(self.l2, Mapping):
            raise ValueError(f"EquilibriumSettings: l2={self.l2!r} must map groups to strengths, as {{B: 1e-4}}; change l2")
        for group, strength in self.l2.items():
            if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < float("inf"):
                raise ValueError(f"EquilibriumSettings: l2.{group}={strength!r} is not in [0, inf); change l2")


@dataclass(frozen=True)
class ImplicitTaskSettings(SupervisedSettings):
    """A network with implicit layers, its parameters fitted on minibatches of images.

    Attributes:
        network: what is built, with its own settings (None: the tanh layer in a small MLP); see
            ``hyperopt.nn.networks.NetworkFactory``.
        batch_size: as above; here 100 by default.
        eval_batch_size: rows of one forward of an evaluation.
        augment: how the images of a step are changed at random (None: not); see ``hyperopt.data.augment.Augment``.
        workers: processes that make the batches ahead of time; 0: none. They change no number.
        jacobian: weight of the Jacobian penalty in the loss of a step (0: none); see ``hyperopt.nn.stabilise``.
        pretrain_steps: first outer steps, in which a layer is ``pretrain_iterations`` evaluations of its cell, unrolled.
        pretrain_iterations: see there.
    """

    network: Any = None
    batch_size: int | None = 100
    eval_batch_size: int = 500
    augment: Any = None
    workers: int = 0
    jacobian: float = 0.0
    pretrain_steps: int = 0
    pretrain_iterations: int = 8

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "eval_batch_size")
        check_count(self, "workers", 0)
        check_number(self, "jacobian", 0.0)
        check_count(self, "pretrain_steps", 0)
        check_count(self, "pretrain_iterations")


@dataclass(frozen=True)
class BilevelTaskSettings:
    """What every trained problem has.

    Attributes:
        inner: how the model is trained (None: gradient descent).
        adjoint: how the hypergradient is found (None: chosen by what it meets, see ``hyperopt.bilevel.auto``).
        products: how an implicit adjoint takes its products.
        warm_start: train from where the last outer step ended; else from the first weights, every time.
        dataset: the rows (None: digits).
    """

    inner: Any = None
    adjoint: Any = None
    products: ProductSettings = field(default_factory=ProductSettings)
    warm_start: bool = True
    dataset: Any = None

    def __post_init__(self) -> None:
        """Check the flag."""
        check_flag(self, "warm_start")


@dataclass(frozen=True)
class TunedSettings(BilevelTaskSettings):
    """A model that is trained on the training rows and tuned on the validation rows.

    Attributes:
        selection_rows: the last validation rows, which the hyperparameters are not fitted to: val/* is theirs, and with it the
            best step and early stopping (0: val/* and outer/* are the same rows).
    """

    selection_rows: int = 0

    def __post_init__(self) -> None:
        """Check the count."""
        super().__post_init__()
        check_count(self, "selection_rows", 0)


@dataclass(frozen=True)
class LinearSettings(TunedSettings):
    """A linear model.

    Attributes:
        retrain: evaluations also train on the training and validation rows together, and test that: ``retrained/*``.
        batch_size: training rows of one inner gradient (None: all); evaluations train on all of them.
        val_batch_size: validation rows of one outer gradient (None: all).
    """

    retrain: bool = False
    batch_size: int | None = None
    val_batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the flag and the sizes."""
        super().__post_init__()
        check_flag(self, "retrain")
        check_optional_count(self, "batch_size")
        check_optional_count(self, "val_batch_size")


@dataclass(frozen=True)
class L2Settings(LinearSettings):
    """A linear model with L2 strengths.

    Attributes:
        l2: space of the strengths.
    """

    l2: Any = None


@dataclass(frozen=True)
class BiasRegularizationSettings(LinearSettings):
    """A linear model held near a learned centre.

    Attributes:
        centre: space of the centre.
        beta: strength of the penalty.
    """

    centre: Any = None
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        check_number(self, "beta", 0.0, open_low=True)


@dataclass(frozen=True)
class DataDistillationSettings(BilevelTaskSettings):
    """Learned training images.

    Attributes:
        images: space of the images.
        images_per_class: how many of each class.
        decay: strength of the L2 of the model that is trained on them.
        hidden: sizes of its hidden layers (none: a linear model).
        batch_size: real rows of one outer step (None: all).
    """

    images: Any = None
    images_per_class: int = 1
    decay: float = 1e-3
    hidden: tuple[int, ...] = ()
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "images_per_class")
        check_number(self, "decay", 0.0)
        check_counts(self, "hidden")
        check_optional_count(self, "batch_size")


@dataclass(frozen=True)
class NetworkSettings(TunedSettings):
    """A perceptron and its batches.

    Attributes:
        hidden: sizes of the hidden layers.
        batch_size: training rows of one inner gradient (None: all).
        val_batch_size: validation rows of one outer step (None: all).
    """

    hidden: tuple[int, ...] = (100,)
    batch_size: int | None = None
    val_batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_counts(self, "hidden")
        check_optional_count(self, "batch_size")
        check_optional_count(self, "val_batch_size")


@dataclass(frozen=True)
class WeightDecaySettings(NetworkSettings):
    """A network with a weight decay for each weight.

    Attributes:
        decay: space of the decays.
    """

    decay: Any = None


@dataclass(frozen=True)
class CleaningSettings(NetworkSettings):
    """A weight for each training row, some of whose labels are replaced.

    Attributes:
        weights: space of the weights.
        corrupted: share of the training labels that are replaced by another class, in [0, 1].
        decay: strength of the L2 of the model.
        hidden: as ``NetworkSettings`` (none: a linear model).
    """

    hidden: tuple[int, ...] = ()
    weights: Any = None
    corrupted: float = 0.5
    decay: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_number(self, "corrupted", 0.0, 1.0)
        check_number(self, "decay", 0.0)


@dataclass(frozen=True)
class AugmentationSettings(NetworkSettings):
    """A network trained on images that another one has changed.

    Attributes:
        width: channels between the two convolutions of the augmentation network.
        scale: factor of what it adds to an image.
    """

    width: int = 8
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "width")
        check_number(self, "scale", 0.0, open_low=True)


@dataclass(frozen=True)
class CoupledSettings:
    """Two coupled equilibrium states of different shapes, trained to match targets; see ``hyperopt.nn.coupled``.

    Attributes:
        x_size: entries of the one state.
        y_shape: shape of the other, two numbers.
        features: entries of one input.
        rows: examples of each split: fitted, selected on, held out.
        max_norm: largest spectral norm of the coupling matrix M, in (0, 1); that of the hidden model has 0.9 of it.
        noise: standard deviation of the noise in the targets.
        certificate_every: outer steps from one certificate (``hypergrad/error_estimate``) to the next.
        solver: how the states are found (None: Picard).
        adjoint: how the hypergradient is found (None: implicit, by the Neumann series).
        policy: what to do when the solver fails: ``raise``, ``warn`` (1st, 10th, 100th, ... time), ``fallback`` or ``ignore``.
        fallback: solvers tried in turn under ``policy=fallback`` (none: Anderson, Broyden, Newton-Krylov).
    """

    x_size: int = 5
    y_shape: tuple[int, int] = (3, 4)
    features: int = 8
    rows: int = 100
    max_norm: float = 0.8
    noise: float = 0.0
    certificate_every: int = 10
    solver: Any = None
    adjoint: Any = None
    policy: str = "warn"
    fallback: Any = field(default_factory=tuple)

    def __post_init__(self) -> None:
        """Check the ranges; a list given as ``y_shape`` becomes a tuple."""
        for name in ("x_size", "features", "rows", "certificate_every"):
            check_count(self, name)
        object.__setattr__(self, "y_shape", tuple(map(plain, self.y_shape)))
        if len(self.y_shape) != 2 or not all(isinstance(n, int) and n >= 1 for n in self.y_shape):
            raise ValueError(f"CoupledSettings: y_shape={self.y_shape!r} must be two whole numbers >= 1; change y_shape")
        check_open_unit(self, "max_norm")
        check_number(self, "noise", 0.0)
        check_choice(self, "policy", POLICIES)
