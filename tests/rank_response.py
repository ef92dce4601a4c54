"""A self-tuning network on one or several ranks, with and without checks of its response: run once a rank.

python rank_response.py RANK WORLD STORE FOLDER
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyperopt import stn


def results(mode: str, check_every: int) -> dict[str, Any]:
    """The checks of six rounds on the same batches on every rank, and the state after them."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    y = x.square().sum(1, keepdim=True)

    def train_loss(model: stn.STN, batch: Any, draw: stn.Draw) -> Tensor:
        fit = (model(batch[0], draw) - batch[1]).square().mean()
        return fit + (draw.h["decay"] * model.squared_norm(draw)).mean()

    def valid_loss(model: stn.STN, batch: Any, draw: stn.Draw | None) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    space = stn.HyperSpace({"decay": stn.Positive(0.1)}, dtype=torch.float64)
    model = stn.convert(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), space)
    settings = stn.SelfTuningSettings(mode=mode, check_every=check_every, check_steps=3)
    make = functools.partial(torch.optim.Adam, lr=0.05)
    tuning = stn.SelfTuning(model, train_loss, valid_loss, settings, weights=make, values=make)
    records = [tuning.step((x[:15], y[:15]), (x[15:], y[15:])) for _ in range(6)]
    errors = [record.metrics["stn/response_error"] for record in records if "stn/response_error" in record.metrics]
    return {"errors": errors, "state": {name: value.clone() for name, value in model.state_dict().items()}}


def cases() -> dict[str, dict[str, Any]]:
    """The results by mode, and with and without checks."""
    return {f"{mode}, {every}": results(mode, every) for mode in ("centred", "delta") for every in (2, 0)}


if __name__ == "__main__":
    rank, world, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save(cases(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
