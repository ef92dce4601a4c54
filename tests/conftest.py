"""What every test shares: one CPU thread, and where real data lies."""

from __future__ import annotations

import os

# Before anything imports torch: the suite runs beside other work, and its sums must not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Directory of real MNIST in torchvision's layout; the test is skipped where there is none."""
    named = os.environ.get("HYPEROPT_DATA")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    for root in (Path(named) if named else beside, beside):
        if (root / "MNIST" / "raw").is_dir():
            return root
    pytest.skip("no MNIST/raw under HYPEROPT_DATA, nor under ../shared/data beside the checkout")
