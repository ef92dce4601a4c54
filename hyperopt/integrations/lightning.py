"""``TunerCallback`` for Lightning: hyperparameters are learned while ``Trainer.fit`` runs.

class Net(lightning.LightningModule):
    def __init__(self, hyper):
        super().__init__()
        ...
        self.tuner = hyperopt.Tuner(self, hyper, train_loss=..., val_loss=..., optimizer=...)

    def training_step(self, batch, index):
        return self.tuner.loss(batch)

net = Net(hyper)
lightning.Trainer(callbacks=[TunerCallback(net.tuner, every_n_steps=100)]).fit(net, train_loader, val_loader)
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer  # pyright: ignore[reportMissingImports]

from hyperopt.bilevel.batches import source_of
from hyperopt.bilevel.own_batches import Moved, numbers_of_batches
from hyperopt.bilevel.record import Record
from hyperopt.bilevel.tuner import Tuner
from hyperopt.core.checks import check_count


class TunerCallback(Callback):
    """Make a step of a tuner after every ``every_n_steps`` steps of the training optimizer.

    The numbers of each step go to the trainer's loggers, and the tuner's state is part of the trainer's checkpoints.

    Args:
        tuner: the tuner of the module that is trained.
        every_n_steps: number of steps of the training optimizer between two steps of the tuner, at least 1; accumulated
            micro-batches count as one step.
        batches: number of batches of a step, see ``Tuner.step``.
        train: data of the training loss (None: the trainer's training loader).
        val: data of the validation loss (None: the trainer's first validation loader).

    Attributes:
        record: the record of the latest step (None: there was none).

    Raises:
        TypeError, ValueError: an argument is out of its range or of another kind.

    Reference: see ``hyperopt.Tuner``, whose steps these are.

    Example:
        >>> import torch, hyperopt
        >>> from hyperopt.integrations.lightning import TunerCallback
        >>> model, hyper = torch.nn.Linear(2, 1), hyperopt.Hyperparameters({"decay": hyperopt.Positive(0.1)})
        >>> def loss(model, batch, lam):
        ...     return model(batch).square().mean() + lam["decay"] * model.weight.square().sum()
        >>> optimizer = torch.optim.Adam(hyper.parameters(), lr=0.1)
        >>> tuner = hyperopt.Tuner(model, hyper, train_loss=loss, val_loss=loss, optimizer=optimizer)
        >>> callback = TunerCallback(tuner, every_n_steps=50)  # lightning.pytorch.Trainer(callbacks=[callback])
        >>> callback.every_n_steps, callback.record
        (50, None)
    """

    def __init__(
        self,
        tuner: Tuner,
        *,
        every_n_steps: int = 100,
        batches: int | tuple[int, int] | None = None,
        train: Any = None,
        val: Any = None,
    ) -> None:
        """Check the arguments."""
        self.tuner, self.every_n_steps, self.batches, self.given = tuner, every_n_steps, batches, (train, val)
        check_count(self, "every_n_steps")
        numbers_of_batches(batches)
        self.record: Record | None = None
        self._last = 0
        self._from: list[Any] = [None, None]  # the data behind ``_sources``
        self._sources: list[Any] = [None, None]
        self._data: list[Moved] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the data of the tuner.

        Raises:
            ValueError: the trainer has no loader for data that were not given.
        """
        self._last = trainer.global_step
        validation = trainer.val_dataloaders
        loaders = trainer.train_dataloader, validation[0] if isinstance(validation, list) and validation else validation
        for i, (name, loader) in enumerate(zip(("train", "val"), loaders, strict=True)):
            data = loader if self.given[i] is None else self.given[i]
            if data is None:
                raise ValueError(f"the trainer has no {name} data for the tuner; give TunerCallback(tuner, {name}=loader)")
            if data is not self._from[i]:  # another ``fit`` with the same loader continues at its position
                self._from[i], self._sources[i] = data, source_of(data, name)
        self._data = [Moved(source, trainer.strategy.batch_to_device) for source in self._sources]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Make a step of the tuner if one is due."""
        step, before = trainer.global_step, self._last
        self._last = step
        if step // self.every_n_steps == before // self.every_n_steps:
            return
        self.record = self.tuner.step(*self._data, batches=self.batches)
        for logger in trainer.loggers:
            logger.log_metrics(self.record.as_dict(), step=step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the tuner."""
        return self.tuner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the tuner."""
        self.tuner.load_state_dict(state_dict)
