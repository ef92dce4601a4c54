"""``TunedTask``: a model that is trained on the training rows of a dataset and tuned on its validation rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hyperopt.bilevel.batches import Minibatches
from hyperopt.bilevel.problem import BilevelProblem, Composite
from hyperopt.core.checks import check_count, check_optional_count
from hyperopt.data.splits import Rows
from hyperopt.tasks.base import SPLIT_MEASURES, Environment
from hyperopt.tasks.bilevel import BilevelTask


@dataclass(eq=False)
class TunedTask(BilevelTask):
    """A model that is trained on the training rows and tuned on the validation rows.

    Attributes:
        selection_rows: number of validation rows, the last ones, to which the hyperparameters are not fitted. They are the rows
            of ``val/*``, which selects the best step and stops early (0: ``val/*`` and ``outer/*`` are the same rows).
        batch_size: number of training rows of an inner gradient (None: all).
        val_batch_size: number of validation rows of an outer gradient (None: all).
    """

    MEASURES: ClassVar[tuple[str, ...]] = (*SPLIT_MEASURES, "train/loss", "train/accuracy")

    selection_rows: int = 0
    batch_size: int | None = None
    val_batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the counts."""
        super().__post_init__()
        check_count(self, "selection_rows", 0)
        check_optional_count(self, "batch_size")
        check_optional_count(self, "val_batch_size")

    @functools.cached_property
    def fitted(self) -> Rows:
        """The validation rows to which the hyperparameters are fitted.

        Raises:
            ValueError: there are none.
        """
        val, kept = self.splits.val, self.selection_rows
        if kept >= len(val):
            raise ValueError(
                f"task.selection_rows={kept} leaves none of the {len(val)} validation rows to fit the hyperparameters to; lower "
                "it or raise dataset.val"
            )
        return val.take(slice(len(val) - kept)) if kept else val

    def rows(self) -> dict[str, Rows]:
        """Return the rows of the metrics by name; a dataset without test rows has no ``test/*``."""
        splits, kept = self.splits, self.selection_rows
        selected = splits.val.take(slice(len(splits.val) - kept, None)) if kept else splits.val
        found = {"train": splits.train, "outer": self.fitted, "val": selected, "test": splits.test}
        return {name: rows for name, rows in found.items() if len(rows)}

    def problem(self, inner: Any, env: Environment, train: tuple[Any, ...], val: tuple[Any, ...] | None = None) -> BilevelProblem:
        """Return the problem with an inner loss, whose outer loss is that of the model on validation rows.

        Args:
            inner: the inner loss.
            env: gives the seed of the batches.
            train: what the batches of the inner loss are taken from: ``(x, y)``, and more with a row for each example.
            val: ``(x, y)`` of the outer loss (None: of ``fitted``).
        """
        val = (self.fitted.x, self.fitted.y) if val is None else val
        return BilevelProblem(
            inner,
            self.outer,
            inner_batches=Minibatches(train, self.batch_size, env.seed, key="task.batch_size"),
            outer_batches=Minibatches(val, self.val_batch_size, env.seed + 1, key="task.val_batch_size"),
        )

    def composite(self, criterion: Callable[..., Tensor]) -> Composite:
        """Return the inner loss ``criterion(z, w, lam, batch)`` of the model's outputs ``z`` on the batch's first part."""
        return Composite(lambda w, lam, batch: self.predict(w, batch[0]), criterion)
