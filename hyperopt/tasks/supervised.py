"""``SupervisedTask``: the rows, batches and evaluation of tasks that fit a classifier by solving equilibria."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hyperopt.core.checks import check_choice, check_optional_count
from hyperopt.data.batches import Batch, Batches
from hyperopt.data.splits import Dataset, Rows, Splits
from hyperopt.tasks.base import Environment, check_dataset, load_splits
from hyperopt.tasks.exports import LearnedModel
from hyperopt.tasks.scores import ROWS, scores
from hyperopt.tasks.solving import SolvingTask

SPLITS = ("train", "val")
LAST_BATCH = ("keep", "drop")


@dataclass(eq=False)
class SupervisedTask(SolvingTask):
    """A task that fits one split of a dataset in batches, selects on another and tests on a third.

    Attributes:
        fitted: the split that is fitted, behind ``outer/*``: ``train`` or ``val``; the other one is behind ``val/*``.
        batch_size: number of fitted rows of an outer step, drawn in epochs without replacement (None: always all of them).
        last_batch: what happens to the remaining rows if ``batch_size`` does not divide the fitted rows: ``keep`` makes a
            smaller batch of them, ``drop`` leaves them out of this epoch.
        eval_rows: number of fitted rows, the first ones, on which ``outer/*`` is measured (None: all); with
            ``dataset.order=shuffled`` these are a random sample.
        dataset: the rows (None: digits).
        splits: the dataset, after ``load``.
        rows: ``{"outer": fitted, "val": for selection, "test": held out}``, after ``load``; ``val`` may have no rows.
        batches: the order in which the fitted rows are used, after ``load``.
        eval_batch_size: number of rows of one forward pass in an evaluation, which bounds its memory.
    """

    classifies = True
    eval_batch_size = ROWS

    fitted: str = "train"
    batch_size: int | None = None
    last_batch: str = "keep"
    eval_rows: int | None = None
    dataset: Dataset | None = None

    splits: Splits = field(init=False, repr=False)
    rows: dict[str, Rows] = field(init=False, repr=False)
    batches: Batches = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_choice(self, "fitted", SPLITS)
        check_optional_count(self, "batch_size")
        check_optional_count(self, "eval_rows")
        check_choice(self, "last_batch", LAST_BATCH)
        check_dataset(self)

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of flattened rows, shape (rows, classes)."""

    def load(self, env: Environment, *, order: torch.device | None = None) -> None:
        """Load the rows, and draw their order from ``env.seed``.

        Args:
            env: the environment of the run.
            order: device of the row numbers of a batch (None: ``env.device``).

        Raises:
            DataError: see ``load_splits``.
            ValueError: there are no fitted rows, or fewer than ``batch_size``.
        """
        self.splits = load_splits(self, env)
        fitted, selected = self.splits.train, self.splits.val
        if self.fitted == "val":
            fitted, selected = selected, fitted
        if not len(fitted):
            raise ValueError(
                f"task.fitted={self.fitted}, but dataset.{self.fitted}=0, so there are no rows to fit; change one of them"
            )
        self.rows = {"outer": fitted, "val": selected, "test": self.splits.test}
        self.batches = Batches(len(fitted), self.batch_size, env.seed, self.last_batch, order or env.device)
        self.steps = 0

    def parts(self) -> dict[str, Any]:
        """Return the model and the position in the data."""
        return {"model": self.model, "batches": self.batches}

    def learned(self) -> LearnedModel:
        """Return the model, whose parameters are the hyperparameters."""
        weights = {f"{self.prefix}{name}": value for name, value in self.model.state_dict().items()}
        return LearnedModel.on(self.splits, weights)

    def place(self, batch: Batch) -> dict[str, float]:
        """Return the metrics that say which batch this was; nothing without minibatches."""
        if batch.index is None:
            return {}
        return {"batch/rows": float(batch.rows), "batch/epoch": batch.epoch + batch.number / self.batches.per_epoch}

    def evaluated(self) -> dict[str, Rows]:
        """Return the rows on which each metric is measured, without splits that have no rows."""
        fitted = self.rows["outer"]
        shown = {**self.rows, "outer": fitted if self.eval_rows is None else fitted.take(slice(self.eval_rows))}
        return {name: rows for name, rows in shown.items() if len(rows)}

    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracy on the three sets of rows."""
        return scores(self.evaluated(), self.logits, self.eval_batch_size)

    def describe(self) -> dict[str, Any]:
        """Return sizes, the dataset with its checksums, and the number of rows of each metric."""
        selected = "val" if self.fitted == "train" else "train"
        names, evaluated = {"outer": self.fitted, "val": selected, "test": "test"}, self.evaluated()
        return {
            "name": self.name,
            "features": self.rows["outer"].x.shape[1],
            "classes": self.splits.num_classes,
            "hyperparameters": self.sizes(),
            "dataset": self.splits.name,
            "checksums": self.splits.checksums,
            "rows": {
                name: {"split": names[name], "count": len(rows), "evaluated": len(evaluated.get(name, ()))}
                for name, rows in self.rows.items()
            },
            "batch_size": self.batches.size or self.batches.rows,
            "batches_per_epoch": self.batches.per_epoch,
        }
