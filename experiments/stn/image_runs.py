"""One training run of the comparison on images: self-tuning, or plain under given hyperparameters. See images.py."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from tables import shared
from torch import Tensor

from hyperopt.stn import STN, HyperSpace, convert
from hyperopt.tasks.scores import scores
from hyperopt.tasks.stn_images import StnImagesTask
from hyperopt.tasks.stn_problem import ImageProblem

EVERY = 50  # updates between two looks at the validation rows: an epoch
Row = shared.Row


class Study:
    """One experiment at one seed: rows, first weights and hyperparameters, the same for every method.

    Args:
        experiment: its name in configs/.
        seed: of the rows, of the first weights and of all that is random.
        overrides: of the config.
    """

    def __init__(self, experiment: str, seed: int, overrides: Sequence[str] = ()) -> None:
        """Build it as ``hyperopt`` would, on one thread of the CPU."""
        built = shared.built(f"experiment={experiment}", f"seed={seed}", *overrides)
        assert isinstance(built.task, StnImagesTask)
        self.seed, self.task, self.outer = seed, built.task, built.optimizer
        self.start: Tensor = self.task.model.space.u.detach().clone()
        self.updates = built.trainer.max_steps * self.task.options.train_steps

    def raw(self, values: Mapping[str, float]) -> Tensor:
        """Hyperparameters in the user's units as the networks take them."""
        each = [dataclasses.replace(one, init=values[name]) for name, one in self.task.tuned.items()]
        return torch.stack([one.raw(torch.float32, "cpu", name) for one, name in zip(each, self.task.tuned, strict=True)])

    def look(self, problem: ImageProblem, model: STN, update: int, found: Row) -> None:
        """Measure on the validation rows and, if that is the best so far, on the test rows."""
        model.eval()
        splits = self.task.splits

        def logits(x: Tensor) -> Tensor:
            return problem.logits(model, x)

        row = {"update": update, **scores({"val": splits.val}, logits, 1000)}
        if row["val/loss"] < found["best"].get("val/loss", float("inf")):
            row |= scores({"test": splits.test}, logits, 1000)
            found["best"] = {**row, "hyper": model.space.values()}
        found["curve"].append(row)

    def self_tuning(self) -> Row:
        """The self-tuning network."""
        task, found = self.task, {"best": {}, "curve": [], "hyper": []}
        optimizer = self.outer.build(task.groups())
        started = time.process_time()
        for k in range(self.updates // task.options.train_steps):
            task.step(optimizer, lambda gradients: None)
            if task.tuning.updates % EVERY == 0 or k == 0:
                self.look(task.problem, task.model, task.tuning.updates, found)
                found["hyper"].append([task.tuning.updates, task.model.space.values(), task.model.space.scales()])
        return {**found, "updates": task.tuning.updates, "seconds": time.process_time() - started}

    def plain(self, raw: Callable[[int], Tensor], updates: int) -> Row:
        """A plain network of the same first weights, batches and draws.

        Args:
            raw: the hyperparameters of an update, in R. shape: (H,)
            updates: of the weights.
        """
        task, found = self.task, {"best": {}, "curve": []}
        problem = ImageProblem(task.splits, task.tuned, task.classifier.dropouts, task.batch_size, task.val_batch_size, self.seed)
        space = HyperSpace(task.tuned)
        model = convert(task.built.module, space, respond=False)
        optimizer = task.options.weights.build({"weights": model.base_parameters()})
        started = time.process_time()
        for k in range(updates):
            batch = problem.train.draw()
            model.train()
            with torch.no_grad():
                space.u.copy_(raw(k))
                draw = space.draw(len(batch[1]), perturb=False)
            optimizer.zero_grad()
            with model.at(draw):
                problem.train_loss(model, batch, draw).backward()
            optimizer.step()
            if (k + 1) % EVERY == 0:
                self.look(problem, model, k + 1, found)
        return {**found, "updates": updates, "seconds": time.process_time() - started}
