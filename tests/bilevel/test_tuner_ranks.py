"""A ``Tuner`` on two ranks, with and without ``DistributedDataParallel``, agrees with one rank on all rows to 12 digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

SCRIPT = Path(__file__).parents[1] / "tuner_ranks.py"
WAYS = (
    "plain module",
    "ddp",
    "ddp in the closure",
    "ddp, several batches",
    "ddp, loaders",
    "ddp, auto",
    "ddp, frozen, static graph",
)
pytestmark = pytest.mark.xdist_group("tuner ranks")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    for world in (1, 2):
        run_ranks(SCRIPT, world, folder)
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_one_and_two_ranks_agree(runs: dict[str, Any], way: str) -> None:
    one, first, second = (runs[name][way] for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(first, second)
    assert float(one[1].abs()) > 1e-4  # a hypergradient
    torch.testing.assert_close(first, one, rtol=1e-12, atol=1e-14)
