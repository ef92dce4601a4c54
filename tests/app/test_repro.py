"""Seeds, device and precision, global state put back, and the facts of run.json."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperopt.app import repro


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), torch.rand(()).item()]


@pytest.fixture(autouse=True)
def preserved() -> Iterator[None]:
    with repro.preserved_global_state():
        yield


def test_same_seed_same_numbers() -> None:
    found = []
    for seed in (1, 1, 2):
        generator = repro.seed_everything(seed)
        found.append([*draws(), torch.rand((), generator=generator).item()])
    assert found[0] == found[1] and all(a != b for a, b in zip(found[0], found[2], strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True])
def test_bad_seed(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed!r}"):
        repro.seed_everything(seed)


def test_rng_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    repro.seed_everything(5)
    draws()  # leaves half a pair of normal numbers behind in each of python's and numpy's generators
    torch.save(repro.rng_state(), tmp_path / "state.pt")
    want = draws()
    repro.set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() == want


def test_global_state_is_put_back_after_an_error() -> None:
    before = torch.get_default_dtype(), torch.get_num_threads(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    repro.seed_everything(9)
    state = repro.rng_state()
    want = draws()
    repro.set_rng_state(state)
    with pytest.raises(KeyError), repro.preserved_global_state():
        repro.configure(torch.device("cuda"), torch.float64, 1)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        repro.seed_everything(1)
        assert torch.get_default_dtype() == torch.float64 and torch.get_num_threads() == 1
        raise KeyError
    assert (torch.get_default_dtype(), torch.get_num_threads(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")) == before
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic
    assert draws() == want


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert repro.resolve_device("cpu") == repro.resolve_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=rf"device='{name}'.*no CUDA device.*device=cpu"):
            repro.resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert repro.resolve_device("auto") == torch.device("cuda") and repro.resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"device='cuda:2'.*cuda:0 to cuda:1"):
        repro.resolve_device("cuda:2")
    for name in ("gpu", "cuda:", "cuda:-1", "CPU", "cpu\n"):
        with pytest.raises(ValueError, match="is not one of auto, cpu, cuda, cuda:N"):
            repro.resolve_device(name)


def test_precision_and_threads() -> None:
    assert repro.resolve_precision("float64") is torch.float64
    with pytest.raises(ValueError, match="precision='bfloat16' is not one of float32, float64"):
        repro.resolve_precision("bfloat16")
    with pytest.raises(ValueError, match="threads=0"):
        repro.configure(torch.device("cpu"), torch.float32, 0)


def test_git_state(tmp_path: Path) -> None:
    assert repro.git_state(tmp_path) is None

    def git(*args: str) -> None:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *args]
        subprocess.run(command, check=True, capture_output=True)

    git("init", "-q")
    assert repro.git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a.txt").write_text("1")
    git("add", "a.txt")
    git("commit", "-qm", "one")
    found = repro.git_state(tmp_path)
    assert found is not None and len(found["hash"]) == 40 and found["dirty"] is False
    (tmp_path / "a.txt").write_text("2")
    assert repro.git_state(tmp_path) == {**found, "dirty": True}


def test_facts_name_versions_and_device() -> None:
    facts = repro.run_facts(torch.device("cpu"))
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"] == torch.__version__
    assert facts["device"]["threads"] == torch.get_num_threads() and facts["argv"] and facts["started"].endswith("+00:00")
