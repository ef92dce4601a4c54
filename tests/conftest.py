"""What every test shares: one CPU thread, and where real data lies."""

from __future__ import annotations

import os

# Before anything imports torch: the suite runs beside other work, and its sums must not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_root() -> Callable[..., str]:
    """``real_root("MNIST/raw")``: a data directory that holds one of the folders named; where none does, the test is skipped."""

    def find(*folders: str) -> str:
        beside = Path(__file__).resolve().parents[2] / "shared" / "data"
        for root in (os.environ.get("HYPEROPT_DATA"), str(beside)):
            if root and any((Path(root) / folder).is_dir() for folder in folders):
                return root
        pytest.skip(f"no {' or '.join(folders)} in HYPEROPT_DATA or in ../shared/data beside the checkout")

    return find
