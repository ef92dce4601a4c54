"""``TunerCallback`` for Hugging Face's ``Trainer``: hyperparameters are learned while ``Trainer.train`` runs.

class Tuned(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = train_loss(model, inputs, hyper.read())
        return (loss, None) if return_outputs else loss

trainer = Tuned(model, args, train_dataset=..., eval_dataset=...)
tuner = hyperopt.Tuner(model, hyper, train_loss=train_loss, val_loss=..., optimizer=...)
trainer.add_callback(TunerCallback(tuner, trainer, every_n_steps=100))
trainer.train()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device  # pyright: ignore[reportMissingImports]
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer, TrainerCallback  # pyright: ignore[reportMissingImports]
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # pyright: ignore[reportMissingImports]

from hyperopt.bilevel.batches import BatchSource, source_of
from hyperopt.bilevel.own_batches import Moved, numbers_of_batches
from hyperopt.bilevel.record import Record
from hyperopt.bilevel.tuner import Tuner
from hyperopt.core import distributed
from hyperopt.core.checks import check_count

FILE = "tuner.pt"
"""Name of the file of the tuner's state in a checkpoint of the trainer."""


class TunerCallback(TrainerCallback):
    """Make a step of a tuner after every ``every_n_steps`` steps of the training optimizer.

    The numbers of each step go to the trainer's log. The tuner's state is saved in the trainer's checkpoints and restored when
    training resumes from one.

    Args:
        tuner: the tuner of the model that is trained.
        trainer: the trainer; its datasets and its collator make the tuner's batches.
        every_n_steps: number of steps of the training optimizer between two steps of the tuner, at least 1.
        batches: number of batches of a step, see ``Tuner.step``.

    Attributes:
        record: the record of the latest step (None: there was none).

    Raises:
        TypeError, ValueError: an argument is out of its range or of another kind.

    Reference: see ``hyperopt.Tuner``, whose steps these are.

    Example:
        >>> import torch, hyperopt
        >>> from hyperopt.integrations.transformers import TunerCallback
        >>> model, hyper = torch.nn.Linear(2, 1), hyperopt.Hyperparameters({"decay": hyperopt.Positive(0.1)})
        >>> def loss(model, batch, lam):
        ...     return model(batch).square().mean() + lam["decay"] * model.weight.square().sum()
        >>> optimizer = torch.optim.Adam(hyper.parameters(), lr=0.1)
        >>> tuner = hyperopt.Tuner(model, hyper, train_loss=loss, val_loss=loss, optimizer=optimizer)
        >>> trainer.add_callback(TunerCallback(tuner, trainer, every_n_steps=50))  # doctest: +SKIP
    """

    def __init__(
        self, tuner: Tuner, trainer: Trainer, *, every_n_steps: int = 100, batches: int | tuple[int, int] | None = None
    ) -> None:
        """Check the arguments, and make loaders of the datasets."""
        self.tuner, self.trainer, self.every_n_steps, self.batches = tuner, trainer, every_n_steps, batches
        check_count(self, "every_n_steps")
        numbers_of_batches(batches)
        self.record: Record | None = None
        args = trainer.args
        self.data = (
            self._source(trainer.get_train_dataloader(), args.train_batch_size, "train"),
            self._source(trainer.get_eval_dataloader(), args.eval_batch_size, "val"),
        )

    def _source(self, loader: DataLoader[Any], size: int, name: str) -> BatchSource:
        """Return batches of the loader's dataset, by a new loader, so that the position of the trainer's own does not move."""
        dataset: Any = loader.dataset
        sampler = DistributedSampler(dataset) if distributed.ranks() > 1 else None
        own = DataLoader(dataset, size, shuffle=sampler is None, sampler=sampler, collate_fn=loader.collate_fn)
        return Moved(source_of(own, name), lambda batch: send_to_device(batch, self.trainer.args.device))

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Restore the tuner's state from the checkpoint from which training resumes."""
        if state.global_step and not self.tuner.steps:
            self.load(Path(args.resume_from_checkpoint or self._folder(args, state)))

    def load(self, folder: Path | str) -> None:
        """Restore the tuner's state from a checkpoint of the trainer.

        Raises:
            FileNotFoundError: the folder holds no state of a tuner.
        """
        file = Path(folder) / FILE
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist; call load(folder) with the checkpoint from which training resumes")
        self.tuner.load_state_dict(torch.load(file, map_location=self.trainer.args.device, weights_only=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Make a step of the tuner if one is due."""
        if state.global_step % self.every_n_steps == 0:
            self.record = self.tuner.step(*self.data, batches=self.batches)
            self.trainer.log(self.record.as_dict())

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Save the tuner's state beside the model's."""
        if state.is_world_process_zero:
            torch.save(self.tuner.state_dict(), self._folder(args, state) / FILE)

    def _folder(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
