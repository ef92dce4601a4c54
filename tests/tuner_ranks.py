"""A ``Tuner`` on one or several ranks, each on rows of its own: run by ``test_tuner_ranks.py``, once a rank.

python tuner_ranks.py RANK WORLD STORE OUT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tuner_reference import EXACT, data, fit, hyperparameters, mlp, regularised

import hyperopt

ROWS = {1: [slice(0, 24)], 2: [slice(0, 10), slice(10, 24)]}
HALVES = {1: [slice(0, 24)], 2: [slice(0, 12), slice(12, 24)]}
PARTS = {1: [[slice(0, 12), slice(12, 24)]], 2: [[slice(0, 5), slice(12, 15)], [slice(5, 12), slice(15, 24)]]}


def rows(batch: tuple[Tensor, Tensor], index: slice) -> tuple[Tensor, Tensor]:
    return batch[0][index], batch[1][index]


def results(rank: int, world: int) -> dict[str, Tensor]:
    """Hypergradients, hyperparameters and weights after three rounds of training and tuning, for each way."""
    train, val, found = data(24), data(24, seed=1), {}

    def go(name: str, model: Any, steps: Any, wrap: bool, **changes: Any) -> None:
        plain, hyper = model, hyperparameters()
        if wrap and world > 1:
            model = DistributedDataParallel(model, **changes.pop("ddp", {}))
        changes.pop("ddp", None)
        losses: dict[str, Any] = {"train_loss": regularised, "val_loss": fit}
        if changes.pop("closure", False):
            losses = {
                "train_loss": lambda m, b, lam: regularised(model, b, lam),
                "val_loss": lambda m, b, lam: fit(getattr(m, "module", m), b, lam),
            }
        outer = torch.optim.SGD(hyper.parameters(), lr=0.1)
        tuner = hyperopt.Tuner(model, hyper, **losses, optimizer=outer, **{"adjoint": EXACT, **changes})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        numbers = []
        for k in range(3):
            for _ in range(2):
                optimizer.zero_grad()
                tuner.loss(rows(train, HALVES[world][rank])).backward()
                if not (wrap or world == 1):
                    for p in model.parameters():
                        dist.all_reduce(p.grad)
                        p.grad /= world
                optimizer.step()
            record = tuner.step(*steps(k))
            numbers += [torch.tensor(record.loss), *record.grad.values(), *hyper.read().values()]
        numbers += [p.detach().flatten() for p in plain.parameters()]
        found[name] = torch.cat([x.reshape(-1).double() for x in numbers])

    def whole(k: int) -> Any:
        return rows(train, ROWS[world][rank]), rows(val, ROWS[world][rank])

    def several(k: int) -> Any:
        return [rows(train, part) for part in PARTS[world][rank]], rows(val, ROWS[world][rank])

    def loader(of: tuple[Tensor, Tensor]) -> DataLoader[Any]:
        dataset = TensorDataset(*of)
        sampler = DistributedSampler(dataset, world, rank, shuffle=False)
        return DataLoader(dataset, 24 // world, sampler=sampler)

    if world > 1:
        tuner = hyperopt.Tuner(
            mlp(), hyper := hyperparameters(), train_loss=regularised, val_loss=fit, optimizer=torch.optim.SGD(hyper.parameters())
        )
        batch, said = whole(0), []
        broken = (batch[0][0], batch[0][1] * (float("nan") if rank else 1.0))
        for given in ((broken, batch[1]), ([batch[0]] * (rank + 1), batch[1])):  # one rank's data are not finite, or one more
            try:
                tuner.step(*given)
            except ValueError as error:
                said.append(str(error))
        assert "train_loss is nan" in said[0] and "different numbers of batches" in said[1], said
    loaders = loader(train), loader(val)
    go("plain module", mlp(), whole, wrap=False)
    go("ddp", mlp(), whole, wrap=True)
    go("ddp in the closure", mlp(), whole, wrap=True, closure=True)
    go("ddp, several batches", mlp(), several, wrap=True)
    go("ddp, loaders", mlp(), lambda k: loaders, wrap=True)
    go("ddp, auto", mlp(), whole, wrap=True, adjoint="auto")
    go(
        "ddp, frozen, static graph",
        mlp(between=[nn.LayerNorm(5)]).requires_grad_(True),
        whole,
        wrap=True,
        ddp={"static_graph": True},
    )
    return found


if __name__ == "__main__":
    rank, world = map(int, sys.argv[1:3])
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
    torch.save(results(rank, world), f"{sys.argv[4]}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()
