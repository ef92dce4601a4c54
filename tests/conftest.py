"""What every test shares: one CPU thread, and where real data lies."""

from __future__ import annotations

import os

# Before anything imports torch: the suite runs beside other work, and its sums must not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from launcher import Launch, Launcher
from marks import sort_cases
from omegaconf import DictConfig, OmegaConf


@pytest.hookimpl(tryfirst=True)  # before the expression of -m is read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Choose which cases of a large test are quick."""
    sort_cases(items)


@pytest.fixture(scope="session")
def real_root() -> Callable[..., str]:
    """``real_root("MNIST/raw")``: a data directory that holds one of the folders or files named; else the test is skipped."""

    def find(*folders: str) -> str:
        beside = Path(__file__).resolve().parents[2] / "shared" / "data"
        for root in (os.environ.get("HYPEROPT_DATA"), str(beside)):
            if root and any((Path(root) / folder).exists() for folder in folders):
                return root
        pytest.skip(f"no {' or '.join(folders)} in HYPEROPT_DATA or in ../shared/data beside the checkout")

    return find


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 by default, one seed, and each warning of a solve said anew."""
    import torch

    from hyperopt.core.policy import reset_warnings

    reset_warnings()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Launcher]:
    """Run ``hyperopt`` in this process, in an empty working directory."""
    from hyperopt.app import cli

    GlobalHydra.instance().clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    level, handlers = logging.root.level, list(logging.root.handlers)

    def launcher(*argv: str) -> Launch:
        monkeypatch.setattr(sys, "argv", ["hyperopt", *argv])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capfd.readouterr()
        return Launch(status, captured.out, captured.err)

    yield launcher
    for handler in [each for each in logging.root.handlers if each not in handlers]:
        logging.root.removeHandler(handler)
        handler.close()
    logging.root.setLevel(level)


@pytest.fixture
def launch(command: Launcher, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """Run ``hyperopt`` with jobs that only leave config and summary, the seed as metric (and fail for ``seed=13``)."""
    runs: list[tuple[DictConfig, Path]] = []

    def run(cfg: DictConfig, out: Path) -> float:
        runs.append((cfg, out))
        OmegaConf.save(cfg, out / "config.yaml", resolve=True)
        if cfg.seed == 13:
            raise ArithmeticError("an unlucky seed")
        (out / "summary.json").write_text(f'{{"status": "completed", "best": {{"metrics": {{"val/loss": {cfg.seed}.0}}}}}}')
        return float(cfg.seed)

    fake = types.ModuleType("hyperopt.app.run")
    fake.run = run  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "hyperopt.app.run", fake)

    def launcher(*argv: str) -> Launch:
        runs.clear()
        done = command(*argv)
        done.runs = list(runs)
        return done

    return launcher
